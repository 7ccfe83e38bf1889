"""Make a small synthetic dataset in the official layout of a bundle's data, so that it runs with no download.

    python bundles/phantoms.py acdc phantoms/acdc

The datasets are acdc, btcv, isic2017, isic2018 and glas. Each is one function of the output folder; the pictures are
drawn, no patient's image is behind them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

PATIENTS = {"train": (1, 4, 5, 6, 7, 10, 11, 13), "validation": (19, 21), "test": (2, 3)}
"""Patient numbers by the papers' split, so that the phantoms fall into it as the real data do."""

SCANS = {"train": (5, 6, 7, 9), "validation": (10,), "test": (1, 2)}
"""BTCV numbers by split, likewise."""

ORGANS = {
    1: ((-95, 20, 15), (38, 30, 35), 115),
    2: ((70, 40, -25), (24, 22, 40), 165),
    3: ((-70, 40, -25), (24, 22, 40), 165),
    4: ((45, -40, 0), (14, 20, 18), 10),
    5: ((8, 15, 60), (9, 9, 20), 40),
    6: ((75, -10, 30), (60, 55, 45), 105),
    7: ((-55, -30, 25), (35, 28, 32), 55),
    8: ((-10, 35, 0), (13, 13, 120), 190),
    9: ((18, 32, 0), (12, 11, 120), 150),
    10: ((15, -5, 10), (22, 8, 8), 145),
    11: ((-15, -15, -5), (45, 13, 16), 85),
    12: ((35, 25, 25), (9, 5, 8), 60),
    13: ((-35, 25, 25), (9, 5, 8), 60),
}
"""Raw BTCV label: centre and radii of an ellipsoid in mm (left, back, up), and its Hounsfield units."""

ANATOMY = {
    "field of view": (160, 185),
    "turn": (0, 0.8),
    "aside": (4, 14),
    "below": (-8, 2),
    "skin": (6, 14),
    "fat": (1.5, 4),
    "radius": (23, 27),
    "wall": (7.5, 10),
    "depth": (32, 40),
    "systole": (0.61, 0.69),
    "coil": (2.4, 3.9),
    "bias": (0.1, 0.3),
}
"""What differs between ACDC's patients, each drawn between two values: lengths in mm, angles in radians.

``aside`` and ``below`` place the left ventricle in the picture; ``turn`` moves the right one from its left to above it.
``radius`` and ``wall`` are the left ventricle's at end-diastole, ``depth`` the right one's; ``systole`` is what remains
of the radius at end-systole. ``fat`` lies around the heart. Signal grows towards the ``coil``, by ``bias`` in 100 mm.
"""

SIGNAL = {
    "skin": 260,
    "chest wall": 65,
    "ribs": 150,
    "lungs": 22,
    "lung vessels": 170,
    "diaphragm": 250,
    "liver": 80,
    "liver vessels": 120,
    "spine": 100,
    "aortic wall": 60,
    "aorta": 205,
    "epicardial fat": 235,
    "right wall": 70,
    "right ventricle": 180,
    "myocardium": 65,
    "left ventricle": 215,
    "papillary muscles": 80,
}
"""Signal of each structure in bright-blood cine MR: fat is brightest, then blood, then muscle and liver, then lung."""


def acdc(output_dir: str, size: int = 96, slices: int = 6, seed: int = 0) -> None:
    """Short-axis cardiac MR in the layout of the ACDC challenge: 12 patients at end-diastole and end-systole.

    Args:
        output_dir: receives ``training/patientNNN/``; must not hold any patient yet.
        size: pixels per side of a slice, at least 64.
        slices: slices of a volume, base to apex.
        seed: the same seed makes the same files.
    """
    folder = Path(output_dir) / "training"
    _empty(folder, "patient*")
    _check(size=(size, 64), slices=(slices, 1))
    numbers = [n for split in PATIENTS.values() for n in split]
    for number in numbers:
        _acdc_patient(folder / f"patient{number:03d}", size, slices, np.random.default_rng([seed, number]))
    print(f"{len(numbers)} patients, {2 * len(numbers)} volumes in {folder}")


