"""Modules of an engine's source, imported apart from a package: what they print and reckon needs no GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attncc import driver

SOURCE = Path(driver.__file__).parent / "codegen"


@contextmanager
def imported(folder: Path, name: str, *others: str) -> Iterator[Any]:
    """Module `name` as a package has it, beside the others that it imports."""
    (folder / f"with{name}").mkdir()
    for module in (name, *others):
        (folder / f"with{name}" / f"{module}.py").write_text((SOURCE / f"{module}.py").read_text())
    (folder / f"with{name}" / "__init__.py").write_text("")
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(f"with{name}.{name}")
    finally:
        sys.path.remove(str(folder))


def plain(value: Any) -> Any:
    """What a constant of Triton's is."""
    return getattr(value, "value", value)
