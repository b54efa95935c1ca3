"""What of a score is linear in the key, told apart: the parts make the score, and the slope is what it moves by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from masks import b, h, i, j, value

from attncc.ir.expr import Expr, cast_to, const, load, maximum, name, where
from attncc.ir.rewrite import names
from attncc.passes.lower.slope import slope_of, split

qk, m, row_bias = name("qk", "f32"), name("m", "f32"), name("bias", "f32")
near = cast_to(i - j, "f32")
FACTORS = st.sampled_from([m, const(0.5), cast_to(h, "f32"), const(-3.0)])
LINES = st.recursive(
    st.sampled_from([near, cast_to(j, "f32"), cast_to(j * 2 - b, "f32"), row_bias, const(1.5)]),
    lambda e: (
        st.builds(Expr.__add__, e, e)
        | st.builds(Expr.__sub__, e, e)
        | st.builds(Expr.__mul__, e, FACTORS)
        | st.builds(Expr.__mul__, FACTORS, e)
        | st.builds(Expr.__truediv__, e, st.just(const(4.0)))
        | st.builds(Expr.__neg__, e)
    ),
    max_leaves=4,
)
CURVES = st.sampled_from([near * near, maximum(near, 0.0), where(j < i, 1.0, 0.0), near * cast_to(i, "f32")])


def points(**more: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers that float64 keeps exactly, whatever is made of them."""
    at = {text: np.asarray(n) for text, n in {"b": 2, "h": 3, "m": 0.25}.items()}
    at |= {"i": np.arange(5)[:, None], "j": np.arange(7)[None, :], "bias": np.arange(5.0)[:, None] * 8}
    return at | {"qk": np.arange(35.0).reshape(5, 7)} | more


@given(line=LINES, curve=st.none() | CURVES, minus=st.booleans())
def test_the_parts_are_the_score(line: Expr, curve: Expr | None, minus: bool) -> None:
    score = qk - line if minus else qk + line
    score = score if curve is None else curve + score
    found = split(score)
    if found is None:
        return
    at = points()
    assert "qk" not in names(found.line)
    assert not names(found.slope) & {"i", "j", "qk", "bias"}
    np.testing.assert_array_equal(value(found.rest, at) + value(found.line, at), value(score, at))
    step = value(found.line, points(j=at["j"] + 1)) - value(found.line, at)
    np.testing.assert_array_equal(np.broadcast_to(value(found.slope, at), step.shape), step)


@pytest.mark.parametrize(
    ("score", "rest", "slope"),
    [
        (qk - m * near, qk, m),
        (qk + cast_to(j, "f32") / 8.0, qk, const(0.125)),
        (qk * where(j < i, 1.0, 2.0) + near, qk * where(j < i, 1.0, 2.0), const(-1.0)),
        (qk + row_bias - near, qk, const(1.0)),
    ],
)
def test_what_is_left(score: Expr, rest: Expr, slope: Expr) -> None:
    found = split(score)
    assert found is not None
    assert found.rest == rest
    at = points()
    assert float(value(found.slope, at)) == float(value(slope, at))


@pytest.mark.parametrize(
    "score",
    [
        qk, qk + row_bias, qk * near, qk + maximum(near, 0.0), qk + near * cast_to(i, "f32"), qk - near * near,
        qk + load("table", j, dtype="f32"), maximum(qk + near, 0.0), cast_to(cast_to(near, "bf16"), "f32") + qk,
    ],
)  # fmt: skip
def test_what_has_no_line(score: Expr) -> None:
    """No key moves it, or not alike for all rows, or it stands inside of something else."""
    assert split(score) is None


def test_integers_have_slopes_in_floats() -> None:
    slope = slope_of(3 * j - i)
    assert slope is not None
    assert slope.dtype == "f32"
    assert value(slope, {}) == 3.0
