"""Function of the heart from label maps of its frames: volumes, ejection fraction, mass, output, and what looks wrong.

ED and ES are the end-diastolic and the end-systolic frame, those where the left ventricle is greatest and smallest,
for both ventricles. The rows with ``lv`` but mass are there with ``rv`` too.

===================  ==============================================================================
column               formula
===================  ==============================================================================
ed_frame, es_frame   frames as they are called, by default counted from 0
lv_edv_ml            voxels at ED x their volume, which is the area of the slices x their distance
lv_esv_ml            the same at ES
lv_sv_ml             EDV - ESV
lv_ef_percent        100 (EDV - ESV) / EDV
lv_mass_g            1.05 g/mL x volume of the myocardium at ED [1, 2]
heart_rate_per_min   60,000 / length of the beat in ms
lv_co_l_min          SV x heart rate / 1000
body_surface_m2      sqrt(height in cm x weight in kg / 3600) [3]
lv_edvi_ml_m2        EDV / body surface; likewise lv_esvi_ml_m2, lv_svi_ml_m2, lv_massi_g_m2, lv_ci_l_min_m2
===================  ==============================================================================

[1] S. G. Myerson et al., Assessment of left ventricular mass by cardiovascular magnetic resonance, Hypertension
2002;39:750-755. [2] J. Schulz-Menger et al., Standardized image interpretation and post-processing in cardiovascular
magnetic resonance: 2020 update, J Cardiovasc Magn Reson 2020;22:19. [3] R. D. Mosteller, Simplified calculation of
body-surface area, N Engl J Med 1987;317:1098.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import DataError
from .measures import components, structure_boxes, voxel_size

__all__ = [
    "HEIGHTS",
    "RIGHT_FIRST",
    "WEIGHTS",
    "body_surface",
    "ed_and_es",
    "frame_shapes",
    "frame_volumes",
    "function_flags",
    "heart_function",
    "heart_numbers",
    "known_times",
    "rate_of_interval",
    "rate_of_times",
    "shape_flags",
    "within",
]

RIGHT_FIRST = {"rv": 1, "myo": 2, "lv": 3}
"""Label numbers of ACDC."""

NAMES = {"lv": "left ventricle", "myo": "myocardium", "rv": "right ventricle"}

DENSITY = 1.05  # g/mL of myocardium
EF_RANGE = (5, 85)  # percent
MYOCARDIUM_CHANGE = 0.2  # of its greatest volume: muscle hardly compresses
RATES = (30, 220)  # beats a minute; others are headers' errors, or frames of a part of the beat

HEIGHTS, WEIGHTS = (0.4, 2.5), (2, 350)
"""Metres and kilograms of a person. A header with others has another unit, or zeros for what nobody measured."""


def frame_volumes(
    labels: Sequence[np.ndarray], spacing: Sequence[float], numbers: Mapping[str, int] = RIGHT_FIRST
) -> dict[str, np.ndarray]:
    """Volumes of the heart's structures in each frame.

    Args:
        labels: one label map ``X, Y, Z`` a frame, all of one shape; an array ``T, X, Y, Z`` is such a sequence.
        spacing: size of a voxel in millimetres, three numbers; across slices it is their distance.
        numbers: label numbers of ``lv``, ``myo`` and ``rv``, by default those of ACDC.

    Returns:
        mL in each of the T frames, by ``lv``, ``myo`` and ``rv``.

    Raises:
        DataError: on frames of different shapes, other label numbers, a spacing that is not finite and positive.
    """
    size = voxel_size(spacing, 3) / 1000
    volumes: dict[str, list[float]] = {name: [] for name in NAMES}
    for frame, boxes in zip(labels, _frame_boxes(labels, numbers), strict=True):
        for name, values in volumes.items():
            values.append(size * np.count_nonzero(_mask(frame, boxes, numbers[name])))
    return {name: np.array(values) for name, values in volumes.items()}


def ed_and_es(
    lv: Sequence[float], ed: int | None = None, es: int | None = None, frames: Sequence[int] | None = None
) -> tuple[int, int]:
    """End-diastolic and end-systolic frame: of the greatest and the smallest left ventricle.

    Args:
        lv: its volume in each frame.
        ed: the end-diastolic frame, as it is called, where it is known.
        es: the end-systolic one, likewise.
        frames: what the frames are called, by default 0, 1, 2, ...

    Returns:
        The places of both among the frames, counted from 0; the first of several equal ones.

    Raises:
        DataError: on fewer than two frames, a volume that is negative or not finite, a frame that is not there, one
            frame that is given for both.
    """
    values = np.asarray(lv, float)
    if values.ndim != 1 or len(values) < 2:
        raise DataError(f"Heart function needs two frames or more, got {values.size}.")
    if not (np.isfinite(values) & (values >= 0)).all():
        raise DataError("A volume of the heart is negative or not finite.")
    called = range(len(values)) if frames is None else frames
    for name, frame in {"ed": ed, "es": es}.items():
        if frame is not None and frame not in called:
            raise DataError(f"The {name} frame is {frame}, but the frames are {_named(called)}.")
    if ed is not None and ed == es:
        raise DataError(f"Frame {ed} cannot be both end-diastole and end-systole.")
    return (
        int(values.argmax()) if ed is None else called.index(ed),
        int(values.argmin()) if es is None else called.index(es),
    )


def heart_function(
    volumes: Mapping[str, Sequence[float]],
    ed: int | None = None,
    es: int | None = None,
    rate: float | None = None,
    surface: float | None = None,
    frames: Sequence[int] | None = None,
) -> dict[str, float]:
    """Function of both ventricles from the volumes of the frames of one beat, or of ED and ES alone.

    Args:
        volumes: mL in each frame by ``lv``, ``myo`` and ``rv``, as from :func:`frame_volumes`.
        ed: the end-diastolic frame, as it is called, where it is known.
        es: the end-systolic one, likewise.
        rate: beats a minute, where known.
        surface: of the body in m2, where known.
        frames: what the frames are called, such as 1 and 12 of ACDC's pairs; by default 0, 1, 2, ...

    Returns:
        The columns of the module's table, without those of an unknown rate or surface. The ejection fraction is NaN
        where the ventricle is empty at ED.

    Raises:
        DataError: as :func:`ed_and_es`; when a structure is missing or has another number of frames.
    """
    at_ed, at_es = _checked(volumes, ed, es, frames)
    called = range(len(volumes["lv"])) if frames is None else frames
    row: dict[str, float] = {"ed_frame": called[at_ed], "es_frame": called[at_es]}
    for side in ("lv", "rv"):
        row |= _ventricle(side, float(volumes[side][at_ed]), float(volumes[side][at_es]), rate, surface)
        if side == "lv":
            row["lv_mass_g"] = DENSITY * float(volumes["myo"][at_ed])
            if surface is not None:
                row["lv_massi_g_m2"] = row["lv_mass_g"] / surface
    if rate is not None:
        row["heart_rate_per_min"] = rate
    if surface is not None:
        row["body_surface_m2"] = surface
    return row


def _ventricle(side: str, edv: float, esv: float, rate: float | None, surface: float | None) -> dict[str, float]:
    stroke = edv - esv
    row = {f"{side}_edv_ml": edv, f"{side}_esv_ml": esv, f"{side}_sv_ml": stroke, f"{side}_ef_percent": _ef(edv, esv)}
    if surface is not None:
        row |= {f"{side}_{what}i_ml_m2": row[f"{side}_{what}_ml"] / surface for what in ("edv", "esv", "sv")}
    if rate is not None:
        row[f"{side}_co_l_min"] = stroke * rate / 1000
        if surface is not None:
            row[f"{side}_ci_l_min_m2"] = stroke * rate / 1000 / surface
    return row


def _ef(edv: float, esv: float) -> float:
    return 100 * (edv - esv) / edv if edv else math.nan


def rate_of_interval(interval: float | None) -> float | None:
    """Heart rate from DICOM's NominalInterval (0018,1062).

    Args:
        interval: length of the beat in milliseconds, where the header says it.

    Returns:
        60,000 / the interval, in beats a minute; None where it is unknown, or the rate is not within :data:`RATES`.
    """
    return within(RATES, 60_000 / interval if interval else None)


def rate_of_times(times: Sequence[float]) -> float | None:
    """Heart rate from the times of frames that are spread evenly over one whole beat.

    Args:
        times: milliseconds of the T frames.

    Returns:
        60,000 / (T x the mean step) in beats a minute; None where times are not known, see :func:`known_times`, or the
        rate is not within :data:`RATES`.
    """
    if not known_times(times):
        return None
    return within(RATES, 60_000 * (len(times) - 1) / (len(times) * (times[-1] - times[0])))


def known_times(times: Sequence[float]) -> bool:
    """Whether times say when frames were: two or more, finite, each later than the one before."""
    return len(times) > 1 and bool(np.isfinite(times).all() and (np.diff(times) > 0).all())


def within(limits: tuple[float, float], *values: float | None) -> float | None:
    """The first of some values that is known and within limits; None where none is."""
    return next((value for value in values if value is not None and limits[0] <= value <= limits[1]), None)


def body_surface(height: float | None, weight: float | None) -> float | None:
    """Area of a body's surface by Mosteller's formula.

    Args:
        height: metres, as DICOM's PatientSize (0010,1020).
        weight: kilograms, as DICOM's PatientWeight (0010,1030).

    Returns:
        m2; None where one of them is unknown, or not within :data:`HEIGHTS` and :data:`WEIGHTS`.
    """
    height, weight = within(HEIGHTS, height), within(WEIGHTS, weight)
    return None if height is None or weight is None else math.sqrt(100 * height * weight / 3600)


def function_flags(
    volumes: Mapping[str, Sequence[float]],
    ed: int | None = None,
    es: int | None = None,
    frames: Sequence[int] | None = None,
) -> list[str]:
    """What a reader must look at in the volumes of the frames.

    Args:
        volumes: as of :func:`heart_function`.
        ed: likewise.
        es: likewise.
        frames: likewise.

    Returns:
        A sentence for each: a ventricle whose ejection fraction is outside 5 to 85 %, or that has none; myocardium
        that is not there at ED, or whose volume changes by more than a fifth of its greatest; ED and ES in neighbouring
        frames of four or more, the last and the first included, or of a pair whose frames are called so. Two frames
        without names are all that there is: that they are neighbours says nothing.

    Raises:
        DataError: as :func:`heart_function`.
    """
    at_ed, at_es = _checked(volumes, ed, es, frames)
    flags = []
    for side in ("lv", "rv"):
        ef = _ef(float(volumes[side][at_ed]), float(volumes[side][at_es]))
        if math.isnan(ef):
            flags.append(f"{NAMES[side]}: not found at end-diastole, so it has no ejection fraction")
        elif not EF_RANGE[0] <= ef <= EF_RANGE[1]:
            flags.append(f"{NAMES[side]}: ejection fraction {ef:.1f} %, outside {EF_RANGE[0]} to {EF_RANGE[1]} %")
    myocardium = np.asarray(volumes["myo"], float)
    if not myocardium[at_ed]:
        flags.append("myocardium: not found at end-diastole, so its mass is 0")
    low, high = myocardium.min(), myocardium.max()
    if high - low > MYOCARDIUM_CHANGE * high:
        flags.append(f"myocardium: its volume changes from {low:.0f} to {high:.0f} mL, by more than a fifth")
    count = len(myocardium)
    apart = abs(at_ed - at_es)
    if frames is not None and count == 2:
        neighbours = abs(frames[at_ed] - frames[at_es]) == 1
    else:
        neighbours = count >= 4 and min(apart, count - apart) == 1
    if neighbours:
        called = range(count) if frames is None else frames
        flags.append(f"end-diastole and end-systole are neighbouring frames, {called[at_ed]} and {called[at_es]}")
    return flags


def heart_numbers(names: Mapping[int, str]) -> dict[str, int] | None:
    """Label numbers of ``lv``, ``myo`` and ``rv``, if these are the structures of some label maps.

    Args:
        names: of the structures, by their numbers.

    Returns:
        The numbers of those that are called as in :data:`NAMES`; None where one is missing.
    """
    numbers = {side: n for side, name in NAMES.items() for n, known in names.items() if known.lower() == name}
    return numbers if len(numbers) == len(NAMES) else None


def frame_shapes(
    label: np.ndarray,
    numbers: Mapping[str, int] = RIGHT_FIRST,
    axis: int = 2,
    seen: Sequence[tuple[int, int]] | None = None,
) -> list[str]:
    """What a reader must look at in the shapes of the structures in one frame.

    Args:
        label: ``X, Y, Z``.
        numbers: as of :func:`frame_volumes`.
        axis: of X, Y and Z, the one across the slices.
        seen: first voxel and the one behind the last that the network saw, along each axis; by default all.

    Returns:
        ``NAME: what`` for each: a ventricle that is missing between slices that have it; a structure in several parts,
        which do not touch even at a corner; a structure at an edge of what was seen of the slices. The first and the
        last slice are no such edge: a stack often ends in the ventricles.

    Raises:
        DataError: on other axes or label numbers.
    """
    (boxes,) = _frame_boxes([label], numbers)
    window = [(0, size) for size in label.shape] if seen is None else seen
    flags = []
    for side, name in NAMES.items():
        if numbers[side] not in boxes:
            continue
        box, mask = boxes[numbers[side]], _mask(label, boxes, numbers[side])
        slices = mask.any(tuple(a for a in range(3) if a != axis))
        if side != "myo" and not slices.all():
            flags.append(f"{name}: missing between slices that have it")
        if components(mask) > 1:
            flags.append(f"{name}: in several parts")
        if any(box[a].start <= window[a][0] or box[a].stop >= window[a][1] for a in range(3) if a != axis):
            flags.append(f"{name}: at the edge of the field of view")
    return flags


def shape_flags(shapes: Sequence[Sequence[str]], frames: Sequence[int] | None = None) -> list[str]:
    """What a reader must look at in the shapes of the structures, each flag once with its frames.

    Args:
        shapes: what :func:`frame_shapes` says of each frame.
        frames: what the frames are called, by default 0, 1, 2, ...

    Returns:
        A sentence for each.
    """
    called = range(len(shapes)) if frames is None else frames
    found: dict[str, list[int]] = {}
    for name, flags in zip(called, shapes, strict=True):
        for flag in flags:
            found.setdefault(flag, []).append(name)
    return [f"{flag}, in {_listed(names)}" for flag, names in found.items()]


def _listed(frames: Sequence[int]) -> str:
    """Frames in words; of many the first three and their number."""
    if len(frames) == 1:
        return f"frame {frames[0]}"
    if len(frames) > 4:
        return f"{len(frames)} frames ({', '.join(map(str, frames[:3]))}, ...)"
    return f"frames {', '.join(map(str, frames[:-1]))} and {frames[-1]}"


def _named(frames: Sequence[int]) -> str:
    """What frames are called, in a few words."""
    first, last = frames[0], frames[-1]
    return f"{first} to {last}" if list(frames) == [*range(first, last + 1)] else ", ".join(map(str, frames))


def _checked(
    volumes: Mapping[str, Sequence[float]], ed: int | None, es: int | None, frames: Sequence[int] | None
) -> tuple[int, int]:
    """Places of ED and ES of volumes that belong together."""
    missing = [name for name in NAMES if name not in volumes]
    if missing:
        raise DataError(f"Heart function needs the volumes of lv, myo and rv, {' and '.join(missing)} is missing.")
    counts = {len(volumes[name]) for name in NAMES} | (set() if frames is None else {len(frames)})
    if len(counts) > 1:
        raise DataError(f"Volumes and names of the frames differ in number: {', '.join(map(str, sorted(counts)))}.")
    for name in ("myo", "rv"):
        ed_and_es(volumes[name])  # the same numbers are wrong there
    return ed_and_es(volumes["lv"], ed, es, frames)


def _frame_boxes(labels: Sequence[np.ndarray], numbers: Mapping[str, int]) -> list[dict[int, tuple]]:
    """Boxes around the structures in each frame."""
    if set(numbers) != set(NAMES) or len(set(numbers.values())) < 3 or min(numbers.values()) < 1:
        raise DataError(f"lv, myo and rv need three different label numbers from 1 on, got {dict(numbers)}.")
    for t, frame in enumerate(labels):
        if frame.ndim != 3 or frame.shape != labels[0].shape:
            raise DataError(
                f"Frame {t} has shape {list(frame.shape)}, the first one {list(labels[0].shape)}: the frames of a "
                "heart are volumes X, Y, Z on one grid."
            )
    return [structure_boxes(frame, tuple(numbers.values()), f"Frame {t}") for t, frame in enumerate(labels)]


def _mask(frame: np.ndarray, boxes: Mapping[int, tuple], number: int) -> np.ndarray:
    """Where a structure is, within its box; nothing where it is not."""
    return frame[boxes.get(number, (slice(0),) * 3)] == number
