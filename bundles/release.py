"""Build the zip of a bundle that others download and run without this repository.

    python bundles/release.py danie_acdc --output_dir dist
    python bundles/release.py danie_synapse --output_dir dist --name danie_s_synapse --set "{'size': 'small'}"

Publish it where ``python -m monai.bundle download --name NAME --bundle_dir .`` finds it:

- on any server: the zip, fetched with ``--url URL_OF_THE_ZIP``;
- on GitHub: commit ``models/model_info.json`` at the top of a repository, tag the commit, attach the zips to the tag's
  release; fetched with ``--source github --repo OWNER/REPOSITORY/TAG``;
- on Hugging Face: the unpacked bundle as the root of a repository of its own, with a tag for the version, as
  ``python -m monai.bundle push_to_hf_hub`` does; fetched with ``--source huggingface_hub --repo OWNER/NAME``.

MONAI downloads zips without a look at checksums. The command printed at the end, with ``--url``, does look.

A release holds the bundle's configs, docs and licence, its weights where there are any, and the code that it needs, as
a package of its own name, such as ``fias_acdc_code_0_4_1``. So bundles of several releases serve side by side, each
with its own code. (The model zoo's name is ``scripts``, which MONAI Label unloads while other threads import it.) The
configs' ``networks.`` becomes ``fias_acdc_code_0_4_1.networks.``.

Where there are weights, ``model.json`` beside them tells what they were trained for: evaluation and inference read it,
and the release's ``train.json`` has the same values. Training goes on from them: ``start_from`` names them, and no
other pretrained weights are fetched. MONAI Label, which trains without asking for more, can so train offline.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import fire
import torch
from monai.apps.utils import download_url
from monai.bundle import ConfigParser, verify_metadata

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from networks import DataError, explain_errors, load_weights  # noqa: E402
from networks.storage import whole_file  # noqa: E402
from networks.trained_for import differences, plain_values, record_of  # noqa: E402
from networks.weights import read_weights  # noqa: E402


def release(
    bundle: str,
    output_dir: str = "dist",
    name: str = "",
    set: dict[str, Any] | None = None,  # noqa: A002  (the option's name on the command line)
    weights: str = "",
    url: str = "",
    weights_url: str = "",
    schema: str = "",
    half: bool = False,
) -> str:
    """Check a bundle, write ``NAME_vVERSION.zip``, and note it in ``models/model_info.json`` beside it.

    The same input gives the same bytes: files are sorted and carry one date.

    Args:
        bundle: folder of the bundle in ``bundles/``, or ``all`` for each as it is.
        output_dir: where the zip goes.
        name: the release's own name, for one with overrides.
        set: values of the configs to bake in, such as ``{'size': 'small'}``; an id that a config lacks is left out.
        weights: file to ship as ``model.pt``; by default the bundle's ``models/model.pt``, which training leaves, else
            ``models/pretrained.pt``, with which some bundles come, else none. The metadata's ``eval_metrics`` are of
            the latter, and left out with others.
        url: address of the folder where the zip will lie, for ``model_info.json``.
        weights_url: address of the folder where the weights will lie, when a zip with them is too large: they are
            written beside the zip as ``NAME_vVERSION.pt``, and ``large_files.yml`` in it names address and checksum for
            ``python -m monai.bundle download_large_files``, which refuses another file.
        schema: file of the model zoo's metadata schema; by default fetched from the metadata's ``schema``.
        half: ship the weights in half precision, half as large; they are loaded into single precision. Vectors, which
            are few, stay whole: a variance of batch normalisation may be above what half precision holds.

    Returns:
        Path of the zip, or of the folder when several were built.

    Raises:
        DataError: when the metadata does not follow the schema, its version is not in its changelog, a set value is in
            no config or is not what the weights were trained with, a weight is too large for half precision, the
            network does not give what the metadata says, or the weights do not fit it.
    """
    if bundle == "all":
        if name or set or weights:
            raise DataError("name, set and weights belong to one bundle: release it by its own name.")
        for metadata_file in sorted((ROOT / "bundles").glob("*/configs/metadata.json")):
            found = metadata_file.parents[1].name
            release(found, output_dir, url=url, weights_url=weights_url, schema=schema, half=half)
        return output_dir
    source = ROOT / "bundles" / bundle
    if not (source / "configs" / "metadata.json").is_file():
        raise DataError(f"No bundle in {source}: expected configs/metadata.json.")
    name = name or bundle
    if "_v" in name:
        raise DataError(f"{name!r} cannot be a release's name: MONAI takes what follows '_v' for the version.")
    files = _files(source, name, set or {}, weights, half)
    metadata = json.loads(files["configs/metadata.json"])
    if metadata["version"] not in metadata["changelog"]:
        raise DataError(f"{source / 'configs/metadata.json'}: version {metadata['version']} is not in its changelog.")
    with tempfile.TemporaryDirectory() as folder:
        _unpack(files, Path(folder))
        _check_metadata(Path(folder) / "configs" / "metadata.json", Path(schema or Path(folder) / "schema.json"))
        _verify(Path(folder))
    target = Path(output_dir) / f"{name}_v{metadata['version']}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    if weights_url and "models/model.pt" in files:
        apart = target.with_suffix(".pt")
        with whole_file(apart) as partial:
            Path(partial).write_bytes(files.pop("models/model.pt"))
        files["large_files.yml"] = _large_file(apart, weights_url).encode()
    with whole_file(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(f"{name}/{path}", (2020, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[path])
    _note(target, url)
    print(f"{target}, {target.stat().st_size / 1e6:.1f} MB, {'with' if 'models/model.pt' in files else 'no'} weights")
    if url:
        checksum = hashlib.sha256(target.read_bytes()).hexdigest()
        options = f"'{_address(url, target)}', '{target.name}', '.', hash_val='{checksum}', hash_type='sha256'"
        print(f'python -c "from monai.apps import download_and_extract as get; get({options})"')
    return str(target)


def _files(source: Path, name: str, values: dict[str, Any], weights: str, half: bool) -> dict[str, bytes]:
    files = {str(p.relative_to(source)): p.read_bytes() for p in sorted((source / "docs").glob("*"))}
    files["docs/guide.md"] = (ROOT / "bundles" / "README.md").read_bytes()
    for page in ("HEARTS.md", "HOSPITAL.md"):
        files[f"docs/{page}"] = (ROOT / "bundles" / page).read_bytes().replace(b"(README.md#", b"(guide.md#")
    files["LICENSE"] = (source / "LICENSE").read_bytes()
    places = [Path(weights)] if weights else [source / "models" / f"{name}.pt" for name in ("model", "pretrained")]
    model = next((place for place in places if place.is_file()), places[-1])
    if weights and not model.is_file():
        raise FileNotFoundError(f"No weights at {model}.")
    version = json.loads((source / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
    code = re.sub(r"\W", "_", f"{name}_code_{version}")
    baked = dict.fromkeys(values, False)
    trained: dict[str, Any] = {}  # evaluation and inference read these from beside the weights
    if model.is_file():
        flat = io.BytesIO()  # bare, on the CPU: MONAI Label and the exports read it leniently, without saying where to
        state = read_weights(model)
        if half:
            state = {k: _halved(k, v) if v.is_floating_point() and v.dim() > 1 else v for k, v in state.items()}
        torch.save(state, flat)
        files["models/model.pt"] = flat.getvalue()
        print(f"weights: {model}")
        if (seen := record_of(model)).is_file():
            trained = plain_values(json.loads(seen.read_bytes()))
            if other := differences(trained, values):
                raise DataError(f"{model} was trained with {other}: set cannot be otherwise.")
        else:
            print(f"No {seen}: the release has the config's own values, whatever {model} was trained with.")
        record = {**trained, "shipped": f"{name} {version}"}
        files["models/model.json"] = f"{json.dumps(record, indent=4)}\n".encode()
        trained = {k: v for k, v in trained.items() if k not in ("network", "shipped")}
        trained |= {"start_from": "$@bundle_root + '/models/model.pt'", "pretrained": False}
    for config in sorted((*(source / "configs").glob("*.json"), source / "configs" / "logging.conf")):
        text = config.read_text(encoding="utf-8")
        if config.name == "metadata.json":
            own = source / "models" / "pretrained.pt"
            if model.resolve() != own.resolve() and json.loads(text)["eval_metrics"]:
                start = text.index('"eval_metrics": ') + len('"eval_metrics": ')
                _, end = json.JSONDecoder().raw_decode(text, start)
                text = f"{text[:start]}{{}}{text[end:]}"
                print(f"no eval_metrics: those of {config.name}, like the figures of the docs, are of {own}.")
        else:
            text = text.replace(f'"name": "{source.name}"', f'"name": "{name}"')
            # the overlays of a device, such as TensorRT's, hold some of these to what it needs
            own_values = {"train": {**trained, **values}, "evaluate": values, "inference": values, "measure": values}
            bake = own_values.get(config.stem, {})
            for key, value in bake.items():
                indent = " " * (4 if f"@trained['{key}']" not in text else 8)
                if match := re.search(rf'^{indent}"{re.escape(key)}": ', text, re.M):
                    usual, end = json.JSONDecoder().raw_decode(text, match.end())
                    text = text if usual == value else text[: match.end()] + json.dumps(value) + text[end:]
                    baked[key] = True
            text = text.replace('"networks.', f'"{code}.networks.')
            text = text.replace('"$import networks"', f'"$import {code}.networks as networks"')
        files[f"configs/{config.name}"] = text.encode("utf-8")
    missing = [key for key, found in baked.items() if not found]
    if missing:
        raise DataError(f"No config of {source.name} has the value {', '.join(missing)}.")
    files[f"{code}/__init__.py"] = b""
    for module in sorted((ROOT / "networks").rglob("*.py")):
        files[f"{code}/{module.relative_to(ROOT)}"] = module.read_bytes()
    if (source / "large_files.yml").is_file():
        files["large_files.yml"] = (source / "large_files.yml").read_bytes()
    return files


def _halved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        raise DataError(
            f"{name} holds values that half precision does not: {float(tensor.abs().max()):g}. Release it whole."
        )
    return half


def _unpack(files: dict[str, bytes], folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def _check_metadata(metadata: Path, schema: Path) -> None:
    """The metadata follow the model zoo's schema; without a connection or file of it, say that this was not checked."""
    address = json.loads(metadata.read_text(encoding="utf-8"))["schema"]
    if not schema.is_file():
        try:
            download_url(address, schema, progress=False)
        except (URLError, RuntimeError) as error:
            print(f"metadata not checked: no schema from {address} ({error}). Give its file by --schema.")
            return
    try:
        verify_metadata(str(metadata), str(schema))
    except ValueError as error:
        raise DataError(f"{metadata.name} does not follow {address}: {error}") from error


