"""A DICOM study sorted by its headers: which images make the short-axis stack, and which of them is which phase.

Folders and file names are not asked. One scanner writes a series for all slices, another one for each, and archives
number the files.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from ..errors import DataError
from .dicom import Frame, extent_of, frames_of, header_of, in_order, is_dicom, no_image, number_of, places_of, value_of
from .walking import below

__all__ = ["Series", "Stack", "StudyFrame", "study_folders", "study_stack"]

logger = logging.getLogger(__name__)

TAGS = ["StudyInstanceUID", "SOPInstanceUID", "SeriesNumber", "SeriesDescription", "PatientSize", "PatientWeight"]
TAGS += ["TriggerTime", "TemporalPositionIdentifier", "NominalInterval", "InstanceNumber"]
TAGS += ["AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime", "RescaleSlope", "RescaleIntercept"]

OBLIQUE = 25
"""Degrees within which planes count as parallel, and a stack's normal as lying in the plane of a long-axis view."""

STRAIGHT = 5
"""Degrees within which a plane is axial, coronal or sagittal, and no view along or across a heart's long axis."""

NEAR = 0.1
"""Millimetres along the normal within which two images lie at one position."""

TOLERANCE = 0.1
"""Share of the distance between slices by which a position may differ from that of a slice."""


@dataclass(eq=False)
class Series:
    """A series of a study.

    Attributes:
        uid: its SeriesInstanceUID.
        number: that the scanner gave it, rising with time; None where there is none.
        description: of the sequence, in the words of the radiographer.
        files: hold it.
        unplaced: why one of its images lies nowhere, where that is so.
    """

    uid: str
    number: float | None
    description: str
    files: list[Path] = field(default_factory=list)
    unplaced: str = ""

    def __str__(self) -> str:
        name = f" ({self.description})" if self.description else ""
        return f"the series{name} of {self.files[0].name}" if self.number is None else f"series {self.number:g}{name}"


@dataclass(eq=False)
class StudyFrame(Frame):
    """A slice at one moment.

    Attributes:
        series: to which it belongs.
        trigger: milliseconds since the R wave.
        temporal: its number among the phases.
        acquired: the day, and seconds since midnight.
        instance: its number in its series, and in its file.
        interval: milliseconds from one R wave to the next.
        scale: slope and intercept of its grey values.
        alone: whether its file holds no other frame.

    What the header does not say is None.
    """

    series: Series
    trigger: float | None
    temporal: float | None
    acquired: tuple[str, float] | None
    instance: tuple[float, int] | None
    interval: float | None
    scale: tuple[float, float] | None
    alone: bool

    def __str__(self) -> str:
        return f"{self.series}, {super().__str__()}"


@dataclass(eq=False)
class Stack:
    """The short-axis stack of a study.

    Attributes:
        phases: in the order of time; of each, its slices along their normal.
        times: milliseconds from the R wave to each phase, the mean of its slices; None where a slice has none.
        interval: the mean one between R waves, in milliseconds.
        height: of the patient, in metres, unless the header has it otherwise; it is not judged here.
        weight: of the patient, in kilograms, likewise.

    What the headers do not say is None.
    """

    phases: list[list[StudyFrame]]
    times: tuple[float, ...] | None
    interval: float | None
    height: float | None
    weight: float | None


@dataclass(eq=False)
class _Slot:
    """A position of parallel images, and what each series has there."""

    offset: float
    runs: list[list[StudyFrame]]


def study_folders(place: str | Path, left_out: list[dict[str, str]]) -> list[Path]:
    """The studies below a folder, each by the deepest folder that holds all of its images.

    Args:
        place: the folder.
        left_out: gets ``{"file", "why"}`` of each folder and file that cannot be read, and each damaged file.

    Returns:
        Folders, sorted, each once: :func:`study_stack` refuses one that holds several studies.
    """
    studies: dict[str, list[str]] = {}
    for file, header in _headers(Path(place), ["StudyInstanceUID"], left_out, damaged=True):
        if no_image(header) is None:
            studies.setdefault(str(header.get("StudyInstanceUID", "")), []).append(str(file.parent))
    return sorted({Path(os.path.commonpath(folders)) for folders in studies.values()})