def _acdc_patient(folder: Path, size: int, slices: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    body = {name: rng.uniform(*limits) for name, limits in ANATOMY.items()}
    pixel, thickness = body["field of view"] / size, rng.choice([8.0, 10.0])

    def speckle(width: float) -> np.ndarray:
        """Smooth noise of mean 0 and deviation 1; its spots are some ``width`` mm wide."""
        noise = gaussian_filter(rng.normal(size=(size, size, slices)), (width / pixel, width / pixel, 0.4))
        return noise / noise.std()

    axis = (np.arange(size) - size / 2 + 0.5) * pixel
    x, y, z = np.meshgrid(axis, axis, (np.arange(slices) + 0.5) / slices, indexing="ij")
    cos, sin = np.cos(body["turn"]), np.sin(body["turn"])
    x, y = cos * x + sin * y - body["aside"], cos * y - sin * x - body["below"]
    x, y = x + 1.5 * speckle(14), y + 1.5 * speckle(14)  # nobody is made of ellipses
    chest = _chest(x, y, z, body, speckle(2.2))
    sensitivity = np.exp(body["bias"] * (np.cos(body["coil"]) * x + np.sin(body["coil"]) * y) / 100)
    sensitivity *= 1 + 0.06 * speckle(3)  # the texture of tissue, and of flowing blood
    frames = {"ED": (1, 1.0), "ES": (int(rng.integers(9, 14)), body["systole"])}
    for frame, contraction in frames.values():
        heart = _heart(x, y, z, body, contraction)
        labels = np.zeros(x.shape, np.uint8)
        for label, name in enumerate(("right ventricle", "myocardium", "left ventricle"), 1):
            labels[heart[name] > 0] = label
        image = np.zeros(x.shape)
        for name, depth in (chest | heart).items():
            image += (SIGNAL[name] - image) * np.clip(depth / 2 + 0.5, 0, 1)  # a border of 2 mm belongs to both sides
        image = gaussian_filter(image * sensitivity, (0.5, 0.5, 0))
        noise = rng.normal(scale=5, size=(2, *image.shape))
        image = np.hypot(image + noise[0], noise[1])  # Rician: the magnitude of a complex signal
        for suffix, data in (("", image.astype(np.int16)), ("_gt", labels)):
            volume = nib.Nifti1Image(data, np.diag([-pixel, -pixel, thickness, 1.0]))
            volume.header.set_xyzt_units("mm", "sec")
            nib.save(volume, folder / f"{folder.name}_frame{frame:02d}{suffix}.nii.gz")
    lines = {"ED": frames["ED"][0], "ES": frames["ES"][0], "Group": "NOR", "Height": 175, "NbFrame": 30, "Weight": 75}
    (folder / "Info.cfg").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))


def _chest(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, body: dict[str, float], spots: np.ndarray
) -> dict[str, np.ndarray]:
    """What lies around the heart: how deep in it each point is, in mm, of each structure, in the order to paint them.

    Args:
        x: mm from the left ventricle's middle, away from the right one.
        y: mm from there towards the diaphragm.
        z: 0 at the base, 1 at the apex.
        body: values drawn from ``ANATOMY``.
        spots: noise whose peaks are vessels.
    """
    trunk = _ellipse(x - 42 - 8 * z, y - 12, 139, 118 - 12 * z)
    wall = trunk - body["skin"]
    lungs = wall - 10
    liver = np.minimum(lungs, _ellipse(x + 38, y - 128 + 22 * z, 118, 72))
    return {
        "skin": trunk,
        "chest wall": wall,
        "ribs": np.minimum(2.5 - abs(wall - 5), 8 * np.cos(9 * np.arctan2(y - 12, x - 42)) - 4),
        "lungs": lungs,
        "lung vessels": np.minimum(lungs - 4, 3 * (spots - 2)),
        "diaphragm": liver + 2.5,  # its fat, that is
        "liver": liver,
        "liver vessels": np.minimum(liver - 6, 3 * (spots - 1.7)),
        "spine": _ellipse(x - 80, y - 68, 25, 21),
        "aortic wall": _ellipse(x - 50, y - 54, 13, 13),
        "aorta": _ellipse(x - 50, y - 54, 11, 11),
    }


