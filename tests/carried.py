"""Which examples what lowering carries, as docs/systems.md says: a test holds the page to what the compiler does.

To lower all examples takes seconds, which every process of a test run would spend for every file that asks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
ROW: Final = re.compile(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([^|]*) \|", re.M)
LOWERINGS: Final = {
    ROOT / "examples" / f"{name}.yaml": () if said.startswith("not yet") else tuple(said.split(", "))
    for name, said in ROW.findall((ROOT / "docs" / "systems.md").read_text())
}


def carried(lowering: str = "") -> list[Path]:
    """The examples that a lowering carries, such as `triton: forward`; any, where none is named."""
    return [path for path, found in LOWERINGS.items() if (lowering in found if lowering else found)]
