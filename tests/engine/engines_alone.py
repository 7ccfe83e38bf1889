"""A network in OpenVINO and ONNX Runtime: the same labels, from a file that is of its own weights and no others.

:mod:`test_engines` runs these.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_heads

from networks import DANIE, FIAS, DataError
from networks.engine import LabelInferer, in_engine
from networks.engine.engines import EngineNetwork, _fingerprint

LIBRARIES = ["openvino", "onnxruntime"]
EVALUATE = f"{ROOT}/bundles/fias_acdc/configs/evaluate.json"


@pytest.fixture(scope="module")
def network() -> FIAS:
    """A FIAS of several classes, in eval mode."""
    return random_heads(FIAS(1, 4, deep_supervision=False)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the weights of ``network`` would lie; what is converted stays there for the next test."""
    return tmp_path_factory.mktemp("models")


def kept(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("engine", LIBRARIES)
def test_logits_and_labels_equal_torchs_for_every_size_of_batch(engine, network, folder):
    pytest.importorskip(engine)
    other = in_engine(network, engine, folder / "model.pt", None).to("cpu").eval()
    torch.manual_seed(0)
    for size in (3, 1):
        x = torch.rand(size, 1, 64, 64)
        with torch.inference_mode():
            wanted, found = network(x), other(x)
        assert found.dtype == torch.float32 and not other.training
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        assert (found.argmax(1) == wanted.argmax(1)).float().mean() > 0.999
    assert len(kept(folder)) == 1  # one file is for both engines and all batches
    volume = torch.rand(1, 1, 50, 70, 3)
    for bfloat16 in (False, True):  # the autocast around it changes nothing
        labels = [LabelInferer((64, 64), 2, bfloat16=b)(volume, n) for n, b in ((network, False), (other, bfloat16))]
        assert (labels[0] == labels[1]).float().mean() > 0.999


def test_another_size_of_slices_is_converted_for_itself(network, tmp_path):
    pytest.importorskip("openvino")
    other = in_engine(network, "openvino", tmp_path / "model.pt")
    for height, width in ((32, 48), (40, 32)):
        x = torch.rand(1, 1, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(other(x), network(x), atol=1e-4, rtol=1e-3)
    assert [name.split("-")[1] for name in kept(tmp_path)] == ["1x32x48", "1x40x32"]


def test_bfloat16_is_openvinos_when_it_is_asked_for_and_only_then(network, folder):
    pytest.importorskip("openvino")
    x = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        wanted = network(x)
        errors = [
            float((in_engine(network, "openvino", folder / "model.pt", b)(x) - wanted).abs().max())
            for b in (None, False, True)
        ]
    assert max(errors[:2]) < 1e-4 * float(wanted.abs().max()) and errors[2] < 0.1 * float(wanted.abs().max())
    with pytest.raises(DataError, match="fp32 alone.*openvino"):
        in_engine(network, "onnxruntime", folder / "model.pt", True)


def test_a_file_of_other_weights_or_code_is_never_used(network, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    weights, x = tmp_path / "model.pt", torch.rand(1, 1, 32, 32)
    first = random_heads(FIAS(1, 4, deep_supervision=False)).eval()
    with torch.inference_mode():
        in_engine(first, "openvino", weights)(x)
        (before,) = kept(tmp_path)
        first.heads.convs[0].weight.add_(1)
        torch.testing.assert_close(in_engine(first, "openvino", weights)(x), first(x), atol=1e-4, rtol=1e-3)
    (after,) = kept(tmp_path)  # the file of weights that are gone goes too
    assert before != after
    monkeypatch.setattr(torch, "__version__", "0")
    assert _fingerprint(first) not in after


def test_a_kept_file_is_read_again_and_one_that_is_damaged_is_named(network, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    x = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        in_engine(network, "openvino", tmp_path / "model.pt")(x)
        monkeypatch.setattr(torch.onnx, "export", None)  # nothing is converted any more
        in_engine(network, "openvino", tmp_path / "model.pt")(x)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:10000])
        with pytest.raises(DataError, match=f"cannot read {file}: remove it"):
            in_engine(network, "openvino", tmp_path / "model.pt")(x)


def test_beside_weights_that_are_read_only_the_users_cache_keeps_it(network, unprivileged, monkeypatch):
    pytest.importorskip("onnxruntime")
    models, cache = unprivileged.folder / "models", unprivileged.folder / "cache"
    models.mkdir(mode=0o555)
    cache.mkdir()
    os.chmod(cache, 0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    x = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():  # loads all code, which that user may not read; OpenVINO would load more
        in_engine(network, "onnxruntime", unprivileged.folder / "model.pt")(x)
    with unprivileged(), torch.inference_mode():
        in_engine(network, "onnxruntime", models / "model.pt")(x)
    assert kept(models) == [] and len(kept(cache / "fias-danie")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(models))
    with unprivileged(), torch.inference_mode(), pytest.raises(DataError, match="neither in .* XDG_CACHE_HOME"):
        in_engine(network, "onnxruntime", models / "model.pt")(x)


@pytest.mark.parametrize("engine", LIBRARIES)
def test_an_engine_that_is_not_installed_says_what_to_install(engine, network, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(DataError, match=f"pip install {engine} onnx"):
        in_engine(network, engine, tmp_path / "model.pt")


def test_what_cannot_run_is_refused(network, tmp_path):
    weights = tmp_path / "model.pt"
    assert in_engine(network, "torch", weights) is network
    with pytest.raises(DataError, match="engine is one of 'torch', 'openvino'"):
        in_engine(network, "tensorrt", weights)
    with pytest.raises(DataError, match="exported network"):
        in_engine(torch.jit.script(torch.nn.Identity()), "openvino", weights)
    compiled = torch.nn.Identity()
    compiled.compile()
    with pytest.raises(DataError, match="torch compiles"):
        in_engine(compiled, "openvino", weights)
    pytest.importorskip("openvino")
    other = in_engine(FIAS(1, 4), "openvino", weights)
    assert isinstance(other, EngineNetwork)
    with pytest.raises(DataError, match="training mode"):
        other(torch.rand(1, 1, 32, 32))


def test_danie_runs_too(tmp_path):
    pytest.importorskip("openvino")
    network, x = random_heads(DANIE(1, 4, size="small", img_size=64)).eval(), torch.rand(3, 1, 64, 64)
    with torch.inference_mode():
        found, wanted = in_engine(network, "openvino", tmp_path / "model.pt")(x), network(x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_an_evaluation_by_openvino_finds_what_torchs_does(phantoms, weights, run_bundle, tmp_path):
    pytest.importorskip("openvino")
    options = {"dataset_dir": phantoms("acdc"), "weights": weights / "model.pt", "device": "cpu", "image_size": 32}
    tables = []
    for engine in ("torch", "openvino"):
        output = tmp_path / engine
        log = run_bundle("evaluating", EVALUATE, engine=engine, output_dir=output, compile=False, **options).stdout
        assert ("network converted for openvino" in log) == (engine == "openvino")
        tables.append(np.genfromtxt(output / "cases.csv", delimiter=",", skip_header=1, dtype=str))
    assert tables[0].shape == tables[1].shape
    scores = [table[:, 2].astype(float) for table in tables]
    np.testing.assert_allclose(*scores, atol=0.01)
    refused = run_bundle("evaluating", EVALUATE, check=False, engine="openvno", output_dir=tmp_path, **options)
    assert refused.returncode == 1 and "engine is one of torch, openvino, onnxruntime" in refused.stdout
