"""One call for the first GPU at hand: its tests, its speed, and a bundle trained for so many minutes.

    tar -cf acdc.tar -C path/to/ACDC .
    python tests/benchmarks/gpu.py fias_acdc --dataset_dir acdc.tar --output_dir results --minutes 6

Needs the packages, but neither a network nor an installation of this one. The steps are ``tests``, those marked gpu,
``speed``, the tables of ``speed.py``, ``throughput``, that of ``training.py``, ``volume``, that of ``volume.py``, and
``training``, by the bundle's ``train.json``. None stops the next, and the exit status is 0 when all went well.

A first call does what is short, ``--steps tests,speed,throughput,volume``, a second ``--steps training``. Any word that
is not below is an override of the training, such as ``--image_size 192 --batch_size 32``. ``--device cpu`` rehearses
all, and ``--small True`` in minutes.

The cosine of the learning rate needs the number of epochs: a training of a few is timed, then as many are trained as
the minutes have left. When they are over, the training is killed, and what its best epoch left is taken.

``output_dir`` receives ``log.txt`` with all output, and in parts of 16 MiB a tar of the weights in half precision, as
``release.py --half True`` ships them, ``model.json``, ``history.csv`` and the run's record. ``sha256sum -c SHA256SUMS``
checks the parts; its first line is the command that joins them.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import fire
import torch

ROOT = Path(__file__).parents[2]
PART = 16 * 2**20
EPOCH = re.compile(r"SupervisedTrainer: Epoch\[\d+\] Complete\. Time taken: (\d+):(\d+):([\d.]+)")


def python(arguments: list[str], log: Path, seconds: float, **options: Any) -> str:
    """Run Python from the repository's root, print the end of its output and give all of it.

    Raises:
        RuntimeError: when it fails, or takes longer.
    """
    command = [sys.executable, *arguments, *(part for k, v in options.items() for part in (f"--{k}", str(v)))]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:  # a file, and no pipe: workers that outlive a killed training would hold that
        before, streams = output.tell(), {"stdout": output, "stderr": subprocess.STDOUT}
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(1, seconds), **streams).returncode
            fault = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            fault = f"was killed after {seconds:.0f} s"
    text = re.sub(r".*\r", "", log.read_bytes()[before:].decode("utf-8", "replace"))  # of a progress bar, its end
    print(text[-3000:], flush=True)
    if fault:
        raise RuntimeError(f"{arguments[-1]} {fault}")
    return text


def epochs_within(seconds: float, training: list[str], log: Path, **options: Any) -> int:
    """The epochs of a training of that many seconds with its start-up, less the time in which this is found out."""
    count = max(3, 1 + options.get("val_interval", 1))  # the first is slow; those after it hold all that others do
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        text = python(training, log, seconds, **options, bundle_root=root, epochs=count)
    taken = time.monotonic() - start
    epoch = fmean(3600 * int(h) + 60 * int(m) + float(s) for h, m, s in EPOCH.findall(text)[1:])
    epochs = max(1, int(0.95 * (seconds - taken - (taken - count * epoch)) / epoch))
    print(f"{count} epochs took {taken:.0f} s, one of them {epoch:.2f} s: {epochs} to train", flush=True)
    return epochs


def train(training: list[str], log: Path, minutes: float, root: str, epochs: int, **options: Any) -> None:
    """Train for so many minutes in all, and pack what that left."""
    end, root = time.monotonic() + 60 * minutes, str(Path(root or tempfile.mkdtemp()).resolve())
    print(f"training in {root}", flush=True)
    epochs = epochs or epochs_within(end - time.monotonic(), training, log, **options)
    try:
        python(training, log, end - time.monotonic(), **options, bundle_root=root, epochs=epochs)
    finally:  # of a killed one too
        if Path(root, "models", "model.pt").is_file():
            pack(Path(root), log.parent)


@contextmanager
def unpacked(data: str) -> Iterator[Path]:
    """The folder of the data, which may come as a tar file."""
    with tempfile.TemporaryDirectory() as folder:
        if Path(data).is_file() and tarfile.is_tarfile(data):
            with tarfile.open(data) as tar:
                tar.extractall(folder, filter="data")
            data = folder
        yield Path(data).resolve()


def pack(root: Path, output: Path) -> None:
    """A training's results in parts."""
    state = torch.load(root / "models" / "model.pt", map_location="cpu", weights_only=True)
    state = {k: v.half() if v.is_floating_point() and v.dim() > 1 else v for k, v in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        half, archive = Path(folder, "model.pt"), Path(folder, "results.tgz")
        torch.save(state, half)
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            for file in (root / "models/model.json", root / "eval/history.csv", root / "eval/training.json", half):
                tar.add(file, file.name)
        content = archive.read_bytes()
    for old in output.glob(f"{archive.name}.part*"):
        old.unlink()
    parts = {f"{archive.name}.part{i // PART:02}": content[i : i + PART] for i in range(0, len(content), PART)}
    for name, part in parts.items():
        (output / name).write_bytes(part)
    sums = "".join(f"{hashlib.sha256(part).hexdigest()}  {name}\n" for name, part in parts.items())
    (output / "SHA256SUMS").write_text(f"# cat {archive.name}.part* | tar -xz\n{sums}")
    files = len(parts) + 2
    print(f"{len(content) / 2**20:.1f} MiB, {files} files with log and sums{', more than 8' if files > 8 else ''}")


def main(
    bundle: str,
    dataset_dir: str,
    output_dir: str,
    minutes: float = 6,
    epochs: int = 0,
    bundle_root: str = "",
    device: str = "cuda",
    steps: str | tuple[str, ...] = ("tests", "speed", "throughput", "volume", "training"),
    limit: float = 4,
    small: bool = False,
    **overrides: Any,
) -> None:
    """Do the steps.

    Args:
        bundle: name of its folder.
        dataset_dir: the data, or a tar file of them.
        output_dir: for the results.
        minutes: that the training may take.
        epochs: of the training; 0 finds out how many the minutes hold.
        bundle_root: the training's folder, which stays, with ``last.ckpt`` to go on from; by default a temporary one.
        device: ``cuda`` or ``cpu``.
        steps: some of the five.
        limit: minutes that each but the training may take.
        small: leave out all that takes long, so that a rehearsal ends.
        overrides: of the training.
    """
    log = Path(output_dir).resolve() / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    tests = "-m pytest -m gpu -vv -rs --durations=5 --disable-warnings -p no:cacheprovider".split()
    tests.append("tests/bundles/test_gpu.py")
    speed: dict[str, Any] = {"settings": "plain,bfloat16,compiled", "batches": "8,32", "side": 224}
    throughput: dict[str, Any] = {"bundles": "fias_acdc,danie_acdc", "batch_sizes": "8,16,32,64", "image_size": 224}
    volume: dict[str, Any] = {}
    if small:
        tests.append("-k logits_are")
        speed = {"settings": "plain", "batches": 2, "rounds": 1, "side": 64, "only": "FIAS"}
        throughput = {"bundles": "fias_acdc", "batch_sizes": 2, "image_size": 64, "steps": 2}
        volume = {"shape": "64,64,4", "only": "bundle fp32"}
    config = ROOT / "bundles" / bundle / "configs" / "train.json"
    training = ["-m", "monai.bundle", "run", "--config_file", str(config), "training"]
    options = {"num_workers": os.cpu_count(), **overrides, "device": device}

    def benchmark(name: str, **options: Any) -> None:
        python([f"tests/benchmarks/{name}.py"], log, 60 * limit, device=device, **options)

    told = []
    with unpacked(dataset_dir) as data:
        throughput |= {"dataset_dir": data, "num_workers": os.cpu_count(), "pretrained": False}
        work = {
            "tests": lambda: python(tests, log, 60 * limit, device=device),
            "speed": lambda: benchmark("speed", **speed),
            "throughput": lambda: benchmark("training", **throughput),
            "volume": lambda: benchmark("volume", **volume),
            "training": lambda: train(training, log, minutes, bundle_root, epochs, **{**options, "dataset_dir": data}),
        }
        for name in (steps,) if isinstance(steps, str) else steps:
            start = time.monotonic()
            try:
                work[name]()
                how = "well"
            except Exception as error:  # the next one may do well
                how = f"FAILED, {type(error).__name__}: {error}"
            told.append(f"{name}, {time.monotonic() - start:.0f} s: {how}")
            print(told[-1], flush=True)
    print("", *told, sep="\n")
    sys.exit("FAILED" in " ".join(told))


if __name__ == "__main__":
    fire.Fire(main)
