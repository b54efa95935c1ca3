"""`qdot`, the score word that multiplies the query by a row of a table: parsing, rendering, bad inputs."""

from __future__ import annotations

import pytest
from spec_samples import HEAD, refusal, spec, underlined

from attncc.ir.expr import Expr, load, maximum, minimum, name, qdot
from attncc.spec import document, loads
from attncc.spec.render import expression

TABLES = """\
inputs:
  rel: {shape: [N, Dqk]}
  by_head: {shape: [Hq, N, 64], dtype: bf16}
  by_kv: {shape: [Hk, Dqk]}
  own: {shape: [N, E]}
  shared: {shape: [1, N, Dqk]}
  one: {shape: [Dqk]}
  rows: {shape: [B, Sq, Dqk]}
  narrow: {shape: [N, 32]}
  wide: {shape: [N, W]}
  values: {shape: [N, 16]}
  scalar: {shape: []}
  ints: {shape: [N, Dqk], dtype: int32}
  few: {shape: [8, Dqk]}
  cells: {shape: [Sk], dtype: int32}
sizes: {E: 64, Sk: {max: 4096}}
"""
QK, SCALE = name("qk", "f32"), name("scale", "f32")
B, H, HK, I, J, ROW, N = (name(n) for n in ("b", "h", "hk", "i", "j", "row", "N"))


def score(text: str) -> Expr:
    return spec(f"score: {text}\n", inputs=TABLES).attention.part.score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qk * scale + qdot(rel[clamp(i - j, 0, N - 1)])", QK * SCALE + qdot("rel", minimum(maximum(I - J, 0), N - 1))),
        ("qk + qdot(by_head[h, j])", QK + qdot("by_head", H, J)),
        ("qk + qdot(by_kv[hk])", QK + qdot("by_kv", HK)),
        ("qk + qdot(own[0])", QK + qdot("own", 0)),
        ("qk + qdot(shared[h, j])", QK + qdot("shared", 0, J)),
        ("qk + qdot(one)", QK + qdot("one")),
        ("qk + qdot(rows[b, row])", QK + qdot("rows", B, ROW)),
        ("qk + qdot(rel[cells[j]])", QK + qdot("rel", load("cells", J, dtype="i32"))),
        ("(qk + qdot(rel[i]) - qdot(rel[j])) * scale", (QK + qdot("rel", I) - qdot("rel", J)) * SCALE),
        ("qdot(one)", qdot("one")),
    ],
)
def test_meaning(text: str, expected: Expr) -> None:
    assert score(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "qk * scale + qdot(rel[clamp(i - j, 0, N - 1)])",
        "qk + qdot(one)",
        "-qdot(by_head[h, i // 2 * 2]) ** 2",
        "(qk + qdot(rel[cells[j] - cells[i] + 7])) * scale",
    ],
)
def test_rendering_reads_back(text: str) -> None:
    read = score(text)
    assert expression(read) == text
    whole = spec(f"score: {text}\n", inputs=TABLES).attention
    assert loads(document(whole)).attention == whole


WIDTH = "last axis has the head's Dqk entries"


@pytest.mark.parametrize(
    ("text", "message", "pointed", "hint"),
    [
        ("qk + qdot(narrow[i])", WIDTH, "qdot(narrow[i])", "narrow: {shape: […, Dqk]}"),
        ("qk + qdot(wide[i])", WIDTH, "qdot(wide[i])", "wide: {shape: […, Dqk]}"),
        ("qk + qdot(cells[i])", WIDTH, "qdot(cells[i])", ""),
        ("qk + qdot(scalar)", WIDTH, "qdot(scalar)", ""),
        ("qk + qdot(ints[i])", "qdot multiplies floats, input 'ints' is int32", "qdot(ints[i])", ""),
        ("qk + qdot(rel)", "takes 1 indices, got 0", "qdot(rel)", ""),
        ("qk + qdot(rel[i, 0])", "takes 1 indices, got 2", "qdot(rel[i, 0])", ""),
        ("qk + qdot(one[0])", "takes 0 indices, got 1", "qdot(one[0])", ""),
        ("qk + qdot(few[8])", "index 8 is outside", "8", ""),
        ("qk + qdot(by_kv[h])", "runs to Hq", "h", "use hk"),
        ("qk + qdot(rows[b, i])", "runs to Sk", "b, i", "use row"),
        ("qk + qdot(rel[qk])", "must be an int", "qk", ""),
        ("qk + qdot(rel[i / 2])", "must be an int", "i / 2", ""),
        ("qk + qdot(rell[i])", "unknown input 'rell'", "rell", "rel"),
        ("qk + qdot(qk)", "qdot needs an input", "qk", ""),
        ("qk + qdot(rel[i][j])", "qdot needs an input", "rel[i]", "one pair of brackets"),
        ("qk + qdot()", "takes 1 argument, got 0", "qdot()", "qdot(x[e, …])"),
        ("qk + qdot(rel[i], rel[j])", "takes 1 argument, got 2", "qdot(rel[i], rel[j])", "qdot(x[e, …])"),
        ("qk + qdot(rel[i], by=2)", "no arguments by name", "by=2", ""),
        ("qk + qdto(rel[i])", "unknown function 'qdto'", "qdto", "qdot"),
        ("qk + qdot", "'qdot' is a function", "qdot", "qdot(…)"),
    ],
)
def test_wrong_uses(text: str, message: str, pointed: str, hint: str) -> None:
    error = refusal(f"{HEAD}{TABLES}score: {text}\n")
    assert message in error.message
    assert underlined(error) == pointed
    assert hint in error.hint


@pytest.mark.parametrize(
    "line",
    [
        "mask: qdot(rel[i]) > 0.0",
        "scale: qdot(one)",
        "normalizer: softmax(sink=qdot(one))",
        "epilogue: [gate(qdot(one))]",
    ],
)
def test_it_stands_in_a_score_only(line: str) -> None:
    error = refusal(f"{HEAD}{TABLES}{line}\n")
    assert "stands in a score only" in error.message
    assert underlined(error).startswith("qdot(")


def test_an_input_cannot_take_its_name() -> None:
    error = refusal(f"{HEAD}inputs: {{qdot: {{shape: [N, Dqk]}}}}\n")
    assert "qdot" in error.message
    assert underlined(error) == "qdot"
