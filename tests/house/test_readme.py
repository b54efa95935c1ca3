"""The README keeps its word: its links lead somewhere, its commands exist, its numbers were measured."""

from __future__ import annotations

import json
import re

import pytest
from house.own_code import ROOT

README = (ROOT / "README.md").read_text()
MEASURED = re.compile(r"\d(?:\.\d+)?\s*(?:×|x\b|TFLOP/s|TB/s|GB/s|ms\b|µs\b)")


def sections() -> list[tuple[str, str]]:
    """Every heading with the text below it, code blocks left out."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    parts = re.split(r"^(#+ .*)$", text, flags=re.MULTILINE)
    return list(zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True))


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", README))))
def test_links_lead_somewhere(link: tuple[str, str]) -> None:
    target = link[0] or link[1]
    assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize(("heading", "text"), sections())
def test_numbers_have_files(heading: str, text: str) -> None:
    """A section that states a speed names the results it comes from."""
    if not MEASURED.search(text):
        return
    files = re.findall(r"benchmarks/results/[\w.\-]+\.json", text)
    assert files, f"{heading}: a measured number without its file"
    for file in files:
        saved = json.loads((ROOT / file).read_text())
        assert saved["meta"]["device"]
        assert saved["rows"]


def test_ci_runs_the_command_of_the_readme() -> None:
    assert re.search(r"^\./run test\b", README, flags=re.MULTILINE)
    assert re.search(r"^\./run test$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
