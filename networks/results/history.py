"""The course of a training, epoch by epoch, as a table."""

from __future__ import annotations

import csv
from pathlib import Path

from ignite.engine import Events
from ignite.metrics import Average
from monai.engines import Evaluator, Trainer
from monai.handlers import from_engine
from torch.optim import Optimizer

from ..storage import write_csv

__all__ = ["History", "read_history"]


class History:
    """Handler of a trainer that keeps ``history.csv``: epoch, mean loss, validation score, learning rate.

    Args:
        output_dir: where to write. A resumed training goes on in the same file.
        optimizer: the network's optimiser.
        evaluator: the validation engine, whose key metric is the score.
    """

    columns = ("epoch", "loss", "score", "learning_rate")

    def __init__(self, output_dir: str | Path, optimizer: Optimizer, evaluator: Evaluator) -> None:
        self.path = Path(output_dir) / "history.csv"
        self.optimizer = optimizer
        self.evaluator = evaluator

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, after its ``ValidationHandler`` and before :class:`Checkpoints`."""
        Average(from_engine(["loss"], first=True), trainer.state.device).attach(trainer, "mean_loss")
        if trainer.state.rank == 0:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._note)

    def _note(self, trainer: Trainer) -> None:
        state = self.evaluator.state
        validated = state.epoch == trainer.state.epoch and state.key_metric_name in state.metrics
        row = {
            "epoch": str(trainer.state.epoch),
            "loss": f"{float(trainer.state.metrics['mean_loss']):.6f}",
            "score": f"{state.metrics[state.key_metric_name]:.6f}" if validated else "",
            "learning_rate": f"{self.optimizer.param_groups[0]['lr']:.3g}",
        }
        # A training killed after this and before its checkpoint does the epoch again.
        before = [row for row in read_history(self.path) if int(row["epoch"]) < trainer.state.epoch]
        write_csv(self.path, self.columns, [[row[c] for c in self.columns] for row in (*before, row)])


def read_history(path: Path) -> list[dict[str, str]]:
    """Rows of a ``history.csv``; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
