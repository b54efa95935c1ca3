"""Long statements are wrapped, and mean the same afterwards."""

from __future__ import annotations

import ast

import pytest

from attncc.codegen.source import wrapped

LONG = "some_quite_long_name_of_a_tensor[None, :] <= another_one[:, None]"


@pytest.mark.parametrize(
    "statement",
    [
        f"keep = inside & (({LONG}) & ({LONG}))",
        f"keep = inside[None, :] & ({LONG})",
        f"x = tl.where({LONG}, {LONG}, 0.0)",
        f"x = tl.zeros_like({LONG})",
        f"x = values[0]({LONG})",
        f"a, b = ({LONG}, {LONG})",
        f"x = {LONG}",
    ],
)
@pytest.mark.parametrize("comment", ["", "  # [BM, BN], by (row, column)"])
def test_the_meaning_stays(statement: str, comment: str) -> None:
    lines = wrapped(statement + comment, 40)
    assert ast.dump(ast.parse("\n".join(lines))) == ast.dump(ast.parse(statement))
    assert comment.strip() in "\n".join(lines)
