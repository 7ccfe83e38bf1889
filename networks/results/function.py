"""Function of hearts in an evaluation: predicted against true, where a patient has truth at two frames or more."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Events
from monai.engines import Evaluator
from monai.utils import string_list_all_gather

from ..errors import DataError
from ..storage import whole_file, write_csv
from .agreement import agreement, bland_altman
from .hearts import ed_and_es, frame_volumes, heart_function, heart_numbers
from .measures import structure_names
from .measuring import FRAME, check_frames, info_files, read_info, row_names

__all__ = ["HeartReport", "function_table"]

logger = logging.getLogger(__name__)

MEASURES = {
    "lv_ef_percent": ("LV ejection fraction", "%"),
    "rv_ef_percent": ("RV ejection fraction", "%"),
    "lv_edv_ml": ("LV end-diastolic volume", "mL"),
    "rv_edv_ml": ("RV end-diastolic volume", "mL"),
    "lv_esv_ml": ("LV end-systolic volume", "mL"),
    "rv_esv_ml": ("RV end-systolic volume", "mL"),
    "lv_mass_g": ("LV mass", "g"),
}
"""Columns of :mod:`networks.results.hearts` that are compared, with their titles and units."""


class HeartReport:
    """Handler that ends an evaluation of hearts with what a cardiologist compares.

    Writes ``function.csv`` (predicted and true values of each patient), ``function.md`` (see :func:`function_table`)
    and ``lv_ef.png`` and ``rv_ef.png`` (Bland-Altman plots). A patient is what cases ``NAME_frameMM`` have in common.
    ED and ES are the frames that the patient's ``Info.cfg`` names, see :func:`networks.results.measuring.info_files`,
    else those of the greatest and smallest true left ventricle; predicted volumes are taken at the same frames. Of
    other label maps than hearts, and of patients with one frame, nothing is written.

    Args:
        output_dir: where to write.
        labels: names of the classes; see :func:`networks.results.measures.structure_names`.
        num_classes: of the network.

    Raises:
        DataError: when all is written, in each of several processes: whose ``Info.cfg`` or files say what cannot be.
    """

    def __init__(self, output_dir: str | Path, labels: Mapping[str, str] | Sequence[str], num_classes: int) -> None:
        self.output_dir = Path(output_dir)
        self.heart = heart_numbers(structure_names(labels, num_classes))
        self._cases: list[str] = []

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to an evaluator whose predictions and labels lie on the image file's own grid."""
        if self.heart is not None:
            evaluator.add_event_handler(Events.STARTED, self._cases.clear)
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
            evaluator.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, evaluator: Evaluator) -> None:
        assert self.heart is not None
        for case, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            named = FRAME.fullmatch(str(case["id"]))
            if named is None:
                continue
            spacing = np.linalg.norm(np.asarray(output["label"].affine, float)[:3, :3], axis=0)
            found: dict[str, Any] = {
                "id": named[0],
                "patient": named[1],
                "frame": int(named[2]) + int("frame" in case),  # as Info.cfg counts, from 1
                "image": str(case["image"].meta["filename_or_obj"]),
            }
            for key in ("label", "pred"):
                volume = np.asarray(output[key].cpu())[0].astype(np.uint8)
                found[key] = {n: float(v[0]) for n, v in frame_volumes([volume], spacing.tolist(), self.heart).items()}
            self._cases.append(json.dumps(found))

    def _write(self, evaluator: Evaluator) -> None:
        patients: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for text in string_list_all_gather(self._cases):
            case = json.loads(text)
            patients.setdefault((str(Path(case["image"]).parent), case["patient"]), []).append(case)
        infos = info_files({patient: cases[0]["image"] for patient, cases in patients.items()})
        several = {patient: cases for patient, cases in sorted(patients.items()) if len(cases) > 1}
        rows: dict[str, dict[str, float]] = {}
        failed: list[str] = []
        for patient, name in row_names({patient: patient for patient in several}).items():
            try:
                rows[name] = _function(several[patient], infos.get(patient))
            except DataError as error:
                failed.append(f"{several[patient][0]['image']}: {error}")
        if rows and idist.get_rank() == 0:
            self._save(rows)
        if failed:
            raise DataError("\n".join([f"{len(failed)} hearts are not compared, the others are:", *failed]))

    def _save(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        columns = [f"{which}_{column}" for column in MEASURES for which in ("predicted", "true")]
        cells = [[name, *(f"{row[column]:.6g}" for column in columns)] for name, row in rows.items()]
        write_csv(self.output_dir / "function.csv", ["patient", *columns], cells)
        table = function_table(list(rows.values()))
        with whole_file(self.output_dir / "function.md") as name:
            Path(name).write_text(table + "\n", encoding="utf-8")
        for side in ("lv", "rv"):
            predicted, true = (
                [row[f"{which}_{side}_ef_percent"] for row in rows.values()] for which in ("predicted", "true")
            )
            with whole_file(self.output_dir / f"{side}_ef.png") as name:
                bland_altman(predicted, true, *MEASURES[f"{side}_ef_percent"]).savefig(name)
        logger.info(f"function of {len(rows)} hearts:\n{table}")


def function_table(rows: Sequence[Mapping[str, float]]) -> str:
    """Markdown table of how far predicted function is from the true one; see :mod:`networks.results.agreement`.

    Args:
        rows: of each patient ``predicted_COLUMN`` and ``true_COLUMN`` of :data:`MEASURES`.

    Returns:
        A row a measure: mean absolute error, bias, 95 % limits of agreement, correlation.
    """
    lines = [
        "| measure | mean absolute error | bias | limits of agreement | correlation |",
        "|---|---:|---:|---:|---:|",
    ]
    for column, (title, unit) in MEASURES.items():
        found = agreement(*([row[f"{which}_{column}"] for row in rows] for which in ("predicted", "true")))
        unit = "points" if unit == "%" else unit
        left_out = f" ({found['undefined']:g} undefined)" if found["undefined"] else ""
        lines.append(
            f"| {title}{left_out} | {found['mean_absolute_error']:.1f} {unit} | {found['bias']:+.1f} | "
            f"{found['limit_low']:.1f} to {found['limit_high']:.1f} | {found['correlation']:.3f} |"
        )
    return "\n".join([*lines, "", f"{len(rows)} patients; predicted - true, at the true ED and ES."])


def _function(cases: Sequence[Mapping[str, Any]], info_file: Path | None) -> dict[str, float]:
    """Predicted and true function of one patient."""
    cases = sorted(cases, key=lambda case: case["frame"])
    info = {} if info_file is None else read_info(info_file)
    called = [case["frame"] for case in cases]
    check_frames(called, [case["id"] for case in cases])
    volumes = {
        which: {name: [case[key][name] for case in cases] for name in cases[0][key]}
        for which, key in (("predicted", "pred"), ("true", "label"))
    }
    ed, es = (int(info[key]) if key in info else None for key in ("ED", "ES"))
    ed, es = (called[place] for place in ed_and_es(volumes["true"]["lv"], ed, es, called))
    return {
        f"{which}_{column}": value
        for which, found in volumes.items()
        for column, value in heart_function(found, ed, es, frames=called).items()
        if column in MEASURES
    }
