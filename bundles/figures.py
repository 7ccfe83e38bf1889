"""Write the figures that README and the bundles' cards show, from the records of the shipped weights.

    python bundles/figures.py            # writes
    python bundles/figures.py --check    # writes nothing, and fails where something would change

Each figure has one source. ``eval_metrics`` in a bundle's ``configs/metadata.json`` has what was measured,
``models/pretrained.json`` what the weights were trained for, and ``models/pretrained.pt`` its own size and SHA-256. The
text between the two marks in README.md, and in the card of each bundle with weights, is made from them.

Names in ``eval_metrics`` carry their units. Dice and IoU are fractions, ``_mm`` are millimetres, ``_mb`` are millions
of bytes, ``_points`` are percentage points. ``test_`` and ``validation_`` are the bundle's splits, ``official_test_``
is ACDC's official test set. With ``patients`` or ``images`` they say how many there were. ``mean_dice`` is the test
Dice again, under the name that MONAI's tools use. ``validation_function`` is what ``evaluating`` writes to
``function.md``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import fire

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from networks import DataError, explain_errors  # noqa: E402
from networks.results.function import MEASURES  # noqa: E402
from networks.storage import whole_file  # noqa: E402
from networks.trained_for import trained_values  # noqa: E402

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

CASES = {
    "test": "{} test {}",
    "official_test": "{} {} of ACDC's official test set",
    "validation": "{} validation {} (the best epoch was chosen on these)",
}
"""Rows of a card's table: the beginning of their names in ``eval_metrics``, and what the table calls them."""

COLUMNS = {"mean_dice": "Dice, %", "mean_iou": "IoU, %", "hd95_mm": "HD95, mm"}
"""Columns of a card's table, likewise; those that a bundle has no figures of are left out."""


def figures(root: str = str(ROOT), check: bool = False) -> None:
    """Write the figures into README and the cards, or check that they stand there.

    Args:
        root: the repository's folder.
        check: write nothing.

    Raises:
        DataError: when weights or marks are missing; with ``check``, naming the files that would change.
    """
    texts = wanted(Path(root))
    changed = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    if check and changed:
        names = ", ".join(str(path.relative_to(root)) for path in changed)
        raise DataError(f"{names}: figures differ from the records of the weights. Run python bundles/figures.py.")
    for path in changed:
        with whole_file(path) as partial:
            Path(partial).write_text(texts[path], encoding="utf-8")
        print(path)


def wanted(root: Path) -> dict[Path, str]:
    """The texts of README and of the cards with the figures of today's weights.

    Args:
        root: the repository's folder.

    Returns:
        Text by path.

    Raises:
        DataError: when weights or marks are missing.
    """
    bundles = sorted(path.parents[1] for path in (root / "bundles").glob("*/configs/metadata.json"))
    shipped = [bundle for bundle in bundles if _weights(bundle).with_suffix(".json").is_file()]
    blocks = {bundle / "docs" / "README.md": _of_card(bundle) for bundle in shipped}
    blocks[root / "README.md"] = _of_readme(shipped, [bundle for bundle in bundles if bundle not in shipped])
    return {path: _between_marks(path, block) for path, block in blocks.items()}


def _between_marks(path: Path, block: str) -> str:
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{path} has no {BEGIN} with {END} after it.")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def _of_readme(shipped: list[Path], others: list[Path]) -> str:
    head = ["bundle", "segments", "weights", "test Dice, %", "test HD95, mm", "seconds per case", "memory"]
    rows = []
    for bundle in sorted(shipped, key=lambda bundle: -_metadata(bundle)["eval_metrics"]["test_mean_dice"]):
        metrics = _metadata(bundle)["eval_metrics"]
        scores = [_figure(metrics, name) for name in ("test_mean_dice", "test_hd95_mm")]
        costs = [f"{_seconds(metrics):g}", _memory(metrics)]
        rows.append([_link(bundle), _task(bundle), f"{_network(bundle)}, {_size(bundle)}", *scores, *costs])
    without = ", ".join(f"{_link(bundle)} ({_task(bundle)})" for bundle in others)
    return _table(head, rows, left=3) + (f"\n\nWithout weights so far: {without}." if others else "")


def _link(bundle: Path) -> str:
    return f"[{bundle.name}](bundles/{bundle.name}/docs/README.md)"


def _task(bundle: Path) -> str:
    return _metadata(bundle)["task"].removeprefix("Segmentation of ").removeprefix("the ")


