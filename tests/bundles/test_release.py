"""Releases: built, checked, downloaded from where they are published, and run without this repository."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, bundle_runner, run
from monai.apps.utils import HashCheckError, extractall
from monai.bundle import ConfigParser

from networks import FIAS, DataError, load_weights

spec = importlib.util.spec_from_file_location("release", ROOT / "bundles" / "release.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

METADATA = json.loads((ROOT / "bundles" / "fias_acdc" / "configs" / "metadata.json").read_text())
FIAS_ACDC = f"fias_acdc_v{METADATA['version']}"
CODE = f"fias_acdc_code_{METADATA['version'].replace('.', '_')}"
SLOW = pytest.mark.slow
PRETRAINED = [file.parents[1].name for file in sorted((ROOT / "bundles").glob("*/models/pretrained.pt"))]


@pytest.fixture(scope="module", autouse=True)
def forks() -> Iterator[None]:
    """The script checks networks by forks of the bundle runner; ``published`` has it run the true command."""
    runner = SimpleNamespace(run=lambda command, cwd, **_: bundle_runner(*command[3:], cwd=cwd, check=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "subprocess", runner)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights of FIAS."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(FIAS(1, 4).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def schema(tmp_path_factory) -> Path:
    """A schema in the form of the model zoo's."""
    file = tmp_path_factory.mktemp("schema") / "schema.json"
    file.write_text(json.dumps({"type": "object", "required": ["version", "task", "network_data_format"]}))
    return file


