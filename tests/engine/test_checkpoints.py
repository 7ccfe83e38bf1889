"""Broken off and taken up again: a training killed by the system ends as if it had not been."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, processes
from monai.bundle import ConfigWorkflow

from networks import DataError
from networks.data.layouts import cases
from networks.engine.checkpoints import Checkpoints


def train(root: str, data: str, resume: bool, recipe: str = "paper", **overrides: object) -> None:
    """Train FIAS in this process."""
    names = ["train.json", "paper.json"] if recipe == "paper" else ["train.json"]
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as on a command line
    workflow = ConfigWorkflow(
        [str(ROOT / "bundles" / "fias_acdc" / "configs" / name) for name in names],
        bundle_root=root,
        dataset_dir=data,
        layout="datalist",
        resume=resume,
        **{"image_size": 32, "num_workers": 0, "device": "cpu", "learning_rate": 1e-3, **overrides},
    )
    workflow.initialize()
    workflow.run()


@pytest.fixture(scope="module")
def datalist(phantoms, tmp_path_factory) -> str:
    """Two volumes to train on and one to validate, of three slices."""
    found = cases("acdc", phantoms("acdc"), "train")[:3]
    entries = [{"image": case["image"], "label": case["label"]} for case in found]
    file = tmp_path_factory.mktemp("list") / "dataset.json"
    file.write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    return str(file)


@pytest.fixture(scope="module")
def start(datalist) -> Callable[..., BaseProcess]:
    """Start :func:`train` in a process of its own, which may be killed; it goes on where there is a checkpoint."""

    def start(root: Path, **overrides: object) -> BaseProcess:
        resume = (root / "models" / "last.ckpt").exists()
        process = processes.Process(target=train, args=(str(root), datalist, resume), kwargs=overrides)
        process.start()
        return process

    return start


def kill(process: BaseProcess, models: Path, moment: float | None) -> None:
    """Kill -9 that many seconds after the next epoch's checkpoint; None kills while a file is written."""

    def saved() -> float:
        return last.stat().st_mtime if last.exists() else 0

    last = models / "last.ckpt"
    before = saved()
    while process.is_alive() and not (any(models.glob(".partial-*")) if moment is None else saved() > before):
        time.sleep(0.001)
    time.sleep(moment or 0)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"


def test_the_network_that_is_validated_is_the_one_that_is_saved(tmp_path):
    network = torch.nn.Linear(1, 1)
    average = torch.optim.swa_utils.AveragedModel(network)
    optimizer = torch.optim.SGD(network.parameters())
    for validated, options in ((average.module, {}), (network, {"averaged": average})):
        with pytest.raises(DataError, match="model.pt"):
            Checkpoints(tmp_path, network, optimizer, SimpleNamespace(network=validated), **options)


def test_a_training_broken_off_in_its_first_epoch_is_not_resumed_as_the_one_before(tmp_path):
    network = torch.nn.Linear(1, 1)
    parts = (tmp_path, network, torch.optim.SGD(network.parameters()), SimpleNamespace(network=network))
    (tmp_path / "last.ckpt").write_text("of before")
    trainer = SimpleNamespace(state=SimpleNamespace(rank=0))
    Checkpoints(*parts).keep_previous(trainer)
    with pytest.raises(FileNotFoundError, match="last.ckpt"):
        Checkpoints(*parts, resume=True).restore(trainer)
    assert (tmp_path / "last.ckpt.previous").read_text() == "of before"


def test_keeping_the_state_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    """Epochs of a second, a state that takes four to write: the first, the best and the last, else one in twenty."""
    clock, written = [0.0], []
    monkeypatch.setattr("networks.engine.checkpoints.time.monotonic", lambda: clock[0])
    network = torch.nn.Linear(1, 1)
    score = SimpleNamespace(best_metric_epoch=30, best_metric=0.5, key_metric_name="dice")
    evaluator = SimpleNamespace(network=network, state=score)
    checkpoints = Checkpoints(tmp_path, network, torch.optim.SGD(network.parameters()), evaluator)

    def write(name: str, state: dict) -> None:
        if name == "last.ckpt":
            clock[0] += 4
            written.append(trainer.state.epoch)

    monkeypatch.setattr(checkpoints, "_write", write)
    trainer = SimpleNamespace(state=SimpleNamespace(rank=0, epoch=0, max_epochs=200), scaler=None, state_dict=dict)
    for trainer.state.epoch in range(1, 201):
        clock[0] += 1
        checkpoints.save(trainer)
    assert written == [1, 30, 106, 182, 200]


@pytest.mark.parametrize(
    ("recipe", "num_workers", "kills"),
    [
        ("paper", 0, 3),
        ("recommended", 0, 2),
        pytest.param("paper", 0, 20, marks=pytest.mark.slow),
        pytest.param("paper", 2, 8, marks=pytest.mark.slow),
    ],
)
def test_a_training_killed_at_any_moment_ends_as_an_unbroken_one(recipe, num_workers, kills, start, tmp_path):
    """The same weights, optimiser, best score and history to the last bit, and nothing half-written."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"recipe": recipe, "num_workers": num_workers, "epochs": kills + 1, "batch_size": 2}
    first = start(whole, **options)
    moments, epochs = random.Random(0), []
    for i in range(kills):
        kill(start(broken, **options), broken / "models", moments.uniform(0, 1) if i % 2 else None)
        last = broken / "models" / "last.ckpt"
        epochs.append(torch.load(last, weights_only=True)["trainer"]["iteration"] // 3 if last.exists() else 0)
    final = start(broken, **options)
    for process in (first, final):
        process.join()
        assert process.exitcode == 0
    print(f"{kills} kills, after which these epochs were whole: {epochs}")
    for name in ("last.ckpt", "model.pt"):
        one, other = (torch.load(root / "models" / name, weights_only=True) for root in (whole, broken))
        assert one.pop("values", {}) == other.pop("values", {})
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    one, other = ((root / "eval" / "history.csv").read_text() for root in (whole, broken))
    assert one == other and len(one.splitlines()) == kills + 2
    assert not list(broken.rglob(".partial-*"))
