"""The IR of every example is as it was: what a change of the language or its reader does to them can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import TESTS, Golden

from attncc import spec
from attncc.ir.text import text
from attncc.ir.verify import verify_attention

EXAMPLES = sorted((TESTS.parent / "examples").glob("*.yaml"))
FOLDER = TESTS / "goldens" / "systems"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_text_of_an_example(path: Path, golden: Golden) -> None:
    attn = spec.load(path).attention
    verify_attention(attn)
    Golden(FOLDER / path.stem, golden.update).check(text(attn))


def test_no_golden_is_left_of_an_example_that_is_gone() -> None:
    assert {p.stem for p in FOLDER.glob("*.txt")} <= {p.stem for p in EXAMPLES}
