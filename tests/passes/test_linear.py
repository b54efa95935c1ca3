"""Integer formulas collected: the same numbers, shorter; comparisons only decided where they are certain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_numpy import Scope, evaluate

from attncc.ir.expr import FALSE, TRUE, Expr, bucket, const, ew, load, maximum, minimum, name, where
from attncc.passes.linear import at_most, choose, implies, tidy

i0, i1, n, Sk = (name(text) for text in ("i0", "i1", "n", "Sk"))
at_i0, at_i1 = bucket("offsets", i0), bucket("offsets", i1)

numbers = st.recursive(
    st.one_of(
        st.sampled_from([i0, i1, n, at_i0, at_i1, load("table", i0, dtype="i32")]), st.integers(-5, 5).map(const)
    ),
    lambda e: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "add", "sub", "mul", "min", "max"]), e, e).map(lambda p: ew(*p)),
        st.tuples(st.sampled_from(["floordiv", "mod"]), e, st.integers(1, 6)).map(lambda p: ew(*p)),
        st.tuples(e, st.integers(-4, 4)).map(lambda p: p[0] * p[1]),
        st.tuples(st.sampled_from(["lt", "le", "gt", "ge"]), e, e, e, e).map(lambda p: where(ew(*p[:3]), *p[3:])),
        e.map(lambda x: -x),
    ),
    max_leaves=7,
)
comparisons = st.tuples(st.sampled_from(["lt", "le", "gt", "ge"]), numbers, numbers).map(lambda p: ew(*p))


def everywhere() -> Scope:
    """All tiles i0 <= i1 of some positions, for some sizes."""
    first, more, size = np.meshgrid(np.arange(-7, 9), np.arange(6), np.arange(1, 5))
    tables = {"offsets": np.array([-2, 0, 3, 3, 8]), "table": np.array([4, -1, 0, 9])}
    return Scope({"i0": first, "i1": first + more, "n": size, "Sk": size * 3}, tables)


SCOPE = everywhere()


@settings(max_examples=500, deadline=None)
@given(st.one_of(numbers, comparisons, st.tuples(comparisons, comparisons).map(lambda p: p[0] | p[1] & p[0])))
def test_collecting_keeps_the_value(e: Expr) -> None:
    new = tidy(e)
    assert new.dtype == e.dtype
    np.testing.assert_array_equal(*np.broadcast_arrays(evaluate(e, SCOPE), evaluate(new, SCOPE)))


@settings(max_examples=300, deadline=None)
@given(numbers)
def test_collecting_twice_changes_nothing(e: Expr) -> None:
    assert tidy(tidy(tidy(e))) == tidy(tidy(e))


@settings(max_examples=500, deadline=None)
@given(numbers, numbers)
def test_certain_orders_hold(a: Expr, b: Expr) -> None:
    if at_most(a, b):
        assert (evaluate(a, SCOPE) <= evaluate(b, SCOPE)).all()


@settings(max_examples=500, deadline=None)
@given(comparisons, comparisons)
def test_certain_implications_hold(a: Expr, b: Expr) -> None:
    if implies(a, b):
        assert (~evaluate(a, SCOPE) | evaluate(b, SCOPE)).all()


@pytest.mark.parametrize(
    ("e", "short"),
    [
        (i1 + 1 - 1, i1),
        (i0 - n + (n - 1) + 1, i0),
        ((i0 - 1024) + 1, i0 - 1023),
        (const(3) - i0 - 5, -i0 - 2),
        (const(3) + -i0, const(3) - i0),
        (i0 + i0 + i0 * 2, i0 * 4),
        ((i0 // 8) * 8 + 7 + 1, i0 // 8 * 8 + 8),
        ((i0 * 8 + 19) // 8, i0 + 2),
        ((i0 // 4) // 8, i0 // 32),
        ((i0 + 12) % 4, i0 % 4),
        (minimum(i1 + 1, i0 + 1), i0 + 1),
        (minimum(i1 + 1, i1 // 8 * 8 + 8), i1 + 1),
        (maximum(maximum(i0, 3), maximum(i1, 2)), maximum(const(3), i1)),
        (minimum(i1, 4) + 1, minimum(i1 + 1, 5)),
        (i0 <= i1, TRUE),
        (i1 < i0, FALSE),
        (i0 // 8 * 8 > i0, FALSE),
        (i0 % 8 < 8, TRUE),
        (at_i0 <= at_i1, TRUE),
        ((i1 < 8) | (i0 < 8), i0 < 8),
        ((i1 < 8) & (i0 < 8), i1 < 8),
        (where(i0 < 8, n, where(i0 < 8, i0, i1)), where(i0 < 8, n, i1)),
        (where(i1 < 8, n, where(i0 < 8, n, i1)), where(i0 < 8, n, i1)),
    ],
)
def test_short_forms(e: Expr, short: Expr) -> None:
    assert tidy(e) == short


@pytest.mark.parametrize(
    "pair", [(i0, n), (i1, i0), (i0 * 2, i1), (i0 // 8 * 8 + 8, i1 + 1), (at_i0, load("table", i0)), (n, 5)]
)
def test_what_may_not_hold_is_not_claimed(pair: tuple[Expr, Expr | int]) -> None:
    a, b = pair
    assert not at_most(a, b if isinstance(b, Expr) else const(b))


def test_choices_share_their_conditions() -> None:
    c, d = i0 < 3, n < 2
    assert choose(c, where(c, i0, i1), Sk) == where(c, i0, Sk)
    assert choose(c, where(d, i0, Sk), Sk) == where(c & d, i0, Sk)
    assert choose(c, i0, where(d, i0, Sk)) == where(c | d, i0, Sk)
