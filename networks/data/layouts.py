"""Where the papers' datasets lie as they unpack, and which case is in which split.

A layout is one way in which images and labels lie in folders, with its split; :func:`cases` reads any by name. A case
is ``{"id", "image", "label"}``, and ``"label_values"`` where the files hold other numbers than the bundles' classes.
What lies there and is left out is named in the log, and in the run's record. Files whose names begin with a dot are the
system's own, and no cases.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from monai.data import load_decathlon_datalist

from ..errors import DataError, check_option
from .cine import nifti_series
from .folders import Case, Cases, either, entries, file_named, files_named_like, natural_order, stem_of, tell_left_out
from .formats import NIFTI, PICTURES, UNREAD, VOLUMES

__all__ = ["ACDC_SPLIT", "BTCV_ORGANS", "BTCV_SPLIT", "LAYOUTS", "PAPERS", "SPLITS", "cases"]

logger = logging.getLogger(__name__)

Splits = dict[str, list[Case]]

SPLITS = ("train", "validation", "test")

PATIENT = r"\D*\d+"
"""What a file's name begins with that tells its patient: all up to the first number."""

LEFT_OUT = "left out"
"""Beside the splits, a layout lists here ``{"file", "why"}`` of what it does not take."""

ACDC_SPLIT = {
    "validation": (19, 21, 29, 33, 41, 50, 61, 71, 76, 80),
    "test": (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95),
}
"""Patients of the split that both papers use (made by MT-UNet); the other 70 of 100 train."""

BTCV_SPLIT = {
    "validation": (10, 27, 37),
    "test": (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38),
}
"""Cases of TransUNet's split, which both papers use; of the other 18 of 1 to 10 and 21 to 40, three validate here."""

BTCV_ORGANS = {8: 1, 4: 2, 3: 3, 2: 4, 6: 5, 11: 6, 1: 7, 7: 8}
"""Raw BTCV labels of the papers' eight organs, in the order of their tables: aorta, gallbladder, left kidney, right
kidney, liver, pancreas, spleen, stomach. The other five become background."""

BTCV_LABELS = {raw: BTCV_ORGANS.get(raw, 0) for raw in range(14)}

MASK_LABELS = {0: 0, 255: 1}

INSTANCE_LABELS = {0: 0, **dict.fromkeys(range(1, 256), 1)}


def cases(layout: str, dataset_dir: str | Path, split: str, patient: str = PATIENT) -> Cases:
    """Cases of one split of a dataset.

    Args:
        layout: one of :data:`LAYOUTS` or :data:`PAPERS`.
        dataset_dir: the folder that the download unpacked to, or one above it; for ``"datalist"`` the JSON file.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        patient: of ``"folder"``, a regular expression for the beginning of a file's name. Files in which it finds the
            same text (its first group, where it has one) are of one patient, and go into one split.

    Returns:
        ``{"id": name, "image": path, "label": path}`` per case, sorted by name; ``"label_values"`` with them maps
        the numbers in the label file to the bundle's classes. Of a time series with its label, ``X, Y, Z, T`` both,
        each frame with a label other than 0 is a case, whose ``"frame"`` is counted from 0.

    Raises:
        ValueError: on an unknown ``layout`` or ``split``.
        DataError: when a folder is missing, an image has no label, a case is there twice or in two splits, the split
            holds no case, or ``patient`` is no pattern or tells no patients apart; the message names the files and what
            was expected where.
    """
    check_option("layout", layout, (*LAYOUTS, *PAPERS))
    check_option("split", split, SPLITS)
    root = Path(dataset_dir)
    if not root.exists():
        raise DataError(f"{root} does not exist. Set dataset_dir to where the dataset was unpacked.")
    base = layout.removesuffix("_papers")
    splits = _folder(root, patient) if base == "folder" else LAYOUTS[base](root)
    left_out = splits.pop(LEFT_OUT, [])
    seen: dict[str, Case] = {}
    for name in SPLITS:
        for case in splits.get(name, []):
            if case["id"] in seen:
                raise DataError(
                    f"{case['id']} is there twice: {seen[case['id']]['image']} and {case['image']}. Remove one."
                )
            seen[case["id"]] = case
    if layout in PAPERS and splits:
        splits = {**splits, "train": splits["train"] + splits["validation"], "validation": splits["test"]}
    if not splits.get(split):
        present = ", ".join(f"{len(found)} {name}" for name, found in splits.items()) or "none"
        raise DataError(f"No {split} cases in {root}: it holds {present}. {_EXPECTED[base]}")
    if split == "train" and not splits.get("test"):
        logger.warning(f"{root} holds no test cases: going on without them.")
    for case in splits[split]:
        label = Path(case["label"])
        if not label.is_file() and not label.is_dir():
            endings = either(VOLUMES if label.name.lower().endswith(VOLUMES) else PICTURES)
            raise DataError(f"{case['image']} has no label: expected {label}, by any ending of {endings}.")
    tell_left_out(root, left_out)
    found = [frame for case in splits[split] for frame in _labelled_frames(case)]
    return Cases(sorted(found, key=lambda case: natural_order(case["id"])), left_out)


