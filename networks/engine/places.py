"""Where a bundle lies, and which of its weights run."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import DataError
from .workflow import running_workflow

__all__ = ["bundle_root", "weights_in"]


def bundle_root(name: str) -> str:
    """The folder of a bundle, from whichever folder Python was started in.

    Args:
        name: of the bundle.

    Returns:
        The folder of the config that runs; outside MONAI's runner that of the release that this code lies in; else the
        current folder where it is that bundle's, else the one of that name in ``bundles/``, of the current folder or
        beside this package; else the current folder.
    """
    above, here, workflow = Path(__file__).resolve().parents[2], Path(), running_workflow()
    places = [above.parent, here, here / "bundles" / name, above / "bundles" / name]
    if workflow is not None:
        places.insert(0, workflow.config_root_path.parent)
    return str(next((place for place in places if _is_bundle(place, name)), here))


def _is_bundle(folder: Path, name: str) -> bool:
    config = folder / "configs" / "train.json"
    if not config.is_file():
        return False
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("name") == name
    except (ValueError, AttributeError):
        return False


def weights_in(ckpt_dir: str | Path) -> str:
    """The weights that a bundle runs with: ``model.pt`` of the last training, else ``pretrained.pt``, shipped with it.

    Args:
        ckpt_dir: the bundle's folder of models.

    Returns:
        Path of the file; of ``model.pt`` where there is neither, as it will be called when it is trained.

    Raises:
        DataError: when there is no ``model.pt``, and of the shipped weights nothing but their values.
    """
    model, shipped = Path(ckpt_dir) / "model.pt", Path(ckpt_dir) / "pretrained.pt"
    if model.is_file() or not (shipped.is_file() or shipped.with_suffix(".json").is_file()):
        return str(model)
    if not shipped.is_file():
        raise DataError(
            f"{shipped} is missing, the weights that this bundle is shipped with. Get them again, in a git clone by "
            f"git checkout -- {shipped}, or train the bundle."
        )
    return str(shipped)
