"""What tests on a GPU share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where packages are compiled to, and imported from."""
    out = tmp_path_factory.mktemp("packages")
    sys.path.insert(0, str(out))
    yield out
    sys.path.remove(str(out))