@pytest.fixture(scope="module")
def release(weights, schema) -> Callable[..., str]:
    """Build a release of fias_acdc in half precision into a folder."""

    def release(folder: Path, **options: str) -> str:
        return script.release("fias_acdc", str(folder), weights=str(weights), schema=str(schema), half=True, **options)

    return release


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a local web server."""
    folder = tmp_path_factory.mktemp("www")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


@pytest.fixture(scope="module")
def published(server, weights, schema) -> tuple[str, Path, str]:
    """Address and folder of a release built on the command line, and what that printed."""
    url, folder = server
    command = ["fias_acdc", "--output_dir", folder, "--weights", weights, "--half", "--schema", schema, "--url", url]
    return url, folder, run("bundles/release.py", *map(str, command)).stdout


def test_a_release_holds_what_it_needs_and_nothing_else(published, weights):
    url, folder, printed = published
    with zipfile.ZipFile(folder / f"{FIAS_ACDC}.zip") as archive:
        names = archive.namelist()
        configs = {Path(n).stem: archive.read(n).decode() for n in names if n.endswith(".json")}
        shipped = torch.load(io.BytesIO(archive.read("fias_acdc/models/model.pt")), weights_only=True)
        hospital = archive.read("fias_acdc/docs/HOSPITAL.md")
    assert b"(guide.md#exports)" in hospital and b"(README.md" not in hospital  # the card is README.md there
    assert all(n.startswith("fias_acdc/") for n in names) and names == sorted(names)
    pages = [f"docs/{page}.md" for page in ("README", "guide", "HEARTS", "HOSPITAL")]
    for file in ("LICENSE", "models/model.pt", *pages):
        assert f"fias_acdc/{file}" in names
    assert f"fias_acdc/{CODE}/networks/data/slices.py" in names and not any("__pycache__" in n for n in names)
    assert not any('"networks.' in c or '"$import networks"' in c for c in configs.values())
    train = json.loads(configs["train"])
    assert train["start_from"] == "$@bundle_root + '/models/model.pt'" and train["pretrained"] is False
    info = json.loads((folder / "models" / "model_info.json").read_text())[FIAS_ACDC]
    assert info["source"] == f"{url}/{FIAS_ACDC}.zip" and len(info["checksum"]) == 40
    assert hashlib.sha256((folder / f"{FIAS_ACDC}.zip").read_bytes()).hexdigest() in printed
    assert "metadata is verified with no error" in printed
    # the bundle's figures are of other weights
    assert METADATA["eval_metrics"] and json.loads(configs["metadata"])["eval_metrics"] == {}
    assert f"weights: {weights}" in printed and "no eval_metrics: those of metadata.json" in printed
    floats = [v for v in shipped.values() if v.is_floating_point()]
    assert all(v.dtype == (torch.float16 if v.dim() > 1 else torch.float32) for v in floats)


@pytest.mark.skipif("ZOO_SCHEMA" not in os.environ, reason="name a file of the model zoo's schema in ZOO_SCHEMA")
@pytest.mark.parametrize("file", sorted((ROOT / "bundles").glob("*/configs/metadata.json")), ids=lambda f: f.parts[-3])
def test_the_metadata_follow_the_model_zoo_s_schema(file):
    jsonschema.validate(json.loads(file.read_text()), json.loads(Path(os.environ["ZOO_SCHEMA"]).read_text()))


def test_the_same_input_gives_the_same_bytes(published, release, tmp_path):
    release(tmp_path)
    first, second = (folder / f"{FIAS_ACDC}.zip" for folder in (published[1], tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_a_download_trains_evaluates_infers_and_loads_without_this_repository(published, phantoms, tmp_path):
    """Importing the repository's package would fail."""
    poison = tmp_path / "poison"
    (poison / "networks").mkdir(parents=True)
    (poison / "networks" / "__init__.py").write_text("raise ImportError('the repository is not there')")

    def alone(*command: str, cwd: Path = tmp_path / "fias_acdc") -> str:
        return run(*command, cwd=cwd, path=poison).stdout

    url = f"{published[0]}/{FIAS_ACDC}.zip"
    where = ["--url", url, "--bundle_dir", "."]
    alone("-m", "monai.bundle", "download", "--name", "fias_acdc", *where, cwd=tmp_path)
    bundle, data = tmp_path / "fias_acdc", phantoms("acdc")
    load = "import monai.bundle as b; n = b.load('fias_acdc', bundle_dir='..'); print(type(n), n.heads.convs[0].weight)"
    weight = torch.load(bundle / "models" / "model.pt")["heads.convs.0.weight"].float()
    assert f"{CODE}.networks.fias.FIAS" in (loaded := alone("-c", load)) and f"{weight[0, 0].item():.4f}" in loaded

    def run_it(run_id: str, config: str, folder: Path = data, **options: object) -> str:
        arguments = {"dataset_dir": folder, "image_size": 64, **options}
        flags = [f"--{key}={value}" for key, value in arguments.items()]
        return alone("-m", "monai.bundle", "run", run_id, "--config_file", f"configs/{config}.json", *flags)

    patient = data / "training" / "patient002"
    run_it("inferring", "inference", patient)
    for label in (maps := sorted((bundle / "eval").glob("*_seg.nii.gz"))):
        image = nib.load(patient / label.name.replace("_seg", ""))
        assert nib.load(label).shape == image.shape and np.array_equal(nib.load(label).affine, image.affine)
    assert len(maps) == 2
    log = run_it("training", "train", epochs=1, num_workers=0)
    tensors = len(torch.load(bundle / "models" / "model.pt"))
    assert f"start from ./models/model.pt: {tensors} of {tensors} tensors taken" in log
    run_it("evaluating", "evaluate")
    assert "| Dice, % |" in (bundle / "eval" / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["fias_acdc", *(pytest.param(name, marks=SLOW) for name in ("danie_glas", "danie_synapse"))]
)
def test_a_bundle_of_each_kind_passes_tests_as_the_model_zoo_has_them(name, schema, tmp_path):
    """Of hearts in time, of pictures, and of CT volumes."""
    extractall(script.release(name, str(tmp_path), schema=str(schema)), tmp_path / "models")
    tests = Path(__file__).with_name("zoo_unit_tests.py")
    found = run(str(tests), f"models/{name}", cwd=tmp_path, path=tmp_path / "models" / name).stdout
    assert "Ran 3 tests" in found and "\nOK\n" in found


def test_the_printed_command_refuses_a_wrong_checksum(published, tmp_path, monkeypatch):
    url, _, printed = published
    (line,) = [line for line in printed.splitlines() if line.startswith("python -c ")]
    monkeypatch.chdir(tmp_path)
    code = line.removeprefix('python -c "').removesuffix('"')
    with pytest.raises(HashCheckError, match="may be corrupted or tampered with"):
        exec(code.replace("hash_val='", "hash_val='0"))
    assert not list(tmp_path.iterdir())
    exec(code)
    assert (tmp_path / "fias_acdc" / "configs" / "train.json").is_file()


def test_a_zip_writes_nothing_outside_its_folder(tmp_path):
    for name in ("../outside", "/tmp/outside", "fias_acdc/../../outside"):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
            archive.writestr(name, "")
        with pytest.raises(ValueError, match="Unsafe path"):
            extractall(tmp_path / "evil.zip", tmp_path / "in")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["evil.zip"]