def study_stack(folder: str | Path, left_out: list[dict[str, str]]) -> Stack | None:
    """The short-axis stack of the study below a folder: the most slices with phases that are parallel and of one grid.

    Images of one series at one position are phases. They are ordered by their trigger times, else by their temporal
    positions, else by the times of acquisition, else by instance numbers. The n-th of each position make one phase:
    trigger times of slices that were acquired in other heartbeats differ. Of series that lie at one position, as when
    one was taken again, the later of those with as many phases as most slices counts. A copy of a file counts once. Of
    stacks in several directions, it is the one whose normal lies within :data:`OBLIQUE` degrees of all long-axis views.

    Args:
        folder: holds the study, in whatever folders and files; or one file that holds all frames.
        left_out: gets ``{"file", "why"}`` of each file and folder that cannot be read, and of each series that is not
            taken, if there is a stack. The log has them too.

    Returns:
        The stack; None when no position has phases, as of a series that is one volume, or nothing is there.

    Raises:
        DataError: when a file is damaged; there is more than one study; no two positions are parallel, and several have
            phases; stacks of several directions may be the short axis; a position has another number of phases, or
            pixels of another size, than the others; slices are missing, shifted or unevenly spaced; two series lie at
            one position and nothing says which is the later; nothing says in which order phases come; or there is one
            slice, of unknown thickness.
    """
    folder, unread = Path(folder), list[dict[str, str]]()
    headers = dict(_headers(folder, TAGS, unread))
    for entry in unread:
        logger.warning(f"{folder}: left out {entry['file']}: {entry['why']}")
    left_out += unread
    _check_one_study(folder, headers)
    series, frames, whys = _sorted_by_series(folder, headers)
    everything = [_slots(plane) for plane in _planes(frames)]
    planes = [slots for every in everything if (slots := _phased(every))]
    if not planes:
        return None
    slots, count = _whole(folder, _largest(folder, _short_axis(folder, planes)), everything)
    runs = [_latest(folder, slot, count, whys) for slot in slots]
    for run in runs:
        if run[0].series.unplaced:
            raise DataError(f"{folder}: {run[0].series} is not whole. {run[0].series.unplaced}")
    columns = [_in_time(folder, run) for run in runs]
    order = in_order(str(folder), [column[0] for column in columns], TOLERANCE)
    extent_of(order)  # refuses what is not known, before frames are read
    stack = [next(column for column in columns if column[0] is first) for first in order]
    _tell(folder, series, frames, stack, planes, whys, left_out)
    triggers = [[frame.trigger for frame in column] for column in stack]
    known = all(None not in row and len(set(row)) == len(row) for row in triggers)
    intervals = [frame.interval for column in stack for frame in column if frame.interval]
    return Stack(
        phases=[list(phase) for phase in zip(*stack, strict=True)],
        times=tuple(np.mean(np.array(triggers, float), 0).tolist()) if known else None,
        interval=float(np.mean(intervals)) if intervals else None,
        height=_positive(headers.values(), "PatientSize"),
        weight=_positive(headers.values(), "PatientWeight"),
    )


def _headers(
    folder: Path, tags: Sequence[str], left_out: list[dict[str, str]], damaged: bool = False
) -> Iterator[tuple[Path, pydicom.Dataset]]:
    """The DICOM files below a folder and what they say, but those that cannot be read, and damaged ones if so asked."""
    for path in sorted([folder] if folder.is_file() else below(folder, left_out)):
        try:
            if is_dicom(path):
                yield path, header_of(path, tags)
        except OSError as error:
            left_out.append({"file": str(path), "why": f"not to be read ({error.strerror or error})"})
        except DataError:
            if not damaged:
                raise
            left_out.append({"file": str(path), "why": "a damaged DICOM file"})


