"""The measures of all cases: each case's kept as it is done, and ``measures.csv`` made of them."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Evaluator, IterationEvents
from monai.utils import ensure_tuple

from ..data.cine import TimeSeries, nifti_series
from ..data.folders import natural_order
from ..data.formats import NIFTI, PICTURES
from ..data.geometry import seen_voxels, slices_along
from ..data.readers import read_image
from ..errors import DataError, beginning
from ..storage import whole_file
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

__all__ = ["Measures", "patient_row", "read_info"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Measures:
    """Handler of an evaluator that measures each case, and ends with ``measures.csv`` of all cases.

    What was measured of a case lies in ``measures/NAME.json``, frame by frame, so that a run that goes on after an
    interruption, or of several processes, has all in its table. Hearts over time have one row each with their function;
    so do the files ``NAME_frameMM`` of one patient. See :mod:`networks.results.measures` and
    :mod:`networks.results.hearts` for the columns.

    Args:
        saver: names the label maps.
        cases: all of them, ``{"id", "image"}`` each, and ``"series"`` of those over time.
        labels: names of the classes; see :func:`networks.results.measures.structure_names`.
        num_classes: of the network.
        field_of_view: what it sees of a slice; see :class:`networks.data.geometry.FieldOfViewd`.
        ed_frame: the end-diastolic frame of all cases, as the table calls it; by default of the greatest left
            ventricle, or as the ``Info.cfg`` beside the image says.
        es_frame: the end-systolic one, likewise.
        curves: draw ``NAME_curve.png`` of each heart over time.
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
        self.curves = curves
        self.enabled = enabled
        self._frames: list[Row] = []

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to an evaluator whose batches have the image as it was loaded as ``"raw"``."""
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
            DataError: when all other cases are done: which label maps cannot be used, and why.
        """
        failed = []
        for case in self.cases:
            target, kept = self.saver.target(case["image"]), self.file(case["image"])
            if not target.is_file():
                logger.warning(f"{case['image']} has no label map {target}: left out")
                continue
            sure = kept.is_file() and kept.stat().st_mtime_ns > target.stat().st_mtime_ns
            before = json.loads(kept.read_text(encoding="utf-8"))["frames"] if sure else []
            try:
                frames = self._of_files(case, target)
            except Exception as error:
                cause = beginning(error)
                failed.append(str(cause) if isinstance(cause, DataError) else f"{target}: {cause}. Write it again.")
                logger.error(failed[-1])
                continue
            for old, new in zip(before, frames):
                new |= {name: value for name, value in old.items() if name.endswith("confidence")}
            self._keep(case["image"], frames)
        self.write_table()
        if failed:
            raise DataError(
                f"{len(failed)} of the label maps cannot be used, the others are measured:\n" + "\n".join(failed)
            )

    def write_table(self) -> None:
        """Write ``measures.csv`` of all cases that were measured, one row each, and the curves.

        Raises:
            DataError: when all is written: which cases do not have the frames that were named.
        """
        rows: dict[str, Row] = {}
        failed = []
        for name, records in self._patients().items():
            frames = [frame for record in records for frame in record["frames"]]
            if self.heart is None or len(frames) == 1:
                rows[name] = {key: value for key, value in frames[0].items() if key != "shapes"}
                if self.heart is not None:
                    rows[name]["flags"] = "; ".join(frames[0]["shapes"])
                continue
            try:
                rows[name] = self._patient(records)
            except DataError as error:
                failed.append(f"{records[0]['image']}: {error}")
                continue
            logger.info(_summary(name, rows[name]))
        write_measures(self.output_dir / "measures.csv", rows)
        if failed:
            raise DataError("\n".join(failed))

    def _patient(self, records: Sequence[Row]) -> Row:
        """The row of one heart over time: of one file or study, or of a file for each frame."""
        records = sorted(records, key=lambda record: natural_order(record["id"]))
        image = records[0]["image"]
        info = read_info(Path(image).parent)
        frames = [frame for record in records for frame in record["frames"]]
        called = series = None
        if len(records) > 1:
            called = [int(re.findall(r"\d+$", record["id"])[0]) for record in records]
        else:
            series = next(case.get("series") for case in self.cases if str(case["image"]) == image)
            info = {key: value - 1 if key in ("ED", "ES") else value for key, value in info.items()}
        ed, es = (
            int(info[key]) if named is None and key in info else named
            for key, named in (("ED", self.ed_frame), ("ES", self.es_frame))
        )
        row = patient_row(frames, self.names, called, series, info, ed, es)
        if self.curves and series is not None:
            volumes = frame_columns(frames, self.names)
            figure = volume_curve(volumes, row["ed_frame"], row["es_frame"], series.times)
            with whole_file(result_file(self.saver, image, "curve.png")) as name:
                figure.savefig(name)
        return row

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
            if label.shape[1:] != image.shape[1:]:
                raise DataError(
                    f"{target} has shape {list(label.shape[1:])}, its image {list(image.shape[1:])}: they must be "
                    "of one grid. Segment the image again."
                )
            frames.append(self._of_frame(self.saver.classes(label[0], target), image))
        return frames

    def _keep(self, image: str, frames: list[Row]) -> None:
        content = {"image": image, "frames": [{name: _plain(value) for name, value in row.items()} for row in frames]}
        with whole_file(self.file(image)) as name:
            Path(name).write_text(json.dumps(content, indent=1), encoding="utf-8", errors="backslashreplace")

    def _finish(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the others' cases are kept
            if torch.distributed.get_rank() != 0:
                return
        self.write_table()

    def _patients(self) -> dict[str, list[Row]]:
        """What was measured, by the name of its row: a case, or the patient of some files ``NAME_frameMM``."""
        records: dict[tuple[str, str], list[Row]] = {}
        for case in self.cases:
            kept = self.file(case["image"])
            if kept.is_file():
                frame = re.fullmatch(r"(.+)_frame\d+", case["id"])
                name = frame[1] if frame and self.heart is not None and "series" not in case else case["id"]
                record = {"id": case["id"], **json.loads(kept.read_text(encoding="utf-8"))}
                record["frames"] = [{k: math.nan if v is None else v for k, v in f.items()} for f in record["frames"]]
                records.setdefault((str(kept.parent.relative_to(self.output_dir / "measures")), name), []).append(
                    record
                )
        for (folder, name), found in list(records.items()):
            if len(found) == 1 and name != found[0]["id"]:  # the one frame of a patient
                records[(folder, found[0]["id"])] = records.pop((folder, name))
        counts = Counter(name for _, name in records)
        return {
            name if counts[name] == 1 else f"{folder}/{name}": found
            for (folder, name), found in sorted(records.items())
        }


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


def read_info(folder: Path) -> dict[str, float]:
    """The numbers of the ``Info.cfg`` that ACDC has beside a patient's images; nothing where there is no such file.

    Args:
        folder: of the images.

    Returns:
        ``ED`` and ``ES``, frames counted from 1, ``Height`` in centimetres, ``Weight`` in kilograms.
    """
    file = folder / "Info.cfg"
    if not file.is_file():
        return {}
    found = re.findall(
        r"^(ED|ES|Height|Weight): *([\d.]+) *$", file.read_text(encoding="utf-8", errors="replace"), re.M
    )
    return {key: int(value) if key in ("ED", "ES") else float(value) for key, value in found}


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
