"""Build the zip of a bundle that others download and run without this repository.

    python bundles/release.py danie_acdc --output_dir dist
    python bundles/release.py danie_acdc --output_dir dist --name danie_s_acdc --set "{'size': 'small'}"

Publish the zips and ``model_info.json`` as assets of a GitHub release, or any server: users fetch one by
``python -m monai.bundle download --name NAME --url URL --bundle_dir .`` and run it from its own folder.

A release holds the bundle's configs, docs and licence, its weights where there are any, and under ``scripts/networks``
the code that it needs: ``scripts`` is the one module name that MONAI Label unloads between bundles, so bundles of two
releases serve side by side, each with its own code. The configs' ``networks.`` becomes ``scripts.networks.``.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import fire
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from networks import DataError, explain_errors, load_weights  # noqa: E402


def release(
    bundle: str,
    output_dir: str = "dist",
    name: str = "",
    set: dict[str, Any] | None = None,  # noqa: A002  (the option's name on the command line)
    weights: str = "",
    url: str = "",
) -> str:
    """Check a bundle, write ``NAME_vVERSION.zip``, and note it in ``model_info.json`` beside it.

    The same input gives the same bytes: files are sorted and carry one date.

    Args:
        bundle: folder of the bundle in ``bundles/``, or ``all`` for each as it is.
        output_dir: where the zip goes.
        name: the release's own name, for one with overrides.
        set: values of the configs to bake in, such as ``{'size': 'small'}``; an id that a config lacks is left out.
        weights: ``model.pt`` to ship; by default the bundle's own, and none where there is none.
        url: where the zip will lie, for ``model_info.json``.

    Returns:
        Path of the zip, or of the folder when several were built.

    Raises:
        DataError: when the version is not in the changelog, a set value is in no config, the network does not give
            what the metadata says, or the weights do not fit it.
    """
    if bundle == "all":
        for metadata_file in sorted((ROOT / "bundles").glob("*/configs/metadata.json")):
            release(metadata_file.parents[1].name, output_dir, url=url)
        return output_dir
    source = ROOT / "bundles" / bundle
    if not (source / "configs" / "metadata.json").is_file():
        raise DataError(f"No bundle in {source}: expected configs/metadata.json.")
    name = name or bundle
    if "_v" in name:
        raise DataError(f"{name!r} cannot be a release's name: MONAI takes what follows '_v' for the version.")
    files = _files(source, name, set or {}, weights)
    metadata = json.loads(files["configs/metadata.json"])
    if metadata["version"] not in metadata["changelog"]:
        raise DataError(f"{source / 'configs/metadata.json'}: version {metadata['version']} is not in its changelog.")
    with tempfile.TemporaryDirectory() as folder:
        _unpack(files, Path(folder))
        _verify(Path(folder))
    target = Path(output_dir) / f"{name}_v{metadata['version']}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(f"{name}/{path}", (2020, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[path])
    _note(target, url)
    print(f"{target}, {target.stat().st_size / 1e6:.1f} MB, {'with' if 'models/model.pt' in files else 'no'} weights")
    return str(target)


def _files(source: Path, name: str, values: dict[str, Any], weights: str) -> dict[str, bytes]:
    files = {str(p.relative_to(source)): p.read_bytes() for p in sorted((source / "docs").glob("*"))}
    files["LICENSE"] = (source / "LICENSE").read_bytes()
    baked = dict.fromkeys(values, False)
    for config in sorted((source / "configs").glob("*")):
        text = config.read_text()
        if config.name != "metadata.json":
            text = text.replace(f'"name": "{source.name}"', f'"name": "{name}"')
            for key, value in values.items():
                text, found = re.subn(
                    rf'^    "{key}": .*?(,?)$', rf'    "{key}": {json.dumps(value)}\1', text, flags=re.M
                )
                baked[key] |= bool(found)
            text = text.replace('"networks.', '"scripts.networks.')
            text = text.replace('"$import networks"', '"$import scripts.networks as networks"')
        files[f"configs/{config.name}"] = text.encode()
    missing = [key for key, found in baked.items() if not found]
    if missing:
        raise DataError(f"No config of {source.name} has the value {', '.join(missing)}.")
    files["scripts/__init__.py"] = b""
    for module in sorted((ROOT / "networks").glob("*.py")):
        files[f"scripts/networks/{module.name}"] = module.read_bytes()
    model = Path(weights) if weights else source / "models" / "model.pt"
    if weights or model.is_file():
        files["models/model.pt"] = model.read_bytes()
    if (source / "large_files.yml").is_file():
        files["large_files.yml"] = (source / "large_files.yml").read_bytes()
    return files


def _unpack(files: dict[str, bytes], folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


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
        config = (folder / "configs" / "inference.json").read_text().replace('"scripts.networks.', '"networks.')
        load_weights(ConfigParser(json.loads(config)).get_parsed_content("network_def"), folder / "models" / "model.pt")


def _note(target: Path, url: str) -> None:
    index = target.parent / "model_info.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    digest = hashlib.sha1(target.read_bytes(), usedforsecurity=False).hexdigest()
    known[target.stem] = {"checksum": digest, "source": f"{url.rstrip('/')}/{target.name}" if url else target.name}
    index.write_text(json.dumps(dict(sorted(known.items())), indent=4) + "\n")


if __name__ == "__main__":
    explain_errors()
    fire.Fire(release)
