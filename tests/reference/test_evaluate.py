"""Expressions over torch tensors: every row of OPS, and the reads of inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attncc.ir.derivatives import PARTIALS
from attncc.ir.expr import OPS, Expr, bucket, cast_to, const, ew, load, name, where
from attncc.ir.interp import convert
from attncc.ir.meaning import Frame
from attncc.ir.meaning import evaluate as numpy_value
from attncc.reference.evaluate import TORCH, Scope, evaluate

FLOATS = [-2.5, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 3.0, 100.0, math.inf, -math.inf, math.nan]
INTEGER_OPS = [
    "add",
    "sub",
    "mul",
    "floordiv",
    "mod",
    "min",
    "max",
    "neg",
    "abs",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "div",
]
INTS = [-7, -3, -1, 0, 1, 2, 5, 2**20]


def value(e: Expr, inputs: dict[str, Tensor] | None = None, /, **names: Any) -> Tensor:
    tensors = {n: torch.as_tensor(x) for n, x in names.items()}
    return evaluate(e, Scope(tensors, inputs or {}, torch.float64, torch.device("cpu")))


def test_every_operator_has_a_torch_function() -> None:
    assert set(TORCH) == set(OPS)
    assert set(TORCH) == set(PARTIALS)


def grid(values: list[Any], arity: int) -> list[Any]:
    axes = np.meshgrid(*[np.array(values)] * arity, indexing="ij")
    return [axis.ravel() for axis in axes]


@pytest.mark.parametrize("op", sorted(set(OPS) - {"and", "or", "not", "where"}))
def test_floats_as_the_table_has_them(op: str) -> None:
    data = grid(FLOATS, OPS[op].arity)
    args = [name(f"x{n}", "f32") for n in range(len(data))]
    got = value(ew(op, *args), **{f"x{n}": torch.tensor(x) for n, x in enumerate(data)}).numpy()
    with np.errstate(all="ignore"):
        expected = OPS[op].numpy(*data)
    if op in ("floordiv", "mod"):  # by 0 and by infinities the libraries differ
        fits = np.isfinite(data[0]) & np.isfinite(data[1]) & (data[1] != 0)
        got, expected = got[fits], expected[fits]
    np.testing.assert_allclose(got, expected, rtol=1e-14, equal_nan=True)


@pytest.mark.parametrize("op", INTEGER_OPS)
def test_integers_as_the_table_has_them(op: str) -> None:
    data = grid(INTS, OPS[op].arity)
    args = [name(f"x{n}") for n in range(len(data))]
    got = value(ew(op, *args), **{f"x{n}": torch.tensor(x) for n, x in enumerate(data)}).numpy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, OPS[op].numpy(*data))


@pytest.mark.parametrize("op", ["and", "or", "not", "where", "eq", "ne"])
def test_booleans_as_the_table_has_them(op: str) -> None:
    data = grid([False, True], OPS[op].arity)
    args = [name(f"x{n}", "bool") for n in range(len(data))]
    got = value(ew(op, *args), **{f"x{n}": torch.tensor(x) for n, x in enumerate(data)})
    assert got.dtype == torch.bool
    np.testing.assert_array_equal(got.numpy(), OPS[op].numpy(*data))


@given(st.integers(-100, 100), st.integers(-9, 9).filter(bool))
def test_division_floors(a: int, b: int) -> None:
    x, y = name("x"), name("y")
    assert int(value(x // y, x=a, y=b)) == a // b
    assert int(value(x % y, x=a, y=b)) == a % b
    assert float(value((x * 1.0) // (y * 1.0), x=a, y=b)) == a // b


def test_mixed_arguments_join() -> None:
    x = name("x")
    assert value(x / 2, x=7).dtype == torch.float64
    assert float(value(x / 2, x=7)) == 3.5
    assert float(value(where(x > 3, x, 0.5), x=7)) == 7.0
    assert float(value(ew("sqrt", x), x=2)) == pytest.approx(math.sqrt(2), rel=1e-15)  # of 53 bits, not of 24
    assert bool(value(x < 7.5, x=7))
    assert int(value(cast_to(name("f", "f32"), "i32"), f=-2.7)) == -2
    assert int(value(const(2**40) + x, x=7)) == 2**40 + 7


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9), st.lists(st.integers(-7, 7), min_size=1, max_size=9))
def test_bucket_counts_entries(row: list[int], values: list[int]) -> None:
    row.sort()
    got = value(bucket("x", name("e")), {"x": torch.tensor(row)}, e=values)
    assert got.tolist() == [sum(r <= e for r in row) for e in values]


def test_bucket_of_many_rows() -> None:
    table = torch.tensor([[1, 3, 3], [0, 0, 9], [4, 5, 6]])
    got = value(bucket("x", name("b"), name("e")), {"x": table}, b=torch.arange(3)[:, None], e=torch.arange(10))
    assert torch.equal(got, (table[:, None] <= torch.arange(10)[:, None]).sum(-1))


def test_bucket_of_nothing() -> None:
    assert value(bucket("x", name("e")), {"x": torch.zeros(0, dtype=torch.int64)}, e=[1, 2]).tolist() == [0, 0]


X = torch.arange(12.0, dtype=torch.float64).view(3, 4) + 1


@pytest.mark.parametrize(("i", "j", "expected"), [(0, 0, 1), (2, 3, 12), (3, 0, 0), (-1, 0, 0), (0, 4, 0), (0, -1, 0)])
def test_reads_stay_inside(i: int, j: int, expected: float) -> None:
    assert float(value(load("x", name("i"), name("j")), {"x": X}, i=i, j=j)) == expected


def test_an_axis_of_one_broadcasts() -> None:
    got = value(load("x", name("i"), name("j")), {"x": X[:1]}, i=torch.arange(-2, 3), j=1)
    assert got.expand(5).tolist() == [2.0] * 5


def test_reads_of_every_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert value(load("x", 0), {"x": torch.ones(1, dtype=dtype)}).dtype == torch.float64
    for small in (torch.int8, torch.uint8, torch.int32):
        assert value(load("x", 0, dtype="i32"), {"x": torch.ones(1, dtype=small)}).dtype == torch.int64
    assert value(load("x", 0, dtype="bool"), {"x": torch.ones(1, dtype=torch.bool)}).dtype == torch.bool


@pytest.mark.parametrize("x", [0.1, 0.2, 0.3, 0.7, 1 / 3])
def test_fp32_decides(x: float) -> None:
    """An fp32 input equals the constant it was made from, though not in float64."""
    stored = {"x": torch.tensor([x], dtype=torch.float32)}
    assert float(stored["x"]) != x
    read = load("x", 0)
    for e in (ew("eq", read, x), read <= x, read >= x, ~(read < x), ~(read > x), ~ew("ne", read, x)):
        assert bool(value(e, stored))
    assert float(value(where(read <= x, read * 2.0, 0.0), stored)) == 2 * float(stored["x"])


def test_fp32_rounds_down() -> None:
    """29 * 0.1 and its like: where float64 and fp32 fall on two sides of an integer, fp32 counts."""
    i = torch.arange(1000)
    by_fp32 = torch.floor(i.float() * torch.tensor(0.7, dtype=torch.float32))
    assert not torch.equal(by_fp32.double(), torch.floor(i.double() * 0.7))
    got = value(ew("floor", name("i") * 0.7), i=i)
    assert got.dtype == torch.float64
    assert torch.equal(got, by_fp32.double())
    assert torch.equal(value(cast_to(name("i") * 0.7, "i32"), i=i), by_fp32.long())
    assert torch.equal(value((name("i") * 0.7) // 1.0, i=i), by_fp32.double())


def test_an_unknown_operator_is_no_number() -> None:
    with pytest.raises(NotImplementedError, match="'rows_min'"):
        value(Expr("rows_min", (name("i"),), None, "i32"), i=3)


@given(st.floats(-10, 10), st.integers(-50, 50), st.integers(1, 50))
def test_oracle_and_interpreter_agree(x: float, i: int, j: int) -> None:
    """Two evaluations of the same nodes, by torch in float64 and by NumPy in float32."""
    f, n, m = name("x", "f32"), name("i"), name("j")
    e = where(n % m < 3, ew("tanh", f) * (n - m), ew("sqrt", ew("abs", f)) + n // m)
    frame = Frame({"x": convert(x, "f32"), "i": convert(i, "i32"), "j": convert(j, "i32")}, {}, 0)
    got = float(value(e, x=torch.tensor(float(np.float32(x)), dtype=torch.float64), i=i, j=j))
    assert got == pytest.approx(float(numpy_value(e, frame)), rel=1e-5, abs=1e-5)
