"""The bundles as users run them: through monai.bundle, on phantoms, on the CPU.

Every bundle trains, evaluates and infers, two of them with ``--slow`` alone. What can go wrong is tried on one bundle
of volumes and one of pictures: their configs are the same word for word but for named values, as a test here shows.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, bundle_runner, run, save_random
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from networks import FIAS
from networks.data.layouts import cases
from networks.engine import AverageWeights
from networks.engine.checks import VALUES

BUNDLES = sorted(p.parent.parent.name for p in (ROOT / "bundles").glob("*/configs/metadata.json"))
SAMPLES = ["fias_acdc", "danie_glas"]
ALIKE = ["danie_isic2017", "danie_synapse"]  # the network of one other bundle on the data of another


EXPRESSIONS = {
    *("name", "device", "labels", "network", "plain_network", "steps", "averaged", "amp_dtype"),
}
"""Values of the configs that are no plain ones, or of any kind."""


def quick(name: str, **more: object) -> dict[str, object]:
    """Options with which a bundle takes seconds."""
    size = {"size": "small"} if name.startswith("danie") else {}
    return {"image_size": 32, "num_workers": 0, "device": "cpu", **size, **more}


samples = pytest.mark.parametrize("name", SAMPLES, indirect=True, scope="module")
of_volumes = pytest.mark.parametrize("name", SAMPLES[:1], indirect=True, scope="module")
of_pictures = pytest.mark.parametrize("name", SAMPLES[1:], indirect=True, scope="module")


@pytest.fixture(params=BUNDLES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def configs(name: str) -> Path:
    return ROOT / "bundles" / name / "configs"


@pytest.fixture(scope="module")
def data(name: str, phantoms) -> Path:
    return phantoms(name.split("_")[1].replace("synapse", "btcv"))


@pytest.fixture(scope="module")
def pictures(name: str) -> bool:
    return not name.endswith(("acdc", "synapse"))


@pytest.fixture(scope="module")
def trained(request, name, configs, data, run_bundle, tmp_path_factory) -> Iterator[Path]:
    """A bundle root after one epoch of training, tracked by MLflow; its log in ``log.txt``."""
    if name in ALIKE and not request.config.getoption("--slow"):
        pytest.skip(f"slow: {name} repeats what other bundles' runs show; run with --slow")
    root = tmp_path_factory.mktemp(name)
    options = {
        "bundle_root": root,
        "dataset_dir": data,
        "epochs": 1,
        "tracking": "mlflow",
        **quick(name, pretrained=False),
    }
    result = run_bundle("training", f"{configs}/train.json", **options)
    (root / "log.txt").write_text(result.stdout)
    yield root
    shutil.rmtree(root)  # up to 800 MB of weights and optimiser state


@pytest.fixture(scope="module")
def one_case(data, pictures, tmp_path_factory) -> Path:
    """A folder with one case's image and label."""
    pattern = {True: "**/*_1*.bmp", False: "**/patient002_frame01*"}[pictures]
    folder = tmp_path_factory.mktemp("one")
    for file in data.glob(pattern):
        if not pictures or file.stem.startswith("testA_1"):
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def equal_label_maps(name, trained, configs, one_case, run_bundle, tmp_path) -> Callable[[Path, str], float]:
    """``equal_label_maps(models, config)`` is the share of voxels that an exported network labels as its weights do."""

    def equal_label_maps(models: Path, config: str) -> float:
        maps = []
        places = {f"{configs}/inference.json": trained / "models"}
        for files, root in {**places, f"['{configs}/inference.json','{configs}/{config}']": models}.items():
            output = tmp_path / f"maps{len(maps)}"
            run_bundle("inferring", files, dataset_dir=one_case, ckpt_dir=root, output_dir=output, **quick(name))
            (label,) = output.glob("*_seg.*")
            maps.append(np.asarray(Image.open(label) if label.suffix == ".png" else nib.load(label).dataobj))
        return float(np.mean(maps[0] == maps[1]))

    return equal_label_maps


