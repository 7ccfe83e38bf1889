"""Where the papers' datasets lie as they unpack, and which case is in which split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .errors import DataError

__all__ = ["ACDC_SPLIT", "acdc", "image_files"]

logger = logging.getLogger(__name__)

Case = dict[str, str]

ACDC_SPLIT = {
    "validation": (19, 21, 29, 33, 41, 50, 61, 71, 76, 80),
    "test": (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95),
}
"""Patients of the split that both papers use (made by MT-UNet); the other 70 of 100 train."""


def acdc(dataset_dir: str | Path, split: str) -> list[Case]:
    """Cases of the ACDC challenge's training set, in its official layout, by the papers' split of patients.

    Labels: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle. End-diastole and end-systole are two cases.

    Args:
        dataset_dir: the folder ``training`` of the download, or one above it, with
            ``patientNNN/patientNNN_frameMM.nii.gz`` and ``..._gt.nii.gz``.
        split: ``"train"`` (70 patients), ``"validation"`` (10) or ``"test"`` (20).

    Returns:
        ``{"image": path, "label": path}`` per case, in the order of patients and frames. Patients of other splits may
        be absent.

    Raises:
        ValueError: on an unknown ``split``.
        DataError: when the folder holds no patient, none of the split, or an image without its label.
    """
    if split not in ("train", *ACDC_SPLIT):
        raise ValueError(f"split is 'train', 'validation' or 'test', got {split!r}.")
    root = Path(dataset_dir)
    candidates = [root, root / "training", root / "database" / "training"]
    folder = next((c for c in candidates if any(c.glob("patient[0-9][0-9][0-9]"))), None)
    if folder is None:
        raise DataError(
            f"No ACDC patients in {root}: expected folders patient001 to patient100 there or in {root / 'training'}. "
            "Set dataset_dir to where the ACDC training set was unpacked."
        )
    found = {int(p.name[7:]): p for p in sorted(folder.glob("patient[0-9][0-9][0-9]"))}
    patients = {n: p for n, p in found.items() if 1 <= n <= 100}
    members = {name: [patients[n] for n in numbers if n in patients] for name, numbers in ACDC_SPLIT.items()}
    held_out = {n for numbers in ACDC_SPLIT.values() for n in numbers}
    members["train"] = [p for n, p in patients.items() if n not in held_out]
    if not members[split]:
        present = ", ".join(f"{len(m)} {name}" for name, m in members.items())
        raise DataError(f"No {split} patients of the papers' split in {folder}: it holds {present} patients.")
    if not members["test"]:
        logger.warning(f"{folder} holds none of the 20 test patients: going on without them.")
    return [case for patient in members[split] for case in _acdc_patient(patient)]


def _acdc_patient(folder: Path) -> list[Case]:
    images = sorted(
        p for p in folder.glob(f"{folder.name}_frame[0-9][0-9].nii*") if p.name.endswith((".nii", ".nii.gz"))
    )
    if not images:
        raise DataError(f"No images in {folder}: expected {folder.name}_frameMM.nii.gz, end-diastole and end-systole.")
    cases = []
    for image in images:
        stem, suffix = image.name.split(".", 1)
        label = image.with_name(f"{stem}_gt.{suffix}")
        if not label.is_file():
            raise DataError(f"{image} has no label: expected {label}.")
        cases.append({"image": str(image), "label": str(label)})
    return cases


def image_files(folder: str | Path, ignore: Sequence[str] = ()) -> list[Case]:
    """Every NIfTI image in a folder and its subfolders, for inference.

    Args:
        folder: where to look.
        ignore: patterns of file names to leave out, such as ``"*_gt.nii.gz"``.

    Returns:
        ``{"image": path}`` per file, sorted.

    Raises:
        DataError: when there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Set dataset_dir to the folder of the images to segment.")
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.name.endswith((".nii", ".nii.gz")) and not any(fnmatch(p.name, pattern) for pattern in ignore)
    )
    if not files:
        raise DataError(f"No images in {folder}: expected .nii or .nii.gz files there or in its subfolders.")
    return [{"image": str(file)} for file in files]
