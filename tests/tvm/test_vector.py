"""Arithmetic of CPU kernels against NumPy's, in the registers of every instruction set that is here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jitted import RUNNABLE, jitted

from attncc.codegen.tvm import formulas, vector
from attncc.codegen.tvm.isa import Isa
from attncc.ir.expr import Expr, const

Array = np.ndarray[Any, Any]
EACH_ISA = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
WIDTHS = pytest.mark.parametrize("lanes", [0, 1], ids=["vector", "scalar"])
TINY, INF, NAN = np.float32(2.0**-126), np.inf, np.nan


def ulps(got: Array, want: Array) -> float:
    """The largest distance in units of fp32's last place."""
    with np.errstate(over="ignore"):
        unit = np.spacing(np.maximum(np.abs(want), TINY).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(got - want) / unit))


# -- functions -----------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Array, float, dict[float, float]]] = {
    "exp2": (
        np.exp2,
        np.concatenate([np.linspace(-149, 127.99, 4001), np.linspace(-0.6, 0.6, 4001), np.arange(-149.0, 128.0)]),
        1.0,
        {INF: INF, -INF: 0, NAN: NAN, 128: INF, 1e30: INF, -151: 0, -1e30: 0, 0: 1, 10: 1024, -149: 2.0**-149},
    ),
    "exp": (
        np.exp,
        np.concatenate([np.linspace(-103, 88.7, 4001), np.linspace(-0.6, 0.6, 4001)]),
        1.5,
        {INF: INF, -INF: 0, NAN: NAN, 89: INF, 1e30: INF, -104: 0, -1e30: 0, 0: 1},
    ),
    "sigmoid": (
        lambda x: 1 / (1 + np.exp(-x)),
        np.concatenate([np.linspace(-86, 20, 4001), np.linspace(-0.6, 0.6, 4001)]),
        3.0,
        {INF: 1, -INF: 0, NAN: NAN, 100: 1, -200: 0, 0: 0.5},
    ),
    "tanh": (
        np.tanh,
        np.concatenate([np.linspace(-10, 10, 4001), np.linspace(-0.3, 0.3, 4001), np.geomspace(1e-30, 1e-3, 101)]),
        3.0,
        {INF: 1, -INF: -1, NAN: NAN, 1e30: 1, -1e30: -1, 0: 0, 1e-40: 1e-40},
    ),
}


@WIDTHS
@pytest.mark.parametrize("name", FUNCTIONS)
@EACH_ISA
def test_functions(isa: Isa, name: str, lanes: int) -> None:
    want, points, limit, special = FUNCTIONS[name]
    f = jitted(isa, ["float32"], "float32", lambda x: getattr(vector, name)(x, isa), lanes)
    x = points.astype(np.float32)
    assert ulps(f(x), want(x.astype(np.float64))) < limit
    ends = np.array(list(special), np.float32)
    np.testing.assert_array_equal(f(ends), np.array(list(special.values()), np.float32))


@EACH_ISA
def test_falling_powers(isa: Isa) -> None:
    """What the softmax takes: no argument is above 0, and hidden ones are -inf."""
    f = jitted(isa, ["float32"], "float32", lambda x: vector.exp2(x, isa, falls=True))
    x = np.concatenate([-np.geomspace(1e-20, 149, 5000), [0.0]]).astype(np.float32)
    assert ulps(f(x), np.exp2(x.astype(np.float64))) < 1
    np.testing.assert_array_equal(f([-INF, -1e38, -2e38, NAN, 0]), np.array([0, 0, 0, NAN, 1], np.float32))


@EACH_ISA
def test_powers_of_two_of_any_size(isa: Isa) -> None:
    f = jitted(isa, ["float32"] * 2, "float32", lambda x, n: vector.times_power(x, n, isa))
    n = np.arange(-300, 301).astype(np.float32)
    for x in (1.0, 1.5, -0.75):
        with np.errstate(over="ignore", under="ignore"):
            np.testing.assert_array_equal(f(np.full_like(n, x), n), np.ldexp(np.float32(x), n.astype(np.int32)))