def _check_one_study(folder: Path, headers: Mapping[Path, pydicom.Dataset]) -> None:
    studies = {str(h.get("StudyInstanceUID", "")): file for file, h in headers.items() if no_image(h) is None}
    if len(studies) > 1:
        found = ", ".join(file.name for file in list(studies.values())[:3])
        raise DataError(
            f"{folder} holds images of {len(studies)} studies, such as {found}. Put each study into a folder of its "
            "own, or name the folder of one."
        )


def _sorted_by_series(
    folder: Path, headers: Mapping[Path, pydicom.Dataset]
) -> tuple[list[Series], list[StudyFrame], dict[str, str]]:
    """All series, all frames that lie somewhere, and why series have none."""
    series: dict[str, Series] = {}
    frames: list[StudyFrame] = []
    whys: dict[str, str] = {}
    known: dict[str, Path] = {}
    copies: list[Path] = []
    for file, header in headers.items():
        uid = str(header.get("SOPInstanceUID", "")) or str(file)
        if known.setdefault(uid, file) != file:
            copies.append(file)
            continue
        uid = str(header.get("SeriesInstanceUID", ""))
        if uid not in series:
            description = str(header.get("SeriesDescription") or "").strip()
            series[uid] = Series(uid, number_of([header], "SeriesNumber"), description)
        series[uid].files.append(file)
        if kind := no_image(header):
            whys[uid] = f"no images ({kind})"
            continue
        try:
            found = _study_frames(file, header, series[uid])
            if lost := next((frame for frame in found if frame.position is None), None):
                raise DataError(f"{lost} does not say where it lies. Export the original images.")
            frames += found
        except DataError as error:  # a screenshot or a report's picture, unless the stack lacks it
            series[uid].unplaced = str(error)
            whys[uid] = "colours, or images that do not say where they lie or how large their pixels are"
    if copies:
        logger.warning(f"{folder}: {len(copies)} files are copies of others, such as {copies[0].name}")
    return sorted(series.values(), key=lambda one: (one.number or 0, str(one))), frames, whys


def _study_frames(file: Path, header: pydicom.Dataset, series: Series) -> list[StudyFrame]:
    try:
        frames = frames_of(file, header)
        number = number_of([header], "InstanceNumber")
        return [
            StudyFrame(
                **vars(frame),
                series=series,
                trigger=number_of(
                    places,
                    "CardiacSynchronizationSequence.NominalCardiacTriggerDelayTime",
                    "CardiacSynchronizationSequence.ActualCardiacTriggerDelayTime",
                    "TriggerTime",
                ),
                temporal=number_of(places, "FrameContentSequence.TemporalPositionIndex", "TemporalPositionIdentifier"),
                acquired=_acquired(places),
                instance=(number or 0, frame.number) if number is not None or len(frames) > 1 else None,
                interval=number_of(
                    places, "CardiacSynchronizationSequence.RRIntervalTimeNominal", "NominalInterval", least=1
                ),
                scale=_scale(places),
                alone=len(frames) == 1,
            )
            for frame, places in zip(frames, places_of(header), strict=True)
        ]
    except DataError:
        raise
    except Exception as error:  # values that are none make pydicom raise errors of many kinds, as they are asked for
        raise DataError(f"{file} is a damaged DICOM file ({error}). Export the series again.") from error


def _scale(places: Sequence[pydicom.Dataset]) -> tuple[float, float] | None:
    names = ("PixelValueTransformationSequence.RescaleSlope", "PixelValueTransformationSequence.RescaleIntercept")
    slope, intercept = (number_of(places, name) for name in names)
    return None if slope is None or intercept is None else (slope, intercept)


def _acquired(places: Sequence[pydicom.Dataset]) -> tuple[str, float] | None:
    moment = value_of(places, ["FrameContentSequence.FrameAcquisitionDateTime", "AcquisitionDateTime"])
    if moment is None:
        day, time = (str(value_of(places, [name]) or "") for name in ("AcquisitionDate", "AcquisitionTime"))
    else:
        day, time = str(moment)[:8], str(moment)[8:]
    parts = re.match(r"(\d\d)(\d\d)?(\d\d(?:\.\d+)?)?", time.replace(":", ""))
    if parts is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    return day, 3600 * hours + 60 * minutes + seconds


