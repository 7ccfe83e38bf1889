"""The figures that README and the cards show are those of the weights' own records."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from networks import DataError

spec = importlib.util.spec_from_file_location("figures", ROOT / "bundles" / "figures.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

CARD = Path("bundles/fias_acdc/docs/README.md")


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the script reads, with links to the weights."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for file in (ROOT / "bundles").glob("*/configs/metadata.json"):
        bundle = tmp_path / "bundles" / file.parents[1].name
        for name in ("configs/metadata.json", "docs/README.md", "models/pretrained.json", "models/pretrained.pt"):
            if (source := file.parents[1] / name).is_file():
                (bundle / name).parent.mkdir(parents=True, exist_ok=True)
                (bundle / name).symlink_to(source) if source.suffix == ".pt" else shutil.copy(source, bundle / name)
    return tmp_path


def test_the_docs_show_the_figures_of_the_weights():
    script.figures(check=True)


def test_other_figures_are_noticed_and_written_and_nothing_else_is(copy):
    before = (copy / CARD).read_text()
    file = copy / "bundles" / "fias_acdc" / "configs" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["eval_metrics"]["test_mean_dice"] = 0.5678
    file.write_text(json.dumps(metadata))
    with pytest.raises(DataError, match="docs/README.md, README.md: .*figures.py"):
        script.figures(str(copy), check=True)
    assert (copy / CARD).read_text() == before
    script.figures(str(copy))
    script.figures(str(copy), check=True)
    assert (copy / CARD).read_text() == before.replace("| 91.42 |", "| 56.78 |")
    assert "| 56.78 |" in (copy / "README.md").read_text()


def test_other_weights_are_noticed(copy):
    weights = copy / "bundles" / "fias_acdc" / "models" / "pretrained.pt"
    weights.unlink()
    with pytest.raises(DataError, match="pretrained.pt is missing"):
        script.figures(str(copy), check=True)
    weights.write_bytes(b"others")
    with pytest.raises(DataError, match="figures differ"):
        script.figures(str(copy), check=True)


def test_a_card_without_its_marks_is_refused(copy):
    (copy / CARD).write_text("no marks")
    with pytest.raises(DataError, match="has no <!-- figures -->"):
        script.figures(str(copy))
