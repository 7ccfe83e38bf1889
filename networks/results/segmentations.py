"""DICOM segmentation objects of an inference, beside its label maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.engines import Evaluator, IterationEvents

from ..data.cine import nifti_series
from ..data.dicom import series_frames
from ..data.formats import SERIES
from ..errors import DataError
from .dicom_seg import write_phases, write_segmentation
from .label_maps import SaveImageLabelMapd, result_file
from .measures import structure_names

__all__ = ["DicomSegmentations"]


class DicomSegmentations:
    """Handler of an inference that writes ``NAME_seg.dcm`` of each DICOM series, of a heart over time one a phase.

    Args:
        saver: names the label maps.
        cases: all of them; those over time have their ``"series"``.
        labels: names of the classes; see :func:`networks.results.measures.structure_names`.
        num_classes: of the network.
        algorithm: name of the bundle.
        version: of the bundle.
        enabled: False writes nothing.

    Raises:
        DataError: while a case is done, when its image is no DICOM series, or as
            :func:`networks.results.dicom_seg.write_segmentation`.
    """

    def __init__(
        self,
        saver: SaveImageLabelMapd,
        cases: Sequence[Mapping[str, Any]],
        labels: Mapping[str, str] | Sequence[str],
        num_classes: int,
        algorithm: str,
        version: str,
        enabled: bool = True,
    ) -> None:
        self.saver = saver
        self.series = {str(case["image"]): case["series"] for case in cases if "series" in case}
        self.names = structure_names(labels, num_classes)
        self.algorithm = algorithm
        self.version = version
        self.enabled = enabled

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to an evaluator, whose errors in a case are told as that case's."""
        if self.enabled:
            evaluator.add_event_handler(IterationEvents.MODEL_COMPLETED, self._write)

    def _write(self, evaluator: Evaluator) -> None:
        for case, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            image = str(case["image"].meta["filename_or_obj"])
            if not (Path(image).is_dir() or image.lower().endswith(SERIES)):
                raise DataError(f"{image} is no DICOM series: leave --dicom_seg out, or name the folder of the series.")
            target = result_file(self.saver, image, "seg.dcm")
            bundle = (self.names, self.algorithm, self.version)
            if "frame" not in case:
                label = np.asarray(output["pred"].cpu())[0].astype(np.uint8)
                write_segmentation(target, label, series_frames(image), *bundle)
            elif int(case["frame"]) == int(case["frames"]) - 1:
                write_phases(target, self._classes(image), self.series[image].phases or [], *bundle)

    def _classes(self, image: str) -> np.ndarray:
        """The label map of a time series, ``X, Y, Z, T``, as it was written."""
        target = self.saver.target(image)
        labels = nifti_series(target)
        assert labels is not None
        return np.stack([self.saver.classes(labels.read(t)[0], target) for t in range(labels.frames)], -1)