def _verify(folder: Path) -> None:
    """The network gives what the metadata says, alone in its folder, and the weights are its own to the last tensor.

    MONAI Label loads weights leniently: it would serve the noise of a network that they do not fit.
    """
    command = "-m monai.bundle verify_net_in_out network_def --device cpu".split()
    files = ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json"]
    check = subprocess.run([sys.executable, *command, *files], cwd=folder, text=True, capture_output=True)
    if check.returncode:
        raise DataError(f"The network does not give what the metadata says:\n{check.stdout}{check.stderr}")
    if (folder / "models" / "model.pt").is_file():
        config = (folder / "configs" / "inference.json").read_text(encoding="utf-8")
        config = re.sub(r"\w+_code_\w+\.networks", "networks", config)
        parser = ConfigParser({**json.loads(config), "bundle_root": str(folder)})
        load_weights(parser.get_parsed_content("network_def"), folder / "models" / "model.pt")


def _large_file(weights: Path, url: str) -> str:
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    return (
        f"large_files:\n  - path: models/model.pt\n    url: {_address(url, weights)}\n"
        f"    hash_val: {checksum}\n    hash_type: sha256\n"
    )


def _address(url: str, file: Path) -> str:
    return f"{url.rstrip('/')}/{file.name}" if url else file.name


def _note(target: Path, url: str) -> None:
    """Enter the zip's checksum in the index that ``monai.bundle download --source github`` reads."""
    index = target.parent / "models" / "model_info.json"
    index.parent.mkdir(exist_ok=True)
    known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    digest = hashlib.sha1(target.read_bytes(), usedforsecurity=False).hexdigest()
    known[target.stem] = {"checksum": digest, "source": _address(url, target)}
    with whole_file(index) as partial:
        Path(partial).write_text(json.dumps(dict(sorted(known.items())), indent=4) + "\n")


if __name__ == "__main__":
    explain_errors()
    fire.Fire(release)
