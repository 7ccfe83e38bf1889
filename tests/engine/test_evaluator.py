"""Inference left alone over night: a bad case stops no other, what is done is not done again, memory stays flat."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, processes
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from networks import FIAS, DataError
from networks.data.geometry import SliceOrientationd
from networks.engine.evaluator import CaseEvaluator
from networks.engine.processes import check_shares

CONFIG = f"{ROOT}/bundles/fias_acdc/configs/inference.json"


@pytest.fixture
def images(phantoms, tmp_path) -> Path:
    """A folder of three volumes."""
    (tmp_path / "in").mkdir()
    for i, patient in enumerate(("patient002", "patient003", "patient004")):
        volume = phantoms("acdc") / "training" / patient / f"{patient}_frame01.nii.gz"
        shutil.copy(volume, tmp_path / "in" / f"{i}.nii.gz")
    return tmp_path / "in"


@pytest.fixture
def infer(weights, images, tmp_path) -> Callable[..., list[str]]:
    """``infer(**overrides)``: the names of all that was written anew, sorted."""

    def infer(**overrides: object) -> list[str]:
        out = tmp_path / "out"
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        options = {"dataset_dir": str(images), "output_dir": str(out), "ckpt_dir": str(weights), "device": "cpu"}
        workflow = ConfigWorkflow(CONFIG, workflow_type="infer", **{**options, "image_size": 32, **overrides})
        try:
            workflow.initialize()
            workflow.run()
        except RuntimeError as error:  # the expression's
            raise error.__cause__ or error
        finally:
            written = [p.name for p in out.rglob("*_seg*") if p.stat().st_mtime_ns != before.get(p)]
            assert not list(out.rglob(".partial-*"))
        return sorted(written)

    return infer


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_cases_are_named_and_the_others_done(num_workers, images, infer, tmp_path):
    good = nib.load(images / "0.nii.gz")
    (images / "a.nii.gz").write_bytes((images / "0.nii.gz").read_bytes()[:1000])
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 3, 5)), good.affine), images / "b.nii.gz")
    with pytest.raises(DataError, match="2 of the cases") as error:
        infer(num_workers=num_workers)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "a.nii.gz" in lines[1] and "truncated" in lines[1] and "b.nii.gz" in lines[2]
    assert sorted(p.name for p in (tmp_path / "out").glob("*_seg*")) == [f"{i}_seg.nii.gz" for i in range(3)]


def test_the_command_line_names_bad_cases_and_fails(images, weights, run_bundle, tmp_path):
    for file in images.iterdir():
        file.write_bytes(b"")
    options = {"dataset_dir": images, "output_dir": tmp_path / "out", "ckpt_dir": weights, "device": "cpu"}
    result = run_bundle("inferring", CONFIG, check=False, image_size=32, **options)
    assert result.returncode == 1
    error = result.stdout[result.stdout.rindex("\nError: ") :]
    assert all(f"{i}.nii.gz" in error for i in range(3)) and "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*_seg*"))


def test_a_case_too_large_to_be_prepared_is_named_and_the_others_done(images, infer, monkeypatch, tmp_path):
    turn = SliceOrientationd.__call__

    def no_memory_for_the_second(self: SliceOrientationd, data: dict) -> dict:
        if data["image"].meta["filename_or_obj"].endswith("1.nii.gz"):
            raise MemoryError("Unable to allocate 9 GiB")
        return turn(self, data)

    monkeypatch.setattr(SliceOrientationd, "__call__", no_memory_for_the_second)
    with pytest.raises(DataError, match="1.nii.gz .*memory"):
        infer()
    assert len(list((tmp_path / "out").glob("*_seg*"))) == 2


def test_a_case_that_fails_in_the_network_is_named_and_the_others_done(images, infer, monkeypatch):
    forward = FIAS.forward

    def no_memory_for_the_second(self: FIAS, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x)

    calls: list[int] = []
    monkeypatch.setattr(FIAS, "forward", no_memory_for_the_second)
    with pytest.raises(DataError, match="1.nii.gz: OutOfMemoryError"):
        infer(overlay=True)
    assert len(calls) == 3


def test_an_image_that_goes_away_meanwhile_is_named_and_the_others_done(images, infer, monkeypatch, tmp_path):
    forward = FIAS.forward
    gone = iter(["1.nii.gz"])

    def remove(self: FIAS, x: torch.Tensor) -> torch.Tensor:
        (images / next(gone, "none")).unlink(missing_ok=True)  # the second is read, and not yet segmented
        return forward(self, x)

    turn = SliceOrientationd.__call__
    read = threading.Event()

    def note(self: SliceOrientationd, data: dict) -> dict:
        if data["image"].meta["filename_or_obj"].endswith("1.nii.gz"):
            read.set()
        return turn(self, data)

    monkeypatch.setattr(CaseEvaluator, "reads_ahead", lambda self, batch: True)
    monkeypatch.setattr(SliceOrientationd, "__call__", note)
    monkeypatch.setattr(FIAS, "forward", lambda self, x: read.wait(60) and remove(self, x))
    with pytest.raises(DataError, match="1.nii.gz"):
        infer(val_batch_size=100)
    assert len(list((tmp_path / "out").glob("*_seg*"))) == 2


def test_results_beside_the_images_are_not_segmented(images, infer):
    assert len(infer(output_dir=str(images), overlay=True)) == 0  # nothing new in the other folder
    assert len(list(images.glob("*_seg.nii.gz"))) == 3
    infer(output_dir=str(images), overlay=True)
    assert len(list(images.glob("*_seg.nii.gz"))) == len(list(images.glob("*_overlay.png"))) == 3


def test_what_is_left_out_is_recorded(images, infer, tmp_path):
    names = ("old_seg.nii.gz", "other.mgz", "photo.png")
    for name in names:
        shutil.copy(images / "0.nii.gz", images / name)
    assert len(infer()) == 3
    record = json.loads((tmp_path / "out" / "inferring_cases.json").read_text())
    assert sorted(Path(entry["file"]).name for entry in record["left_out"]) == sorted(names)
    assert all(entry["why"] for entry in record["left_out"])


def test_one_file_is_segmented_whatever_its_name(images, infer, tmp_path):
    (images / "0.nii.gz").rename(images / "0_seg.nii.gz")
    assert infer(dataset_dir=str(images / "0_seg.nii.gz"), overlay=True) == [
        "0_seg.json",
        "0_seg_overlay.png",
        "0_seg_seg.nii.gz",
    ]
    assert infer(dataset_dir=str(images / "0_seg.nii.gz"), overlay=True, resume=True) == []


def test_names_that_are_not_utf_8_are_segmented_too(images, infer):
    name = os.fsdecode(b"M\xfcller.nii.gz")
    (images / "0.nii.gz").rename(images / name)
    assert infer(overlay=True) == ["1_seg.nii.gz", "2_seg.nii.gz", name.replace(".nii", "_seg.nii")]


def test_folders_whose_names_are_numbers_are_taken_as_typed(images, weights, run_bundle, tmp_path):
    shutil.copytree(images, tmp_path / "2026_11")
    options = {"dataset_dir": "2026_11", "output_dir": 101, "ckpt_dir": weights, "device": "cpu", "image_size": 32}
    run_bundle("inferring", CONFIG, cwd=tmp_path, **options)
    assert len(list((tmp_path / "101").glob("*_seg.nii.gz"))) == 3


def test_a_folder_with_a_volume_s_name_is_a_folder(images, infer):
    (images / "3.nii").mkdir()
    shutil.move(images / "0.nii.gz", images / "3.nii" / "3.nii.gz")
    assert infer() == ["1_seg.nii.gz", "2_seg.nii.gz", "3_seg.nii.gz"]


def test_on_a_cpu_cases_are_read_one_at_a_time(images, infer, monkeypatch):
    turn, forward = SliceOrientationd.__call__, FIAS.forward
    order: list[str] = []
    monkeypatch.setattr(SliceOrientationd, "__call__", lambda self, data: order.append("read") or turn(self, data))
    monkeypatch.setattr(FIAS, "forward", lambda self, x: order.append("segment") or forward(self, x))
    assert len(infer(val_batch_size=100)) == 3
    assert order == ["read", "segment"] * 3


def test_elsewhere_the_next_case_is_read_while_the_network_is_at_one(images, infer, monkeypatch):
    largest, larger = ({"image": torch.empty(values, device="meta")} for values in (2**28, 2**28 + 1))
    for device, case, ahead in (("cpu", largest, False), ("cuda", largest, True), ("cuda", larger, False)):
        evaluator = SimpleNamespace(state=SimpleNamespace(device=torch.device(device)))
        assert CaseEvaluator.reads_ahead(evaluator, case) == ahead
    monkeypatch.setattr(CaseEvaluator, "reads_ahead", lambda self, batch: True)
    turn, forward = SliceOrientationd.__call__, FIAS.forward
    reading = [threading.Event() for _ in range(3)]
    seen: list[bool] = []

    def note(self: SliceOrientationd, data: dict) -> dict:
        reading[int(Path(data["image"].meta["filename_or_obj"]).name[0])].set()
        return turn(self, data)

    def wait(self: FIAS, x: torch.Tensor) -> torch.Tensor:
        seen.append(reading[min(2, len(seen) + 1)].wait(60))
        return forward(self, x)

    monkeypatch.setattr(SliceOrientationd, "__call__", note)
    monkeypatch.setattr(FIAS, "forward", wait)
    assert len(infer(val_batch_size=100)) == 3
    assert seen == [True] * 3


def test_a_resumed_inference_does_what_is_not_whole_or_older(images, infer, weights, tmp_path):
    every = [f"{i}_seg.nii.gz" for i in range(3)]
    assert infer(resume=True) == every  # nothing there yet
    assert infer(resume=True) == []
    assert infer() == every
    out = tmp_path / "out"
    (out / "0_seg.nii.gz").unlink()
    half = (out / "1_seg.nii.gz").read_bytes()
    (out / "1_seg.nii.gz").write_bytes(half[: len(half) // 2])
    shutil.copy(images / "0.nii.gz", images / "new.nii.gz")
    assert infer(resume=True) == [*every[:2], "new_seg.nii.gz"]
    os.utime(images / "2.nii.gz")
    assert infer(resume=True) == every[2:]
    before = (weights / "model.pt").stat()
    shutil.copy2(weights / "model.pt", tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(weights / "model.pt")  # with its old date
    assert (weights / "model.pt").stat().st_mtime_ns == before.st_mtime_ns
    assert len(infer(resume=True)) == 4
    assert len(infer(resume=True, image_size=48)) == 4
    assert infer(resume=True, image_size=48) == []
    assert len(infer(resume=True, overlay=True)) == 4
    (out / "1_overlay.png").unlink()  # killed between a label map and its picture
    assert infer(resume=True, overlay=True) == every[1:2]


def test_more_processes_than_cases_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    check_shares([1, 2, 3])
    with pytest.raises(DataError, match="2 cases .* 3 processes"):
        check_shares([1, 2])


def _run_of(rank: int, sync: str, outcome: str) -> None:
    """The run of one of two processes: the other's case is bad, and what this one finds at the end is, too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{sync}", rank=rank, world_size=2)
    case = {"image": MetaTensor(torch.zeros(1, 1, 4, 4, 1), meta={"filename_or_obj": ["good.nii.gz"]})}

    class Loader:
        dataset = SimpleNamespace(data=[{"image": "good.nii.gz" if rank == 0 else "bad.nii.gz"}])
        batch_sampler = ((0,),)

        def __iter__(self):
            return self

        def __next__(self):
            if rank == 0:
                return case
            raise DataError("bad.nii.gz is bad")

    evaluator = CaseEvaluator(torch.device("cpu"), Loader(), torch.nn.Identity(), decollate=False)
    if rank == 0:
        evaluator.add_event_handler(Events.COMPLETED, lambda: evaluator.failed.update(table="no such frame"))
    try:
        evaluator.run()
    except DataError as error:
        Path(f"{outcome}{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_what_any_process_finds_bad_is_told_by_each(tmp_path):
    started = [processes.Process(target=_run_of, args=(i, str(tmp_path / "sync"), str(tmp_path / "o"))) for i in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    for rank in (0, 1):
        first, *lines = (tmp_path / f"o{rank}").read_text().splitlines()
        assert first.startswith("2 of the cases failed") and sorted(lines) == ["bad.nii.gz is bad", "no such frame"]


def test_a_run_is_recorded_beside_its_results_and_can_be_run_again(infer, tmp_path):
    infer(image_size=48)
    record = tmp_path / "out" / "inferring.json"
    config = json.loads(record.read_text())
    assert config["image_size"] == 48 and config["output_dir"] == str(tmp_path / "out")
    assert config["_run_"]["packages"]["monai"] and len(config["_run_"]["revision"].split(",")[0]) == 40
    cases = json.loads((tmp_path / "out" / "inferring_cases.json").read_text())["cases"]
    assert [Path(case["image"]).name for case in cases] == ["0.nii.gz", "1.nii.gz", "2.nii.gz"]
    first = (tmp_path / "out" / "0_seg.nii.gz").read_bytes()
    (tmp_path / "out" / "0_seg.nii.gz").unlink()
    again = ConfigWorkflow(str(record), workflow_type="infer")
    again.initialize()
    again.run()
    assert (tmp_path / "out" / "0_seg.nii.gz").read_bytes() == first


@pytest.mark.parametrize("network", ["convolution", pytest.param("FIAS", marks=pytest.mark.slow)])
def test_memory_stays_flat_over_200_volumes(network, weights, tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("the system does not say how much memory a process holds")
    (tmp_path / "in").mkdir()
    voxels = np.random.default_rng(0).integers(0, 1000, (128, 112, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 8, 1])), tmp_path / "in" / "000.nii.gz")
    for i in range(1, 200):
        os.link(tmp_path / "in" / "000.nii.gz", tmp_path / "in" / f"{i:03}.nii.gz")
    options = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(weights)}
    if network == "convolution":  # as much around the network, in a tenth of the time
        options["network_def"] = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 4, "kernel_size": 1}
        options["initialize"] = "$None"
    workflow = ConfigWorkflow(CONFIG, workflow_type="infer", device="cpu", image_size=32, **options)
    workflow.initialize()
    memory: list[int] = []

    def note() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE") // 2**20)

    workflow.parser.get_parsed_content("evaluator").add_event_handler(Events.ITERATION_COMPLETED(every=20), note)
    workflow.run()
    print(f"{network}, MB after each 20 of 200 volumes of {voxels.nbytes / 2**20:.1f} MB: {memory}")
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 200
    assert max(memory[5:]) - max(memory[:5]) < 10  # one volume in ten kept would be 11 MB and more