def _labelled_frames(case: Case) -> list[Case]:
    """A case, or those frames of a time series in which something is labelled: most have two."""
    if not case["label"].lower().endswith(NIFTI) or not Path(case["label"]).is_file():
        return [case]
    try:
        images = nifti_series(case["image"]) if case["image"].lower().endswith(NIFTI) else None
    except Exception:  # told of as the file is loaded
        return [case]
    frame, numbers = 0, list[int]()
    try:
        labels = nifti_series(case["label"])
        if labels is None:
            return [case]
        for frame in range(labels.frames):
            if bool(labels.read(frame).any()):
                numbers.append(frame)
    except Exception:  # told of likewise; without a frame, the image would be blamed for having several
        return [case if images is None else {**case, "frame": frame}]
    if images is None or images.frames != labels.frames:
        raise DataError(
            f"{case['label']} has {labels.frames} frames, its image {case['image']} {images.frames if images else 1}. "
            "Is it the label of another image?"
        )
    if not numbers:
        raise DataError(f"{case['label']} holds nothing but 0 in all its {labels.frames} frames. Is it a label?")
    return [{**case, "id": f"{case['id']}_frame{t}", "frame": t} for t in numbers]


def _acdc(root: Path) -> Splits:
    folder = _first(root, ["", "training", "database/training"], "patient[0-9][0-9][0-9]")
    if folder is None:
        return {}
    splits: Splits = {name: [] for name in SPLITS}
    for patient in sorted(folder.glob("patient[0-9][0-9][0-9]")):
        split = _split_of(int(patient.name[7:]), ACDC_SPLIT, range(1, 101))
        images = files_named_like(patient, VOLUMES, rf"{patient.name}_frame\d\d")
        if not images:
            raise DataError(
                f"No images in {patient}: expected {patient.name}_frameMM.nii.gz, end-diastole and end-systole."
            )
        if split:
            splits[split] += [_case(image, file_named(patient, f"{stem_of(image)}_gt", VOLUMES)) for image in images]
            whole = files_named_like(patient, VOLUMES, f"{patient.name}_4d")
            why = "the whole series, without labels of its own"
            splits.setdefault(LEFT_OUT, []).extend({"file": str(file), "why": why} for file in whole)
        else:
            splits.setdefault(LEFT_OUT, []).append({"file": str(patient), "why": "in none of the split's lists"})
    return splits


def _btcv(root: Path) -> Splits:
    names = {"img": "label", "imagesTr": "labelsTr"}
    places = [f"{above}{images}" for images in names for above in ("", "Training/", "RawData/Training/")]
    folder = _first(root, places, "img[0-9][0-9][0-9][0-9].*")
    if folder is None:
        return {}
    labels = names[folder.name]
    splits: Splits = {name: [] for name in SPLITS}
    for image in files_named_like(folder, VOLUMES, r"img\d{4}"):
        number = stem_of(image)[3:]
        split = _split_of(int(number), BTCV_SPLIT, (*range(1, 11), *range(21, 41)))
        if split:
            label = file_named(folder.parent / labels, f"label{number}", VOLUMES)
            splits[split].append(_case(image, label, BTCV_LABELS))
        else:
            splits.setdefault(LEFT_OUT, []).append({"file": str(image), "why": "in none of the split's lists"})
    return splits


def _isic2017(root: Path) -> Splits:
    parts = {"train": "Training", "validation": "Validation", "test": "Test_v2"}
    folders = {s: (f"ISIC-2017_{p}_Data", f"ISIC-2017_{p}_Part1_GroundTruth") for s, p in parts.items()}
    return _isic(root, folders)


