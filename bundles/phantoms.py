"""Make a small synthetic dataset in the official layout of a bundle's data, so that it runs with no download.

    python bundles/phantoms.py acdc phantoms/acdc

Every dataset is one function of the output folder; the pictures are drawn, no patient's image is behind them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

PATIENTS = {"train": (1, 4, 5, 6, 7, 10, 11, 13), "validation": (19, 21), "test": (2, 3)}
"""Patient numbers by the papers' split, so that the phantoms fall into it as the real data do."""


def acdc(output_dir: str, size: int = 96, slices: int = 6, seed: int = 0) -> None:
    """Short-axis cardiac MR in the layout of the ACDC challenge: 12 patients at end-diastole and end-systole.

    Args:
        output_dir: receives ``training/patientNNN/``; must not hold any patient yet.
        size: pixels per side of a slice, at least 64.
        slices: slices of a volume, base to apex.
        seed: the same seed makes the same files.
    """
    folder = Path(output_dir) / "training"
    if any(folder.glob("patient*")):
        sys.exit(f"{folder} already holds patients: choose another folder or remove them first.")
    if size < 64 or slices < 1:
        sys.exit(f"size must be at least 64 and slices at least 1, got {size} and {slices}.")
    numbers = [n for split in PATIENTS.values() for n in split]
    for number in numbers:
        _acdc_patient(folder / f"patient{number:03d}", size, slices, np.random.default_rng([seed, number]))
    print(f"{len(numbers)} patients, {2 * len(numbers)} volumes in {folder}")


def _acdc_patient(folder: Path, size: int, slices: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    spacing = (1.5 * 96 / size * rng.uniform(0.9, 1.1),) * 2 + (rng.choice([8.0, 10.0]),)
    heart = {
        "centre": rng.uniform(-8, 8, 2),
        "radius": rng.uniform(22, 27),
        "wall": rng.uniform(7, 10),
        "angle": rng.uniform(-0.5, 0.5),
        "flatness": rng.uniform(0.9, 1.1),
    }
    frames = {"ED": (1, 1.0), "ES": (int(rng.integers(9, 14)), rng.uniform(0.62, 0.78))}
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    for frame, contraction in frames.values():
        labels = _short_axis(heart, contraction, size, slices, spacing)
        image = _mr_contrast(labels, spacing, rng)
        name = f"{folder.name}_frame{frame:02d}"
        for suffix, data in (("", image), ("_gt", labels.astype(np.uint8))):
            volume = nib.Nifti1Image(data, affine)
            volume.header.set_xyzt_units("mm", "sec")
            nib.save(volume, folder / f"{name}{suffix}.nii.gz")
    lines = {"ED": frames["ED"][0], "ES": frames["ES"][0], "Group": "NOR", "Height": 175, "NbFrame": 30, "Weight": 75}
    (folder / "Info.cfg").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))


def _short_axis(heart: dict, contraction: float, size: int, slices: int, spacing: tuple[float, ...]) -> np.ndarray:
    """Labels of one phase, ``X, Y, Z``: 1 right ventricle, 2 myocardium, 3 left ventricle, all lengths in mm."""
    axis = (np.arange(size) - size / 2 + 0.5) * spacing[0]
    x, y = np.meshgrid(axis - heart["centre"][0], axis - heart["centre"][1], indexing="ij")
    cos, sin = np.cos(heart["angle"]), np.sin(heart["angle"])
    x, y = cos * x + sin * y, cos * y - sin * x
    labels = np.zeros((size, size, slices))
    for z in range(slices):
        taper = np.sqrt(1 - 0.8 * ((z + 0.5) / slices) ** 2)  # base wide, apex narrow
        cavity = heart["radius"] * taper * contraction
        wall = heart["wall"] * (1 + 0.9 * (1 - contraction))  # the wall thickens as the cavity empties
        left = np.hypot(x * heart["flatness"], y)
        right = np.hypot((x + cavity + 0.75 * wall) / 0.95, y / 1.45)
        labels[right < cavity + 4, z] = 1
        labels[left < cavity + wall, z] = 2
        labels[left < cavity, z] = 3
    return labels


def _mr_contrast(labels: np.ndarray, spacing: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """A bright-blood image of the labels: body, lungs, papillary texture, bias field, blur and Rician noise."""
    size = labels.shape[0]
    axis = (np.arange(size) - size / 2) * spacing[0]
    x, y = np.meshgrid(axis, axis, indexing="ij")
    body = np.hypot(x / 68, y / 62) < 1
    lung = (np.hypot((x - 42) / 20, (y - 8) / 34) < 1) | (np.hypot((x + 58) / 14, (y - 12) / 30) < 1)
    tissue = np.where(body, np.where(lung, 40.0, 170.0), 8.0) + 200 * gaussian_filter(rng.normal(size=(size, size)), 3)
    image = np.repeat(tissue[..., None], labels.shape[2], 2)
    for value, signal in {1: rng.uniform(280, 330), 2: rng.uniform(90, 130), 3: rng.uniform(290, 340)}.items():
        image[labels == value] = signal
    image = gaussian_filter(image, (0.8, 0.8, 0)) * (1 + 0.25 * np.sin(x / 90 + rng.uniform(0, 6)))[..., None]
    noise = rng.normal(scale=12, size=(2, *image.shape))
    return np.hypot(image + noise[0], noise[1]).astype(np.int16)


if __name__ == "__main__":
    fire.Fire({"acdc": acdc})