def test_training_leaves_checkpoints_history_and_events(trained):
    state = torch.load(trained / "models" / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())  # flat: MONAI Label and CheckpointLoader read it
    assert json.loads((trained / "models" / "model.json").read_text())["image_size"] == 32
    last = torch.load(trained / "models" / "last.ckpt", weights_only=True)
    assert last["trainer"]["iteration"] == last["trainer"]["epoch_length"] > 0
    assert list((trained / "eval").glob("events.*"))
    with (trained / "eval" / "history.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["epoch"] == "1" and 0 < float(row["loss"]) < 20 and float(row["learning_rate"]) < 5e-4
    log = (trained / "log.txt").read_text()
    shown = re.search(r"loss=[\d.]+, dice=(nan|[\d.]+), slices/s=([\d.]+)", log)
    assert shown and float(shown[2]) > 0
    assert re.search(r"\d+ volumes, \d+ slices an epoch, .* MB in memory", log)
    client = mlflow.MlflowClient(f"sqlite:///{trained}/eval/mlruns.db")
    (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert run.data.metrics["train_loss"] > 0 and "val_mean_dice" in run.data.metrics


def test_evaluation_leaves_tables_and_pictures(name, trained, configs, data, run_bundle, pictures):
    arguments = {"bundle_root": trained, "dataset_dir": data, "device": "cpu"}  # what it was trained for, it knows
    log = run_bundle("evaluating", f"{configs}/evaluate.json", **arguments).stdout
    summary = (trained / "eval" / "summary.md").read_text(encoding="utf-8")
    assert summary.strip() in log and "| Dice, % |" in summary and "mean ± standard deviation" in summary
    assert ("| HD95, mm |" in summary) != pictures
    assert ("| Dice over all pixels, % |" in summary) == ("isic" in name)
    labels = json.loads((configs / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert all(f" {label} |" in summary for label in list(labels["channel_def"].values())[1:])
    with (trained / "eval" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = {"acdc": "patient002_frame01", "synapse": "img0001", "glas": "testA_1"}
    assert rows[0]["case"] == first.get(name.split("_")[1], "ISIC_0000016")
    for picture in ("worst", "median", "best", "curves"):
        assert Image.open(trained / "eval" / f"{picture}.png").size[1] >= 256


def test_inference_writes_each_image_s_label_map_on_its_grid(
    name, trained, configs, data, run_bundle, tmp_path, pictures
):
    arguments = {"bundle_root": trained, "dataset_dir": data, "output_dir": tmp_path, "overlay": True, "device": "cpu"}
    run_bundle("inferring", f"{configs}/inference.json", **arguments)
    maps = sorted(p for p in tmp_path.rglob("*_seg.*"))
    assert maps and len(list(tmp_path.rglob("*_overlay.png"))) == len(maps)
    for file in maps:
        source = data / file.relative_to(tmp_path).parent / file.name.replace("_seg", "")
        if pictures:
            source = next(source.parent.glob(f"{source.stem}.*"))
            label = Image.open(file)
            assert label.size == Image.open(source).size and np.asarray(label).max() <= 1
        else:
            label, image = nib.load(file), nib.load(source)
            assert label.shape == image.shape and label.get_data_dtype() == np.uint8
            assert np.array_equal(label.affine, image.affine)


def test_run_names_the_one_entry_of_each_config(configs):
    for file, run_id in {"train": "training", "evaluate": "evaluating", "inference": "inferring"}.items():
        config = json.loads((configs / f"{file}.json").read_text())
        assert config["run"] == [f"$@{run_id}"] and f"/{run_id}.json" in config[run_id][0]


@of_volumes
def test_evaluation_over_the_training_config_gives_the_same(name, trained, configs, data, run_bundle):
    arguments = {"bundle_root": trained, "dataset_dir": data, **quick(name, pretrained=False)}
    alone = run_bundle("evaluating", f"{configs}/evaluate.json", **arguments).stdout
    table = (trained / "eval" / "summary.md").read_text(encoding="utf-8").strip()
    assert table in alone
    assert table in run_bundle("run", f"['{configs}/train.json','{configs}/evaluate.json']", **arguments).stdout
    paper = run_bundle("evaluating", f"{configs}/evaluate.json", convention="paper", **arguments).stdout
    assert "| HD95, voxels |" in paper and "| HD95, mm |" not in paper


@of_volumes
def test_resume_takes_up_epoch_optimiser_best_score_and_history(name, trained, configs, data, run_bundle, tmp_path):
    shutil.copytree(trained, tmp_path / "root")
    last = tmp_path / "root" / "models" / "last.ckpt"
    before = torch.load(last, weights_only=True)
    before["optimizer"]["param_groups"][0]["fused"] = None  # of an optimiser that was not
    before["best"]["best_metric"] = 2.0  # out of reach: a resumed run must not think its first epoch the best
    torch.save(before, last)
    model = (last.parent / "model.pt").read_bytes()
    arguments = {"bundle_root": tmp_path / "root", "dataset_dir": data, "resume": True, **quick(name, pretrained=False)}
    log = run_bundle("training", f"{configs}/train.json", epochs=2, **arguments).stdout
    after = torch.load(last, weights_only=True)
    assert "resumed after epoch 1 of 2, best score 2.0000" in log
    assert after["optimizer"]["param_groups"][0]["fused"] is True
    assert after["trainer"]["iteration"] == 2 * before["trainer"]["iteration"]
    steps = [{int(s["step"]) for s in state["optimizer"]["state"].values()} for state in (before, after)]
    assert steps[1] == {2 * s for s in steps[0]}
    assert (last.parent / "model.pt").read_bytes() == model and after["best"]["best_metric"] == 2.0
    history = (tmp_path / "root" / "eval" / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history] == ["epoch", "1", "2"]
    assert history[1] == (trained / "eval" / "history.csv").read_text().splitlines()[1]
    assert "nothing to train" in run_bundle("training", f"{configs}/train.json", epochs=2, **arguments).stdout


@of_pictures
def test_your_own_data_trains_by_overrides_from_another_checkpoint(name, trained, configs, data, run_bundle, tmp_path):
    """A folder of images and labels with three classes, started from a checkpoint of the bundle's own."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    labels = sorted([*data.glob("**/patient*_gt.nii.gz"), *data.glob("*_anno.bmp")])[:6]
    for i, label in enumerate(labels):
        image = label.with_name(label.name.replace("_gt", "").replace("_anno", ""))
        shutil.copy(image, tmp_path / "images" / f"case{i}{''.join(image.suffixes)}")
        to = tmp_path / "labels" / f"case{i}{''.join(label.suffixes)}"
        if label.suffix == ".gz":
            volume = nib.load(label)
            nib.save(nib.Nifti1Image(100 * np.asarray(volume.dataobj).clip(0, 2), volume.affine), to)
        else:
            Image.fromarray(100 * np.asarray(Image.open(label)).clip(0, 2)).save(to)
    own = {"dataset_dir": tmp_path, "layout": "folder", "num_classes": 3, "bundle_root": tmp_path / "root"}
    own["label_values"] = {0: 0, 100: 1, 200: 2}
    start = trained / "models" / "model.pt"
    arguments = {**own, "start_from": start, "epochs": 1, **quick(name, pretrained=False)}
    log = run_bundle("training", f"{configs}/train.json", **arguments).stdout
    total = len(torch.load(start, weights_only=True))
    heads = [k for k in torch.load(start, weights_only=True) if k.startswith("heads.")]
    assert f"start from {start}: {total - len(heads)} of {total} tensors taken" in log
    assert f"{len(heads)} tensors in the file, left out: {', '.join(sorted(heads))}" in log
    run_bundle("evaluating", f"{configs}/evaluate.json", **own, **quick(name))
    assert "class 2" in (tmp_path / "root" / "eval" / "summary.md").read_text(encoding="utf-8")
    cases = [{"image": str(f), "label": f"labels/{f.name}"} for f in sorted((tmp_path / "images").iterdir())]
    cases = [{**c, "image": f"images/{Path(c['image']).name}"} for c in cases]
    datalist = tmp_path / "dataset.json"
    datalist.write_text(json.dumps({"training": cases[:4], "validation": cases[4:5], "test": cases[5:]}))
    listed = {**own, "dataset_dir": datalist, "layout": "datalist"}
    run_bundle("evaluating", f"{configs}/evaluate.json", labels=["crypt", "stroma"], **listed, **quick(name))
    rows = (tmp_path / "root" / "eval" / "cases.csv").read_text()
    assert "case5" in rows and "dice stroma" in rows


@of_volumes
def test_other_values_than_the_training_s_are_refused(name, trained, configs, data, run_bundle, tmp_path):
    shutil.copytree(trained / "models", tmp_path / "models")
    options = {"bundle_root": tmp_path, "dataset_dir": data, **quick(name)}
    other = {
        "Resume with --image_size 32.": {"image_size": 64},
        "with weight_decay 0.05, this one has 0.": {"weight_decay": 0},
    }
    for message, value in other.items():
        values = {**options, "epochs": 2, "resume": True, "pretrained": False, **value}
        result = run_bundle("training", f"{configs}/train.json", check=False, **values)
        assert result.returncode == 1 and message in result.stdout
    needed = ("model.pt", "--field_of_view 224", '--intensity "percentiles 0.5 99.5"')
    values = {"field_of_view": 50, "intensity": "zscore"}
    result = run_bundle("inferring", f"{configs}/inference.json", check=False, **options, **values)
    assert result.returncode == 1 and all(option in result.stdout for option in needed)
    advised = {"field_of_view": 224, "intensity": "percentiles 0.5 99.5", "output_dir": tmp_path}
    run_bundle("inferring", f"{configs}/inference.json", **options, **advised)


@of_volumes
def test_none_which_the_runner_drops_is_refused(name, configs, tmp_path):
    release = json.loads((configs / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(release))
    for option in (["--field_of_view", "None"], ["--field_of_view=None"]):
        result = bundle_runner("run", "training", "--config_file", f"{tmp_path}/train.json", *option, check=False)
        assert result.returncode == 1 and "--field_of_view whole" in result.stdout


@of_volumes
def test_outside_the_runner_weights_keep_what_they_are_trained_for(name, configs, data, tmp_path, caplog):
    parser = ConfigParser.load_config_file(configs / "train.json")
    options = quick(name, bundle_root=str(tmp_path), dataset_dir=str(data), pretrained=False, epochs=1, batch_size=64)
    parser = ConfigParser({**parser, **options})
    parser["train"]["handlers"] = [h for h in parser["train"]["handlers"] if "Checkpoints" in h["_target_"]]
    parser.get_parsed_content("train#trainer").run()
    kept = json.loads((tmp_path / "models" / "model.json").read_text())
    assert kept == {
        "network": "FIAS",
        "in_channels": 1,
        "num_classes": 4,
        "image_size": 32,
        "field_of_view": 224,
        "intensity": "percentiles 0.5 99.5",
    }
    parser["train"]["handlers"][0]["values"] = None
    parser.parse()
    parser.get_parsed_content("train#trainer").run()
    assert not (tmp_path / "models" / "model.json").exists() and "model.json" in caplog.text


@samples
def test_the_recommended_recipe_saves_averaged_weights(name, configs, data, run_bundle, tmp_path):
    options = {"bundle_root": tmp_path, "dataset_dir": data, "epochs": 2}
    train = f"{configs}/train.json"
    run_bundle("training", train, **options, batch_size=6, **quick(name, pretrained=False))
    last = torch.load(tmp_path / "models" / "last.ckpt", weights_only=True)
    assert last["averaged_steps"] == last["trainer"]["iteration"]
    assert any(not torch.equal(last["averaged"][key], value) for key, value in last["network"].items())
    with (tmp_path / "eval" / "history.csv").open() as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates[0] == pytest.approx(2.5e-4, rel=0.2) and rates[1] == 0  # half of a cosine, and its end
    options = {**options, "epochs": 3, "resume": True, "batch_size": 6, **quick(name, pretrained=False)}
    result = run_bundle("training", train, check=False, average_weights=False, **options)
    assert result.returncode == 1
    assert "last.ckpt" in result.stdout and "averaged" in result.stdout


@samples
def test_the_paper_s_recipe_is_laid_over_the_recommended_one(name, configs, data, run_bundle, tmp_path):
    recipe = str([f"{configs}/train.json", f"{configs}/paper.json"])
    options = {"bundle_root": tmp_path, "dataset_dir": data, "epochs": 1, **quick(name, pretrained=False)}
    run_bundle("training", recipe, **options)
    last = torch.load(tmp_path / "models" / "last.ckpt", weights_only=True)
    assert "averaged" not in last and last["values"]["field_of_view"] == "whole"
    (group,) = last["optimizer"]["param_groups"]
    assert group["lr"] == group["weight_decay"] == 1e-4
    values = ConfigParser.load_config_files([configs / "train.json", configs / "paper.json"])
    assert values["optimizer"]["_target_"] == f"torch.optim.{'Adam' if name.startswith('fias') else 'AdamW'}"
    assert values.get("size", "large") == "large" and values["image_size"] == 256


def test_the_average_is_the_moving_average_of_all_steps():
    """Also of a batch normalisation's statistics; the first step's weights begin it."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.7)
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    seen: list[dict[str, torch.Tensor]] = []

    def step(engine: Engine, image: torch.Tensor) -> None:
        optimizer.zero_grad()
        network(image).square().sum().backward()
        optimizer.step()

    trainer = Engine(step)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: seen.append({k: v.clone().double() for k, v in network.state_dict().items()}),
    )
    AverageWeights(averaged, network).attach(trainer)
    trainer.run(torch.randn(5, 2, 1, 8, 8))
    for key in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        expected = seen[0][key]
        for state in seen[1:]:
            expected = 0.7 * expected + 0.3 * state[key]
        torch.testing.assert_close(averaged.module.state_dict()[key].double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(averaged.module.state_dict()[key], network.state_dict()[key])


@pytest.mark.parametrize("steps", [100, 500, 30000])
@of_volumes
def test_the_average_holds_nothing_of_the_initial_weights(name, configs, steps):
    parser = ConfigParser({**ConfigParser.load_config_file(configs / "train.json"), "steps": steps})
    assert (1 - parser.get_parsed_content("ema_momentum")) ** steps < 1e-4


class Reads(TorchDispatchMode):
    """Counts what reads a value from a tensor: on a GPU, each waits until all before it is computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@of_volumes
def test_a_training_step_reads_nothing_from_the_device(name, configs, data, tmp_path):
    """But each tenth, for the progress bar and TensorBoard."""
    options = quick(name, bundle_root=str(tmp_path), dataset_dir=str(data), pretrained=False, batch_size=2)
    options |= {"average_weights": False}  # whose number of steps torch reads, from the CPU
    workflow = ConfigWorkflow(f"{configs}/train.json", **{**options, "num_workers": 1, "epochs": 1})
    workflow.initialize()
    trainer, counts, reads = workflow.parser.get_parsed_content("train#trainer"), [], Reads()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: counts.append(reads.count))
    with reads:
        workflow.run()
    steps = np.diff(counts).tolist()
    assert len(steps) >= 20 and steps[8] > 0
    assert not any(steps[:8] + steps[9:18])


@of_volumes
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("batch_size", [7, 60, 1000])
def test_a_compiled_training_has_whole_batches_alone(name, batch_size, processes, configs, data, tmp_path):
    """A short batch would be compiled for anew, unless it is all that a process has."""
    options = quick(name, bundle_root=str(tmp_path), dataset_dir=str(data), batch_size=batch_size)
    files = [f"{configs}/train.json"]
    if processes > 1:
        files.append(f"{configs}/multi_gpu_train.json")
        options |= {"train#sampler#num_replicas": processes, "train#sampler#rank": 0}
    lengths = []
    for compiled in (False, True):
        parser = ConfigParser()
        parser.read_config(files)
        parser.update({**options, "compile": compiled})
        loader = parser.get_parsed_content("train#dataloader")
        lengths.append([len(batch["image"]) for batch in loader])
    slices = len(loader.dataset) // processes
    assert sum(lengths[0]) == slices and slices % batch_size
    assert lengths[1] == ([batch_size] * (slices // batch_size) or [slices])


@samples
def test_runs_from_the_bundle_s_own_folder(name, trained, configs, one_case, run_bundle, tmp_path):
    root = tmp_path / "elsewhere"
    shutil.copytree(configs.parent, root, ignore=shutil.ignore_patterns("models", "eval"))
    shutil.copytree(trained / "models", root / "models")
    run_bundle("inferring", "configs/inference.json", cwd=root, dataset_dir=one_case, **quick(name))
    assert len(list((root / "eval").glob("*_seg.*"))) == 1


@pytest.fixture(scope="module")
def torchrun(name, configs, data) -> Callable[..., str]:
    """``torchrun(run_id, *files, **overrides)`` in two processes with gloo; their log."""

    def torchrun(run_id: str, *files: str, **overrides: object) -> str:
        config = str([f"{configs}/{file}.json" for file in files])
        launch = "-m torch.distributed.run --standalone --nproc_per_node=2 -m monai.bundle run".split()
        options = {**quick(name, pretrained=False), "dataset_dir": data}
        del options["device"]  # each process has its own, unless told
        options |= overrides
        arguments = [f"--{key}={value}" for key, value in options.items()]
        return run(*launch, run_id, "--config_file", config, *arguments, threads=1).stdout

    return torchrun


@of_volumes
def test_two_processes_evaluate_and_infer_as_one(name, configs, data, run_bundle, torchrun, tmp_path):
    """The same tables and label maps, each case once."""
    alone, together, ckpt = tmp_path / "alone", tmp_path / "together", {"ckpt_dir": tmp_path}
    save_random(FIAS(1, 4), tmp_path / "model.pt")
    options = {"dataset_dir": data, "output_dir": alone, **ckpt, **quick(name)}
    run_bundle("evaluating", f"{configs}/evaluate.json", **options)
    run_bundle("inferring", f"{configs}/inference.json", **options)
    torchrun("evaluating", "evaluate", "multi_gpu_evaluate", output_dir=together, **ckpt)
    torchrun("inferring", "inference", "multi_gpu_evaluate", output_dir=together, device="cpu", **ckpt)
    first, second = (sorted((f / "cases.csv").read_text().splitlines()) for f in (alone, together))
    assert len(first) > 2 and [row.split(",")[0] for row in first] == [row.split(",")[0] for row in second]
    for a, b in zip(first, second, strict=True):
        if not a.startswith("case"):
            np.testing.assert_allclose(*([float(v) for v in r.split(",")[1:]] for r in (a, b)), rtol=1e-4)
        print(a, b, sep="\n")
    maps = sorted(str(p.relative_to(alone)) for p in alone.rglob("*_seg.nii.gz"))
    assert len(maps) > 1 and maps == sorted(str(p.relative_to(together)) for p in together.rglob("*_seg.nii.gz"))
    for file in maps:
        a, b = (np.asarray(nib.load(folder / file).dataobj) for folder in (alone, together))
        assert np.mean(a == b) > 0.9999  # the number of threads changes rounding
    first, second = ((f / "measures.csv").read_text().splitlines() for f in (alone, together))
    assert len(first) > 1 and [row.split(",")[0] for row in first] == [row.split(",")[0] for row in second]


@of_volumes
@pytest.mark.parametrize("validation", [1, 3])
def test_two_processes_train_to_one_model(name, validation, configs, data, run_bundle, torchrun, tmp_path):
    """Its score is what one process finds; of uneven shares too, and of one case, which both then score."""
    found = cases("acdc", data, "train")
    splits = {"training": found[:4], "validation": found[-validation:]}
    lists = {split: [{"image": c["image"], "label": c["label"]} for c in found] for split, found in splits.items()}
    (tmp_path / "dataset.json").write_text(json.dumps(lists))
    options = {"layout": "datalist", "dataset_dir": tmp_path / "dataset.json", "bundle_root": tmp_path}
    start = FIAS(1, 4)
    for conv in start.heads.convs:  # class 1 everywhere: a score of its own in each case, whatever is rounded
        torch.nn.init.zeros_(conv.weight)
        conv.bias.data = torch.eye(4)[1]
    torch.save(start.state_dict(), tmp_path / "start.pt")
    steps = {"epochs": 1, "learning_rate": 1e-6, "start_from": tmp_path / "start.pt"}
    steps |= {"device": "cpu"} if validation == 1 else {}
    torchrun("training", "train", "multi_gpu_train", **steps, **options)
    assert len({file.name.split(".")[-2] for file in (tmp_path / "eval").glob("events.*")}) == 1  # one process's
    run_bundle("evaluating", f"{configs}/evaluate.json", split="validation", **options, **quick(name))
    (epoch,), scores = (list(csv.DictReader((tmp_path / "eval" / f).open())) for f in ("history.csv", "cases.csv"))
    dice = [float(case[column]) for case in scores for column in case if column.startswith("dice")]
    assert len(dice) == 3 * validation and np.mean(dice) > 0
    np.testing.assert_allclose(float(epoch["score"]), np.mean(dice), rtol=1e-3)


def test_threads_of_processes_together_end_before_the_interpreter_does(tmp_path):
    """As it shuts down, one that frees a tensor would abort a process whose training is done."""
    script = """
import atexit, pathlib, monai.bundle
def threads():
    print("threads", *(file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")))
atexit.register(threads)  # called last
monai.bundle.run("training", config_file="config.json")
threads()
"""
    group = f"$torch.distributed.init_process_group('gloo', 'file://{tmp_path}/store', rank=0, world_size=1)"
    config = {
        "imports": ["$import torch", "$from networks.engine import leave_process_group"],  # first: imports free things
        "network": {"_target_": "torch.nn.parallel.DistributedDataParallel", "module": "$torch.nn.Linear(1, 1)"},
        "initialize": group,
        "training": "$@network(torch.ones(1, 1)).sum().backward()",
        "finalize": "$leave_process_group()",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = run("-c", script, cwd=tmp_path).stdout
    after_the_run, at_the_end = (line for line in output.splitlines() if line.startswith("threads"))
    print(after_the_run)  # gloo's are among them with some versions of torch, and have names with some
    assert "gloo" not in at_the_end


@of_volumes
def test_federated_training_s_client_takes_the_bundle(name, configs, data, tmp_path):
    """NVFlare runs MONAI's client, which adds values of its own to the config."""
    options = {"dataset_dir": str(data), "output_dir": str(tmp_path), **quick(name)}
    client = MonaiAlgo(
        str(configs.parent),
        send_weight_diff=False,
        config_evaluate_filename="configs/train.json",
        train_kwargs=options,
        eval_kwargs=options,
    )
    client.initialize(extra={ExtraItems.CLIENT_NAME: "site"})
    assert client.get_weights().weights.keys() == FIAS(1, 4).state_dict().keys()


def test_wrong_volumes_end_in_one_sentence_and_nothing_written(phantoms, run_bundle, tmp_path):
    def first(patient: Path, suffix: str = "") -> Path:
        return patient / f"{patient.name}_frame01{suffix}.nii.gz"

    def change_label(edit):
        def change(patient: Path) -> None:
            label = nib.load(first(patient, "_gt"))
            nib.save(nib.Nifti1Image(edit(np.asarray(label.dataobj)), label.affine), first(patient, "_gt"))

        return change

    wrong = {
        "has no label": lambda p: first(p, "_gt").unlink(),
        "Cannot read .*patient004_frame01.nii.gz": lambda p: first(p).write_bytes(first(p).read_bytes()[:500]),
        r"values \[7.0\], expected whole numbers from 0 to 3": change_label(lambda a: np.where(a == 3, 7, a)),
    }
    for message, change in wrong.items():
        data = _changed(phantoms("acdc"), tmp_path, "training/patient004", change)
        _fails(run_bundle, "fias_acdc", data, tmp_path / "root", message)


def test_wrong_pictures_end_in_one_sentence_and_nothing_written(phantoms, run_bundle, tmp_path):
    def mask(image: Path) -> Path:
        return image.parents[1] / "ISIC2018_Task1_Training_GroundTruth" / f"{image.stem}_segmentation.png"

    wrong = {
        "has 1 channel.*expected 3: an RGB picture": lambda f: Image.open(f).convert("L").save(f),
        r"values \[7.0\], expected none but 0, 255": lambda f: Image.new("L", Image.open(f).size, 7).save(mask(f)),
    }
    for message, change in wrong.items():
        image = "ISIC2018_Task1-2_Training_Input/ISIC_0000001.jpg"
        data = _changed(phantoms("isic2018"), tmp_path, image, change)
        _fails(run_bundle, "danie_isic2018", data, tmp_path / "root", message)


def _changed(data: Path, tmp_path: Path, place: str, change) -> Path:
    """A copy of a dataset with one place in it spoilt."""
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    shutil.copytree(data, tmp_path / "data")
    change(tmp_path / "data" / place)
    return tmp_path / "data"


def _fails(run_bundle, name: str, data: Path, root: Path, message: str) -> None:
    config = f"{ROOT}/bundles/{name}/configs/train.json"
    result = run_bundle(
        "training", config, check=False, bundle_root=root, dataset_dir=data, **quick(name, pretrained=False)
    )
    assert result.returncode == 1
    error = result.stdout[result.stdout.rindex("\nError: ") :]
    assert re.search(message, error, re.S) and "Traceback" not in error, error
    assert not (root / "models").exists()


@of_pictures
def test_wrong_weights_end_in_one_sentence(name, trained, configs, data, run_bundle, tmp_path):
    arguments = {"dataset_dir": data, **quick(name)}
    absent = run_bundle("evaluating", f"{configs}/evaluate.json", check=False, ckpt_dir=tmp_path, **arguments)
    assert absent.returncode == 1 and "Error: " in absent.stdout and str(tmp_path / "model.pt") in absent.stdout
    shutil.copy(trained / "models" / "model.pt", tmp_path)  # without model.json, which would name the value
    other = run_bundle(
        "evaluating", f"{configs}/evaluate.json", check=False, ckpt_dir=tmp_path, num_classes=9, **arguments
    )
    assert other.returncode == 1
    assert re.search(r"heads.convs.0.weight is \[\d, .* in the file, \[9, .* in the network", other.stdout)


def test_all_properties_resolve(name, configs, data, tmp_path):
    for files, kind in {
        ("train",): "train",
        ("train", "evaluate"): "train",
        ("evaluate",): "infer",
        ("inference",): "infer",
    }.items():
        workflow = ConfigWorkflow(
            [str(configs / f"{file}.json") for file in files],
            workflow_type=kind,
            logging_file=False,
            dataset_dir=str(data),
            bundle_root=str(tmp_path),
            **quick(name, pretrained=False),
        )
        workflow.parser["initialize"] = []
        workflow.initialize()
        assert workflow.check_properties() == [], files


def test_what_the_configs_of_a_bundle_share_is_the_same(configs):
    """Evaluation and inference prepare, infer and invert as validation in training does."""
    train, evaluate, inference = (
        json.loads((configs / f"{f}.json").read_text()) for f in ("train", "evaluate", "inference")
    )
    assert train["validate"]["preprocessing_transforms"] == evaluate["preprocessing"]["transforms"]
    assert {**train["validate"]["inferer"], "flips": "@flips"} == evaluate["inferer"]
    without_label = [t for t in evaluate["preprocessing"]["transforms"] if isinstance(t, str) or t["keys"] != "label"]
    kept = {"_target_": "CopyItemsd", "keys": "image", "names": "raw"}  # to be measured, which changes nothing else
    assert without_label == [t for t in inference["preprocessing"]["transforms"] if t != kept]
    assert train["trained_for"] == evaluate["trained_for"] == inference["trained_for"]
    for name in train["trained_for"]:  # what there is no weights' own value of
        assert train[name] == evaluate["trained"][name] == inference["trained"][name]
        assert evaluate[name] == inference[name] == f"$@trained['{name}']"
    for part, own in (("inferer", "training"), ("network_def", "dropout")):
        del inference[part][own]  # of MONAI Label's scoring, of which evaluation knows nothing
    for own in ("confidence", "entropy", "probabilities"):  # maps beside the label map
        del inference["inferer"][own]
    for key in ("inferer", "dataloader", "network_def", "network", "engine", "device"):
        assert evaluate[key] == inference[key]
    for a, b in ((train, evaluate), (evaluate, inference)):
        for key in {key for key in a.keys() & b.keys() if not key.startswith("_")} - {
            *("network_def", "network", "initialize", "run", "num_workers", "imports", "device"),
            *("preprocessing", "postprocessing", "cases", "dataset", "handlers", "evaluator"),
            *train["trained_for"],
        }:
            assert a[key] == b[key], key


def test_the_configs_are_what_their_common_source_says():
    run("bundles/configs.py", "--check")


def test_every_plain_value_has_a_schema(configs):
    values = [
        json.loads((configs / f"{file}.json").read_text()) for file in ("train", "paper", "evaluate", "inference")
    ]
    names = {name for config in values for name, value in config.items() if not isinstance(value, (dict, list))}
    plain = {name for name in names if not name.startswith("_") and "#" not in name}
    assert plain - set(VALUES) <= EXPRESSIONS


def test_docs_and_metadata_have_the_same_parts_in_all_bundles(configs):
    first = ROOT / "bundles" / BUNDLES[0]
    assert (configs.parent / "LICENSE").read_bytes() == (first / "LICENSE").read_bytes()

    def sections(bundle: Path) -> list[str]:
        return re.findall("^#+ .*$", (bundle / "docs" / "README.md").read_text(), re.M)[1:]

    assert sections(configs.parent) == sections(first)
    meta, other = (json.loads((f / "metadata.json").read_text()) for f in (configs, first / "configs"))
    assert list(meta) == list(other)


def test_every_target_resolves(configs, data):
    targets = set()
    for file in configs.glob("*.json"):
        targets |= set(re.findall(r'"_target_": "([\w.]+)"', file.read_text()))
    assert len(targets) > 20
    for target in targets:
        assert ConfigParser({"x": {"_target_": target, "_mode_": "callable"}}).get_parsed_content("x") is not None


def test_metadata_tells_what_the_network_gives(configs):
    meta = json.loads((configs / "metadata.json").read_text())
    assert meta["version"] in meta["changelog"]
    parser = ConfigParser(json.loads((configs / "inference.json").read_text()))
    network = parser.get_parsed_content("network_def").eval()
    spec_in = meta["network_data_format"]["inputs"]["image"]
    spec_out = meta["network_data_format"]["outputs"]["pred"]
    with torch.no_grad():
        out = network(torch.zeros(1, spec_in["num_channels"], *spec_in["spatial_shape"]))
    assert list(out.shape) == [1, spec_out["num_channels"], *spec_out["spatial_shape"]]
    assert list(spec_out["channel_def"]) == [str(i) for i in range(spec_out["num_channels"])]


def bundle_command(command: str, configs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = ["--meta_file", f"{configs}/metadata.json", "--config_file", f"{configs}/inference.json"]
    return bundle_runner(command, "network_def", *files, *arguments)


@samples
def test_verify_net_in_out_succeeds(configs):
    bundle_command("verify_net_in_out", configs, "--device", "cpu")


@of_pictures
def test_ckpt_export_gives_the_same_network(name, trained, configs, equal_label_maps, tmp_path):
    weights = trained / "models" / "model.pt"
    file = tmp_path / "model.ts"
    options = ["--filepath", str(file), "--ckpt_file", str(weights), "--size", "small", "--image_size", "32"]
    bundle_command("ckpt_export", configs, *options)
    parser = ConfigParser(json.loads((configs / "inference.json").read_text()))
    parser["size"], parser["image_size"] = "small", 32
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.rand(2, network.in_channels, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(file)(x), network(x), atol=1e-5, rtol=1e-5)
    assert equal_label_maps(tmp_path, "inference_ts.json") > 0.999  # an untrained network has ties


@samples
def test_an_exported_program_gives_the_same_label_map(name, trained, configs, run_bundle, equal_label_maps, tmp_path):
    for file in ("model.pt", "model.json"):
        shutil.copy(trained / "models" / file, tmp_path)
    run_bundle("exporting", f"{configs}/inference.json", ckpt_dir=tmp_path, **quick(name))
    assert equal_label_maps(tmp_path, "inference_pt2.json") > 0.999  # an untrained network has ties


@pytest.mark.slow
@samples
def test_onnx_export_succeeds(trained, configs, tmp_path):
    weights, file = trained / "models" / "model.pt", tmp_path / "model.onnx"
    channels = json.loads((configs / "inference.json").read_text())["in_channels"]
    options = ["--filepath", str(file), "--ckpt_file", str(weights), "--input_shape", f"[1,{channels},64,64]"]
    bundle_command("onnx_export", configs, *options, "--size", "small")
    assert file.stat().st_size > 1000