def test_github_s_layout_is_what_monai_reads(published, tmp_path, monkeypatch):
    """With the local server in the place of GitHub's two hosts: the index at the tag, the zip at its release."""
    url, folder, _ = published
    index, asset = folder / "owner/repo/v1/models", folder / "owner/repo/releases/download/v1"
    shutil.copytree(folder / "models", index)
    asset.mkdir(parents=True)
    shutil.copy(folder / f"{FIAS_ACDC}.zip", asset)

    def local(address: str) -> str:
        return address.replace("https://raw.githubusercontent.com", url).replace("https://github.com", url)

    scripts = monai.bundle.scripts
    get, release_url = requests.get, scripts._get_git_release_url
    monkeypatch.setattr(requests, "get", lambda address, **options: get(local(address), **options))
    monkeypatch.setattr(scripts, "_get_git_release_url", lambda *a, **k: local(release_url(*a, **k)))
    monai.bundle.download("fias_acdc", bundle_dir=tmp_path, source="github", repo="owner/repo/v1", progress=False)
    assert (tmp_path / "fias_acdc" / "models" / "model.pt").is_file()


def test_weights_elsewhere_are_fetched_and_checked_by_monai(release, server, weights, tmp_path, monkeypatch):
    url, folder = server
    release(folder / "large", weights_url=f"{url}/large")
    with zipfile.ZipFile(folder / "large" / f"{FIAS_ACDC}.zip") as archive:
        assert not any("model.pt" in name for name in archive.namelist())
        archive.extractall(tmp_path)
    model = tmp_path / "fias_acdc" / "models" / "model.pt"
    stored = folder / "large" / f"{FIAS_ACDC}.pt"
    good = stored.read_bytes()
    stored.write_bytes(good[:-1] + b"x")
    with pytest.raises(HashCheckError):
        monai.bundle.download_large_files(str(tmp_path / "fias_acdc"))
    assert not model.exists()
    stored.write_bytes(good)
    monai.bundle.download_large_files(str(tmp_path / "fias_acdc"))
    assert model.read_bytes() == good and torch.load(model, weights_only=True).keys() == torch.load(weights).keys()


def test_an_override_is_baked_in_under_another_name(schema, tmp_path):
    values = {"size": "small", "batch_size": 4, "bfloat16": True, "field_of_view": 200}
    built = script.release("danie_isic2018", str(tmp_path), name="danie_s_isic", set=values, schema=str(schema))
    with zipfile.ZipFile(built) as archive:
        train, inference, tensorrt = (
            json.loads(archive.read(f"danie_s_isic/configs/{n}.json")) for n in ("train", "inference", "inference_trt")
        )
    assert train["size"] == inference["trained"]["size"] == "small" and train["batch_size"] == 4
    assert train["field_of_view"] == inference["trained"]["field_of_view"] == 200
    assert inference["bfloat16"] is True and tensorrt["bfloat16"] is False  # its engine has a type of its own
    assert train["name"] == inference["name"] == "danie_s_isic"
    assert train["pretrained"] is True and train["start_from"] == ""  # no weights: as the bundle itself


def test_weights_are_released_with_the_values_they_were_trained_with(weights, schema, phantoms, tmp_path, capsys):
    values = {"image_size": 64, "field_of_view": 90, "intensity": "zscore"}
    older = {**values, "intensity": {"_target_": "NormalizeIntensityd", "keys": "image"}}
    shutil.copy(weights, tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"in_channels": 1, "num_classes": 4, **older}))
    script.release("fias_acdc", str(tmp_path), weights=str(tmp_path / "model.pt"), schema=str(schema))
    extractall(tmp_path / f"{FIAS_ACDC}.zip", tmp_path)
    released = tmp_path / "fias_acdc"
    assert values.items() <= json.loads((released / "configs" / "train.json").read_text()).items()
    assert values.items() <= json.loads((released / "models" / "model.json").read_text()).items()
    command = ["run", "inferring", "--config_file", "configs/inference.json", "--dataset_dir", str(phantoms("acdc"))]
    result = bundle_runner(*command, "--image_size", "96", cwd=tmp_path / "fias_acdc", check=False)
    assert "model.pt" in result.stdout and "--image_size 64" in result.stdout
    assert result.returncode == 1 and not list((tmp_path / "fias_acdc" / "eval").glob("*_seg*"))
    for file in (tmp_path / "model.pt", tmp_path / "model.json"):
        file.rename(f"{file}.previous")
    script.release("fias_acdc", str(tmp_path), weights=str(tmp_path / "model.pt.previous"), schema=str(schema))
    with zipfile.ZipFile(tmp_path / f"{FIAS_ACDC}.zip") as archive:
        assert values.items() <= json.loads(archive.read("fias_acdc/configs/train.json")).items()
    (tmp_path / "model.json.previous").unlink()
    capsys.readouterr()
    script.release("fias_acdc", str(tmp_path), weights=str(tmp_path / "model.pt.previous"), schema=str(schema))
    assert "model.json.previous: the release has the config's own values" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_weights_fit_the_network_of_their_values(name):
    bundle = ROOT / "bundles" / name
    file = bundle / "models" / "pretrained.pt"
    figures = json.loads((bundle / "configs" / "metadata.json").read_text())["eval_metrics"]
    assert figures["mean_dice"] == figures["test_mean_dice"] and file.stat().st_size < 100e6
    config = json.loads((bundle / "configs" / "inference.json").read_text())
    values = json.loads(file.with_suffix(".json").read_text())
    load_weights(ConfigParser({**config, **values}).get_parsed_content("network_def"), file)  # strictly


