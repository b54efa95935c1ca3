"""Partial derivatives against finite differences in fp64, and at the points where they jump."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.ir.derivatives import PARTIALS
from attncc.ir.expr import OPS, Expr, ew, name
from attncc.ir.rewrite import walk

POSITIVE = {"log", "log2", "sqrt", "rsqrt", "pow"}
"""Operators whose arguments are drawn from the positive numbers."""
FLAT = {"floordiv", "floor", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"}


def value(e: Expr, points: dict[str, np.ndarray]) -> np.ndarray:
    """In fp64, whatever the nodes say: a difference quotient has no digits in fp32."""
    if e.op == "const":
        return np.float64(e.attr) if not isinstance(e.attr, bool) else np.bool_(e.attr)
    return points[str(e.attr)] if e.op == "name" else OPS[e.op].numpy(*(value(a, points) for a in e.args))


def arguments(op: str) -> list[Expr]:
    logical = op in ("and", "or", "not")
    return [name(t, "bool" if logical or (op == "where" and t == "a") else "f32") for t in "abc"[: OPS[op].arity]]


def points(op: str, draws: list[float]) -> dict[str, np.ndarray]:
    at = {t: np.float64(abs(x) + 0.1 if op in POSITIVE else x) for t, x in zip("abc", draws, strict=True)}
    if op in ("where", "and", "or", "not"):
        at["a"] = np.bool_(draws[0] > 0)
    if op in ("and", "or"):
        at["b"] = np.bool_(draws[1] > 0)
    if op == "log1p":
        at["a"] = np.abs(at["a"])
    return at


@pytest.mark.parametrize("op", sorted(set(OPS) - FLAT))
@settings(max_examples=60, deadline=None)
@given(draws=st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-2), min_size=3, max_size=3))
def test_slopes(op: str, draws: list[float]) -> None:
    args, at = arguments(op), points(op, draws)
    if op in ("min", "max") and abs(draws[0] - draws[1]) < 1e-3:
        return
    if op == "mod" and abs(draws[0] / draws[1] - round(draws[0] / draws[1])) < 1e-3:
        return
    y = ew(op, *args)
    for arg, partial in zip(args, PARTIALS[op](*args, y), strict=True):
        if arg.dtype == "bool":
            assert value(partial, at) == 0
            continue
        step, text = 1e-6, str(arg.attr)
        ahead, behind = (value(y, at | {text: at[text] + d}) for d in (step, -step))
        np.testing.assert_allclose(value(partial, at), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", sorted(FLAT))
def test_steps_are_flat(op: str) -> None:
    args = arguments(op)
    assert [p.value for p in PARTIALS[op](*args, ew(op, *args))] == [0.0] * len(args)


@pytest.mark.parametrize("op", ["min", "max"])
def test_equal_arguments_share_the_gradient(op: str) -> None:
    args = arguments(op)
    assert [value(p, {"a": 2.0, "b": 2.0}) for p in PARTIALS[op](*args, ew(op, *args))] == [0.5, 0.5]


def test_kinks_and_edges_are_finite() -> None:
    (slope,) = PARTIALS["abs"](*arguments("abs"), name("y", "f32"))
    assert value(slope, {"a": np.float64(0.0)}) == 0.0
    x, n = arguments("pow")
    by_x, by_n = PARTIALS["pow"](x, n, ew("pow", x, n))
    assert value(by_n, {"a": np.float64(0.0), "b": np.float64(2.0)}) == 0.0
    assert value(by_x, {"a": np.float64(-3.0), "b": np.float64(2.0)}) == -6.0


@pytest.mark.parametrize("op", ["exp", "exp2", "sqrt", "rsqrt", "sigmoid", "tanh"])
def test_the_forward_value_is_used_again(op: str) -> None:
    """A transcendental is not computed a second time where its own value gives the slope."""
    args, y = arguments(op), name("y", "f32")
    nodes = {node.op for p in PARTIALS[op](*args, y) for node in walk(p)}
    assert nodes <= {"name", "const", "mul", "div", "sub"}
