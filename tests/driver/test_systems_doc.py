"""The page on systems is what the command writes."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from attncc.cli import app

ROOT = Path(__file__).parents[2]


def test_the_page_is_the_commands_output() -> None:
    """After a change of examples: attncc list examples --markdown > docs/systems.md"""
    result = CliRunner().invoke(app, ["list", str(ROOT / "examples"), "--markdown"])
    assert result.exit_code == 0, result.output
    assert (ROOT / "docs" / "systems.md").read_text() == result.stdout