@pytest.fixture(scope="module", params=[p if p == "fias_acdc" else pytest.param(p, marks=SLOW) for p in PRETRAINED])
def pretrained(request, schema, tmp_path_factory) -> Path:
    """A bundle with the weights that it comes with, released and unpacked."""
    folder = tmp_path_factory.mktemp("pretrained")
    weights = ROOT / "bundles" / request.param / "models" / "pretrained.pt"
    extractall(script.release(request.param, str(folder), weights=str(weights), schema=str(schema)), folder)
    return folder / request.param


def test_a_release_of_pretrained_weights_holds_them_with_their_figures(pretrained):
    bundle = ROOT / "bundles" / pretrained.name
    own, shipped = bundle / "models" / "pretrained.pt", pretrained / "models" / "model.pt"
    one, other = (torch.load(file, weights_only=True) for file in (own, shipped))
    assert one.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in one.items())
    one, other = (json.loads((folder / "configs" / "metadata.json").read_text()) for folder in (bundle, pretrained))
    assert one == other and one["eval_metrics"]


@SLOW
def test_a_released_bundle_gives_the_figures_of_its_docs(pretrained):
    """Validation Dice of each structure, on a CPU, to 0.001."""
    variable = f"{pretrained.name.split('_')[-1].upper()}_DIR"
    if variable not in os.environ:
        pytest.skip(f"needs the dataset: name its folder in {variable}")
    data = ["--dataset_dir", str(Path(os.environ[variable]).resolve()), "--split", "validation", "--device", "cpu"]
    command = ["-m", "monai.bundle", "run", "evaluating", "--config_file", "configs/evaluate.json"]
    run(*command, *data, cwd=pretrained, path="")
    with (pretrained / "eval" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    dice = {name.replace(" ", "_"): np.mean([float(row[name]) for row in rows]) for name in rows[0] if "dice" in name}
    figures = json.loads((pretrained / "configs" / "metadata.json").read_text())["eval_metrics"]
    kept = {key: value for key, value in figures.items() if key.startswith("validation_") and "dice" in key}
    claimed = {key.removeprefix("validation_"): value for key, value in kept.items()}
    assert {"mean_dice": np.mean([*dice.values()]), **dice} == pytest.approx(claimed, abs=0.001)


def test_what_must_not_be_released_is_refused(weights, schema, tmp_path):
    large = torch.load(weights, weights_only=True)
    large[next(iter(large))].fill_(1e5)
    torch.save(large, tmp_path / "large.pt")
    trained = tmp_path / "trained.pt"
    shutil.copy(weights, trained)
    trained.with_suffix(".json").write_text(json.dumps({"image_size": 128}))
    strict = tmp_path / "strict.json"
    strict.write_text(json.dumps({"type": "object", "required": ["colour"]}))
    wrong = {
        "'colour' is a required property": ["fias_acdc", {"schema": str(strict)}],
        "No bundle in": ["none_acdc", {}],
        "MONAI takes what follows '_v' for the version": ["fias_acdc", {"name": "fias_vessel"}],
        "has the value colour": ["fias_acdc", {"set": {"colour": 1}}],
        "was trained with --image_size 128": ["fias_acdc", {"weights": str(trained), "set": {"image_size": 64}}],
        "belong to one bundle": ["all", {"name": "other"}],
        "holds values that half precision does not: 100000": [
            "fias_acdc",
            {"weights": str(tmp_path / "large.pt"), "half": True},
        ],
        "No weights at": ["fias_acdc", {"weights": str(tmp_path / "none.pt")}],
        "are not those of this DANIE": ["danie_acdc", {"set": {"size": "small"}, "weights": str(weights)}],
    }
    for message, (bundle, options) in wrong.items():
        with pytest.raises((DataError, FileNotFoundError), match=message):
            script.release(bundle, str(tmp_path / "dist"), **{"schema": str(schema), **options})
        assert not (tmp_path / "dist").exists()