def _of_card(bundle: Path) -> str:
    metadata, trained = _metadata(bundle), trained_values(_weights(bundle))
    metrics = metadata["eval_metrics"]
    kind = _kind(metrics)
    columns = {name: title for name, title in COLUMNS.items() if any(f"{cases}_{name}" in metrics for cases in CASES)}
    rows = [
        [title.format(metrics[f"{cases}_{kind}"], kind), *(_figure(metrics, f"{cases}_{name}") for name in columns)]
        for cases, title in CASES.items()
        if f"{cases}_{kind}" in metrics
    ]
    labels = list(metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values())[1:]
    by_label = [f"{label} {_figure(metrics, f'validation_dice_{_name(label)}')} %" for label in labels]
    side, view = trained["image_size"], trained["field_of_view"]
    seen = "the whole image" if view == "whole" else f"a centred square of {view} mm"
    facts = [
        ["input of the network", f"{seen} at {side} x {side}, intensity `{trained['intensity']}`"],
        ["one CPU core", f"{_seconds(metrics):g} s for {_one(metrics)}, {_memory(metrics)} of memory at most"],
        ["file", f"`models/pretrained.pt`, {_network(bundle)}, version {metadata['version']}, {_size(bundle)}"],
        ["SHA-256 of the file", f"`{hashlib.sha256(_weights(bundle).read_bytes()).hexdigest()}`"],
    ]
    if "official_test_lvef_mae_points" in metrics:
        left, right = (metrics[f"official_test_{side}vef_mae_points"] for side in "lr")
        error = f"left ventricle {left:g}, right ventricle {right:g} points, on the official test set"
        facts.insert(0, ["mean absolute error of the ejection fraction", error])
    if len(labels) > 1:
        facts.insert(0, [f"Dice of the validation {kind}", ", ".join(by_label)])
    tables = [_table(["measured on", *columns.values()], rows, left=1), _table(["", ""], facts, left=2)]
    if function := metrics.get("validation_function"):
        heads = [
            f"function of the heart, {metrics['validation_patients']} validation patients",
            "mean absolute error",
            "bias",
        ]
        heads += ["limits of agreement", "correlation"]
        tables.append(_table(heads, [_agreement(*measure) for measure in function.items()], left=1))
    return "\n\n".join(tables)


def _agreement(column: str, found: dict[str, float]) -> list[str]:
    """Cells of a measure of the heart."""
    title, unit = MEASURES[column]
    unit = "points" if unit == "%" else unit
    limits = f"{found['limit_low']:.1f} to {found['limit_high']:.1f}"
    return [
        title,
        f"{found['mean_absolute_error']:.1f} {unit}",
        f"{found['bias']:+.1f}",
        limits,
        f"{found['correlation']:.3f}",
    ]


def _metadata(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def _weights(bundle: Path) -> Path:
    return bundle / "models" / "pretrained.pt"


def _size(bundle: Path) -> str:
    if not _weights(bundle).is_file():
        raise DataError(f"{_weights(bundle)} is missing. Get it again by git checkout -- {_weights(bundle)}.")
    return f"{_weights(bundle).stat().st_size / 1e6:.1f} MB"


def _network(bundle: Path) -> str:
    size = trained_values(_weights(bundle)).get("size")
    return bundle.name.split("_")[0].upper() + {"small": "-S", "large": "-L"}.get(str(size), "")


def _kind(metrics: dict[str, float]) -> str:
    return "images" if "test_images" in metrics else "patients"


def _one(metrics: dict[str, float]) -> str:
    return "an image" if _kind(metrics) == "images" else "a volume"


def _seconds(metrics: dict[str, float]) -> float:
    return metrics[f"seconds_per_{_one(metrics).split()[1]}_one_core"]


def _memory(metrics: dict[str, float]) -> str:
    return f"{metrics['peak_memory_mb'] / 1000:.1f} GB"


def _name(label: str) -> str:
    return label.replace(" ", "_")


def _figure(metrics: dict[str, float], name: str) -> str:
    """Fractions in percent, without zeros that nobody measured; empty where there is no figure."""
    if name not in metrics:
        return ""
    return f"{metrics[name]:.2f}" if name.endswith("_mm") else f"{100 * metrics[name]:.4g}"


def _table(head: list[str], rows: list[list[str]], left: int) -> str:
    rule = "|".join(["---"] * left + ["---:"] * (len(head) - left))
    first, *others = ("| " + " | ".join(line) + " |" for line in [head, *rows])
    return "\n".join([first, f"|{rule}|", *others]).replace("  ", " ")


if __name__ == "__main__":
    explain_errors()
    fire.Fire(figures)
