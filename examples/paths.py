"""Prints the sample inputs, one path a line: those in this folder and the CT slice that pydicom itself installs.

scanscribe report $(python examples/paths.py) --reference examples/golden --out reports
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent


def paths() -> list[Path]:
    """The samples in the order of `expected.json`, the deliberately broken ones included."""
    samples = json.loads((EXAMPLES / "expected.json").read_text(encoding="utf-8"))["samples"]
    return [_locate(sample) for sample in samples]


def _locate(sample: dict[str, str]) -> Path:
    if "installed" not in sample:
        return EXAMPLES / sample["path"]
    from pydicom.data import get_testdata_file

    installed = get_testdata_file(sample["installed"], download=False)
    if installed is None:
        sys.exit(f"{sample['installed']} is not part of this installation of pydicom; run `make setup`")
    return Path(str(installed))


if __name__ == "__main__":
    print(*paths(), sep="\n")
