"""Hostile input: drawn shapes, orientations and label sets; NIfTI files with bytes changed at random.

``--slow`` draws more.
"""

from __future__ import annotations

import gzip
import random
import signal
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.transforms import Compose, Invertd

from networks import DataError
from networks.data.geometry import SliceOrientationd
from networks.data.loading import LoadVolumed
from networks.data.slices import VolumeDataset
from networks.engine.inferers import LabelInferer
from networks.results.label_maps import SaveImageLabelMapd
from networks.results.metrics import CaseMetric

DTYPES = [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]
CLASSES = 4


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any axes, flips, spacings and position, and tilts up to 40 degrees."""
    axes = np.eye(3)[list(draw(st.permutations(range(3))))]
    spacing = [draw(st.sampled_from([0.5, 0.8, 1.0, 3.0, 10.0])) for _ in range(3)]
    flips = [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    angle = draw(st.floats(-0.7, 0.7))
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    position = [draw(st.integers(-200, 200)) for _ in range(3)]
    return nib.affines.from_matvec(tilt @ axes @ np.diag(np.multiply(spacing, flips)), position)


def nearest_class(slices: torch.Tensor) -> torch.Tensor:
    """In a network's place: logits whose greatest class is the nearest to a pixel's value."""
    return -(slices - torch.arange(CLASSES).view(1, -1, 1, 1)).abs()


PREPARE = Compose([LoadVolumed("image"), SliceOrientationd("image")])


def segment(file: Path, output_dir: Path) -> Path:
    """From file to file as a bundle does, with :func:`nearest_class` at the image's own size."""
    case = VolumeDataset([{"image": str(file)}], PREPARE)[0]
    image = case["image"]
    case["pred"] = LabelInferer(image.shape[1:3])(image[None], nearest_class)[0]
    saver = SaveImageLabelMapd("pred", output_dir)
    saver(Invertd("pred", PREPARE, "image", nearest_interp=True)(case))
    return saver.target(file)


def examples(request: pytest.FixtureRequest, usual: int, slow: int) -> int:
    return slow if request.config.getoption("--slow") else usual


def test_any_volume_comes_back_on_its_own_grid(request, tmp_path_factory):
    """Each voxel gets its own label and place, whatever shape, type and orientation."""
    folder = tmp_path_factory.mktemp("volumes")
    seen: Counter = Counter()

    @settings(max_examples=examples(request, 80, 3000), deadline=None, database=None)
    @given(
        arrays(st.sampled_from(DTYPES), st.tuples(*[st.integers(1, 9)] * 3), elements=st.integers(0, CLASSES - 1)),
        affines(),
        st.sampled_from([".nii", ".nii.gz"]),
    )
    def check(data: np.ndarray, affine: np.ndarray, suffix: str) -> None:
        file = folder / f"volume{suffix}"
        nib.save(nib.Nifti1Image(data, affine), file)
        label, image = nib.load(segment(file, folder / "out")), nib.load(file)
        np.testing.assert_array_equal(np.asarray(label.dataobj), data)
        np.testing.assert_array_equal(label.affine, image.affine)
        assert label.get_data_dtype() == np.uint8
        seen["".join(nib.aff2axcodes(affine))] += 1

    check()
    print(f"{sum(seen.values())} volumes in {len(seen)} of 48 orientations")


def test_scores_of_any_label_maps_are_sound(request):
    """Dice and IoU as counted by hand; distances symmetric, 0 for the truth itself, at most the image's diagonal."""
    maps = st.tuples(*[st.integers(1, 6)] * 3).flatmap(
        lambda shape: st.tuples(*[arrays(np.uint8, shape, elements=st.integers(0, CLASSES - 1))] * 2)
    )
    count = 0

    def score(name: str, pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return CaseMetric(name, CLASSES)([torch.from_numpy(pred)[None]], [torch.from_numpy(truth)[None]])[0].numpy()

    @settings(max_examples=examples(request, 80, 3000), deadline=None, database=None)
    @given(maps)
    def check(pair: tuple[np.ndarray, np.ndarray]) -> None:
        nonlocal count
        pred, truth = pair
        both, sizes = (
            np.array([f(c) for c in range(1, CLASSES)])
            for f in (lambda c: ((pred == c) & (truth == c)).sum(), lambda c: (pred == c).sum() + (truth == c).sum())
        )
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(score("dice", pred, truth), 2 * both / sizes, rtol=1e-6)
            np.testing.assert_allclose(score("iou", pred, truth), both / (sizes - both), rtol=1e-6)
        for name in ("hd95", "asd"):
            found = score(name, pred, truth)
            np.testing.assert_allclose(found, score(name, truth, pred), rtol=1e-6)
            assert np.array_equal(np.isnan(found), sizes == 0)
            assert (found[sizes > 0] >= 0).all() and (found[sizes > 0] <= np.linalg.norm(truth.shape) + 1e-6).all()
            assert (np.nan_to_num(score(name, truth, truth)) == 0).all()
        count += 1

    check()
    print(f"{count} pairs of label maps")


def test_a_spoilt_nifti_ends_in_our_error_or_a_right_result(request, tmp_path):
    """Bytes of header and voxels changed, files cut and drawn out, before and after zipping."""
    rng = random.Random(0)
    volume = nib.Nifti1Image(np.random.default_rng(0).integers(0, CLASSES, (7, 6, 5)).astype(np.int16), np.eye(4))
    volume.set_sform(np.diag([2.0, -1, 3, 1]), 1)
    plain = volume.to_bytes()
    ends: Counter = Counter()

    def too_long(*_: object) -> None:
        raise AssertionError(f"{file} takes longer than 20 s")

    signal.signal(signal.SIGALRM, too_long)
    for i in range(examples(request, 300, 20000)):
        zipped = i % 2
        content = bytearray(gzip.compress(plain, mtime=0) if zipped and i % 4 == 1 else plain)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            at = rng.randrange(min(352, len(content)) if rng.random() < 0.8 else len(content))
            content[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content))] + bytes(rng.randrange(20))
        file = tmp_path / f"{i}.nii{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(content, mtime=0) if zipped and i % 4 == 3 else content)
        signal.alarm(20)
        try:
            label = nib.load(segment(file, tmp_path / "out"))
        except DataError as error:
            assert str(file) in str(error)
            assert not list((tmp_path / "out").rglob(f"*{i}_seg*"))
            ends["our error"] += 1
        else:
            image = nib.load(file)
            data = image.get_fdata(dtype=np.float32)
            expected = np.abs(data[..., None] - np.arange(CLASSES, dtype=np.float32)).argmin(-1)
            np.testing.assert_array_equal(np.asarray(label.dataobj), expected)
            ends["a right result"] += 1
        finally:
            signal.alarm(0)
    print(dict(ends))
    assert min(ends["our error"], ends["a right result"]) > sum(ends.values()) / 10