@EACH_ISA
def test_bounds_keep_nan(isa: Isa) -> None:
    x = np.array([NAN, -INF, INF, -3, 3, 0], np.float32)
    most = jitted(isa, ["float32"] * 2, "float32", vector.largest)
    least = jitted(isa, ["float32"] * 2, "float32", vector.least)
    np.testing.assert_array_equal(most(np.zeros(6), x), np.array([NAN, 0, INF, 0, 3, 0], np.float32))
    np.testing.assert_array_equal(least(np.zeros(6), x), np.array([NAN, -INF, 0, -3, 0, 0], np.float32))


# -- whole numbers -------------------------------------------------------------------------------

INTEGERS = {"int32": 31, "int64": 63}


def floored(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient and remainder as Python has them, 0 for a divisor of 0; the least number by -1 wraps around."""
    bits = 8 * a.itemsize
    pairs = [divmod(int(x), int(y)) if y else (0, 0) for x, y in zip(a, b, strict=True)]
    wrapped = [((q + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1), r) for q, r in pairs]
    return tuple(np.array(column, a.dtype) for column in zip(*wrapped, strict=True))  # type: ignore[return-value]


@cache
def divisions(isa: Isa, kind: str, lanes: int) -> tuple[Callable[..., Array], Callable[..., Array]]:
    return tuple(jitted(isa, [kind] * 2, kind, f, lanes) for f in (vector.quotient, vector.remainder))  # type: ignore[return-value]


def numbers(bits: int) -> st.SearchStrategy[int]:
    ends = [0, 1, -1, 2**bits - 1, -(2**bits), 1 - 2**bits]
    return st.sampled_from(ends) | st.integers(-9, 9) | st.integers(-(2**bits), 2**bits - 1)


@WIDTHS
@pytest.mark.parametrize("kind", INTEGERS)
@EACH_ISA
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_division(isa: Isa, kind: str, lanes: int, data: st.DataObject) -> None:
    pair = st.tuples(*[numbers(INTEGERS[kind])] * 2)
    pairs = data.draw(st.lists(pair, min_size=1, max_size=24))
    a, b = (np.array(column, kind) for column in zip(*pairs, strict=True))
    quotient, remainder = divisions(isa, kind, lanes)
    q, r = floored(a, b)
    np.testing.assert_array_equal(quotient(a, b), q)
    np.testing.assert_array_equal(remainder(a, b), r)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 64, 1000, 2**30, -1, -2, -7, 0])
@EACH_ISA
def test_division_by_a_constant(isa: Isa, divisor: int) -> None:
    a = np.concatenate([np.arange(-200, 200), [2**31 - 1, 1 - 2**31]]).astype(np.int32)
    q, r = floored(a, np.full_like(a, divisor))
    for f, want in ((vector.quotient, q), (vector.remainder, r)):
        np.testing.assert_array_equal(
            jitted(isa, ["int32"], "int32", lambda x, f=f: f(x, vector.whole(divisor)))(a), want
        )


@EACH_ISA
def test_a_scalar_among_vectors(isa: Isa) -> None:
    """NumPy's rules: what has one lane stands beside every lane of the other."""
    a = np.arange(-40, 40).astype(np.int32)
    f = jitted(isa, ["int32"], "int32", lambda x: vector.quotient(vector.whole(1000), x))
    np.testing.assert_array_equal(f(a), floored(np.full_like(a, 1000), a)[0])


@pytest.mark.parametrize("kind", INTEGERS)
@EACH_ISA
def test_signs(isa: Isa, kind: str) -> None:
    bits = INTEGERS[kind]
    f = jitted(isa, [kind], kind, vector.signs)
    np.testing.assert_array_equal(f([-1, 0, 1, -(2**bits), 2**bits - 1]), np.array([-1, 0, 0, -1, 0], kind))


# -- min, max, and what is outside ----------------------------------------------------------------


def extreme(isa: Isa, op: str, kind: str, dtype: Any) -> Callable[..., Array]:
    e = Expr(op, (const(0), const(0)), None, dtype)
    return jitted(isa, [kind] * 2, kind, lambda a, b: formulas.OPERATORS[op](isa, e, [a, b]))


@EACH_ISA
def test_extremes_of_floats(isa: Isa) -> None:
    """NaN where either is NaN, as torch has it."""
    values = np.array([NAN, -INF, INF, -2, -0.0, 0.0, 1e-40, 3], np.float32)
    a, b = (x.ravel() for x in np.meshgrid(values, values))
    for op, want in (("min", np.minimum), ("max", np.maximum)):
        np.testing.assert_array_equal(extreme(isa, op, "float32", "f32")(a, b), want(a, b))


COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


@pytest.mark.parametrize("op", COMPARISONS)
@EACH_ISA
def test_comparisons(isa: Isa, op: str) -> None:
    """NaN is unequal to itself, and neither less nor greater."""
    e = Expr(op, (const(0.0), const(0.0)), None, "bool")
    f = jitted(isa, ["float32"] * 2, "int32", lambda a, b: vector.cast(formulas.OPERATORS[op](isa, e, [a, b]), "int32"))
    values = np.array([NAN, -INF, INF, -2, -0.0, 0.0, 1e-40, 3], np.float32)
    a, b = (x.ravel() for x in np.meshgrid(values, values))
    np.testing.assert_array_equal(f(a, b), COMPARISONS[op](a, b).astype(np.int32))


@pytest.mark.parametrize(("kind", "dtype"), [("int32", "i32"), ("int64", "i64")])
@EACH_ISA
def test_extremes_of_integers(isa: Isa, kind: str, dtype: str) -> None:
    bits = INTEGERS[kind]
    values = np.array([-(2**bits), -7, -1, 0, 1, 7, 2**bits - 1], kind)
    a, b = (x.ravel() for x in np.meshgrid(values, values))
    for op, want in (("min", np.minimum), ("max", np.maximum)):
        np.testing.assert_array_equal(extreme(isa, op, kind, dtype)(a, b), want(a, b))


@pytest.mark.parametrize("kind", ["float32", "int32", "int64"])
@EACH_ISA
def test_kept(isa: Isa, kind: str) -> None:
    """0 where outside, whatever is there."""
    f = jitted(isa, [kind, "int64"], kind, formulas.kept)
    x = np.array([5, -3, NAN, INF, 1, 2] if kind == "float32" else [5, -3, 7, 2**31 - 1, 1, 2]).astype(kind)
    outside = np.array([0, 0, -1, -1, -1, 0])
    np.testing.assert_array_equal(f(x, outside), np.where(outside, np.zeros_like(x), x))


# -- storage -------------------------------------------------------------------------------------


def every_half(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@WIDTHS
@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("bf16", "uint16", torch.bfloat16), ("fp16", "float16", torch.float16)]
)
@EACH_ISA
def test_every_half_is_read(isa: Isa, name: str, kind: str, dtype: torch.dtype, lanes: int) -> None:
    f = jitted(isa, [kind], "float32", lambda x: formulas.widen(x, name), lanes)
    x = every_half(dtype)
    np.testing.assert_array_equal(f(x.view(torch.int16).numpy().view(kind)), x.float().numpy())


