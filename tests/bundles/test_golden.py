"""The shipped weights give what they gave: the network's code may change, what published weights find may not.

One drawn picture for each data set, a heart and a field of glands, goes through each bundle's ``models/pretrained.pt``.
In ``golden/`` lie 4 x 4 of its logits for each class, and its label map. No patient's image is behind them.

``python tests/bundles/test_golden.py`` writes these files anew. That is right when other weights are shipped, or when
the drawing is another; a bundle's stored files then change together with its ``pretrained.pt``. It is wrong when a test
here fails after a change of the code: the weights that users have would give other label maps. Another processor or
version of torch needs no new files: they round by 1e-5, and the tests allow 1e-3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch import Tensor

from networks import load_weights
from networks.results.pictures import label_picture

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
SHIPPED = sorted(file.parents[1].name for file in (ROOT / "bundles").glob("*/models/pretrained.pt"))


class Ellipse:
    """An ellipse on a grid ``x, y``."""

    def __init__(self, grid: np.ndarray, centre: tuple[float, float], radii: tuple[float, float]) -> None:
        self.offset = [g - c for g, c in zip(grid, centre, strict=True)]
        self.depth = 1 - np.hypot(*(o / r for o, r in zip(self.offset, radii, strict=True)))

    def paint(self, image: np.ndarray, value: np.ndarray | float, depth: float = 0) -> np.ndarray:
        """The image with that value inside, from a depth of 0 at the border to 1 at the centre on; edges are soft."""
        inside = 1 / (1 + np.exp(-20 * (self.depth - depth)))
        return image * (1 - inside) + value * inside


def heart(size: int, noise: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """A short-axis slice of 224 mm, ``1, right, anterior``, scaled to 0 to 1; and the label map drawn."""
    grid = ((np.indices((size, size)) + 0.5) / size - 0.5) * 224
    image = np.full((size, size), 20.0)
    for centre, radii, signal in (
        ((0, 0), (150, 100), 120),  # body
        ((-75, -10), (38, 60), 25),  # lungs
        ((80, -20), (35, 60), 25),
        ((20, 75), (70, 25), 220),  # fat
    ):
        image = Ellipse(grid, centre, radii).paint(image, signal)
    labels = np.zeros((size, size), np.uint8)
    for label, centre, radii, signal in (
        (1, (26, 8), (30, 36), 260),
        (2, (-12, -4), (32, 32), 90),
        (3, (-12, -4), (22, 22), 280),
    ):
        structure = Ellipse(grid, centre, radii)
        image = structure.paint(image, signal)
        labels[structure.depth > 0] = label
    image = np.hypot(image + noise.normal(0, 10, image.shape), noise.normal(0, 10, image.shape))
    low, high = np.percentile(image, (0.5, 99.5))
    return ((image - low) / (high - low)).clip(0, 1)[None], labels


def glands(size: int, noise: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Four glands, each a ring of nuclei around a lumen, ``RGB, x, y`` in 0 to 1; and the label map drawn."""
    grid = np.indices((size, size)) * 192 / size
    colours = (215, 150, 190), (145, 95, 165), (205, 175, 215), (240, 235, 240)
    stroma, wall, cytoplasm, lumen = (np.array(colour)[:, None, None] for colour in colours)
    image = stroma + np.zeros((3, size, size))
    labels = np.zeros((size, size), np.uint8)
    for centre, radii in (
        ((45, 50), (34, 28)),
        ((135, 45), (30, 36)),
        ((60, 140), (40, 30)),
        ((148, 135), (28, 34)),
    ):
        gland = Ellipse(grid, centre, radii)
        nuclei = 15 * np.cos(28 * np.arctan2(*gland.offset))
        for colour, depth in ((wall + nuclei, 0), (cytoplasm, 0.35), (lumen, 0.7)):
            image = gland.paint(image, colour, depth)
        labels[gland.depth > 0] = 1
    return (image + noise.normal(0, 12, (size, size))).clip(0, 255) / 255, labels


class Seen(NamedTuple):
    """What a network sees in a drawing."""

    logits: Tensor
    """4 x 4 for each class, ``classes, 4, 4``."""
    labels: np.ndarray
    drawn: np.ndarray


@torch.no_grad()
def see(name: str) -> Seen:
    """The drawing for a bundle by its shipped weights, at the size that these were trained for."""
    bundle = ROOT / "bundles" / name
    values = json.loads((bundle / "models" / "pretrained.json").read_text(encoding="utf-8"))
    size = values["image_size"]
    config = ConfigParser({**ConfigParser.load_config_file(bundle / "configs" / "inference.json"), **values})
    network = config.get_parsed_content("network_def").eval()
    load_weights(network, bundle / "models" / "pretrained.pt")
    # Of numpy's generators this one alone promises the same numbers in each of its versions.
    image, drawn = {"acdc": heart, "glas": glands}[name.split("_")[1]](size, np.random.RandomState(0))
    logits = network(torch.from_numpy(image[None]).float())[0]
    return Seen(logits[:, size // 8 :: size // 4, size // 8 :: size // 4], logits.argmax(0).byte().numpy(), drawn)


@pytest.fixture(scope="module", params=SHIPPED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def seen(name: str) -> Seen:
    return see(name)


def test_shipped_weights_give_the_logits_that_they_gave(name, seen):
    """Logits reach from 5 to 40, so 1e-3 is little; fp32 rounds by 1e-5."""
    stored = torch.tensor(json.loads((GOLDEN / f"{name}.json").read_text()))
    torch.testing.assert_close(seen.logits, stored, atol=1e-3, rtol=0)


def test_shipped_weights_give_the_label_map_that_they_gave(name, seen):
    """But for pixels on the border between two classes, on which processors may round to either."""
    differ = float((seen.labels != np.asarray(Image.open(GOLDEN / f"{name}.png"))).mean())
    assert differ <= 1e-3, f"{differ:.1%} of the pixels have another class"


def test_stored_label_maps_have_each_class_where_it_is_drawn(name, seen):
    """A network that finds nothing, or takes one class for another, is not worth storing."""
    stored = np.asarray(Image.open(GOLDEN / f"{name}.png"))
    for label in range(len(seen.logits)):
        found, drawn = stored == label, seen.drawn == label
        assert found.mean() > 0.02
        assert 2 * (found & drawn).sum() / (found.sum() + drawn.sum()) > 0.75, f"class {label}"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for bundle in SHIPPED:
        found = see(bundle)
        (GOLDEN / f"{bundle}.json").write_text(json.dumps(found.logits.double().numpy().round(5).tolist()) + "\n")
        label_picture(found.labels).save(GOLDEN / f"{bundle}.png")
        print(f"{GOLDEN / bundle}.json and .png written")
