"""The canonical form: no value changes by a bit, conversions are nodes, dropped terms are invisible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import attention, b, h, i, j, row
from scalar_numpy import Scope, evaluate

from attncc.ir.attention import Align, Attention, Call, Input, Normalizer, Select, Size
from attncc.ir.expr import FLOATS, OPS, TRUE, Expr, cast_to, const, ew, load, name, where
from attncc.ir.rewrite import walk
from attncc.passes.canonicalize import canonicalize

qk, scale = name("qk", "f32"), name("scale", "f32")
HARD = np.array([0.0, -0.0, 1.0, -1.0, 3.5, -7e4, 1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)

floats = st.one_of(
    st.sampled_from([qk, qk, scale, load("bias", j), load("bias", i)]),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -4.0, 3.0, 0.1, 1e-30, 2.0**-130, 3e38]).map(const),
)
integers = st.sampled_from([i, j, row, h, i - j, (j - i) * 3, ew("abs", i - j), i // 4 - j, const(0), const(-7), j % 5])
conditions = st.sampled_from([j <= i, qk < 0.5, ~(qk <= scale), load("bias", j) > load("bias", i), ~(i < j), i < 3.5])
UNARY = ("neg", "neg", "abs", "exp", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "floor", "sin", "erf")
BINARY = ("add", "sub", "mul", "div", "add", "sub", "mul", "div", "min", "max", "floordiv", "mod")


def _grow(part: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    either = st.one_of(part, part, integers)
    return st.one_of(
        st.tuples(st.sampled_from(UNARY), either).map(lambda p: ew(*p)),
        st.tuples(st.sampled_from(BINARY), either, either).map(lambda p: ew(*p)),
        st.tuples(conditions, either, either).map(lambda p: where(*p)),
    )


scores = st.recursive(floats, _grow, max_leaves=8)


def variant(score: Expr, mask: Expr = TRUE) -> Attention:
    base = attention(mask)
    return replace(base, parts=(replace(base.part, score=score),))


def scope(seed: int) -> Scope:
    """8 rows of 12 keys, hard numbers everywhere."""
    rng = np.random.default_rng(seed)
    at = np.arange(8)[:, None]
    named = {
        "qk": rng.choice(HARD, (8, 12)),
        "scale": rng.choice(HARD),
        "row": at,
        "i": at + 4,
        "j": np.arange(12)[None, :],
    }
    return Scope({**named, "b": 0, "h": 2, "Sq": 8, "Sk": 12, "n": 3}, {"bias": rng.choice(HARD, 12)})


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    nan = np.isnan(a)
    return bool((nan == np.isnan(b)).all() and ((a == b) & (np.signbit(a) == np.signbit(b)) | nan).all())


@settings(max_examples=800, deadline=None)
@given(scores, st.integers(0, 30))
def test_no_bit_of_a_score_changes(score: Expr, seed: int) -> None:
    new = canonicalize(variant(score)).part.score
    old_value, value = evaluate(score, scope(seed)), evaluate(new, scope(seed))
    assert same_bits(*np.broadcast_arrays(old_value.astype(np.float32), value.astype(np.float32)))


@settings(max_examples=300, deadline=None)
@given(scores, scores, st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), st.integers(0, 30))
def test_no_mask_changes(a: Expr, b: Expr, op: str, seed: int) -> None:
    mask = ~ew(op, a, b)
    new = canonicalize(variant(qk, mask)).part.mask
    assert (evaluate(mask, scope(seed)) == evaluate(new, scope(seed))).all()


@settings(max_examples=300, deadline=None)
@given(scores)
def test_operators_never_mix_integers_and_floats(score: Expr) -> None:
    for node in walk(canonicalize(variant(score)).part.score):
        if node.op in OPS:
            kinds = {a.dtype in FLOATS for a in (node.args[1:] if node.op == "where" else node.args)}
            assert len(kinds) == 1
            assert node.op in ("lt", "le", "gt", "ge", "eq", "ne") or (node.dtype in FLOATS) in kinds


@settings(max_examples=200, deadline=None)
@given(scores)
def test_canonical_is_a_fixed_point(score: Expr) -> None:
    once = canonicalize(variant(score))
    assert canonicalize(once) == once


def f(e: Expr) -> Expr:
    return cast_to(e, "f32")


x, count = load("bias", j), load("lengths", b, dtype="i32")

SIMPLER: dict[str, tuple[Expr, Expr]] = {
    "power of two": (qk / 8.0, qk * 0.125),
    "not a power of two": (qk / 50.0, qk / 50.0),
    "numbers stand last": (0.5 * qk, qk * 0.5),
    "one": (1.0 * (qk / 1.0), qk),
    "adding 0 is not nothing": (qk + 0.0, qk + 0.0),
    "adding -0 is": (qk + const(-0.0), qk),
    "taking 0 off is": (qk - 0.0, qk),
    "times 0 is not 0": (qk * 0.0, qk * 0.0),
    "a sum of a negation": (x + -qk, x - qk),
    "a difference of a negation": (x - -qk, x + qk),
    "two signs": (-qk * -x, qk * x),
    "a sign into a number": (-qk * 3.0, qk * -3.0),
    "sums keep their order": ((qk + 1.0) + 2.0, (qk + 1.0) + 2.0),
    "constants": (qk * (const(2.0) * 0.25 + 1.0), qk * 1.5),
    "constants stay short": (qk * (const(0.1) * 3.0), qk * 0.3),
    "no number for infinity": (qk * (const(1.0) / 0.0), qk * (const(1.0) / 0.0)),
    "square": (ew("pow", qk, 2), qk * qk),
    "sizes": (qk * name("Dqk"), qk * 16.0),
    "rows and columns": (qk + (j - i), qk + (f(j) - f(i))),
    "distance": (qk - ew("abs", i - j) * 0.25, qk - ew("abs", f(i) - f(j)) * 0.25),
    "columns alone": (qk + (j + 1), qk + f(j + 1)),
    "products stay integers": (qk + i * j, qk + f(i * j)),
    "quotients stay integers": (qk + (i - j) // 4, qk + f((i - j) // 4)),
    "data may be large": (qk + (count + i - j), qk + f(count + i - j)),
    "integers in a choice": (where(j <= i, qk, 3), where(j <= i, qk, 3.0)),
    "a choice by negation": (where(~(qk < 1.0), qk, x), where(qk < 1.0, x, qk)),
    "softcap is left alone": (ew("tanh", qk * scale / 50.0) * 50.0, ew("tanh", qk * scale / 50.0) * 50.0),
}  # fmt: skip


@pytest.mark.parametrize("label", SIMPLER)
def test_scores(label: str) -> None:
    before, after = SIMPLER[label]
    assert canonicalize(variant(before)).part.score == after


MASKS: dict[str, tuple[Expr, Expr]] = {
    "an integer comparison is turned": (~(j <= i), j > i),
    "a float comparison is not": (~(x <= 0.5), ~(x <= 0.5)),
    "mixed comparisons": (j < 0.5 * i, f(j) < f(i) * 0.5),
    "head counts": (h < name("Hq"), h < 1),
}


@pytest.mark.parametrize("label", MASKS)
def test_masks(label: str) -> None:
    before, after = MASKS[label]
    assert canonicalize(variant(qk, before)).part.mask == after


def test_long_sequences_keep_integer_distances() -> None:
    long = replace(variant(qk + (j - i)), sizes=(Size("Sk", max=2**25),))
    assert canonicalize(long).part.score == qk + f(j - i)


def test_a_fixed_length_is_a_number_unless_sequences_are_packed() -> None:
    dense = replace(variant(qk * name("Sk")), sizes=(Size("Sk", fixed=64),))
    assert canonicalize(dense).part.score == qk * 64.0
    assert canonicalize(replace(dense, layout="varlen")).part.score == qk * f(name("Sk"))


def test_default_scale_is_a_number() -> None:
    (number,) = walk(canonicalize(replace(variant(qk), scale=ew("rsqrt", name("Dqk")))).scale)
    assert number.value == 0.25


@pytest.mark.parametrize("align", [Align(), Align("top_left"), Align("input", "lengths")])
def test_distances_are_exact_however_queries_are_aligned(align: Align) -> None:
    assert canonicalize(replace(variant(qk + (j - i)), align=align)).part.score == qk + (f(j) - f(i))


only_o = (Call("o"),)


@pytest.mark.parametrize(
    ("score", "left"),
    [
        (qk * scale + i * 0.5, qk * scale),
        (i * 0.5 + (qk - h), qk),
        (qk + j * 0.5, qk + f(j) * 0.5),
        (qk + load("bias", i), qk + load("bias", i)),
        (qk + ew("log", i), qk + ew("log", f(i))),
        (qk * i, qk * f(i)),
    ],
)
def test_row_terms_fall_away_under_softmax(score: Expr, left: Expr) -> None:
    assert canonicalize(replace(variant(score), outputs=only_o)).part.score == left


@pytest.mark.parametrize("shown", ["lse", "max_score"])
def test_row_terms_stay_where_an_output_shows_them(shown: str) -> None:
    kept = canonicalize(replace(variant(qk + i * 0.5), outputs=(*only_o, Call(shown)))).part.score
    assert kept == qk + f(i) * 0.5


@pytest.mark.parametrize("normalizer", [Normalizer("sigmoid"), Normalizer("none"), Normalizer(sink=const(0.0))])
def test_row_terms_stay_where_they_do_not_divide_out(normalizer: Normalizer) -> None:
    probe = replace(variant(qk + i * 0.5), outputs=only_o)
    probe = replace(probe, parts=(replace(probe.part, normalizer=normalizer),))
    assert canonicalize(probe).part.score == qk + f(i) * 0.5


def test_row_terms_stay_where_branches_are_merged() -> None:
    probe = replace(variant(qk + i * 0.5), outputs=only_o)
    merged = canonicalize(replace(probe, parts=probe.parts * 2))
    assert [part.score for part in merged.parts] == [qk + f(i) * 0.5] * 2


@pytest.mark.parametrize(("options", "left"), [((("lse", "sums"),), qk + f(i) * 0.5), ((), qk)])
def test_row_terms_stay_where_a_selection_compares_them(options: tuple[tuple[str, str], ...], left: Expr) -> None:
    probe = replace(variant(qk + i * 0.5), outputs=only_o, inputs=(Input("sums", ("B", "Hq", "Sq")),))
    score, rule = Call("exact_mass", kwargs=options), Call("topk", (const(2),))
    select = Select((4, 4), score, "none", "none", rule, (), Call("every_call"))
    probe = replace(probe, parts=(replace(probe.part, select=select),))
    assert canonicalize(probe).part.score == left


def test_own_sizes_and_inputs_are_left_alone() -> None:
    table = Input("table", ("Hq", "buckets"), "fp32")
    probe = replace(variant(qk + load("table", h, j % name("buckets"))), inputs=(table,))
    assert canonicalize(probe).part.score == qk + load("table", h, j % name("buckets"))
