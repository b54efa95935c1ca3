"""Intervals hold every value that sampling finds, and are exact where the solver relies on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_numpy import Scope, evaluate

from attncc.ir.expr import (
    FALSE,
    OPS,
    TRUE,
    Expr,
    bucket,
    cast_to,
    const,
    ew,
    load,
    maximum,
    minimum,
    name,
    where,
)
from attncc.ir.intervals import UNKNOWN, interval, is_at_least, is_positive

i, j, n, b = name("i"), name("j"), name("n"), name("b")
BOX = {"i": (name("i0"), name("i1")), "j": (name("j0"), name("j1"))}
RISING = {"sorted": const(9)}

numbers = st.recursive(
    st.one_of(
        st.sampled_from([i, j, n, i // 3, load("table", i, dtype="i32"), bucket("sorted", i), bucket("sorted", j - 4)]),
        st.sampled_from([load("sorted", minimum(maximum(i, 0), 8), dtype="i32"), load("sorted", i, dtype="i32")]),
        st.integers(-6, 6).map(const),
    ),
    lambda e: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "min", "max"]), e, e).map(lambda p: ew(*p)),
        st.tuples(st.sampled_from(["floordiv", "mod"]), e, st.integers(1, 7)).map(lambda p: ew(*p)),
        st.tuples(st.sampled_from(["neg", "abs"]), e).map(lambda p: ew(*p)),
        st.tuples(st.sampled_from(["lt", "ge", "eq", "ne"]), e, e, e, e).map(lambda p: where(ew(*p[:3]), *p[3:])),
        e.map(lambda x: cast_to(cast_to(x, "bool"), "i32")),
    ),
    max_leaves=6,
)
conditions = st.recursive(
    st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), numbers, numbers).map(lambda p: ew(*p)),
    lambda e: st.one_of(
        st.tuples(e, e).map(lambda p: p[0] & p[1]), st.tuples(e, e).map(lambda p: p[0] | p[1]), e.map(lambda x: ~x)
    ),
    max_leaves=4,
)
boxes = st.tuples(st.integers(-6, 9), st.integers(0, 7), st.integers(-6, 9), st.integers(0, 7))


def scopes(box: tuple[int, int, int, int]) -> tuple[Scope, Scope]:
    """The ends of a box, and every point of it."""
    i0, rows, j0, columns = box
    buffers = {"table": np.array([3, -2, 7, 0, 5, 5, -9, 1]), "sorted": np.array([-3, 0, 0, 2, 4, 4, 5, 8, 11])}
    at = np.arange(i0, i0 + rows + 1)
    ends = Scope({"i0": i0, "i1": i0 + rows, "j0": j0, "j1": j0 + columns, "n": 4, "b": 0}, buffers, (at, at))
    inside = {**ends.names, "i": at[:, None], "j": np.arange(j0, j0 + columns + 1)[None, :]}
    return ends, replace(ends, names=inside)


@settings(max_examples=600, deadline=None)
@given(st.one_of(numbers, conditions), boxes)
def test_no_value_lies_outside(e: Expr, box: tuple[int, int, int, int]) -> None:
    ends, inside = scopes(box)
    low, high = interval(e, BOX, RISING)
    values = evaluate(e, inside).astype(np.int64)
    assert low is None or evaluate(low, ends).astype(np.int64) <= values.min()
    assert high is None or evaluate(high, ends).astype(np.int64) >= values.max()


@pytest.mark.parametrize("op", sorted(op for op in OPS if OPS[op].dtype(("f32",) * OPS[op].arity) == "f32"))
@settings(max_examples=60, deadline=None)
@given(
    ends=st.tuples(*[st.tuples(st.floats(-8, 8, width=32), st.floats(0, 4, width=32))] * 3),
    positive=st.booleans(),
)
def test_float_operators_hold_every_sample(op: str, ends: tuple[tuple[float, float], ...], positive: bool) -> None:
    """A NaN has no place in an interval, so that none may be known where one appears."""
    lows = [np.float32(abs(low) if positive else low) for low, _ in ends]
    spans = dict(
        zip(
            "abc",
            [(float(low), float(low + np.float32(width))) for low, (_, width) in zip(lows, ends, strict=True)],
            strict=True,
        )
    )
    args = [name(text, "bool" if op == "where" and text == "a" else "f32") for text in "abc"[: OPS[op].arity]]
    env = {text: (const(low), const(high)) for text, (low, high) in spans.items()} | (
        {"a": (FALSE, TRUE)} if op == "where" else {}
    )
    low, high = interval(ew(op, *args), env)
    rng = np.random.default_rng(0)
    points = {text: rng.uniform(*span, 50).astype(np.float32) for text, span in spans.items()}
    if op == "where":
        points["a"] = rng.random(50) < 0.5
    values = evaluate(ew(op, *args), Scope(points, {}))
    slack = 1e-5 * np.abs(values[np.isfinite(values)]).max(initial=1.0)
    assert low is None or (evaluate(low, Scope({}, {})) - slack <= values).all()
    assert high is None or (values <= evaluate(high, Scope({}, {})) + slack).all()


EXACT = [
    i - j,
    (i - j) // 4,
    minimum(i, 3) - maximum(j, 2),
    ew("abs", i - 2),
    (i // 4) * 4 + 3,
    bucket("sorted", i),
    load("sorted", minimum(maximum(i, 0), 8), dtype="i32"),
    load("table", i, dtype="i32"),
    j <= i,
    i // 3 < j // 5,
    where(i <= 3, 100, -1),
]


@pytest.mark.parametrize("e", EXACT, ids=range(len(EXACT)))
@settings(max_examples=60, deadline=None)
@given(box=boxes)
def test_ends_are_reached(e: Expr, box: tuple[int, int, int, int]) -> None:
    ends, inside = scopes(box)
    low, high = interval(e, BOX, RISING)
    assert low is not None
    assert high is not None
    values = evaluate(e, inside)
    assert evaluate(low, ends) == values.min()
    assert evaluate(high, ends) == values.max()


def test_a_remainder_is_exact_inside_one_period() -> None:
    low, high = interval(i % 8, {"i": (const(17), const(22))})
    assert (low, high) == (const(1), const(6))
    assert interval(i % 8, {"i": (const(17), const(24))}) == (const(0), const(7))


def test_what_is_not_known_stays_unknown() -> None:
    assert interval(load("table", j), BOX) == UNKNOWN
    assert interval(i // j, BOX) == UNKNOWN
    assert interval(ew("sqrt", i - j), BOX) == UNKNOWN
    assert interval(load("table", j) < 3.0, BOX) == (FALSE, TRUE)
    assert interval(load("sorted", j, dtype="i32"), BOX, RISING) == UNKNOWN  # j may be outside, where it reads 0


def test_unmoved_parts_stand_for_themselves() -> None:
    fixed = load("table", b * 2 + n, dtype="i32")
    assert interval(fixed, BOX) == (fixed, fixed)
    assert interval(fixed <= 3, BOX) == (fixed <= 3, fixed <= 3)
    alone = load("alone", dtype="i32")
    i0, i1, j0, j1 = (name(end) for end in ("i0", "i1", "j0", "j1"))
    assert interval(i - j < alone, BOX) == (i1 - j0 < alone, i0 - j1 < alone)
    assert interval(alone, BOX, RISING) == (alone, alone)


def test_flags_of_rows_are_counted_as_integers() -> None:
    every, some = interval(load("flag", i, dtype="bool"), BOX)
    ones = where(load("flag", i, dtype="bool"), 1, 0)
    assert every == (Expr("rows_min", (ones,), None, "i32") > 0)
    assert some == (Expr("rows_max", (ones,), None, "i32") > 0)


@pytest.mark.parametrize(
    ("e", "yes"),
    [
        (const(3), True),
        (const(0), False),
        (const(-1), False),
        (n, True),
        (name("Sk"), True),
        (i, False),
        (name("row0"), False),
    ],
)
def test_sizes_are_positive_and_positions_are_not(e: Expr, yes: bool) -> None:
    assert is_positive(e) is yes


@pytest.mark.parametrize(
    ("e", "yes"),
    [
        (None, False),
        (ew("abs", i), True),
        (maximum(i, 0), True),
        (maximum(i, 0) // n, True),
        (maximum(i, 0) // j, False),
        (maximum(i, 0) / -2.0, False),
        (minimum(n, i), False),
        (n * n + 3, True),
        (cast_to(maximum(j, 0), "f32"), True),
        (cast_to(j, "f32"), False),
        (bucket("sorted", i), True),
    ],
)
def test_certainly_not_negative(e: Expr | None, yes: bool) -> None:
    assert is_at_least(e, 0) is yes
