"""The measures of all cases: each case's kept as it is done, and ``measures.csv`` made of them."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines import Evaluator, IterationEvents
from monai.utils import ensure_tuple

from ..data.cine import TimeSeries, nifti_series
from ..data.folders import natural_order
from ..data.formats import NIFTI, PICTURES
from ..data.geometry import seen_voxels, slices_along
from ..data.labels import CheckLabeld
from ..data.readers import read_image
from ..errors import DataError, WriteError, beginning
from ..storage import changed, whole_file
from .beats import volume_curve
from .hearts import (
    HEIGHTS,
    WEIGHTS,
    body_surface,
    frame_shapes,
    function_flags,
    heart_function,
    heart_numbers,
    rate_of_interval,
    rate_of_times,
    shape_flags,
    within,
)
from .label_maps import SaveImageLabelMapd, result_file
from .measures import column_of, measures, structure_names, write_measures
from .report import Overlays

__all__ = ["Measures", "check_frames", "info_files", "patient_row", "read_info", "row_names"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Record = dict[str, Any]

FRAME = re.compile(r"(.+)_frame(\d+)")
"""The name of one frame of a patient."""

Patient = tuple[str, str, bool]
"""Folder, name, and whether it has a file for each frame."""

Key = TypeVar("Key", bound=Hashable)

INFO = {"ed": "ED", "es": "ES", "height": "Height", "weight": "Weight"}
"""What is read of an ``Info.cfg``."""


class Measures:
    """Handler of an evaluator that measures each case, and ends with ``measures.csv`` of all cases.

    What was measured of a case lies in ``measures/NAME.json``, frame by frame, so that a run that goes on after an
    interruption, or of several processes, has all in its table. It counts while the label map is there, and neither
    that nor the image was changed since; a label map that was corrected meanwhile is measured as it lies. Hearts over
    time have one row each with their function; so do the files ``NAME_frameMM`` of one patient. See
    :mod:`networks.results.measures` and :mod:`networks.results.hearts` for the columns.

    Args:
        saver: names the label maps.
        cases: all of them, ``{"id", "image"}`` each, and ``"series"`` of those over time.
        labels: names of the classes; see :func:`networks.results.measures.structure_names`.
        num_classes: of the network.
        field_of_view: what it sees of a slice; see :class:`networks.data.geometry.FieldOfViewd`.
        ed_frame: the end-diastolic frame of all cases, as the table calls it; by default of the greatest left
            ventricle, or as the ``Info.cfg`` says that :func:`info_files` finds.
        es_frame: the end-systolic one, likewise.
        curves: draw ``NAME_curve.png`` of each heart over time, and the pictures of label maps that are measured as
            they lie. Without it a curve that is there is kept up to date, and pictures out of date are removed.
        enabled: False measures nothing in an evaluator.
    """

    def __init__(
        self,
        saver: SaveImageLabelMapd,
        cases: Sequence[Mapping[str, Any]],
        labels: Mapping[str, str] | Sequence[str],
        num_classes: int,
        field_of_view: float | str | None = "whole",
        ed_frame: int | None = None,
        es_frame: int | None = None,
        curves: bool = False,
        enabled: bool = True,
    ) -> None:
        self.saver = saver
        self.output_dir = saver.output_dir
        self.cases = cases
        self.names = structure_names(labels, num_classes)
        self.heart = heart_numbers(self.names)
        self.field_of_view = field_of_view
        self.ed_frame = ed_frame
        self.es_frame = es_frame
        self.overlays = Overlays(saver, cases, labels, num_classes, enabled=curves)
        self.enabled = enabled
        self._frames: list[Row] = []

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to a :class:`networks.engine.evaluator.CaseEvaluator` whose batches have the image as it was loaded as
        ``"raw"``. Its ``failed`` gets the cases that have no row."""
        if self.enabled:
            evaluator.add_event_handler(Events.ITERATION_STARTED, self._forget)
            evaluator.add_event_handler(IterationEvents.MODEL_COMPLETED, self._measure)  # an error is the case's
            evaluator.add_event_handler(Events.COMPLETED, self._finish)

    def file(self, image: str | Path) -> Path:
        """Where the measures of an image are kept."""
        target = self.saver.target(image).relative_to(self.output_dir)
        return self.output_dir / "measures" / target.with_name(f"{target.name.rpartition('_seg')[0]}.json")

    def again(self) -> None:
        """Measure the label maps as they lie, such as those that a person has corrected, and write the table.

        Nothing says how sure a person is, so there is no confidence of a label map that changed since it was measured.

        Raises:
            DataError: when all other cases are done: which cannot be measured, and why.
        """
        failed = self._of_label_maps(self.cases) | self.write_table()
        if failed:
            raise DataError(
                f"{len(failed)} of the cases cannot be measured, the others are:\n" + "\n".join(failed.values())
            )

    def write_table(self) -> dict[str, str]:
        """Write ``measures.csv`` of all cases whose measures count, one row each, and the curves.

        Returns:
            Why cases have no row, by their images: they lack the frames that were named, or their ``Info.cfg`` is none.
        """
        patients = self._patients()
        infos = info_files({patient: cases[0]["image"] for patient, cases in patients.items()}) if self.heart else {}
        found = {patient: records for patient, cases in patients.items() if (records := self._records(cases))}
        rows: dict[str, Row] = {}
        failed: dict[str, str] = {}
        for patient, name in row_names({key: (key[0], _row_name(key, found[key], patients)) for key in found}).items():
            records = found[patient]
            image = records[0]["image"]
            frames = [frame for record in records for frame in record["frames"]]
            if self.heart is None or len(frames) == 1:
                rows[name] = {key: value for key, value in frames[0].items() if key != "shapes"}
                if self.heart is not None:
                    rows[name]["flags"] = "; ".join(frames[0]["shapes"])
                continue
            try:
                rows[name] = self._patient(records, infos.get(patient))
            except DataError as error:
                failed[image] = f"{image}: {error}"
                result_file(self.saver, image, "curve.png").unlink(missing_ok=True)
                continue
            logger.info(_summary(name, rows[name]))
        write_measures(self.output_dir / "measures.csv", rows)
        return failed

    def _patient(self, records: Sequence[Record], info_file: Path | None) -> Row:
        """The row of one heart over time: of one file or study, or of a file for each frame."""
        image = records[0]["image"]
        info = {} if info_file is None else read_info(info_file)
        frames = [frame for record in records for frame in record["frames"]]
        called = series = None
        if len(records) > 1:
            names = [record["id"] for record in records]
            called = [int(FRAME.fullmatch(name)[2]) for name in names]  # type: ignore[index]
            check_frames(called, names)
        else:
            series = self.overlays.series[image]
            info = {key: value - 1 if key in ("ED", "ES") else value for key, value in info.items()}
        ed, es = (
            int(info[key]) if named is None and key in info else named
            for key, named in (("ED", self.ed_frame), ("ES", self.es_frame))
        )
        row = patient_row(frames, self.names, called, series, info, ed, es)
        curve = result_file(self.saver, image, "curve.png")
        if series is not None and (self.overlays.enabled or curve.is_file()):
            figure = volume_curve(frame_columns(frames, self.names), row["ed_frame"], row["es_frame"], series.times)
            with whole_file(curve) as name:
                figure.savefig(name)
        return row

    def _counts(self, case: Mapping[str, Any]) -> bool:
        """Whether what is kept of a case was measured in its label map as it lies, of its image as it is."""
        kept, made_of = self.file(case["image"]), [self.saver.target(case["image"]), Path(case["image"])]
        if not all(file.exists() for file in (kept, *made_of)):
            return False
        # A folder changes with all that is written into it, results too.
        return changed(kept) >= max(changed(file) for file in made_of if file.is_file())

    def _of_label_maps(self, cases: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        """Measure label maps as they lie; why some cannot be, by their images."""
        failed: dict[str, str] = {}
        for case in cases:
            image, target = str(case["image"]), self.saver.target(case["image"])
            if not target.is_file():
                logger.warning(f"{image} has no label map {target}: left out")
                self._leave_out(case)
                continue
            kept = self.file(image)
            before = json.loads(kept.read_text(encoding="utf-8"))["frames"] if self._counts(case) else []
            try:
                frames = self._of_files(case, target)
            except Exception as error:
                cause = beginning(error)
                if isinstance(cause, WriteError):  # nor could the next be written
                    raise
                failed[image] = str(cause) if isinstance(cause, DataError) else f"{target}: {cause}. Write it again."
                logger.error(failed[image])
                self._leave_out(case)
                continue
            for old, new in zip(before, frames):
                new |= {name: value for name, value in old.items() if name.endswith("confidence")}
            self._keep(image, frames)
            picture = Overlays.picture(self.saver, case)
            if picture.is_file() and changed(picture) < changed(target):
                self._remove(picture)
        return failed

    def _leave_out(self, case: Mapping[str, Any]) -> None:
        """Of a case whose label map is not there, or cannot be used, nothing measured or drawn counts."""
        self.file(case["image"]).unlink(missing_ok=True)
        for picture in (Overlays.picture(self.saver, case), result_file(self.saver, case["image"], "curve.png")):
            if picture.is_file():
                self._remove(picture)

    def _remove(self, picture: Path) -> None:
        picture.unlink()
        logger.warning(f"{picture} is out of date: removed. Measure with --overlay True to draw it anew.")

    def _forget(self, evaluator: Evaluator) -> None:
        """Measures of an earlier label map would pass for those of the new one, if the run ended between the two."""
        for image in ensure_tuple(evaluator.state.batch["image"].meta["filename_or_obj"]):
            self.file(image).unlink(missing_ok=True)

    def _measure(self, evaluator: Evaluator) -> None:
        for case, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            image = str(case["image"].meta["filename_or_obj"])
            if int(case.get("frame", 0)) == 0:
                self._frames = []
            probability = output.get("confidence")
            self._frames.append(
                self._of_frame(
                    np.asarray(output["pred"].cpu())[0],
                    case["raw"],
                    None if probability is None else np.asarray(probability.cpu())[0],
                )
            )
            if len(self._frames) == int(case.get("frames", 1)):
                self._keep(image, self._frames)

    def _of_frame(self, label: np.ndarray, image: Any, probability: np.ndarray | None = None) -> Row:
        """Measures of one label map ``X, Y, Z`` and its image, a ``MetaTensor`` ``C, X, Y, Z`` as it was loaded."""
        values = np.asarray(image.cpu())
        if str(image.meta["filename_or_obj"]).lower().endswith(PICTURES):
            flat = values.reshape(*values.shape[:3])
            sure = None if probability is None else probability[..., 0]
            return measures(label[..., 0], self.names, None, flat, sure)
        spacing = np.linalg.norm(np.asarray(image.affine, float)[:3, :3], axis=0)
        row: Row = dict(measures(label, self.names, spacing.tolist(), values, probability))
        if self.heart is not None:
            axis = slices_along(image.affine, label.shape)
            seen = seen_voxels(label.shape, spacing, axis, self.field_of_view)
            row["shapes"] = frame_shapes(label, self.heart, axis, seen)
        return row

    def _of_files(self, case: Mapping[str, Any], target: Path) -> list[Row]:
        series: TimeSeries | None = case.get("series")
        labels = nifti_series(target) if target.name.endswith(NIFTI) else None
        if (series is None) != (labels is None) or (series and labels and series.frames != labels.frames):
            raise DataError(f"{target} has other frames than its image {case['image']}. Segment the image again.")
        frames = []
        for frame in range(series.frames if series else 1):
            image = series.read(frame) if series else read_image(case["image"])
            label = labels.read(frame) if labels else read_image(target)
            if image.ndim == 3:  # a picture
                image, label = image[..., None], label[..., None]
            label = MetaTensor(torch.as_tensor(self.saver.classes(label, target))).copy_meta_from(label)
            CheckLabeld("label", len(self.saver.numbers))({"label": label, "image": image})
            frames.append(self._of_frame(np.asarray(label)[0], image))
        if self.overlays.enabled:
            self.overlays.draw(str(case["image"]), label)
        return frames

    def _keep(self, image: str, frames: list[Row]) -> None:
        content = {"image": image, "frames": [{name: _plain(value) for name, value in row.items()} for row in frames]}
        with whole_file(self.file(image)) as name:
            Path(name).write_text(json.dumps(content, indent=1), encoding="utf-8", errors="backslashreplace")

    def _finish(self, evaluator: Any) -> None:
        for image in evaluator.failed:  # of which an earlier run may have measured something
            self.file(image).unlink(missing_ok=True)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the others' cases are kept
            if torch.distributed.get_rank() != 0:
                return
        corrected = [c for c in self.cases if self.file(c["image"]).is_file() and not self._counts(c)]
        if corrected:
            logger.info(f"{len(corrected)} label maps were changed since they were measured, and are measured again")
        evaluator.failed |= self._of_label_maps(corrected) | self.write_table()

    def _patients(self) -> dict[Patient, list[Mapping[str, Any]]]:
        """All cases by what has a row: a case, or the patient of some files ``NAME_frameMM``."""
        patients: dict[Patient, list[Mapping[str, Any]]] = {}
        for case in sorted(self.cases, key=lambda case: natural_order(case["id"])):
            frame = FRAME.fullmatch(case["id"]) if self.heart is not None and "series" not in case else None
            folder = str(self.file(case["image"]).parent.relative_to(self.output_dir / "measures"))
            patients.setdefault((folder, frame[1] if frame else case["id"], bool(frame)), []).append(case)
        return dict(sorted(patients.items()))

    def _records(self, cases: Iterable[Mapping[str, Any]]) -> list[Record]:
        """What was measured of some cases, where it counts."""
        records = []
        for case in filter(self._counts, cases):
            frames = json.loads(self.file(case["image"]).read_text(encoding="utf-8"))["frames"]
            frames = [{name: math.nan if value is None else value for name, value in f.items()} for f in frames]
            records.append({"id": case["id"], "image": str(case["image"]), "frames": frames})
        return records


def _row_name(patient: Patient, records: Sequence[Record], patients: Collection[Patient]) -> str:
    """The name of a row in its folder: the patient's where there are several frames, unless a case is called so."""
    folder, name, _ = patient
    names = [record["id"] for record in records]
    return name if len(names) > 1 and (folder, name, False) not in patients else " and ".join(names)


def row_names(places: Mapping[Key, tuple[str, str]]) -> dict[Key, str]:
    """What rows are called: by their names, with the folder where another folder has the same.

    Args:
        places: folder and name, no two the same, by whatever the rows are of.

    Returns:
        Names by the same, in their order, no two the same.
    """
    counts = Counter(name for _, name in places.values())
    return {key: name if counts[name] == 1 else f"{folder}/{name}" for key, (folder, name) in places.items()}


def check_frames(called: Sequence[int], names: Sequence[str]) -> None:
    """Refuse two files of one frame, such as ``NAME_frame1`` and ``NAME_frame01``.

    Args:
        called: the numbers of the frames.
        names: of their files.

    Raises:
        DataError: naming both.
    """
    for number, count in Counter(called).items():
        if count > 1:
            same = " and ".join(name for name, other in zip(names, called, strict=True) if other == number)
            raise DataError(f"{same} are both frame {number}. Rename or remove one.")


def patient_row(
    frames: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    called: Sequence[int] | None = None,
    series: TimeSeries | None = None,
    info: Mapping[str, float] | None = None,
    ed: int | None = None,
    es: int | None = None,
) -> Row:
    """The row of a heart over time: its function, how sure the network was in all frames together, and flags.

    Args:
        frames: the measures of each frame, and its ``"shapes"``.
        names: of the structures by their numbers, those of the heart among them.
        called: what the frames are called, by default 0, 1, 2, ...
        series: what says the times of the frames, and the patient's height and weight.
        info: of an ``Info.cfg``, as :func:`read_info`, for height and weight that the series does not say.
        ed: the end-diastolic frame, as it is called, where it is known.
        es: the end-systolic one, likewise.

    Returns:
        Columns of :mod:`networks.results.hearts`, ``NAME_confidence``, ``confidence`` and ``flags``.

    Raises:
        DataError: when a frame that is named is not there; see :func:`networks.results.hearts.ed_and_es`.
    """
    volumes = frame_columns(frames, names)
    info = info or {}
    height, weight = (None, None) if series is None else (series.height, series.weight)
    surface = body_surface(
        within(HEIGHTS, height, info.get("Height", 0) / 100), within(WEIGHTS, weight, info.get("Weight"))
    )
    rate = None if series is None else rate_of_interval(series.interval) or rate_of_times(series.times or [])
    row: Row = heart_function(volumes, ed, es, rate, surface, called)
    row |= _confidence(frames, [column_of(name) for name in names.values()])
    flags = function_flags(volumes, ed, es, called) + shape_flags([f["shapes"] for f in frames], called)
    return {**row, "flags": "; ".join(flags)}


def frame_columns(frames: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> dict[str, list[float]]:
    """Volumes of the heart's structures in each frame, mL by ``lv``, ``myo`` and ``rv``; see :func:`patient_row`."""
    numbers = heart_numbers(names)
    assert numbers is not None
    return {side: [float(frame[f"{column_of(names[n])}_ml"]) for frame in frames] for side, n in numbers.items()}


def info_files(patients: Mapping[Key, str]) -> dict[Key, Path]:
    """The ``Info.cfg`` of each patient that has one: beside the image, or in the folder that is the image.

    One that lies beside several patients is not used, as it does not say whose it is. The log has a warning of it.

    Args:
        patients: an image of each.

    Returns:
        Files, by whatever stands for the patients.
    """
    beside: dict[Path, list[Key]] = {}
    for patient, image in patients.items():
        file = (Path(image) if Path(image).is_dir() else Path(image).parent) / "Info.cfg"
        if file.is_file():
            beside.setdefault(file, []).append(patient)
    for file, several in beside.items():
        if len(several) > 1:
            logger.warning(f"{file} lies beside {len(several)} patients and does not say whose it is: not used")
    return {only: file for file, (only, *others) in beside.items() if not others}


def read_info(file: Path) -> dict[str, float]:
    """The numbers of the ``Info.cfg`` that ACDC has beside a patient's images.

    Args:
        file: with lines ``ED: 1``; capitals, blanks and a comment behind ``#`` do not matter.

    Returns:
        ``ED`` and ``ES``, frames counted from 1, ``Height`` in centimetres, ``Weight`` in kilograms, where it has them.

    Raises:
        DataError: when a line that begins with one of these does not go on with such a number.
    """
    numbers: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if known := re.match(rf"\s*({'|'.join(INFO)})\b(.*)", line, re.IGNORECASE):
            key = INFO[known[1].lower()]
            value = re.fullmatch(r"\s*[:=]\s*(\d+(?:\.\d*)?)\s*(?:[#;].*)?", known[2])
            number = float(value[1]) if value else math.nan
            if math.isnan(number) or key in ("ED", "ES") and not (number >= 1 and number.is_integer()):
                expected = "a frame, counted from 1" if key in ("ED", "ES") else "a number"
                raise DataError(f"{file} has the line {line.strip()!r}, expected {key}: and {expected}.")
            numbers[key] = number
    return numbers


def _confidence(frames: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, float]:
    """Means over the voxels of all frames."""
    if any("confidence" not in frame for frame in frames):
        return {}
    sizes = {column: np.array([frame[f"{column}_ml"] for frame in frames]) for column in columns}
    sums = {c: np.nansum([frame[f"{c}_confidence"] for frame in frames] * size) for c, size in sizes.items()}
    means = {f"{c}_confidence": float(sums[c] / size.sum()) if size.sum() else math.nan for c, size in sizes.items()}
    total = sum(size.sum() for size in sizes.values())
    return {**means, "confidence": float(sum(sums.values()) / total) if total else math.nan}


def _summary(name: str, row: Row) -> str:
    """The row in words, for the log."""
    flags = f" Look at: {row['flags']}." if row["flags"] else ""
    return (
        f"{name}: LV {row['lv_edv_ml']:.0f} mL at end-diastole (frame {row['ed_frame']}), {row['lv_esv_ml']:.0f} mL at "
        f"end-systole (frame {row['es_frame']}), ejection fraction LV {row['lv_ef_percent']:.1f} %, "
        f"RV {row['rv_ef_percent']:.1f} %.{flags}"
    )


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