def _heart(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, body: dict[str, float], contraction: float
) -> dict[str, np.ndarray]:
    """The heart, as ``_chest``, when ``contraction`` is what remains of the left ventricle's radius."""
    radius = body["radius"] * np.sqrt(1 - 0.85 * z**2)  # base wide, apex narrow
    cavity = radius * contraction
    # The wall thickens as the cavity empties: muscle keeps its volume.
    outer = np.sqrt((radius + body["wall"] * (1 - 0.3 * z)) ** 2 - radius**2 + cavity**2)
    left = _ellipse(x, y, outer, outer)
    # The right ventricle is what the left one leaves of an ellipse between these two distances: a crescent.
    near, far = 0.1 * outer, outer + body["depth"] * (1 - 0.9 * z**1.5) * (0.2 + 0.8 * contraction)
    right = _ellipse(x + (near + far) / 2, y + 0.2 * x, (far - near) / 2, 0.72 * (far - near))
    papillary = [
        _ellipse(x - 0.68 * cavity * np.cos(angle), y - 0.68 * cavity * np.sin(angle), 0.2 * cavity, 0.2 * cavity)
        for angle in (-0.9, 1.4)
    ]
    return {
        "epicardial fat": np.maximum(left, right + 3) + body["fat"] * (1 - x / 60),  # less towards the left lung
        "right wall": right + 3,
        "right ventricle": right,
        "myocardium": left,
        "left ventricle": _ellipse(x, y, cavity, cavity),
        "papillary muscles": np.where(abs(z - 0.5) < 0.3, np.maximum(*papillary), -9),  # ACDC counts them as cavity
    }


def _ellipse(x: np.ndarray, y: np.ndarray, width: np.ndarray | float, height: np.ndarray | float) -> np.ndarray:
    """How many mm, about, each point lies within an ellipse about the origin of these half axes; below 0 outside."""
    return (1 - np.hypot(x / width, y / height)) * np.minimum(width, height)


def btcv(output_dir: str, size: int = 96, slices: int = 12, seed: int = 0) -> None:
    """Abdominal CT with 13 labelled organs in the layout of BTCV: 7 volumes that fall into the papers' split.

    Args:
        output_dir: receives ``RawData/Training/img`` and ``label``; must not hold any image yet.
        size: pixels per side of a slice, at least 64.
        slices: slices of a volume.
        seed: the same seed makes the same files.
    """
    folder = _empty(Path(output_dir) / "RawData" / "Training", "img/img*.nii*")
    _check(size=(size, 64), slices=(slices, 1))
    (folder / "img").mkdir(parents=True)
    (folder / "label").mkdir()
    numbers = [n for split in SCANS.values() for n in split]
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        spacing = np.array([350 / size, 350 / size, 200 / slices])
        grid = [(np.arange(n) - n / 2 + 0.5) * s for n, s in zip((size, size, slices), spacing, strict=True)]
        x, y, z = np.meshgrid(*grid, indexing="ij")
        body = np.hypot(x / 160, y / 120) < 1
        labels, image = np.zeros(body.shape, np.uint8), np.where(body, 30.0, -1000.0)
        image[body & (np.hypot(x / 145, y / 105) > 1)] = -100  # fat
        for value, (centre, radii, signal) in ORGANS.items():
            shift, grow = rng.uniform(-6, 6, 3), rng.uniform(0.85, 1.15)
            centred = [(g - c - d) / (r * grow) for g, c, d, r in zip((x, y, z), centre, shift, radii, strict=True)]
            inside = np.sqrt(sum(c**2 for c in centred)) < 1
            labels[inside], image[inside] = value, signal
        image = gaussian_filter(image, (0.7, 0.7, 0)) + rng.normal(scale=12, size=image.shape)
        affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
        for data, name in ((image.astype(np.int16), f"img/img{number:04d}"), (labels, f"label/label{number:04d}")):
            nib.save(nib.Nifti1Image(data, affine), folder / f"{name}.nii.gz")
    print(f"{len(numbers)} volumes in {folder}")


def isic2017(output_dir: str, size: int = 128, train: int = 12, seed: int = 0) -> None:
    """Dermoscopic images with lesion masks in the layout of ISIC 2017, part 1.

    Args:
        output_dir: receives a folder of images and one of masks for each of the official parts; must not hold any.
        size: pixels of the shorter side, at least 64; the longer has a third more.
        train: images to train on; a third as many validate, and as many test.
        seed: the same seed makes the same files.
    """
    names = ["ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth"]
    _lesions(Path(output_dir), names, ("Training", "Validation", "Test_v2"), size, train, seed)


