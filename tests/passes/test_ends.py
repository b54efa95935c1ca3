"""The end of the keys as a part of the mask: the same pairs as both say by themselves, by fewer comparisons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from masks import b, causal, i, j, same, value

from attncc.ir.expr import TRUE, Expr, name
from attncc.ir.rewrite import walk
from attncc.passes.lower.ends import with_end

Sk, x = name("Sk"), name("x")
BOUNDS = st.sampled_from([i, i + 3, x, Sk - x, i - j, name("far", "i64"), b * 5])
ORDERS = st.sampled_from([Expr.__lt__, Expr.__le__, Expr.__gt__, Expr.__ge__])
CONDITIONS = st.builds(
    lambda order, bound, turned: order(bound, j) if turned else order(j, bound), ORDERS, BOUNDS, st.booleans()
)


@given(mask=st.recursive(CONDITIONS, lambda e: st.builds(Expr.__and__, e, e) | st.builds(Expr.__or__, e, e)))
def test_the_same_pairs(mask: Expr) -> None:
    at = {text: np.asarray(n) for text, n in {"b": 2, "x": 7, "far": 11, "Sk": 20}.items()}
    at |= {"i": np.arange(-4, 30)[:, None], "j": np.arange(0, 32)[None, :]}
    expected = value(mask, at) & (at["j"] < 20)
    np.testing.assert_array_equal(np.broadcast_to(value(with_end(mask), at), expected.shape), expected)


def comparisons(e: Expr) -> int:
    return sum(n.op in ("lt", "le", "gt", "ge") and "j" in str(n.args) for n in walk(e))


@pytest.mark.parametrize(
    ("mask", "count"),
    [(TRUE, 1), (causal, 1), ((j >= i - 9) & causal, 2), (causal & (j >= x) & causal, 2), (same("ids"), 1)],
)
def test_how_many_comparisons(mask: Expr, count: int) -> None:
    """Of pairs: one bound of the mask takes the end in; a mask without one gets a comparison more."""
    assert comparisons(with_end(mask)) == count
