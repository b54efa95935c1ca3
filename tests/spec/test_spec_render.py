"""Rendering: exact texts, and the round trip through text of random formulas and whole specs."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spec_samples import HEAD, INPUTS, mask, score, spec

from attncc.errors import SpecError
from attncc.ir.attention import Attention
from attncc.ir.expr import Expr, bucket, const, load, name
from attncc.spec import document, loads
from attncc.spec.operators import FUNCTIONS, Fault, apply, integer
from attncc.spec.render import expression

INTS = [name(n) for n in ("b", "h", "hk", "i", "j", "row", "Sq", "Sk", "W")]
FLOATS = [load("tau"), load("slopes", name("h"))]
SCORES = [name("qk", "f32"), name("scale", "f32")]


@pytest.mark.parametrize(
    "text",
    [
        "qk * scale - (i - j)",
        "qk - (1.0 - qk)",
        "-qk ** 2",
        "(-qk) ** 2",
        "2.0 ** qk ** 2",
        "(2.0 ** qk) ** 2",
        "2.0 ** -qk",
        "(-2.0) ** qk",
        "-(qk * scale)",
        "-qk * scale",
        "qk / (scale / 2.0)",
        "qk + -0.5",
        "qk * 1e-06",
        "qk + -inf",
        "qk + (i + j) // 2 % 3",
        "qk + i // (2 * j)",
        "softcap(qk * scale, 50.0)",
        "clamp(qk, -1.0, 1.0)",
        "where(causal, qk, 0.0)",
        "max(qk, scale)",
        "qk + bias[h, bucket(edges, j - i)]",
        "qk * tau + bucket(offsets[b], j)",
    ],
)
def test_scores_have_no_needless_parentheses(text: str) -> None:
    assert expression(score(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "causal",
        "~causal",
        "~(i < 3)",
        "(i < 3) & (j < 3) | causal",
        "(i < 3) & ((j < 3) | causal)",
        "(i < j) == (j < 3)",
        "ids[b, i] != ids[b, j]",
        "true",
        "blocks[i // 128, j // 128]",
    ],
)
def test_masks_have_no_needless_parentheses(text: str) -> None:
    assert expression(mask(text)) == text


@st.composite
def formulas(draw: st.DrawFn, kind: str, names: list[Expr], depth: int = 4) -> Expr:
    """A random well-typed formula, built as the parser builds; `names` are its floats."""
    if depth and draw(st.integers(0, 4)):
        try:
            return draw(NODES[kind](names, depth - 1))
        except Fault:
            pass
    return draw(leaves(kind, names))


def leaves(kind: str, names: list[Expr]) -> st.SearchStrategy[Expr]:
    match kind:
        case "int":
            return st.sampled_from(INTS) | st.integers(-(2**40), 2**40).map(integer)
        case "float":
            return st.sampled_from(names) | st.floats(allow_nan=False, allow_infinity=False).map(const)
        case _:
            return st.booleans().map(const) | st.just(apply("le", name("j"), name("i")))


@st.composite
def ints(draw: st.DrawFn, names: list[Expr], depth: int) -> Expr:
    sub = lambda kind="int": draw(formulas(kind, names, depth))
    match draw(st.sampled_from(["add", "sub", "mul", "floordiv", "mod", "neg", "min", "max", "abs", "load", "where"])):
        case "load":
            inside = [apply("mod", sub(), name("M")) for _ in range(2)]
            return draw(st.sampled_from([load("grid", *inside, dtype="i32"), bucket("edges", inside[0])]))
        case "where":
            return apply("where", sub("bool"), sub(), sub())
        case "neg" | "abs" as op:
            return apply(op, sub())
        case op:
            return apply(op, sub(), sub())


@st.composite
def floats(draw: st.DrawFn, names: list[Expr], depth: int) -> Expr:
    sub = lambda kind: draw(formulas(kind, names, depth))
    unary = ["neg", "exp", "tanh", "rsqrt", "floor", "erf"]
    either = draw(st.sampled_from(["int", "float"]))
    match draw(st.sampled_from(["add", "sub", "mul", "div", "pow", "min", "max", "where", "softcap", "float", *unary])):
        case "where":
            return apply("where", sub("bool"), sub("float"), sub(either))
        case "softcap":
            return FUNCTIONS["softcap"].build(sub("float"), sub("float"))
        case "float":
            return FUNCTIONS["float"].build(sub(either))
        case op if op in unary:
            return apply(op, sub("float"))
        case op:
            return apply(op, sub("float"), sub(either))


@st.composite
def bools(draw: st.DrawFn, names: list[Expr], depth: int) -> Expr:
    sub = lambda kind: draw(formulas(kind, names, depth))
    match draw(st.sampled_from(["and", "or", "not", "lt", "le", "gt", "ge", "eq", "ne"])):
        case "not":
            return apply("not", sub("bool"))
        case "and" | "or" as op:
            return apply(op, sub("bool"), sub("bool"))
        case op:
            kind = draw(st.sampled_from(["int", "float"]))
            return apply(op, sub(kind), sub(kind))


NODES = {"int": ints, "float": floats, "bool": bools}


def read_back(key: str, e: Expr) -> Attention:
    """The attention with `e` for its score or mask; formulas that are too large are not of interest."""
    try:
        return spec(f"{key}: '{expression(e)}'\n", inputs=INPUTS).attention
    except SpecError as error:
        assume("too large" not in error.message and "characters" not in error.message)
        raise


@given(formulas("float", [*FLOATS, *SCORES]))
@settings(max_examples=150, deadline=None)
def test_scores_round_trip(e: Expr) -> None:
    found = read_back("score", e)
    assert found.part.score == e
    assert loads(document(found)).attention == found


@given(formulas("bool", FLOATS))
@settings(max_examples=150, deadline=None)
def test_masks_round_trip(e: Expr) -> None:
    found = read_back("mask", e)
    assert found.part.mask == e
    assert loads(document(found)).attention == found


FRAGMENTS: list[list[str]] = [
    ["dtype: fp16", "dtype: fp32"],
    ["layout: bshd", "layout: varlen"],
    ["scale: 0.125", "scale: 1 / sqrt(Dv)"],
    ["align: top_left", "align: lengths"],
    ["score: softcap(qk * scale, 30)", "score: qk * scale + bias[h, clamp(i - j, 0, W - 1)]", "score: qk * tau"],
    ["mask: causal & window(64)", "mask: segments(offsets)", "mask: ~document(ids) | sink(3)", "mask: false"],
    ["normalizer: sigmoid", "normalizer: softmax(sink=slopes[h])", "normalizer: linear(1e-5)", "normalizer: relu"],
    ["dropout: 0.1"],
    ["kv: paged(16)", "kv: latent(rope=8)", "kv: latent(rope=8, page_size=4)", "kv: gathered(picks)"],
    ["sizes: {Sk: 4096, W: {max: 64}}", "sizes: {B: {multiple: 2}}"],
    ["doc: 'plain: # not \"so\"'", "doc: true story", "doc: '7'", "doc: 'ümlaut, {x}'"],
    ["schedule: split_kv(4)", "schedule: stream_k"],
    ["numerics: {reproducible: batch}", "numerics: {exp: exact}"],
    ["prologue: [rope, l2_norm(to=2)]", "prologue:\n  - temperature(tau, on=k)"],
    ["epilogue: [lerp_v(0.5)]", "epilogue:\n  - skip(slopes[h])"],
    ["quantize: {k: int8(per=token), q: int8}"],
    ["tune: [{B: 1, Sq: 128}]"],
    ["modes: [prefill]"],
]


@given(st.tuples(*(st.sampled_from(["", *options]) for options in FRAGMENTS)))
@settings(max_examples=80, deadline=None)
def test_specs_round_trip(chosen: tuple[str, ...]) -> None:
    text = HEAD + INPUTS + "".join(f"{line}\n" for line in chosen if line)
    attn = loads(text).attention
    canonical = document(attn)
    assert loads(canonical).attention == attn
    assert document(loads(canonical).attention) == canonical


def test_canonical_text() -> None:
    text = """\
heads: {kv: 8, q: 8}
name: 'sample'
inputs: {bias: {dtype: bf16, shape: [Hq, W]}}
attncc: 1
mask: (causal)
dims: {v: 64, qk: 64}
dtype: bf16
score: (qk * scale) + bias[(h), j % W]
"""
    expected = """\
attncc: 1
name: sample
heads: 8
dims: 64
inputs:
  bias: {shape: [Hq, W], dtype: bf16}
score: qk * scale + bias[h, j % W]
mask: causal
"""
    assert document(loads(text).attention) == expected