def _positive(headers: Iterable[pydicom.Dataset], name: str) -> float | None:
    """The first number that is one: zeros stand for what nobody measured."""
    numbers = (number_of([header], name) for header in headers)
    return next((number for number in numbers if number is not None and number > 0), None)


def _same_direction(one: Frame, other: Frame) -> bool:
    return bool(np.abs(one.rows - other.rows).max() <= 1e-3)


def _same_pixels(one: Frame, other: Frame) -> bool:
    return one.size == other.size and np.allclose(one.spacing, other.spacing, rtol=1e-3)


def _planes(frames: Iterable[StudyFrame]) -> list[list[StudyFrame]]:
    """Frames that are parallel, turned alike, and of one size and spacing."""
    planes: list[list[StudyFrame]] = []
    known: dict[Any, list[StudyFrame]] = {}  # most frames repeat the numbers of another
    for frame in frames:
        key = (frame.size, frame.rows.tobytes(), frame.spacing.tobytes())
        if key not in known:
            fitting = (p for p in planes if _same_direction(p[0], frame) and _same_pixels(p[0], frame))
            known[key] = next(fitting, [])
            if not known[key]:
                planes.append(known[key])
        known[key].append(frame)
    return planes


def _slots(plane: list[StudyFrame]) -> list[_Slot]:
    """The positions of parallel frames, along their normal."""
    offsets = np.array([frame.position for frame in plane]) @ np.cross(*plane[0].rows)
    order = np.argsort(offsets, kind="stable")
    slots = []
    for at in np.split(order, np.flatnonzero(np.diff(offsets[order]) > NEAR) + 1):
        runs: dict[str, list[StudyFrame]] = {}
        for index in at:
            runs.setdefault(plane[index].series.uid, []).append(plane[index])
        slots.append(_Slot(float(offsets[at].mean()), list(runs.values())))
    return slots


def _phased(slots: list[_Slot]) -> list[_Slot]:
    """Those of some positions where a series has two images or more, for one is no time series."""
    series = ((slot.offset, [run for run in slot.runs if len(run) > 1]) for slot in slots)
    return [_Slot(offset, runs) for offset, runs in series if runs]


def _short_axis(folder: Path, planes: list[list[_Slot]]) -> list[list[_Slot]]:
    """The planes that may hold the short axis: all, or those of one direction where several have three slices or more.

    The short axis is seen along the heart's long axis, which lies in all long-axis views.
    """
    stacks: list[list[_Slot]] = []
    for slots in sorted((slots for slots in planes if len(slots) > 2), key=len, reverse=True):
        if not any(_parallel(slots, other) for other in stacks):
            stacks.append(slots)
    if len(stacks) < 2:
        return planes

    def outdoes(one: list[_Slot], other: list[_Slot]) -> bool:
        normals = [_normal(slots) for slots in planes if not _parallel(slots, one) and not _parallel(slots, other)]
        views = [normal for normal in normals if not _is_straight(normal)]
        return _is_seen_along(one, views) and not _is_seen_along(other, views)

    for one in stacks:
        if not _has_twin(one, planes) and all(one is other or outdoes(one, other) for other in stacks):
            return [slots for slots in planes if _parallel(slots, one)]
    names = " or ".join(f"{len(slots)} slices of {slots[0].runs[0][0].series}" for slots in stacks)
    raise DataError(
        f"{folder}: {names} may be the short axis, and its long-axis views do not tell which. Give the folder of the "
        "short-axis series alone."
    )


def _has_twin(stack: list[_Slot], planes: list[list[_Slot]]) -> bool:
    """Whether a slice or two of as many phases are parallel to a stack, as a long-axis view is to a stack of such."""
    few = (slots for slots in planes if len(slots) < 3)
    return any(_parallel(slots, stack) and len(slots[0].runs[0]) == len(stack[0].runs[0]) for slots in few)


