"""Long statements are wrapped, and mean the same afterwards."""

from __future__ import annotations

import ast

import pytest

from attncc.codegen.source import Writer, wrapped

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


def test_an_axis_at_the_end_stays_behind_its_call() -> None:
    found = wrapped(f"x = tl.load({'a' * 60}, mask={'b' * 40})[None, :] - tl.load(c)[:, None].to(tl.float32)", 60)
    assert all(len(line) <= 70 for line in found)
    assert any(line.strip() == ")[None, :]" for line in found)
    assert ast.dump(ast.parse("\n".join(found)))


@pytest.mark.parametrize("count", [3, 40])
def test_a_signature_takes_as_many_lines_as_it_needs(count: int) -> None:
    w = Writer()
    names = [f"tensor_{n}" for n in range(count)]
    w.signature("attention", ["q", "*", *names, "scale=None"])
    with w.indented():
        w.line("return q")
    assert (len(w.lines) == 2) == (count == 3)
    assert max(map(len, w.lines)) <= 120
    (made,) = ast.parse(w.text()).body
    assert isinstance(made, ast.FunctionDef)
    assert [a.arg for a in made.args.kwonlyargs] == [*names, "scale"]
