"""Which images lie in a folder, and which of them are left out."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import DataError
from .cine import TimeSeries, nifti_series, study_series, unreadable_series
from .dicom import has_image, is_series
from .formats import NIFTI, PICTURES, SERIES, UNREAD, VOLUMES
from .studies import study_folders
from .walking import below

__all__ = [
    "Case",
    "Cases",
    "either",
    "entries",
    "file_named",
    "files_named_like",
    "folder_of",
    "image_files",
    "natural_order",
    "stem_of",
    "tell_left_out",
]

logger = logging.getLogger(__name__)

Case = dict[str, Any]


class Cases(list[Case]):
    """Cases, and what was found beside them and left out.

    Args:
        cases: the cases.
        left_out: ``{"file", "why"}`` each.
    """

    def __init__(self, cases: Iterable[Case] = (), left_out: Iterable[Mapping[str, str]] = ()) -> None:
        super().__init__(cases)
        self.left_out = [dict(entry) for entry in left_out]


def folder_of(place: str | Path) -> Path:
    """The folder of the images at a place: itself, or that of the one file."""
    path = Path(place)
    return path.parent if path.is_file() else path


def image_files(
    place: str | Path,
    suffixes: Sequence[str] = (*VOLUMES, SERIES),
    ignore: Sequence[str] = (),
    time_series: bool = False,
    channels: int = 1,
) -> Cases:
    """Every image in a folder and its subfolders, linked ones too, for inference; or one image file.

    Args:
        place: the folder or file. A file that is named here is taken, whatever its name.
        suffixes: endings of the files to take; with :data:`networks.data.formats.SERIES` also each folder of DICOM
            files.
        ignore: patterns of names to leave out, such as ``"*_gt.nii.gz"``.
        time_series: take series over time too: NIfTI files of four dimensions, and the short-axis cine of DICOM
            studies, each of which may lie in many folders. A study without phases is taken as volumes, a folder each.
        channels: of each image. Where there are several, they are the fourth dimension, and no image is over time.

    Returns:
        ``{"id": name, "image": path}`` per file or series, sorted; those over time have their
        :class:`networks.data.cine.TimeSeries` as ``"series"``. Images that were left out by their names, formats or
        rights, or as frames of a series that lies beside them, are in its ``left_out``, and in the log.

    Raises:
        DataError: when there is no such place, no image in it, or two of one name but for the ending.
    """
    folder = Path(place)
    time_series = time_series and channels == 1
    if folder.is_file():
        return Cases([_case(folder, stem_of(folder), _series_of(folder) if time_series else None)])
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Set dataset_dir to the folder or the file to segment.")
    endings = tuple(s for s in suffixes if s != SERIES)
    left_out: list[dict[str, str]] = []
    found: dict[Path, str] = {}
    of_studies: list[dict[str, str]] = []  # which tell of it themselves
    series = _studies(folder, of_studies) if time_series and SERIES in suffixes else {}
    found |= {path: path.resolve().name for path in series}
    for path in (folder, *below(folder, left_out)):
        name = path.name.lower()
        why = None
        if path.is_dir():
            if any(path.is_relative_to(study) for study in series):
                continue
            if SERIES in suffixes and (why := _why_no_series(path)) is None:
                found[path] = path.resolve().name
        elif name.endswith((*VOLUMES, *PICTURES, *UNREAD)) and not name.startswith("."):
            pattern = next((pattern for pattern in ignore if fnmatch(path.name, pattern)), None)
            if pattern is not None:
                why = f"named like {pattern}"
            elif not name.endswith(endings):
                why = "of a format that this bundle does not read"
            elif not path.is_file():
                why = "a link to nothing"
            else:
                found[path] = stem_of(path)
        if why:
            left_out.append({"file": str(path), "why": why})
    if time_series:
        series |= {path: over_time for path in found if path not in series and (over_time := _series_of(path))}
        _leave_out_frames(found, series, left_out)
    taken = sorted(found)
    tell_left_out(folder, left_out)
    left_out += of_studies
    if not taken:
        raise DataError(
            f"No images in {folder}: expected {either(suffixes)} files there or in its subfolders."
            + (f" {len(left_out)} were left out: {left_out[0]['file']} is {left_out[0]['why']}." if left_out else "")
        )
    named: dict[tuple[Path, str], Path] = {}
    for path in taken:
        other = named.setdefault((path.parent, found[path]), path)
        if other != path:
            raise DataError(f"{other} and {path} would have one label map, by their name. Rename or remove one.")
    return Cases([_case(path, found[path], series.get(path)) for path in taken], left_out)


def _case(path: Path, name: str, series: TimeSeries | None) -> Case:
    return {"id": name, "image": str(path), **({} if series is None else {"series": series})}


def _series_of(path: Path) -> TimeSeries | None:
    """The time series in a file or folder, if it is one; whatever cannot be read is told of when its turn comes."""
    name = path.name.lower()
    try:
        if name.endswith(NIFTI) and path.is_file():
            return nifti_series(path)
        if name.endswith(SERIES) and path.is_file():
            return _study(path, [])
    except Exception:  # nibabel and pydicom have many; the file's loading names each
        return None
    return None


def _studies(place: Path, left_out: list[dict[str, str]]) -> dict[Path, TimeSeries]:
    """The short-axis cines of the DICOM studies below a folder, by the studies' folders."""
    found: dict[Path, TimeSeries] = {}
    for folder in study_folders(place, []):  # what else cannot be read is told of as its own folder is looked into
        noted: list[dict[str, str]] = []
        if (series := _study(folder, noted)) is not None:
            found[folder] = series
            left_out += noted
    return found


