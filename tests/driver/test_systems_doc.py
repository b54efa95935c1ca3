"""The page on systems is what the commands write."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from attncc.cli import app
from benchmarks import lean

ROOT = Path(__file__).parents[2]


def test_the_page_is_the_commands_output() -> None:
    """After a change of examples: attncc list examples --markdown > docs/systems.md, and the table of measurements
    behind it: python -m benchmarks.lean page benchmarks/results/lean-nvidia_h200.json >> docs/systems.md"""
    result = CliRunner().invoke(app, ["list", str(ROOT / "examples"), "--markdown"])
    assert result.exit_code == 0, result.output
    measured = lean.page(ROOT / "benchmarks" / "results" / "lean-nvidia_h200.json")
    assert (ROOT / "docs" / "systems.md").read_text() == f"{result.stdout}{measured}\n"
