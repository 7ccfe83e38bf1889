"""Networks trained through a bundle's configs, by one recipe, and scored on its validation cases.

    python tests/benchmarks/accuracy.py DATASET_DIR [--bundle fias_acdc] [--recipe recommended]
        [--networks FIAS,DynUNet] [--seeds 0,1] [--epochs 400] [--output_dir accuracy]

``recommended`` is the bundle's ``train.json``, ``paper`` the recipe of its network's paper, ``paper.json`` over it. A
peer takes the network's place by ``network_def`` alone; SwinUNETR needs ``pip install einops``. Any other word is an
override of both configs, such as ``--image_size 224``; one of training alone goes in by
``--train "{'batch_size': 8}"``.
``--first "{'epochs': 20, 'image_size': 128}"`` is what a training before it has otherwise, from whose weights it
starts.

Each training leaves its folder, ``output_dir/BUNDLE_RECIPE_NETWORK_SEED``, which is refused under other options. The
same command takes up a broken-off table: what has its scores is not run again, and a training goes on after the last
epoch that it kept. Time has the start-up and all validation in it. Scores are of ``model.pt``, the best epoch on the
same validation cases: they compare networks and recipes, and are no figures of a test set.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import fire
from measure import chosen, table

ROOT = Path(__file__).parents[2]
ENDS = {"in_channels": "@in_channels", "out_channels": "@num_classes"}
DANIE = {"_target_": "networks.DANIE", **ENDS, "size": "@size", "img_size": "@image_size"}
NETWORKS: dict[str, dict[str, Any]] = {  # what each overrides; size is a value, so that model.json has it
    "FIAS": {"network_def": {"_target_": "networks.FIAS", **ENDS}},
    "DANIE-S": {"network_def": DANIE, "size": "small"},
    "DANIE-L": {"network_def": DANIE, "size": "large"},
    "DANIE-S deep": {"network_def": {**DANIE, "deep_supervision": True}, "size": "small"},
    "DynUNet": {  # nnU-Net's 2D plan for slices of 256 x 256
        "network_def": {
            "_target_": "DynUNet",
            "spatial_dims": 2,
            **ENDS,
            "kernel_size": [3] * 7,
            "strides": [1] + [2] * 6,
            "upsample_kernel_size": [2] * 6,
            "filters": [32, 64, 128, 256, 512, 512, 512],
            "norm_name": "instance",
        }
    },
    "AttentionUnet": {
        "network_def": {
            "_target_": "AttentionUnet",
            "spatial_dims": 2,
            **ENDS,
            "channels": [32, 64, 128, 256, 512],
            "strides": [2, 2, 2, 2],
        }
    },
    "SwinUNETR": {"network_def": {"_target_": "SwinUNETR", "spatial_dims": 2, **ENDS, "feature_size": 48}},
}


def bundle_run(run_id: str, configs: list[Path], log: Path, **overrides: Any) -> None:
    """``python -m monai.bundle run``, its output in a file.

    Raises:
        RuntimeError: with the end of the output, when it fails.
    """
    files = str([str(config) for config in configs])
    arguments = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", files, *arguments]
    with log.open("w") as output:
        failed = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
    if failed:
        raise RuntimeError(f"{run_id} failed, {log} ends with:\n{log.read_text()[-2000:]}")


def score(folder: Path) -> dict[str, float]:
    """Means over the cases of an evaluation's ``cases.csv``, absent structures left out; Dice in percent."""
    with (folder / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {name: [float(row[name]) for row in rows if row[name] not in ("", "nan")] for name in list(rows[0])[1:]}
    means = {name: fmean(values) * (100 if "dice" in name else 1) for name, values in found.items() if values}
    return {"mean dice": fmean(value for name, value in means.items() if "dice" in name), **means}


def fit(root: Path, configs: list[Path], options: dict[str, Any]) -> dict[str, float]:
    """Train one network, or take up what an earlier call left in ``root``.

    Args:
        root: the training's folder.
        configs: of the training.
        options: their overrides.

    Returns:
        ``slices`` that it saw, and ``seconds`` that it took.

    Raises:
        ValueError: when ``root`` was made by other options.
        RuntimeError: when it fails.
    """
    file, last = root / "training.json", root / "models" / "last.ckpt"
    asked = json.loads(json.dumps(options, default=str))
    state = json.loads(file.read_text()) if file.exists() else {"asked": asked, "seconds": 0.0}
    if state["asked"] != asked or (last.exists() and "started" not in state):
        raise ValueError(f"{root} was trained by other options: remove it, or name another output_dir.")
    if "slices" in state:
        return state
    root.mkdir(parents=True, exist_ok=True)
    if last.exists():
        state["seconds"] += max(0.0, last.stat().st_mtime - state["started"])
    state["started"] = time.time()
    file.write_text(json.dumps(state))
    bundle_run("training", configs, root / "training.log", bundle_root=root, resume=last.exists(), **options)
    (slices,) = re.findall(r"(\d+) slices an epoch", (root / "training.log").read_text())
    state["slices"] = options["epochs"] * int(slices)
    state["seconds"] += time.time() - state["started"]
    file.write_text(json.dumps(state))
    last.unlink()
    return state


def run(
    root: Path, bundle: str, recipe: str, both: dict[str, Any], training: dict[str, Any], first: dict[str, Any]
) -> dict[str, float]:
    """Train and evaluate one network, or take up what an earlier call left in ``root``.

    Args:
        root: the training's folder.
        bundle: whose configs.
        recipe: ``recommended`` or ``paper``.
        both: overrides of training and evaluation.
        training: overrides of the training alone.
        first: what a training before it has otherwise, from whose weights it starts; empty for none.

    Returns:
        Its scores, minutes and slices per second.

    Raises:
        ValueError: when ``root`` was made by other options.
        RuntimeError: when training or evaluation fails.
    """
    configs = ROOT / "bundles" / bundle / "configs"
    recipes = {
        "recommended": [configs / "train.json"],
        "paper": [configs / "train.json", configs / "paper.json"],
    }
    options, before = {**both, **training}, {"slices": 0.0, "seconds": 0.0}
    if first:
        before = fit(root / "first", recipes[recipe], {**options, **first})
        options["start_from"] = root / "first" / "models" / "model.pt"
    trained = fit(root, recipes[recipe], options)
    file = root / "scores.json"
    if not file.exists():
        scoring = {"bundle_root": root, "split": "validation", "metrics": ["hd95"], **both}
        bundle_run("evaluating", [configs / "evaluate.json"], root / "evaluating.log", **scoring)
        file.write_text(json.dumps(score(root / "eval")))
    slices, seconds = (trained[name] + before[name] for name in ("slices", "seconds"))
    return {**json.loads(file.read_text()), "minutes": seconds / 60, "slices/s": slices / seconds}


def main(
    dataset_dir: str,
    bundle: str = "fias_acdc",
    recipe: str = "recommended",
    networks: str | tuple[str, ...] = ("FIAS", "DANIE-S", "DANIE-L", "DynUNet", "AttentionUnet", "SwinUNETR"),
    seeds: int | tuple[int, ...] = 0,
    epochs: int = 400,
    output_dir: str = "accuracy",
    train: dict[str, Any] | None = None,
    first: dict[str, Any] | None = None,
    **overrides: Any,
) -> None:
    """Train, evaluate and print the table.

    Args:
        dataset_dir: the data.
        bundle: whose configs.
        recipe: ``recommended`` or ``paper``.
        networks: names of the table above.
        seeds: each of them trains every network.
        epochs: of each training.
        output_dir: where the trainings' folders go.
        train: overrides of the training alone.
        first: what a training before it has otherwise, from whose weights it starts.
        overrides: of training and evaluation.
    """
    rows = []
    for name in chosen(networks):
        for seed in (seeds,) if isinstance(seeds, int) else seeds:
            root = Path(output_dir).resolve() / f"{bundle}_{recipe}_{name.replace(' ', '_')}_{seed}"
            both = {"dataset_dir": Path(dataset_dir).resolve(), **NETWORKS[name], **overrides}
            training = {"seed": seed, "epochs": epochs, **(train or {})}
            rows.append((name, str(seed), run(root, bundle, recipe, both, training, first or {})))
    columns = list(dict.fromkeys(key for *_, scores in rows for key in scores))
    cells = [[name, seed, *(f"{scores.get(key, float('nan')):.4g}" for key in columns)] for name, seed, scores in rows]
    start = (train or {}).get("start_from", "scratch")
    print(f"\n{bundle}, {recipe} recipe, validation cases, from {start}\n")
    print(table(["network", "seed", *columns], cells))


if __name__ == "__main__":
    fire.Fire(main)
