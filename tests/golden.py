"""Goldens: text and resource figures that a test's output is compared with, or that it writes anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any, Final

import pytest

from attncc.codegen.aot import Resources

TESTS: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Golden:
    """Compares text with a file under tests/goldens that is named after the test."""

    stem: Path
    update: bool

    def check(self, text: str, suffix: str = ".txt") -> None:
        """`text` is what the golden says, byte for byte."""
        path = self.stem.with_name(self.stem.name + suffix)
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        if not path.exists():
            pytest.fail(f"no golden {path.relative_to(TESTS)}: run pytest --update-golden and read it")
        old = path.read_text()
        if old != text:
            name = str(path.relative_to(TESTS))
            diff = unified_diff(old.splitlines(), text.splitlines(), name, "now", lineterm="")
            pytest.fail("\n".join([f"{name} differs (--update-golden accepts it)", *diff]))

    def check_resources(self, built: Mapping[str, Resources]) -> None:
        """What compiled kernels take, by a name such as `prefill/sm_90`.

        Figures are compared exactly under the Triton that made the golden; under another one only the set
        of kernels is.
        """
        figures = {name: _without_names(resources) for name, resources in sorted(built.items())}
        (version,) = {resources.triton for resources in built.values()}
        path = self.stem.with_name(self.stem.name + ".json")
        saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if self.update or saved.get("triton") == version or not saved:
            self.check(_table(version, figures), ".json")
        else:
            assert sorted(saved["kernels"]) == sorted(figures)


NAMED: Final = ("kernel", "target", "triton")
"""Said by a kernel's name and by the file."""


def _without_names(resources: Resources) -> dict[str, Any]:
    return {k: v for k, v in asdict(resources).items() if k not in NAMED}


def _table(version: str, figures: Mapping[str, dict[str, Any]]) -> str:
    """JSON with one line a kernel, so that a difference can be read."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in figures.items())
    return f'{{\n "triton": "{version}",\n "kernels": {{\n{lines}\n }}\n}}\n'