def _is_seen_along(stack: list[_Slot], views: list[np.ndarray]) -> bool:
    """Whether a stack's normal lies in all views, and can be a heart's long axis."""
    normal = _normal(stack)
    fits = all(90 - _angle(normal, view) <= OBLIQUE for view in views)
    return bool(views) and fits and not _is_straight(normal)


def _normal(slots: list[_Slot]) -> np.ndarray:
    return np.cross(*slots[0].runs[0][0].rows)


def _parallel(one: list[_Slot], other: list[_Slot]) -> bool:
    return _angle(_normal(one), _normal(other)) <= OBLIQUE


def _is_straight(normal: np.ndarray) -> bool:
    return min(_angle(normal, axis) for axis in np.eye(3)) <= STRAIGHT


def _angle(one: np.ndarray, other: np.ndarray) -> float:
    """Degrees between two lines, from 0 to 90."""
    return float(np.degrees(np.arccos(min(1.0, abs(float(one @ other))))))


def _largest(folder: Path, planes: list[list[_Slot]]) -> list[_Slot]:
    """The planes' one with the most positions, the later of two."""
    most = max(map(len, planes))
    largest = [slots for slots in planes if len(slots) == most]
    if len(largest) == 1:
        return largest[0]
    if most == 1:
        names = "; ".join(dict.fromkeys(str(run[0].series) for (slot,) in largest for run in slot.runs))
        raise DataError(
            f"{folder}: no two of its {len(largest)} slices with phases are parallel and of one size, so none is known "
            f"for the short axis: {names}. Export the short-axis stack, or put one slice into a folder of its own."
        )
    at = _later([[frame for slot in slots for run in slot.runs for frame in run] for slots in largest])
    if at is None:
        names = "; ".join(str(slots[0].runs[0][0].series) for slots in largest)
        raise DataError(
            f"{folder}: {len(largest)} stacks have {most} slices each, and nothing says which is the later: {names}. "
            "Move all but one away."
        )
    return largest[at]


def _later(choices: list[list[StudyFrame]]) -> int | None:
    """Which of some series was taken last: by times of acquisition, else by the numbers that the scanner gave."""
    for moment in (lambda frame: frame.acquired, lambda frame: frame.series.number):
        moments = [[m for frame in frames if (m := moment(frame)) is not None] for frames in choices]
        if all(moments):
            last = [max(found) for found in moments]
            if last.count(max(last)) == 1:
                return last.index(max(last))
    return None


def _whole(folder: Path, stack: list[_Slot], everything: list[list[_Slot]]) -> tuple[list[_Slot], int]:
    """The positions of a stack with as many phases as most have, and how many; no other may be one of its slices."""
    counts = Counter(count for slot in stack for count in {len(run) for run in slot.runs})
    usual = max(counts, key=lambda count: (counts[count], count))
    kept = [slot for slot in stack if any(len(run) == usual for run in slot.runs)]
    first = kept[0].runs[0][0]
    offsets = np.array([slot.offset for slot in kept])
    sources = [run[0].series for slot in kept for run in slot.runs if len(run) == usual]
    names = {series.uid for series in sources} | {series.description for series in sources if series.description}
    for run in (run for slots in everything for slot in slots for run in slot.runs):
        if len(run) == 1 and not names & {run[0].series.uid, run[0].series.description}:
            continue  # of a localiser, or of another kind
        if _same_direction(first, run[0]) and _lacks(offsets, float(np.cross(*first.rows) @ run[0].position)):
            if len(run) != usual:
                what = f"{len(run)} phase{'s' if len(run) > 1 else ''}, the other slices {usual}"
            elif run[0].size != first.size:
                what = "{1} x {0} pixels, the other slices {3} x {2}".format(*run[0].size, *first.size)
            else:
                what = "pixels of another size than the other slices"
            raise DataError(
                f"{folder}: at the position of {run[0].file.name}, {run[0].series} has {what}. Export the study "
                "again, or move that series away."
            )
    return kept, usual


