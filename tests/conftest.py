"""What several test files share: phantoms made once, and a bundle run as a user runs it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import pydicom
import pytest
import torch
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid
from torch import nn

from networks import FIAS

ROOT = Path(__file__).parent.parent
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the processes below
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["monai.bundle", "networks.data", "networks.engine", "networks.results"])


collect_ignore = ["bundles/deploy_app.py"]  # a program of MONAI Deploy's SDK, which is not installed here


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--device", default="cuda", help="of the tests marked gpu; cpu rehearses them without one")


def on_gpu(config: pytest.Config) -> bool:
    """Whether this is a run of the tests marked gpu alone, on one."""
    return config.getoption("markexpr") == "gpu" and config.getoption("device") != "cpu"


def pytest_configure(config: pytest.Config) -> None:
    # All other tests, and the processes that they start, are to find a CPU alone. CUDA reads this when it is first
    # asked, which no import does; a process of pytest-xdist comes by here too, with the same options.
    if not on_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # a file, or a bundle, stays in one process: its fixtures train networks
        bundle = item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {bundle}"))
    skips = {} if config.getoption("--slow") else {"slow": "slow: run with --slow"}
    if config.getoption("markexpr") != "gpu":
        skips["gpu"] = "gpu: run with -m gpu"
    elif on_gpu(config) and not torch.cuda.is_available():
        skips["gpu"] = "no GPU"
    for item in items:
        for mark, reason in skips.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def succeeded(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """A command's result, or an AssertionError with the end of its output."""
    assert not result.returncode, f"{' '.join(result.args)} ended with {result.returncode}:\n{result.stdout[-6000:]}"
    return result


def run(
    *command: str, cwd: Path = ROOT, check: bool = True, threads: int = THREADS, path: Path | str = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command line with ``path`` importable, by default this tree; its output in one string."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": str(threads)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=env, **pipes)
    return succeeded(result) if check else result


def bundle_runner(*arguments: str, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """``python -m monai.bundle`` in a fork of a process that has done its many seconds of imports."""
    with NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        process = processes.Process(target=_bundle_runner, args=(arguments, cwd, output.name))
        process.start()
        process.join()
        result = subprocess.CompletedProcess(arguments, process.exitcode, output.read())
    return succeeded(result) if check else result


def _bundle_runner(arguments: tuple[str, ...], cwd: Path, output: str) -> None:
    """What the interpreter does for a command line, in the new process."""
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as on a command line
    sys.argv = ["monai.bundle", *arguments]
    sys.path.insert(0, str(cwd))
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def group(**values: object) -> Dataset:
    """A functional group: sequences of one item each, by their pydicom keywords."""
    found = Dataset()
    for name, items in values.items():
        inner = Dataset()
        for key, value in items.items():
            setattr(inner, key, value)
        setattr(found, name, Sequence([inner]))
    return found


def random_heads(network: nn.Module) -> nn.Module:
    """Give a network random heads that find several classes in each picture."""
    torch.manual_seed(0)
    for conv in network.heads.convs:
        nn.init.normal_(conv.weight)
        nn.init.zeros_(conv.bias)
    return network


def save_random(network: nn.Module, file: Path) -> None:
    """Save a network's weights with :func:`random_heads`."""
    torch.save(random_heads(network).state_dict(), file)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``phantoms(dataset)``: a folder with that dataset's phantoms of 64 pixels, made at its first use."""
    root = tmp_path_factory.mktemp("phantoms")

    def phantoms(dataset: str) -> Path:
        if not (root / dataset).exists():
            slices = ["--slices", "3"] if dataset in ("acdc", "btcv") else []
            run("bundles/phantoms.py", dataset, str(root / dataset), "--size", "64", *slices)
        return root / dataset

    return phantoms


def write_phase(cine: Path, folder: Path, number: int) -> None:
    """Write a phase of a cine, by its number from 0, as a DICOM series of its own, in a study of its own."""
    slices = [pydicom.dcmread(file) for file in cine.iterdir()]
    moment = sorted({float(one.TriggerTime) for one in slices})[number]
    folder.mkdir(parents=True)
    for one in (one for one in slices if float(one.TriggerTime) == moment):
        for level in ("Study", "Series", "SOP"):
            own = [one[f"{level}InstanceUID"].value, "phases", *([str(number)] if level == "Series" else [])]
            setattr(one, f"{level}InstanceUID", generate_uid(entropy_srcs=own))
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.SeriesNumber, one.SeriesDescription = 101 + number, f"phase {number + 1}"
        one.save_as(folder / f"{one.InstanceNumber}.dcm")


class Unprivileged:
    """Within ``with unprivileged():`` this process is a user to whom ``folder`` is open, and rights of files count."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def __call__(self) -> Iterator[None]:
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)  # root may read everything
        try:
            yield
        finally:
            os.seteuid(user)


@pytest.fixture
def unprivileged() -> Iterator[Unprivileged]:
    """Rights that count, for whoever runs the tests; pytest's own folders are closed to all others."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Unprivileged(Path(folder))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model.pt of FIAS for ACDC."""
    folder = tmp_path_factory.mktemp("weights")
    save_random(FIAS(1, 4), folder / "model.pt")
    return folder


@pytest.fixture(scope="session")
def run_bundle() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_bundle(run_id, config_file, check=True, **overrides)`` by :func:`bundle_runner`."""

    def run_bundle(
        run_id: str, config: str, check: bool = True, cwd: Path = ROOT, **overrides: object
    ) -> subprocess.CompletedProcess[str]:
        arguments = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
        return bundle_runner("run", run_id, "--config_file", config, *arguments, cwd=cwd, check=check)

    return run_bundle
