"""Proofs about sizes: never wrong against samples, and strong enough for what relies on them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_numpy import Scope, evaluate

from attncc.ir.dims import UNBOUNDED, Range, bounds, cdiv, fits, is_multiple
from attncc.ir.expr import Expr, bucket, cast_to, const, ew, load, maximum, minimum, name, where

m, n, Sq, Sk, D, i, j = (name(text) for text in ("m", "n", "Sq", "Sk", "D", "i", "j"))
SIZES: dict[str, Range] = {"m": (0, 6), "n": (-3, 5), "Sq": (0, 2**24), "Sk": (0, 2**24), "D": (128, 128)}
POSITIONS = {"i": (Sk - Sq, Sk - 1), "j": (const(0), Sk - 1)}

formulas = st.recursive(
    st.one_of(st.sampled_from([m, n]), st.integers(-5, 5).map(const)),
    lambda e: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "min", "max"]), e, e).map(lambda p: ew(*p)),
        st.tuples(st.sampled_from(["floordiv", "mod"]), e, st.integers(1, 5)).map(lambda p: ew(*p)),
        st.tuples(e, e, e).map(lambda p: where(p[0] < 2, p[1], p[2])),
        st.tuples(st.sampled_from(["neg", "abs"]), e).map(lambda p: ew(*p)),
        e.map(lambda x: cast_to(x, "i64")),
    ),
    max_leaves=7,
)
GRID = Scope({"m": np.arange(7)[:, None], "n": np.arange(-3, 6)[None, :]}, {})


@settings(max_examples=300, deadline=None)
@given(formulas)
def test_bounds_hold_everywhere(e: Expr) -> None:
    least, greatest = bounds(e, SIZES)
    values = evaluate(e, GRID)
    assert least is None or least <= values.min()
    assert greatest is None or greatest >= values.max()


@settings(max_examples=300, deadline=None)
@given(formulas, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_a_proven_divisor_divides(e: Expr, divisor: int, by_m: int, by_n: int) -> None:
    if is_multiple(e, divisor, {"m": by_m, "n": by_n}):
        scope = Scope({"m": np.arange(7)[:, None] * by_m, "n": np.arange(-3, 6)[None, :] * by_n}, {})
        assert (evaluate(e, scope) % divisor == 0).all()


@pytest.mark.parametrize(
    ("e", "range_"),
    [
        (i - j, (1 - 2**24, 2**24 - 1)),
        (ew("abs", i - j), (0, 2**24 - 1)),
        ((m + n) - m, (-3, 5)),
        (m * D + D - 1, (127, 6 * 128 + 127)),
        (Sk // 16, (0, 2**20)),
        (n // 2, (-2, 2)),
        (n % 4, (0, 3)),
        (minimum(n, name("unknown")), (None, 5)),
        (maximum(n, name("unknown")), (-3, None)),
        (load("x", n, dtype="i32"), (-(2**31), 2**31 - 1)),
        (load("x", n, dtype="u8"), (0, 255)),
        (bucket("x", n), (0, 2**31 - 1)),
        (name("unknown") + 1, UNBOUNDED),
        (Sk * Sq * D, (0, 2**55)),
    ],
)
def test_bounds(e: Expr, range_: Range) -> None:
    assert bounds(e, SIZES, POSITIONS) == range_


def test_widths() -> None:
    assert fits(bounds(Sk * 100, SIZES), "i32")
    assert not fits(bounds(Sk * D, SIZES), "i32")
    assert fits(bounds(Sk * Sq * D, SIZES), "i64")
    assert not fits(UNBOUNDED, "i64")
    assert fits((0, 255), "u8")
    assert not fits((-1, 255), "u8")


@pytest.mark.parametrize(
    ("e", "divisor", "yes"),
    [
        (Sk * D, 128, False),
        (Sk * 128, 128, True),
        (Sk * 8 + 16, 8, True),
        (Sk * 8 + 4, 8, False),
        (m * Sk, 12, False),
        (m * 3 * Sk * 4, 12, True),
        (Sk // 2 * 16, 16, True),
        (const(0), 7, True),
    ],
)
def test_divisors(e: Expr, divisor: int, yes: bool) -> None:
    assert is_multiple(e, divisor, {}) is yes


def test_divisors_of_names_count() -> None:
    assert is_multiple(Sk + m * 2, 16, {"Sk": 32, "m": 8})
    assert not is_multiple(Sk + m, 16, {"Sk": 32, "m": 8})


@given(st.integers(0, 100), st.integers(1, 9))
def test_cdiv_rounds_up(a: int, b: int) -> None:
    assert cdiv(const(a), b).value == -(-a // b)
    assert cdiv(m, 1) is m
