"""Write the configs of all bundles from the one source that they share.

    python bundles/configs.py            writes bundles/NAME/configs
    python bundles/configs.py --check    changes nothing, and fails where a file is not as it would be written

``common/`` holds each config once. A value ``"<name>"`` in it differs between bundles: ``common/bundles.json`` has it,
for the bundle, its dataset, its kind of images or its network; the first of them that names it counts. Where none does,
the line is left out. ``metadata.json`` and the docs are each bundle's own.
"""

from __future__ import annotations

import json
import re
import sys
from collections import ChainMap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
COMMON = ROOT / "common"


def bundle_values(bundle: str) -> ChainMap[str, Any]:
    """The values of one bundle by the names in ``common/``.

    Args:
        bundle: its name, ``NETWORK_DATASET``.
    """
    source = json.loads((COMMON / "bundles.json").read_text(encoding="utf-8"))
    network, dataset = bundle.split("_")
    data = source["datasets"][dataset]
    own = {"name": bundle, "dataset_dir": f"phantoms/{data['layout']}"}
    return ChainMap(
        own, source["bundles"][bundle], data, source["images"][data["images"]], source["networks"][network.upper()]
    )


def filled_in(text: str, values: ChainMap[str, Any]) -> str:
    """A config of ``common/`` with one bundle's values in it.

    Args:
        text: the file's, one key a line where the value is ``"<name>"``.
        values: by name.

    Returns:
        The config's text, which is valid JSON again.
    """
    lines = []
    for line in text.splitlines():
        if found := re.fullmatch(r'( *)("[^"]+": )"<(.+)>"(,?)', line):
            indent, key, name, comma = found.groups()
            if name not in values:
                continue
            value = values[name]
            dump = json.dumps(value, indent=4 if isinstance(value, dict) else None)
            line = f"{indent}{key}{dump}{comma}".replace("\n", f"\n{indent}")
        lines.append(line)
    filled = "\n".join(lines) + "\n"
    json.loads(filled)
    return filled


def main(check: bool = False) -> int:
    """Write the files, or with ``check`` count those that would change."""
    stale = []
    for bundle in json.loads((COMMON / "bundles.json").read_text(encoding="utf-8"))["bundles"]:
        values = bundle_values(bundle)
        for source in sorted(set(COMMON.iterdir()) - {COMMON / "bundles.json"}):
            target = ROOT / bundle / "configs" / source.name
            text = source.read_text(encoding="utf-8")
            text = filled_in(text, values) if source.suffix == ".json" else text
            if not target.is_file() or target.read_text(encoding="utf-8") != text:
                stale.append(target)
                if not check:
                    target.write_text(text, encoding="utf-8")
    for target in stale:
        print(f"{target.relative_to(ROOT)} {'is not what common/ says' if check else 'written'}")
    return len(stale) if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