def _isic2018(root: Path) -> Splits:
    parts = {"train": "Training", "validation": "Validation", "test": "Test"}
    folders = {s: (f"ISIC2018_Task1-2_{p}_Input", f"ISIC2018_Task1_{p}_GroundTruth") for s, p in parts.items()}
    return _isic(root, folders)


def _isic2018_bcdunet(root: Path) -> Splits:
    """BCDU-Net divides the 2,594 training images 1,815, 259, 520, by position: here in the order of their names."""
    found = sorted(_isic2018(root).get("train", []), key=lambda case: case["id"])
    first, second = int(0.7 * len(found)), int(0.7 * len(found)) + int(0.1 * len(found))
    return {"train": found[:first], "validation": found[first:second], "test": found[second:]}


def _isic(root: Path, folders: Mapping[str, tuple[str, str]]) -> Splits:
    splits: Splits = {}
    for split, (images, labels) in folders.items():
        folder = next((p for p in (root / images, *root.glob(f"*/{images}")) if p.is_dir()), None)
        if folder:
            splits[split] = [
                _case(
                    image, file_named(folder.parent / labels, f"{stem_of(image)}_segmentation", (".png",)), MASK_LABELS
                )
                for image in files_named_like(folder, PICTURES, r"ISIC_\d+")
            ]
    return splits


def _glas(root: Path) -> Splits:
    folder = _first(root, ["", "*"], "train_1.*")
    if folder is None:
        return {}
    splits: Splits = {name: [] for name in SPLITS}
    for image in files_named_like(folder, PICTURES, r"(train|testA|testB)_\d+"):
        part, number = stem_of(image).split("_")
        split = "test" if part != "train" else "train" if int(number) % 5 else "validation"
        own = (image.name[len(stem_of(image)) :].lower(), *PICTURES)
        splits[split].append(_case(image, file_named(image.parent, f"{stem_of(image)}_anno", own), INSTANCE_LABELS))
    return splits


def _folder(root: Path, patient: str = PATIENT) -> Splits:
    """``images/`` and ``labels/`` with the same names; of ten patients one validates and two test, drawn by name."""
    images, labels = root / "images", root / "labels"
    if not (images.is_dir() and labels.is_dir()):
        return {}
    found, left_out = [], []
    for image in entries(images):
        name = image.name.lower()
        if kind := next((kind for kind in (VOLUMES, PICTURES) if name.endswith(kind)), None):
            found.append(_case(image, file_named(labels, stem_of(image), kind)))
        elif name.endswith(UNREAD) or image.is_dir():
            left_out.append({"file": str(image), "why": "of a format that is not read here"})
    patients = _by_patient(found, patient)
    if len(patients) < len(found):
        logger.info(f"{images}: {len(found)} files of {len(patients)} patients, such as {next(iter(patients))}")
    names = list(patients)
    random.Random(0).shuffle(names)
    validation, test = (max(1, round(share * len(names))) if len(names) > 2 else 0 for share in (0.1, 0.2))
    parts = {
        "validation": names[:validation],
        "test": names[validation : validation + test],
        "train": names[validation + test :],
    }
    splits = {split: [case for name in part for case in patients[name]] for split, part in parts.items()}
    return {**splits, LEFT_OUT: left_out}


def _by_patient(cases: Sequence[Case], pattern: str) -> dict[str, list[Case]]:
    """Cases by the patient that their names begin with; one whose name does not match is a patient of its own."""
    try:
        known = re.compile(pattern)
    except re.error as error:
        raise DataError(f"patient is a regular expression, got {pattern!r}: {error}.") from error
    patients: dict[str, list[Case]] = {}
    for case in cases:
        match = known.match(case["id"])
        name = case["id"] if match is None else match.group(1 if known.groups else 0) or case["id"]
        patients.setdefault(name, []).append(case)
    if len(cases) > 2 and len(patients) == 1:
        raise DataError(
            f"All {len(cases)} files, such as {cases[0]['image']}, are of one patient, {next(iter(patients))}: they "
            "cannot be split. Say by --patient with which part of its name a patient's files begin."
        )
    return patients