def _study(place: Path, left_out: list[dict[str, str]]) -> TimeSeries | None:
    """The cine of a study, or what stands for one that is refused: as volumes it would be for reasons that are none."""
    try:
        return study_series(place, left_out)
    except DataError as error:
        unread = f" {left_out[0]['file']} is {left_out[0]['why']}." if left_out else ""
        return unreadable_series(place, f"{error}{unread}")


def _leave_out_frames(
    found: dict[Path, str], series: Mapping[Path, TimeSeries], left_out: list[dict[str, str]]
) -> None:
    """Take out files that are frames of a series beside them: ``NAME_frame01`` of ``NAME_4d`` or ``NAME``."""
    whole = {(path.parent, stem_of(path).removesuffix("_4d")): path for path in series if path.is_file()}
    for path, name in sorted(found.items()):
        frame = re.fullmatch(r"(.+)_frame\d+", name)
        if frame and path not in series and (source := whole.get((path.parent, frame[1]))):
            del found[path]
            left_out.append({"file": str(path), "why": f"a frame of {source.name}, which lies beside it"})


def _why_no_series(folder: Path) -> str | None:
    """Why a folder that holds DICOM files is no image; None where it is one, and empty where it holds none."""
    try:
        if not is_series(folder):
            return ""
        return None if has_image(folder) else "a folder of DICOM files without an image"
    except OSError as error:
        return f"not to be read ({Path(error.filename or folder).name}: {error.strerror})"


def tell_left_out(place: Path, left_out: Sequence[Mapping[str, str]], most: int = 5) -> None:
    """Name in the log what is left out, by its reason."""
    for why, count in Counter(entry["why"] for entry in left_out).items():
        files = [Path(entry["file"]).name for entry in left_out if entry["why"] == why]
        more = f" and {count - most} more" if count > most else ""
        logger.warning(f"{place}: {count} left out, {why}: {', '.join(files[:most])}{more}")


def entries(folder: Path) -> Iterator[Path]:
    """What lies in a folder, sorted; of a folder that bears a volume's name, as some unpack, what lies in it."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.name.lower().endswith(VOLUMES) and path.is_dir():
            yield from (inner for inner in sorted(path.iterdir()) if not inner.name.startswith("."))
        else:
            yield path


def files_named_like(folder: Path, suffixes: Sequence[str], stem: str) -> list[Path]:
    return [p for p in entries(folder) if p.name.lower().endswith(tuple(suffixes)) and re.fullmatch(stem, stem_of(p))]


def file_named(folder: Path, stem: str, suffixes: Sequence[str]) -> Path:
    """The file of a name in a folder with any of some suffixes, in capitals too; with the first where there is none."""
    candidates = [folder / f"{stem}{suffix}" for suffix in suffixes]
    if found := next((c for c in candidates if c.is_file()), None):
        return found
    others = files_named_like(folder, suffixes, re.escape(stem)) if folder.is_dir() else []
    return others[0] if others else candidates[0]


def stem_of(path: Path) -> str:
    return re.sub(r"(\.nii)?\.[^.]+$", "", path.name, flags=re.IGNORECASE)


def natural_order(name: str) -> list[tuple[str, int]]:
    """Sorting key that puts train_2 before train_10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def either(suffixes: Sequence[str]) -> str:
    return " or ".join([", ".join(suffixes[:-1]), suffixes[-1]] if len(suffixes) > 1 else suffixes)