@WIDTHS
@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("bf16", "uint16", torch.bfloat16), ("fp16", "float16", torch.float16)]
)
@EACH_ISA
def test_floats_are_rounded_to_nearest_even(isa: Isa, name: str, kind: str, dtype: torch.dtype, lanes: int) -> None:
    f = jitted(isa, ["float32"], kind, lambda x: formulas.narrow(x, name), lanes)
    exact = every_half(dtype).float()
    finite = exact[exact.isfinite()].double().sort().values
    between = ((finite[1:] + finite[:-1]) / 2).float()  # ties, and their neighbours in fp32
    near = [torch.nextafter(between, torch.tensor(end)) for end in (INF, -INF)]
    special = torch.tensor([NAN, -NAN, INF, -INF, 3.4e38, -3.4e38, 65519.9, 65520.0, 1e-45, -1e-45, 0.0, -0.0])
    payloads = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FFF8000], dtype=torch.int32).view(torch.float32)
    x = torch.cat([exact, between, *near, special, payloads])
    got = torch.from_numpy(f(x.numpy()).view(np.int16)).view(dtype)
    want = x.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@EACH_ISA
def test_bytes_are_read(isa: Isa, kind: str) -> None:
    x = np.arange(256).astype(np.uint8).view(kind)
    f = jitted(isa, [kind], "int32", lambda x: formulas.widen(x, kind))
    np.testing.assert_array_equal(f(x), x.astype(np.int32))