def _datalist(root: Path) -> Splits:
    """MONAI's form of the Decathlon's ``dataset.json``, with lists ``training``, ``validation`` and ``test``.

    Images of one name, as in a folder per patient, are told apart by their folders.
    """
    try:
        keys = json.loads(root.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {root} as a datalist: {error}. Set dataset_dir to the JSON file.") from error
    splits: Splits = {}
    for split, key in {"train": "training", "validation": "validation", "test": "test"}.items():
        entries = keys.get(key, []) if isinstance(keys, dict) else []
        if all(isinstance(entry, dict) and {"image", "label"} <= entry.keys() for entry in entries) and entries:
            loaded = load_decathlon_datalist(str(root), True, key, root.parent)
            several = next((v for entry in loaded for v in entry.values() if isinstance(v, (list, tuple))), None)
            if several:
                raise DataError(
                    f"{root} names several files for one image: {', '.join(map(str, several))}. Write their channels "
                    "into one file, X, Y, Z, channel."
                )
            splits[split] = [_case(Path(entry["image"]), Path(entry["label"])) for entry in loaded]
    listed = [case for found in splits.values() for case in found]
    names = Counter(stem for stem, _ in {(case["id"], case["image"]) for case in listed})
    for case in listed:
        if names[case["id"]] > 1:
            case["id"] = f"{os.path.relpath(Path(case['image']).parent, root.parent)}/{case['id']}"
    return splits


LAYOUTS: dict[str, Callable[[Path], Splits]] = {
    "acdc": _acdc,
    "btcv": _btcv,
    "isic2017": _isic2017,
    "isic2018": _isic2018,
    "isic2018_bcdunet": _isic2018_bcdunet,
    "glas": _glas,
    "folder": _folder,
    "datalist": _datalist,
}
"""How datasets lie in folders, and their splits:

- ``acdc``: 70, 10 and 20 patients (:data:`ACDC_SPLIT`), two cases each.
- ``btcv``: 15, 3 and 12 cases (:data:`BTCV_SPLIT`).
- ``isic2017``, ``isic2018``: the official three parts; ``isic2018_bcdunet``: 70, 10 and 20 % of the training part.
- ``glas``: 68, 17 (each fifth) and 80 (test A and B).
- ``folder``: your own ``images/`` and ``labels/``, 70, 10 and 20 % of the patients.
- ``datalist``: your own JSON file in the form of the Medical Segmentation Decathlon's.

Of datasets without validation cases of their own, ``btcv_papers`` and ``glas_papers`` do as the papers did: the
validation cases train too, and the test cases choose the best epoch. Such a score is no measure of new cases.
"""

PAPERS = ("btcv_papers", "glas_papers")

_EXPECTED = {
    "acdc": "Expected training/patientNNN/patientNNN_frameMM.nii.gz, and _gt.nii.gz beside each, of the split's NNN.",
    "btcv": "Expected RawData/Training/img/img0001.nii.gz and label/label0001.nii.gz, or imagesTr and labelsTr.",
    "isic2017": "Expected ISIC-2017_Training_Data and ISIC-2017_Training_Part1_GroundTruth, and so for Validation "
    "and Test_v2.",
    "isic2018": "Expected ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth, and so for "
    "Validation and Test.",
    "glas": "Expected train_1.bmp and train_1_anno.bmp to train_85, testA_1 to 60, testB_1 to 20.",
    "folder": "Expected images/NAME and labels/NAME of the same names, of three patients or more.",
    "datalist": "Expected lists 'training', 'validation' and 'test' of entries with 'image' and 'label'.",
}

_EXPECTED["isic2018_bcdunet"] = _EXPECTED["isic2018"]


def _case(image: Path, label: Path, label_values: Mapping[int, int] | None = None) -> Case:
    case: Case = {"id": stem_of(image), "image": str(image), "label": str(label)}
    return case if label_values is None else {**case, "label_values": dict(label_values)}


def _split_of(number: int, split: Mapping[str, Sequence[int]], known: Iterable[int]) -> str | None:
    """The split that lists a number; training has all other known ones."""
    named = next((name for name, numbers in split.items() if number in numbers), None)
    return named or ("train" if number in known else None)


def _first(root: Path, places: Sequence[str], content: str) -> Path | None:
    """The first of some folders that holds a file or folder of a pattern."""
    folders = [folder for place in places for folder in (root.glob(place) if place else [root])]
    return next((folder for folder in folders if any(folder.glob(content))), None)