def _lacks(offsets: np.ndarray, offset: float) -> bool:
    """Whether a stack has no slice at a position where it should have one: between its slices or at an end."""
    if len(offsets) == 1:
        return bool(abs(offset - offsets[0]) > NEAR)
    gap = float(np.diff(offsets).min())  # a slice that is missing makes others wider
    steps, last = (offset - offsets[0]) / gap, round(float(offsets[-1] - offsets[0]) / gap)
    there = np.abs(offsets - offset).min() <= TOLERANCE * gap
    return not there and abs(steps - round(steps)) <= TOLERANCE and -1 <= round(steps) <= last + 1


def _latest(folder: Path, slot: _Slot, count: int, whys: dict[str, str]) -> list[StudyFrame]:
    """The images of one series at a position: the later ones of ``count``, if a slice was taken again."""
    runs = [run for run in slot.runs if len(run) == count]
    at = _later(runs) if len(runs) > 1 else 0
    if at is None:
        names = " and ".join(str(run[0].series) for run in runs)
        raise DataError(
            f"{folder}: {names} lie at one position, and nothing says which was taken later. Move one of them away."
        )
    taken = runs[at][0].series
    for run in slot.runs:
        if len(run) != count:
            why = f"{len(run)} phases; {taken} has {count} at the same position, like the other slices, and counts"
            whys.setdefault(run[0].series.uid, why)
        elif run is not runs[at]:
            whys.setdefault(run[0].series.uid, f"taken again at the same position, later, as {taken}")
    return runs[at]


def _in_time(folder: Path, run: list[StudyFrame]) -> list[StudyFrame]:
    """The images of one position in their order."""
    clash = False
    for name in ("trigger", "temporal", "acquired", "instance"):
        if clash and name == "acquired":
            raise DataError(
                f"{folder}: {run[0].series} has several images for one time at one position, at that of "
                f"{run[0].file.name}. Are they of two kinds, or two scans? Move one kind away."
            )
        values = [getattr(frame, name) for frame in run]
        if None not in values:
            if len(set(values)) == len(values):
                return sorted(run, key=lambda frame: getattr(frame, name))
            clash |= name in ("trigger", "temporal") and len(set(values)) > 1
    raise DataError(
        f"{folder}: nothing says in which order the images of {run[0].series} come: no trigger times, temporal "
        "positions, times of acquisition or instance numbers that differ. Export the original images."
    )


def _tell(
    folder: Path,
    series: list[Series],
    frames: list[StudyFrame],
    stack: list[list[StudyFrame]],
    planes: list[list[_Slot]],
    whys: Mapping[str, str],
    left_out: list[dict[str, str]],
) -> None:
    """Name in the log, and in ``left_out``, what the stack is made of and which series are not in it."""
    taken = {id(frame) for column in stack for frame in column}
    phased = {id(frame) for slots in planes for slot in slots for run in slot.runs for frame in run}
    first = stack[0][0]
    rest: dict[str, list[StudyFrame]] = {}
    for frame in frames:
        if id(frame) not in taken:
            rest.setdefault(frame.series.uid, []).append(frame)
    sources = dict.fromkeys(str(column[0].series) for column in stack)
    logger.info(f"{folder}: {len(stack)} slices of {len(stack[0])} phases, from {', '.join(sources)}")
    for one in series:
        others = rest.get(one.uid, [])
        if not others and one.uid not in whys:
            continue
        if one.uid in whys:
            why = whys[one.uid]
        elif not any(id(frame) in phased for frame in others):
            why = "one image at a position, no phases"
        elif not _same_direction(others[0], first):
            why = "in another direction than the short-axis stack"
        elif not _same_pixels(others[0], first):
            why = "pixels of another size than the short-axis stack's"
        else:
            why = "another number of phases than the short-axis stack's, or between its slices"
        count = f"{len(others)} images" if others else f"{len(one.files)} files"
        logger.warning(f"{folder}: left out {one}, {count}: {why}")
        left_out.append({"file": str(one.files[0]), "why": f"{one}, {count}: {why}"})
