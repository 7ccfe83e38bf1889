"""The bundles as users run them: through monai.bundle, on phantoms, on the CPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from conftest import ROOT, run

BUNDLES = sorted(p.parent.parent.name for p in (ROOT / "bundles").glob("*/configs/metadata.json"))
QUICK = {"image_size": 32, "num_workers": 0, "device": "cpu"}
TRAIN = {**QUICK, "pretrained": False}


@pytest.fixture(params=BUNDLES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def configs(name: str) -> Path:
    return ROOT / "bundles" / name / "configs"


@pytest.fixture(scope="module")
def trained(name, configs, acdc_phantoms, run_bundle, tmp_path_factory) -> Path:
    """A bundle root after one epoch of training; its log in ``log.txt``."""
    root = tmp_path_factory.mktemp(name)
    result = run_bundle(
        "training", f"{configs}/train.json", bundle_root=root, dataset_dir=acdc_phantoms, epochs=1, **TRAIN
    )
    (root / "log.txt").write_text(result.stdout)
    return root


def test_training_leaves_best_and_last_checkpoint_and_tensorboard_events(trained):
    state = torch.load(trained / "models" / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())  # flat: MONAI Label and CheckpointLoader read it
    last = torch.load(trained / "models" / "last.pt", weights_only=True)
    assert last["trainer"]["iteration"] == last["trainer"]["epoch_length"] > 0
    assert list((trained / "eval").glob("events.*"))
    log = (trained / "log.txt").read_text()
    assert re.search(r"loss=[\d.]+, dice=(nan|[\d.]+), slices/s=\d+", log)
    assert re.search(r"16 volumes, 48 slices an epoch, .* MB in memory", log)
    assert "best val_mean_dice" in log


def test_resume_takes_up_epoch_optimiser_and_best_score(trained, configs, acdc_phantoms, run_bundle, tmp_path):
    shutil.copytree(trained, tmp_path / "root")
    last = tmp_path / "root" / "models" / "last.pt"
    before = torch.load(last, weights_only=True)
    before["best"]["best_metric"] = 2.0  # out of reach: a resumed run must not think its first epoch the best
    torch.save(before, last)
    model = (last.parent / "model.pt").read_bytes()
    arguments = {"bundle_root": tmp_path / "root", "dataset_dir": acdc_phantoms, "resume": True, **TRAIN}
    log = run_bundle("training", f"{configs}/train.json", epochs=2, **arguments).stdout
    after = torch.load(last, weights_only=True)
    assert "resumed after epoch 1 of 2, best score 2.0000" in log
    assert after["trainer"]["iteration"] == 2 * before["trainer"]["iteration"]
    steps = [{int(s["step"]) for s in state["optimizer"]["state"].values()} for state in (before, after)]
    assert steps[1] == {2 * s for s in steps[0]}
    assert (last.parent / "model.pt").read_bytes() == model and after["best"]["best_metric"] == 2.0
    assert "nothing to train" in run_bundle("training", f"{configs}/train.json", epochs=2, **arguments).stdout


def test_run_names_the_one_entry_of_each_config(configs):
    for file, run_id in {"train": "training", "evaluate": "evaluating", "inference": "inferring"}.items():
        config = json.loads((configs / f"{file}.json").read_text())
        assert config["run"] == [f"$@{run_id}"] and len(config[run_id]) == 1


def test_evaluation_leaves_table_and_pictures(trained, configs, acdc_phantoms, run_bundle):
    arguments = {"bundle_root": trained, "dataset_dir": acdc_phantoms, **QUICK}
    log = run_bundle("evaluating", f"{configs}/evaluate.json", **arguments).stdout
    table = (trained / "eval" / "dice.md").read_text()
    assert table.strip() in log and table.count("| patient00") == 4 and "| right ventricle | myocardium |" in table
    for picture in ("worst", "median", "best"):
        assert (trained / "eval" / f"{picture}.png").stat().st_size > 1000
    rows = (trained / "eval" / "val_mean_dice_raw.csv").read_text().splitlines()
    assert len(rows) == 5 and "patient002_frame01" in rows[1]
    patched = f"['{configs}/train.json','{configs}/evaluate.json']"
    assert table.strip() in run_bundle("run", patched, **arguments).stdout


def test_inference_writes_a_label_map_on_each_image_s_grid(trained, configs, acdc_phantoms, run_bundle, tmp_path):
    patient = acdc_phantoms / "training" / "patient002"
    run_bundle(
        "inferring",
        f"{configs}/inference.json",
        bundle_root=trained,
        dataset_dir=patient,
        output_dir=tmp_path / "out",
        **QUICK,
    )
    images = sorted(p for p in patient.glob("*.nii.gz") if "_gt" not in p.name)
    assert len(list((tmp_path / "out").iterdir())) == len(images) == 2
    for image in images:
        label = nib.load(tmp_path / "out" / image.name.replace(".nii", "_seg.nii"))
        assert label.shape == nib.load(image).shape and label.get_data_dtype() == np.uint8
        assert np.array_equal(label.affine, nib.load(image).affine)


def test_runs_from_the_bundle_s_own_folder(trained, configs, acdc_phantoms, run_bundle, tmp_path):
    root = tmp_path / "elsewhere"
    shutil.copytree(configs.parent, root, ignore=shutil.ignore_patterns("models", "eval"))
    shutil.copytree(trained / "models", root / "models")
    folder = acdc_phantoms / "training" / "patient003"
    run_bundle("inferring", "configs/inference.json", cwd=root, dataset_dir=folder, **QUICK)
    assert len(list((root / "eval").glob("*_seg.nii.gz"))) == 2


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(trained, configs, acdc_phantoms, run_bundle, tmp_path):
    """torchrun with gloo: training ends in one model.pt, evaluation in the same mean Dice as one process."""

    def torchrun(run_id: str, *files: str, root: Path) -> str:
        config = str([f"{configs}/{file}.json" for file in files])
        launch = "-m torch.distributed.run --standalone --nproc_per_node=2 -m monai.bundle run".split()
        options = {"bundle_root": root, "dataset_dir": acdc_phantoms, "image_size": 32, "num_workers": 0, "epochs": 1}
        options["pretrained"] = False
        arguments = [f"--{key}={value}" for key, value in options.items()]
        return run(*launch, run_id, "--config_file", config, *arguments, threads=1).stdout

    torchrun("training", "train", "multi_gpu_train", root=tmp_path)
    assert (tmp_path / "models" / "model.pt").is_file()
    log = torchrun("evaluating", "evaluate", "multi_gpu_evaluate", root=trained)
    together = float(re.search(r"val_mean_dice: ([\d.]+)", log)[1])
    arguments = {"bundle_root": trained, "dataset_dir": acdc_phantoms, **QUICK}
    alone = run_bundle("evaluating", f"{configs}/evaluate.json", **arguments).stdout
    assert together == pytest.approx(float(re.search(r"val_mean_dice: ([\d.]+)", alone)[1]), abs=1e-6)


def test_wrong_data_ends_in_one_sentence_and_nothing_written(configs, acdc_phantoms, run_bundle, tmp_path):
    def bad(change) -> Path:
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(acdc_phantoms, folder)
        change(folder / "training" / "patient004")
        return folder

    def first(patient: Path, suffix: str = "") -> Path:
        return patient / f"{patient.name}_frame01{suffix}.nii.gz"

    def change_label(edit):
        def change(patient: Path) -> None:
            label = nib.load(first(patient, "_gt"))
            nib.save(nib.Nifti1Image(edit(np.asarray(label.dataobj)), label.affine), first(patient, "_gt"))

        return change

    wrong = {
        "expected folders patient001": lambda p: shutil.rmtree(p.parent),
        "has no label": lambda p: first(p, "_gt").unlink(),
        "Cannot read .*patient004_frame01.nii.gz": lambda p: first(p).write_bytes(first(p).read_bytes()[:500]),
        "its image .* the label must lie on the image's grid": change_label(lambda a: a[:, :, :2]),
        r"values \[7.0\], expected whole numbers from 0 to 3": change_label(lambda a: np.where(a == 3, 7, a)),
    }
    for message, change in wrong.items():
        result = run_bundle(
            "training",
            f"{configs}/train.json",
            check=False,
            bundle_root=tmp_path / "root",
            dataset_dir=bad(change),
            **TRAIN,
        )
        assert result.returncode == 1
        error = result.stdout[result.stdout.rindex("\nError: ") :]
        assert re.search(message, error, re.S) and "Traceback" not in error
        print(error.strip())
        assert not (tmp_path / "root" / "models").exists()


def test_wrong_weights_end_in_one_sentence(trained, configs, acdc_phantoms, run_bundle, tmp_path):
    arguments = {"dataset_dir": acdc_phantoms, **QUICK}
    absent = run_bundle("evaluating", f"{configs}/evaluate.json", check=False, ckpt_dir=tmp_path, **arguments)
    assert absent.returncode == 1 and "Error: No weights at" in absent.stdout and "Train them" in absent.stdout
    other = run_bundle(
        "evaluating", f"{configs}/evaluate.json", check=False, ckpt_dir=trained / "models", num_classes=9, **arguments
    )
    assert other.returncode == 1
    assert re.search(r"heads.convs.0.weight is \[4, .* in the file, \[9, .* in the network", other.stdout)


def test_all_properties_resolve(name, configs, acdc_phantoms):
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
            dataset_dir=str(acdc_phantoms),
            **TRAIN,
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
    for key in ("inferer", "key_metric"):
        assert train["validate"][key] == evaluate[key]
    without_label = [
        {**t, "keys": "image"}
        for t in evaluate["preprocessing"]["transforms"]
        if not t["_target_"].endswith("CheckLabeld")
    ]
    assert without_label == inference["preprocessing"]["transforms"]
    for key in ("inferer", "dataloader", "network_def", "network"):
        assert evaluate[key] == inference[key]
    for key in train.keys() & evaluate.keys() - {"network_def", "initialize", "run", "num_workers", "imports"}:
        assert train[key] == evaluate[key], key


def test_what_the_bundles_share_is_the_same_word_for_word(name, configs):
    """Two bundles differ in named values at the top, the network, its optimiser and nothing else."""
    own = "name size epochs batch_size dice_weight ce_weight dropout pretrained deep_supervision".split()

    def shared(file: Path) -> str:
        text = re.sub(r'    "network_def": \{.*?\n    \},\n', "", file.read_text(), flags=re.S)
        text = re.sub(r'"torch\.optim\.\w+"', "", text)
        return re.sub(rf'    "({"|".join(own)})": .*\n', "", text)

    first = ROOT / "bundles" / BUNDLES[0]
    for file in sorted(configs.glob("*")):
        if file.name != "metadata.json":
            assert shared(file) == shared(first / "configs" / file.name), file
    assert (configs.parent / "LICENSE").read_bytes() == (first / "LICENSE").read_bytes()

    def sections(bundle: Path) -> list[str]:
        return re.findall("^#+ .*$", (bundle / "docs" / "README.md").read_text(), re.M)[1:]

    assert sections(configs.parent) == sections(first)
    meta, other = (json.loads((f / "metadata.json").read_text()) for f in (configs, first / "configs"))
    assert list(meta) == list(other)


def test_metadata_tells_what_the_network_gives(name, configs):
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
    return run("-m", "monai.bundle", command, "network_def", *files, *arguments)


def test_verify_net_in_out_succeeds(configs):
    bundle_command("verify_net_in_out", configs, "--device", "cpu")


def test_ckpt_export_gives_the_same_network(trained, configs, tmp_path):
    weights = trained / "models" / "model.pt"
    file = tmp_path / "model.ts"
    bundle_command("ckpt_export", configs, "--filepath", str(file), "--ckpt_file", str(weights))
    network = (
        ConfigParser(json.loads((configs / "inference.json").read_text())).get_parsed_content("network_def").eval()
    )
    network.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(file)(x), network(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_onnx_export_succeeds(trained, configs, tmp_path):
    weights, file = trained / "models" / "model.pt", tmp_path / "model.onnx"
    bundle_command(
        "onnx_export", configs, "--filepath", str(file), "--ckpt_file", str(weights), "--input_shape", "[1,1,64,64]"
    )
    assert file.stat().st_size > 1000
