"""The expression node: the tables agree, folding keeps value, dtype and shape."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_numpy import Scope, evaluate

from attncc.ir.derivatives import PARTIALS
from attncc.ir.expr import (
    FALSE,
    OPS,
    STRUCTURAL,
    TRUE,
    Expr,
    broadcast,
    cast_to,
    const,
    eq,
    ew,
    load,
    name,
    where,
)
from attncc.ir.intervals import INTERVALS

i, j, x = name("i"), name("j"), name("x", "f32")


def test_every_operator_has_a_meaning_an_interval_and_a_derivative() -> None:
    assert set(OPS) == set(INTERVALS) == set(PARTIALS)
    assert not set(OPS) & set(STRUCTURAL)


def _raw(op: str, *args: Expr) -> Expr:
    """An operator as it was written, nothing folded."""
    return Expr(op, args, None, OPS[op].dtype(tuple(a.dtype for a in args)))


def _node(ops: str, *args: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.builds(_raw, st.sampled_from(ops.split()), *args)


@cache
def formulas(depth: int) -> tuple[st.SearchStrategy[Expr], ...]:
    """Integers, numbers and conditions, so many operators deep: without a bound most of what is drawn is too deep."""
    integers = st.one_of(st.sampled_from([i, j]), st.integers(-3, 3).map(const))
    numbers = st.one_of(st.sampled_from([x, const(0.0), const(1.0)]), integers)
    conditions = st.sampled_from([j <= i, TRUE, FALSE])
    if not depth:
        return integers, numbers, conditions
    smaller_integers, smaller_numbers, smaller_conditions = formulas(depth - 1)
    integers = st.one_of(
        integers,
        _node("add sub mul min max", smaller_integers, smaller_integers),
        _node("floordiv mod", smaller_integers, st.sampled_from([const(1), const(3), const(-2)])),
        _node("neg abs", smaller_integers),
        _node("where", smaller_conditions, smaller_integers, smaller_integers),
    )
    numbers = st.one_of(
        numbers,
        integers,
        _node("add sub mul min max", smaller_numbers, smaller_numbers),
        _node("where", smaller_conditions, smaller_numbers, smaller_numbers),
    )
    conditions = st.one_of(
        conditions,
        _node("lt le gt ge eq ne", smaller_numbers, smaller_numbers),
        _node("and or", smaller_conditions, smaller_conditions),
        _node("not", smaller_conditions),
        _node("where", smaller_conditions, smaller_conditions, smaller_conditions),
    )
    return integers, numbers, conditions


def _folded(e: Expr) -> Expr:
    return ew(e.op, *map(_folded, e.args)) if e.op in OPS else e


def _keeps_value_and_dtype(e: Expr) -> None:
    names = {
        "i": np.arange(-3, 4)[:, None, None],
        "j": np.arange(-2, 3)[:, None],
        "x": np.array([0.0, -0.0, 1.5, np.nan]),
    }
    folded = _folded(e)
    assert folded.dtype == e.dtype
    old, new = np.broadcast_arrays(evaluate(e, Scope(names, {})), evaluate(folded, Scope(names, {})))
    np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(np.signbit(old.astype(float)), np.signbit(new.astype(float)))


@settings(max_examples=500, deadline=None)
@given(st.one_of(*formulas(4)[1:]))
def test_folding_keeps_value_and_dtype(e: Expr) -> None:
    _keeps_value_and_dtype(e)


INTEGERS = (i, j, *map(const, (-1, 0, 1, 2)))
NUMBERS = (*INTEGERS, x, const(0.0), const(1.0))
CONDITIONS = (j <= i, TRUE, FALSE)


@pytest.mark.parametrize(
    ("ops", "operands"),
    [
        ("add sub mul min max lt le gt ge eq ne", (NUMBERS, NUMBERS)),
        ("floordiv mod", (INTEGERS, (const(1), const(3), const(-2)))),
        ("neg abs", (INTEGERS,)),
        ("and or", (CONDITIONS, CONDITIONS)),
        ("not", (CONDITIONS,)),
        ("where", (CONDITIONS, NUMBERS, NUMBERS)),
        ("where", (CONDITIONS, CONDITIONS, CONDITIONS)),
    ],
)
def test_every_operator_of_leaves_keeps_value_and_dtype(ops: str, operands: tuple[tuple[Expr, ...], ...]) -> None:
    for op, args in product(ops.split(), product(*operands)):
        _keeps_value_and_dtype(_raw(op, *args))


@pytest.mark.parametrize(
    ("folded", "expected"),
    [
        (i + 0, i),
        (0 + i, i),
        (1 * i, i),
        (i - 0, i),
        (i - i, const(0)),
        ((i + j) - j, i),
        (i // 1, i),
        (const(7) // -2, const(-4)),
        (const(7) % -2, const(-1)),
        (const(3) < 4, TRUE),
        ((j <= i) & TRUE, j <= i),
        ((j <= i) & FALSE, FALSE),
        ((j <= i) | TRUE, TRUE),
        (~~(j <= i), j <= i),
        (where(TRUE, i, j), i),
        (where(j <= i, x, x), x),
        (where(FALSE, x, 2), const(2.0)),
        (const(2**31 - 1) + 1, const(2**31, "i64")),
        (const(2**40) * const(2**20), const(2**60, "i64")),
    ],
)
def test_folds(folded: Expr, expected: Expr) -> None:
    assert folded == expected


@pytest.mark.parametrize(
    "e",
    [
        x + 0.0,
        x * 0.0,
        x - x,
        x + 0,
        const(1) // 0,
        const(1) % 0,
        const(2**62) * 4,
        const(0.5) + 0.5,
        const(0.1) < 0.2,
        ew("pow", const(2), 100),
    ],
)
def test_what_is_not_exact_is_not_folded(e: Expr) -> None:
    assert e.op in OPS


def test_negative_zero_is_not_zero() -> None:
    assert const(-0.0) != const(0.0)
    assert where(j <= i, const(0.0), const(-0.0)).op == "where"
    assert np.signbit(evaluate(const(-0.0), Scope({}, {})))


def test_folding_keeps_the_shape_of_a_tile() -> None:
    tile = name("t", "i32", ("BM", "BN"))
    visible = tile <= 3
    for e in (tile - tile, visible & FALSE, visible | TRUE, where(TRUE, const(0), tile), tile * 1, tile + const(0)):
        assert e.shape == ("BM", "BN")


def test_wide_operands_give_wide_results() -> None:
    wide = load("offsets", i, dtype="i64")
    assert (i + wide).dtype == "i64"
    assert (wide - wide).dtype == "i64"
    assert where(TRUE, i, wide).dtype == "i64"


def test_dtypes() -> None:
    assert (i / j).dtype == "f32"
    assert ew("sqrt", i).dtype == "f32"
    assert (i + x).dtype == "f32"
    assert (name("a", "f16") * name("b", "bf16")).dtype == "f32"
    assert eq(i, x).dtype == "bool"
    assert where(j <= i, TRUE, j < 3).dtype == "bool"


def test_casts_of_constants_are_constants() -> None:
    assert cast_to(const(3), "f32") == const(3.0)
    assert cast_to(const(3.7), "i32") == const(3)
    assert cast_to(i, "i32") is i
    assert cast_to(i, "f32").op == "cast"


@pytest.mark.parametrize(
    ("shapes", "common"),
    [
        ([("BM", 1), (1, "BN")], ("BM", "BN")),
        ([(), ("BM",)], ("BM",)),
        ([("BN",), ("BM", "BN")], ("BM", "BN")),
        ([(1, 1), (1,)], (1, 1)),
        ([], ()),
    ],
)
def test_broadcast(shapes: list[tuple[str | int, ...]], common: tuple[str | int, ...]) -> None:
    assert broadcast(*shapes) == common


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not broadcast"):
        broadcast(("BM",), ("BN",))


def test_the_number_of_arguments_is_checked() -> None:
    with pytest.raises(ValueError, match="'add' takes 2 arguments, got 1"):
        ew("add", i)


def test_python_operators_are_the_table() -> None:
    """Each operator of the language builds its own row, from either side."""
    for a, b in product((i, 2), (j, 3)):
        if isinstance(a, Expr) or isinstance(b, Expr):
            assert [e.op for e in (a + b, a - b, a * b, a / b)] == ["add", "sub", "mul", "div"]
    assert [e.op for e in (i // j, i % j, i**j, -i)] == ["floordiv", "mod", "pow", "neg"]
    assert [e.op for e in (i < j, i <= j, i > j, i >= j)] == ["lt", "le", "gt", "ge"]