def isic2018(output_dir: str, size: int = 128, train: int = 12, seed: int = 0) -> None:
    """Dermoscopic images with lesion masks in the layout of ISIC 2018, task 1; arguments as for ``isic2017``."""
    names = ["ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"]
    _lesions(Path(output_dir), names, ("Training", "Validation", "Test"), size, train, seed)


def glas(output_dir: str, size: int = 128, train: int = 15, seed: int = 0) -> None:
    """Stained gland tissue with instance labels in the layout of GlaS.

    Args:
        output_dir: receives ``train_N.bmp``, ``testA_N.bmp``, ``testB_N.bmp`` and ``..._anno.bmp``; must not hold any.
        size: pixels of the shorter side, at least 64; the longer has half as many more.
        train: images of the training part, each fifth of which validates; a fifth as many in each test part.
        seed: the same seed makes the same files.
    """
    folder = _empty(Path(output_dir), "*.bmp")
    _check(size=(size, 64), train=(train, 5))
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        f"{part}_{n + 1}"
        for part, count in (("train", train), ("testA", train // 5), ("testB", train // 5))
        for n in range(count)
    ]
    for i, name in enumerate(names):
        rng = np.random.default_rng([seed, i])
        y, x = np.mgrid[:size, : size * 3 // 2]
        labels = np.zeros(y.shape, np.uint8)
        stroma, gland, lumen = (np.array(c, float) for c in ((225, 150, 195), (140, 75, 155), (240, 230, 240)))
        image = np.broadcast_to(stroma, (*y.shape, 3)).copy()
        for instance in range(1, int(rng.integers(4, 8))):
            cy, cx = rng.uniform(0, size), rng.uniform(0, size * 1.5)
            radii = size * rng.uniform(0.10, 0.2, 2)
            distance = np.hypot((y - cy) / radii[0], (x - cx) / radii[1])
            free = (distance < 1) & (labels == 0)
            labels[free] = instance
            image[free] = np.where(distance[free, None] < 0.5, lumen, gland)
        _save_picture(image, rng, folder / f"{name}.bmp")
        Image.fromarray(labels).save(folder / f"{name}_anno.bmp")
    print(f"{len(names)} images in {folder}")


def _lesions(root: Path, names: list[str], parts: tuple[str, ...], size: int, train: int, seed: int) -> None:
    _check(size=(size, 64), train=(train, 3))
    number = 0
    for part, count in zip(parts, (train, train // 3, train // 3), strict=True):
        images, masks = (_empty(root / name.format(part), "ISIC_*") for name in names)
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            rng = np.random.default_rng([seed, number])
            y, x = np.mgrid[:size, : size * 4 // 3]
            cy, cx = size * rng.uniform(0.35, 0.65), size * rng.uniform(0.45, 0.85)
            angle = np.arctan2(y - cy, x - cx)
            border = size * rng.uniform(0.18, 0.3) * (1 + 0.15 * np.sin(3 * angle + rng.uniform(0, 6)))
            mask = np.hypot(y - cy, x - cx) < border
            skin, mole = np.array([225, 180, 160.0]), np.array([120, 75, 60.0]) + rng.uniform(-20, 20, 3)
            name = f"ISIC_{number:07d}"
            _save_picture(np.where(mask[..., None], mole, skin), rng, images / f"{name}.jpg")
            Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{name}_segmentation.png")
            number += 1
    print(f"{number} images in {root}")


def _save_picture(image: np.ndarray, rng: np.random.Generator, file: Path) -> None:
    image = gaussian_filter(image, (1.2, 1.2, 0)) + rng.normal(scale=6, size=image.shape)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file)


def _empty(folder: Path, pattern: str) -> Path:
    if any(folder.glob(pattern)):
        sys.exit(f"{folder} already holds images: choose another folder or remove them first.")
    return folder


def _check(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if not isinstance(value, int) or value < least:
            sys.exit(f"{name} must be a whole number of at least {least}, got {value!r}.")


if __name__ == "__main__":
    try:
        fire.Fire({"acdc": acdc, "btcv": btcv, "isic2017": isic2017, "isic2018": isic2018, "glas": glas})
    except OSError as error:
        sys.exit(f"{error}. Choose another folder, or free some space.")
