"""Packages that tests on a GPU compile for the one that is here, once each."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from attncc import driver, spec


def package(folder: Path, name: str, body: str) -> ModuleType:
    """Of a spec behind its name; `folder` is where modules are found."""
    if not (folder / name).exists():
        driver.compile(spec.loads(f"attncc: 1\nname: {name}\n{body}"), folder)
        importlib.invalidate_caches()
    return importlib.import_module(name)
