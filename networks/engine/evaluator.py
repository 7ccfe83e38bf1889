"""Inference over many cases, unattended: a bad one stops no other, and what is done is not done again."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.utils import ensure_tuple, string_list_all_gather

from ..data.cine import nifti_series
from ..data.formats import NIFTI
from ..data.loading import LoadVolumed
from ..errors import DataError, WriteError, beginning
from ..results.label_maps import SaveImageLabelMapd
from ..results.measuring import Measures
from ..results.report import Overlays
from ..storage import changed

__all__ = ["CaseEvaluator", "unfinished"]

logger = logging.getLogger(__name__)


class CaseEvaluator(SupervisedEvaluator):
    """:class:`monai.engines.SupervisedEvaluator` that goes on after a case that it cannot do, and names it at the end.

    Such is a file that cannot be used, or one that does not fit into memory. Of a time series, no further frame is
    taken after one that failed. Where nothing can be written it stops. What the inferer keeps in its ``maps``, as
    :class:`networks.engine.inferers.LabelInferer` does, is postprocessed along with the label maps, under its names.

    Attributes:
        failed: why cases cannot be done, by their images. Handlers at the end of the run may add what they find.

    Raises:
        DataError: by ``run``, when all other cases are done: which failed, and why. With several processes, in each.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._take_maps)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Do all cases of the loader; see :class:`monai.engines.Evaluator`."""
        self.failed: dict[str, str] = {}
        loader, batches = self.data_loader, self._usable(self.data_loader)
        self.data_loader, self.state.epoch_length = batches, None
        try:
            super().run(global_epoch)
        finally:
            batches.close()
            self.data_loader = loader
        failed = [reason for reason in string_list_all_gather([*self.failed.values()]) if reason]
        if failed:
            raise DataError(f"{len(failed)} of the cases failed, the others are done:\n" + "\n".join(failed))

    def reads_ahead(self, batch: Mapping[str, Any]) -> bool:
        """Whether the next case is read while the network is at this one.

        Not on a CPU, all of whose cores the network takes (1.02 to 1.05 of the time, measured on two), and not beside
        an image of more than 1 GB: of such, memory holds one at a time.
        """
        return self.state.device.type != "cpu" and batch["image"].nbytes <= 2**30

    def _usable(self, loader: Any) -> Generator[Any, None, None]:
        """The batches that can be read, of cases that have not failed.

        A loader goes on after an error, in its workers too.
        """
        batches = iter(loader)
        with ThreadPoolExecutor(1) as reader:
            following: Future | None = None
            for image in _images(loader):
                try:
                    batch = (following or reader.submit(next, batches, None)).result()
                except DataError as error:
                    self._note(str(error), image)
                    following = None
                    continue
                following = reader.submit(next, batches, None) if self.reads_ahead(batch) else None
                if image not in self.failed:
                    yield batch
                del batch

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict:
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:
            if isinstance(beginning(error), WriteError):  # nor could the next be written
                raise
            image = str(ensure_tuple(batchdata["image"].meta["filename_or_obj"])[0])
            self._note(f"{image}: {type(error).__name__}: {error}", image, trace=True)
            engine.state.batch, engine.state.output = [], []  # nothing for the handlers of an iteration
            return engine.state.output

    def _note(self, reason: str, image: str, trace: bool = False) -> None:
        if image not in self.failed:
            logger.error(reason, exc_info=trace)
            self.failed[image] = reason

    def _take_maps(self) -> None:
        self.state.output |= getattr(self.inferer, "maps", {})


def _images(loader: Any) -> Iterator[str]:
    """The image of each batch of a loader, all of whose items are of one case."""
    return (str(loader.dataset.data[indices[0]]["image"]) for indices in loader.batch_sampler)


def unfinished(
    cases: Sequence[Mapping[str, Any]],
    saver: SaveImageLabelMapd,
    newer_than: Sequence[str | Path],
    overlay: bool = False,
    measures: Measures | None = None,
    resume: bool = True,
) -> list[Mapping[str, Any]]:
    """The cases without a label map that is whole and newer than the image and than all that it was made by.

    Args:
        cases: ``{"image": path}`` each, and ``"series"`` of those over time.
        saver: what names the label maps.
        newer_than: files such as weights and the record of the config; one that is absent makes all cases unfinished.
        overlay: a case needs its :class:`networks.results.report.Overlays` picture too, which is written after the
            label map.
        measures: a case needs its measures too, where these are enabled. They are the last that is written of it.
        resume: False takes all cases.

    Returns:
        Some of the cases, in their order; with several processes, what the first one finds.

    Raises:
        DataError: with several processes, when fewer cases than those are left.
    """
    if not resume:
        return list(cases)
    made_by = [Path(file) for file in newer_than]
    measured = measures if measures is not None and measures.enabled else None
    done = [
        _is_done(case["image"], saver.target(case["image"]), made_by)
        and (not overlay or Overlays.picture(saver, case).is_file())
        and (measured is None or measured.file(case["image"]).is_file())
        for case in cases
    ]
    found = [[case for case, whole in zip(cases, done, strict=True) if not whole]]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)  # the first process may write by the time that another looks
    logger.info(f"{len(cases) - len(found[0])} of {len(cases)} cases are done, {len(found[0])} to do")
    if torch.distributed.is_initialized() and len(found[0]) < torch.distributed.get_world_size():
        raise DataError(
            f"{len(cases) - len(found[0])} of {len(cases)} cases are done, {len(found[0])} to do: fewer than the "
            f"{torch.distributed.get_world_size()} processes. Do the rest with one process, without torchrun."
        )
    return found[0]


def _is_done(image: str, target: Path, made_by: Sequence[Path]) -> bool:
    before = [*made_by, Path(image), *(Path(image).rglob("*") if Path(image).is_dir() else ())]
    if not target.is_file() or not all(file.exists() for file in before):
        return False
    if target.stat().st_mtime_ns <= max(changed(file) for file in before):
        return False
    load = LoadVolumed("pred", suffixes=("",))
    try:
        series = nifti_series(target) if target.name.endswith(NIFTI) else None
        load({"pred": target} if series is None else {"pred": target, "series": series, "frame": series.frames - 1})
    except Exception:  # of another program, or not whole
        return False
    return True
