"""Make a small synthetic dataset in the official layout of a bundle's data, so that it runs with no download.

    python bundles/phantoms.py acdc phantoms/acdc
    python bundles/phantoms.py acdc phantoms/cine --cine True    # hearts that beat

The datasets are acdc, btcv, isic2017, isic2018 and glas. Each is one function of the output folder; the pictures are
drawn, no patient's image is behind them.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from phantom_heart import Heart
from phantom_study import write_study
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

HEIGHT, WEIGHT = 175, 75
"""cm and kg of each of ACDC's patients."""


def acdc(output_dir: str, size: int = 96, slices: int = 6, seed: int = 0, cine: bool = False, frames: int = 14) -> None:
    """Short-axis cardiac MR in the layout of the ACDC challenge: 12 patients at end-diastole and end-systole.

    Args:
        output_dir: receives ``training/patientNNN/``; must not hold any patient yet.
        size: pixels per side of a slice, at least 64.
        slices: slices of a volume, base to apex.
        seed: the same seed makes the same files.
        cine: whether the hearts beat. There are then also ``patientNNN_4d.nii.gz``, all frames of a beat, beside its
            two; ``truth.csv``, the labels' volumes; and ``dicom/patientNNN/``, the test patients' studies.
        frames: of a beat, at least 6.
    """
    root = Path(output_dir)
    folder = root / "training"
    _empty(folder, "patient*")
    _check(size=(size, 64), slices=(slices, 1), frames=(frames, 6))
    numbers = sorted(n for split in PATIENTS.values() for n in split)
    truth = []
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        patient, heart = folder / f"patient{number:03d}", Heart(size, slices, rng)
        if cine:
            truth.append(_beat(patient, heart, frames, rng))
        else:
            es = int(rng.integers(9, 14))
            _two_phases(patient, heart, heart.frame(1.0, rng), heart.frame(heart.body["systole"], rng), es, 30)
    print(f"{len(numbers)} patients, {2 * len(numbers)} volumes in {folder}")
    if not cine:
        return
    with open(root / "truth.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, truth[0])
        table.writeheader()
        table.writerows(truth)
    print(f"{len(numbers)} beats of {frames} frames beside them, and their volumes in {root / 'truth.csv'}")
    for number, by_slice in zip(PATIENTS["test"], (True, False), strict=True):
        name = f"patient{number:03d}"
        write_study(folder / name / f"{name}_4d.nii.gz", root / "dicom" / name, by_slice, HEIGHT / 100, WEIGHT, seed)
        (row,) = (row for row in truth if row["patient"] == name)
        lv, rv = (row[f"{side}_ef_percent"] for side in ("lv", "rv"))
        print(f"DICOM study {root / 'dicom' / name}: true ejection fraction LV {lv:.1f} %, RV {rv:.1f} %")


def _beat(folder: Path, heart: Heart, frames: int, rng: np.random.Generator) -> dict[str, str | float]:
    """Write a patient whose heart beats; what is true of it, a row of ``truth.csv``."""
    es, interval = round(frames * rng.uniform(0.33, 0.4)), int(rng.integers(750, 1100))  # interval in ms
    beat = [heart.frame(contraction, rng, beating=True) for contraction in heart.contractions(frames, es)]
    _two_phases(folder, heart, beat[0], beat[es], es + 1, frames)
    volume = _volume(np.stack([image for image, _ in beat], -1), heart)
    volume.header["pixdim"][4] = interval / 1000 / frames
    nib.save(volume, folder / f"{folder.name}_4d.nii.gz")
    ed_ml, es_ml = (np.bincount(beat[t][1].ravel()) * heart.pixel**2 * heart.gap / 1000 for t in (0, es))
    row: dict[str, float] = {}
    for side, label in (("lv", 3), ("rv", 1)):
        row |= {f"{side}_edv_ml": ed_ml[label], f"{side}_esv_ml": es_ml[label]}
        row[f"{side}_ef_percent"] = 100 * (1 - es_ml[label] / ed_ml[label])
    row |= {"lv_mass_g": 1.05 * ed_ml[2], "heart_rate_per_min": 60_000 / interval}
    return {"patient": folder.name, **{name: round(float(value), 3) for name, value in row.items()}}


def _two_phases(
    folder: Path,
    heart: Heart,
    ed: tuple[np.ndarray, np.ndarray],
    es: tuple[np.ndarray, np.ndarray],
    es_number: int,
    frames: int,
) -> None:
    """Write a patient's images and labels at end-diastole, frame 1, and end-systole, of so many frames."""
    folder.mkdir(parents=True)
    for number, phase in ((1, ed), (es_number, es)):
        for suffix, data in zip(("", "_gt"), phase, strict=True):
            nib.save(_volume(data, heart), folder / f"{folder.name}_frame{number:02d}{suffix}.nii.gz")
    lines = {"ED": 1, "ES": es_number, "Group": "NOR", "Height": HEIGHT, "NbFrame": frames, "Weight": WEIGHT}
    (folder / "Info.cfg").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))


def _volume(data: np.ndarray, heart: Heart) -> nib.Nifti1Image:
    volume = nib.Nifti1Image(data, np.diag([-heart.pixel, -heart.pixel, heart.gap, 1.0]))
    volume.header.set_xyzt_units("mm", "sec")
    return volume


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
