"""The interpreter of tile IR, against plain NumPy and torch; and what it refuses to define."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tile_samples import KNOBS, attention, builder, copy, matmul, scalars, single, two_kernels

from attncc.errors import CompilerBug
from attncc.ir import interp
from attncc.ir.build import (
    Builder,
    column,
    full,
    half,
    iota,
    joined,
    program,
    quotient,
    read,
    reduce,
    remainder,
    reshape,
    row,
    tile,
    unpack,
)
from attncc.ir.expr import OPS, Dtype, Expr, Value, cast_to, const, eq, ew, name, where
from attncc.ir.fields import FIELDS, NUMBERS
from attncc.ir.meaning import convert
from attncc.ir.tile import Kernel, Launch, Let, Param, Program, Scratch

RNG = np.random.default_rng(7)
CONFIGS = [{"BM": 16, "BN": 16}, {"BM": 8, "BN": 16}, {"BM": 16, "BN": 4}, {"BM": 4, "BN": 4}]


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


# -- whole programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 50])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_copy(n: int, config: dict[str, int]) -> None:
    x, y = normal(n), np.full(n + 5, 9.0, np.float32)
    interp.run(copy(), {"x": x, "y": y}, {"N": n}, config)
    np.testing.assert_array_equal(y, np.concatenate([x, np.full(5, 9.0, np.float32)]))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (16, 16), (17, 31), (33, 5), (3, 40)])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_matmul_with_ragged_edges(m: int, n: int, config: dict[str, int]) -> None:
    a, b, c = normal(2, 3, m, 24), normal(2, 3, n, 24), np.full((2, 3, m, n), np.nan, np.float32)
    interp.run(matmul(), {"X": a, "Y": b, "Z": c}, {"M": m, "N": n, "H": 3, "B": 2}, config)
    np.testing.assert_allclose(c, a @ b.swapaxes(2, 3), rtol=1e-5, atol=1e-5)


def test_operands_may_be_any_view() -> None:
    a, b = normal(2, 9, 3, 24).swapaxes(1, 2), normal(2, 3, 24, 10).swapaxes(2, 3)[:, :, ::2]
    c = np.zeros((2, 3, 9, 5), np.float32)
    interp.run(matmul(), {"X": a, "Y": b, "Z": c}, {"M": 9, "N": 5, "H": 3, "B": 2}, CONFIGS[0])
    np.testing.assert_allclose(c, a @ b.swapaxes(2, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s", [1, 7, 16, 37])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_online_softmax(s: int, config: dict[str, int]) -> None:
    q, k, v = (normal(1, 2, s, 16) for _ in range(3))
    o, lse = np.full_like(q, np.nan), np.full((2, s), np.nan, np.float32)
    interp.run(attention(), {"Q": q, "K": k, "V": v, "O": o, "lse": lse}, {"S": s, "H": 2, "scale": 0.25}, config)
    x = torch.tensor(q @ k.swapaxes(2, 3) * 0.25).double().masked_fill(~torch.ones(s, s).tril().bool(), -math.inf)
    np.testing.assert_allclose(o, torch.softmax(x, -1) @ torch.tensor(v).double(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, torch.logsumexp(x, -1)[0], rtol=1e-5, atol=1e-5)


def test_outputs_are_rounded_to_their_dtype() -> None:
    q, k, v = (convert(normal(1, 1, 20, 16), "bf16") for _ in range(3))
    o, lse = np.zeros_like(q), np.zeros((1, 20), np.float32)
    interp.run(
        attention("bf16"), {"Q": q, "K": k, "V": v, "O": o, "lse": lse}, {"S": 20, "H": 1, "scale": 0.25}, CONFIGS[0]
    )
    np.testing.assert_array_equal(o, torch.tensor(o).bfloat16().float().numpy())
    exact = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), is_causal=True)
    assert 1e-5 < np.abs(o - exact.numpy()).max() < 2e-2


@pytest.mark.parametrize("n", [1, 16, 100])
def test_scratch_goes_from_kernel_to_kernel(n: int) -> None:
    x, out = normal(n), np.zeros(1, np.float32)
    interp.run(two_kernels(), {"x": x, "out": out}, {"N": n}, CONFIGS[1])
    np.testing.assert_allclose(out[0], x.sum(), rtol=1e-5)


def test_scratch_starts_out_poisoned() -> None:
    whole = two_kernels()
    x, out = normal(5), np.zeros(1, np.float32)
    interp.run(replace(whole, launches=whole.launches[1:]), {"x": x, "out": out}, {"N": 5}, CONFIGS[0])
    assert np.isnan(out[0])


def test_integer_scratch_is_poisoned_too() -> None:
    scratch, out = Param("table", "buffer", "i32", rank=1), Param("y", "buffer", "f32", rank=1)
    b = builder(scratch, out)
    b.store(out, (0,), read(out, read(scratch, 0)))
    with pytest.raises(CompilerBug, match="'y' has 1 entries along axis 0"):
        interp.run(
            single("peek", b, const(1), scratch=(Scratch("table", (const(3),), "i32"),)),
            {"y": np.zeros(1, np.float32)},
            {},
            CONFIGS[0],
        )


def test_constants_of_a_launch() -> None:
    y = Param("y", "buffer", "i32", rank=1)
    b = Builder({"y": y, "PASS": Param("PASS", "constexpr", "i32")})
    with b.when(eq(name("PASS"), 1)):
        b.store(y, (program(),), name("PASS") * 10 + program())
    kernel = Kernel("k", tuple(b.params.values()), b.body, (), const(3))
    out = np.zeros(3, np.int32)
    launches = (Launch("k", (("PASS", 1),)), Launch("k", (("PASS", 0),)))
    interp.run(Program("p", (kernel,), launches, KNOBS), {"y": out}, {}, CONFIGS[0])
    np.testing.assert_array_equal(out, [10, 11, 12])


# -- single expressions --------------------------------------------------------------------------


def value(e: Expr, buffers: dict[str, tuple[Param, Any]] | None = None, **numbers: float) -> Any:
    """The value of an expression, through a program that stores it."""
    known = buffers or {}
    out = Param("out", "buffer", e.dtype, rank=max(1, len(e.shape)))
    params = [*(p for p, _ in known.values()), out]
    params += [Param(n, "scalar", "i32" if isinstance(x, int) else "f32") for n, x in numbers.items()]
    b = builder(*params)
    sizes = {"BM": 4, "BN": 8}
    shape = [sizes.get(str(d), d) for d in e.shape] or [1]
    index: list[Value] = [0]
    if e.shape:
        rank = len(e.shape)
        index = [_along(iota(d), axis, rank) if d != 1 else const(0) for axis, d in enumerate(e.shape)]
    b.store(out, index, e)
    result = np.zeros([int(d) for d in shape], interp.NUMPY[e.dtype])
    interp.run(single("value", b, const(1)), {"out": result, **{k: a for k, (_, a) in known.items()}}, numbers, sizes)
    return result if e.shape else result[0]


def _along(x: Expr, axis: int, rank: int) -> Expr:
    shape = tuple(x.shape[0] if k == axis else 1 for k in range(rank))
    return reshape(x, shape)


N, F = name("n"), name("x", "f32")


@pytest.mark.parametrize("n", [-9, -8, -1, 0, 1, 7, 8])
@pytest.mark.parametrize("d", [-4, -3, 3, 4])
def test_integer_division_floors(n: int, d: int) -> None:
    assert value(N // name("d"), n=n, d=d) == n // d
    assert value(N % name("d"), n=n, d=d) == n % d
    if n >= 0 < d:
        assert value(quotient(N, name("d")), n=n, d=d) == n // d
        assert value(remainder(N, name("d")), n=n, d=d) == n % d


def test_integers_have_32_bits() -> None:
    assert value(N * N, n=2**16 + 1) == 2**17 + 1
    assert value(cast_to(N, "i64") * cast_to(N, "i64"), n=2**16 + 1) == (2**16 + 1) ** 2


@given(st.floats(width=32))
def test_bf16_rounds_as_torch_does(x: float) -> None:
    expected = torch.tensor(x, dtype=torch.float32).bfloat16().float().numpy()
    np.testing.assert_array_equal(convert(np.float32(x), "bf16"), expected)


@given(st.floats(width=32))
def test_f16_rounds_as_torch_does(x: float) -> None:
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(convert(np.float32(x), "f16"), torch.tensor(x).half().float().numpy())


@pytest.mark.parametrize(("dtype", "theirs"), [("f8e4m3", torch.float8_e4m3fn), ("f8e5m2", torch.float8_e5m2)])
def test_f8_rounds_as_torch_does(dtype: Dtype, theirs: torch.dtype) -> None:
    """Every number of the format, halfway to the next one, and close to that."""
    codes = torch.arange(256).to(torch.uint8).view(theirs).float()
    numbers = codes[codes.isfinite()].unique()
    halves = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, halves, halves * (1 + 1e-6), halves * (1 - 1e-6), torch.tensor([torch.nan])])
    np.testing.assert_array_equal(convert(x.numpy(), dtype), x.to(theirs).float().numpy())
    assert np.isnan(convert(np.float32(1e6), dtype)).all()


@pytest.mark.parametrize("what", FIELDS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_fields_of_words(what: str, dtype: Dtype) -> None:
    """Every code in every place, with others beside it."""
    bits = FIELDS[what]
    codes = torch.arange(1 << bits)
    theirs = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    wanted = {
        "i8": codes - 256 * (codes > 127),
        "u8": codes - 128,
        "u4": codes - 8,
        "f8e4m3": theirs,
    }[what].float()
    for bit in range(0, 16, bits):
        around = 0xA5C3 & ~((1 << bits) - 1 << bit)
        words = (codes << bit | around).to(torch.int32).numpy().astype(np.uint16).view(np.int16).reshape(-1, 16)
        x = Param("x", "buffer", "i16", rank=2)
        place = (column(iota(len(words))), row(iota(16)))
        got = value(unpack(read(x, *place), what, bit, dtype), {"x": (x, words)}).reshape(-1)
        known = wanted.isfinite().numpy()
        np.testing.assert_array_equal(got[known], wanted.numpy()[known])


def test_every_operation_in_bf16_rounds() -> None:
    a = cast_to(F, "bf16")
    assert value(cast_to(a * a + a, "f32"), x=1.0078125) == float(
        (torch.tensor(1.0078125).bfloat16() ** 2 + torch.tensor(1.0078125).bfloat16()).float()
    )


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_operator_runs_on_tiles(op: str) -> None:
    """Against the table's own meaning in float64, on numbers for which all of them are defined."""
    data = np.array([0.25, 0.5, 0.75, 1.25], np.float32)
    x = read(Param("x", "buffer", "f32", rank=1), iota("BM"))
    truth: Any = data > 0.4
    if op in ("and", "or", "not"):
        args: tuple[Any, ...] = (x > 0.4, x < 1.0)[: OPS[op].arity]
        given_: tuple[Any, ...] = (truth, data < 1.0)[: OPS[op].arity]
    elif op == "where":
        args, given_ = (x > 0.4, x, 2.0), (truth, data, 2.0)
    else:
        args, given_ = (x, 0.5)[: OPS[op].arity], (data.astype(np.float64), 0.5)[: OPS[op].arity]
    got = value(ew(op, *args), {"x": (Param("x", "buffer", "f32", rank=1), data)})
    np.testing.assert_allclose(got, OPS[op].numpy(*given_), rtol=1e-6)


def test_shapes() -> None:
    grid = column(iota("BM")) * 10 + row(iota("BN"))
    expected = np.arange(4)[:, None] * 10 + np.arange(8)
    np.testing.assert_array_equal(value(grid), expected)
    np.testing.assert_array_equal(value(Expr("trans", (grid,), None, "i32", ("BN", "BM"))), expected.T)
    for kind, f in (("max", np.max), ("min", np.min), ("sum", np.sum)):
        for axis in (0, 1):
            np.testing.assert_array_equal(value(reduce(kind, grid, axis)), f(expected, axis=axis))
    eight = column(iota("BM")) * 10 + row(iota(8))
    np.testing.assert_array_equal(value(half(eight, 0)), expected[:, :4])
    np.testing.assert_array_equal(value(half(eight, 1)), expected[:, 4:])
    np.testing.assert_array_equal(value(joined(half(eight, 0), half(eight, 1))), expected)
    even, odd = half(eight, 0, in_turn=True), half(eight, 1, in_turn=True)
    np.testing.assert_array_equal(value(even), expected[:, ::2])
    np.testing.assert_array_equal(value(odd), expected[:, 1::2])
    np.testing.assert_array_equal(value(joined(even, odd, in_turn=True)), expected)
    parts = reduce("sum", reshape(grid, ("BM", "BN/4", 4)), 1)
    np.testing.assert_array_equal(value(parts), expected.reshape(4, 2, 4).sum(1))
    np.testing.assert_array_equal(value(Expr("cumsum", (iota("BN"),), None, "i32", ("BN",))), np.arange(8).cumsum())
    np.testing.assert_array_equal(value(full(("BM",), 2.5)), np.full(4, 2.5))


def test_masked_lanes_read_zero_and_touch_nothing() -> None:
    x = Param("x", "buffer", "f32", rank=1)
    got = value(read(x, iota("BN") * 100 - 100, mask=eq(iota("BN"), 1)), {"x": (x, np.array([3.0], np.float32))})
    np.testing.assert_array_equal(got, [0, 3, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(("lead", "expected"), [(0, [0, 1, 1, 3, 3, 4, 4, 4]), (1, [3, 3, 3, 3, 3, 3, 3, 4])])
def test_bucket_counts_entries(lead: int, expected: list[int]) -> None:
    x = Param("x", "buffer", "i32", rank=2)
    table = np.array([[1, 3, 3, 5, 99], [0, 0, 0, 7, 99]], np.int32)
    e = Expr("bucket", (const(lead), iota("BN"), const(4)), "x", "i32", ("BN",))
    np.testing.assert_array_equal(value(e, {"x": (x, table)}), expected)


@pytest.mark.parametrize(("row0", "column0"), [(0, 0), (3, 4), (-2, 0), (0, -1), (6, 8), (-9, 0), (9, 9)])
def test_tiles_read_zero_beyond_their_extent(row0: int, column0: int) -> None:
    x = Param("x", "operand", "f32", tiles=(("BM", 8),), extent=(name("rows"), 6))
    data = normal(2, 1, 7, 6)
    padded = np.zeros((40, 40), np.float32)
    padded[20:25, 20:26] = data[1, 0, :5]
    expected = padded[20 + row0 : 24 + row0, 20 + column0 : 28 + column0]
    got = value(
        Expr("tile", (const(1), const(0), N, name("c")), "x", "f32", ("BM", 8)),
        {"x": (x, data)},
        n=row0,
        c=column0,
        rows=5,
    )
    np.testing.assert_array_equal(got, expected)


def test_float_literals_in_formulas() -> None:
    assert value(where(F > 0.0, -math.inf, F), x=1.0) == -math.inf
    assert math.isnan(value(F * math.nan, x=1.0))


# -- what has no meaning -------------------------------------------------------------------------

X = Param("x", "buffer", "f32", rank=1)
T = Param("t", "operand", "f32", tiles=(("BM", 8),), extent=(name("rows"), 8))


def _faults() -> dict[str, tuple[Any, str]]:
    return {
        "read past the end": (lambda b: b.let("y", read(X, 5)), "'x' has 3 entries along axis 0, entry 5"),
        "read before the start": (lambda b: b.let("y", read(X, -1)), "entry -1"),
        "unmasked ragged read": (lambda b: b.let("y", read(X, iota("BM"))), "entry 3"),
        "store past the end": (lambda b: b.store(X, (7,), const(0.0)), "entry 7"),
        "unbound name": (lambda b: b.let("y", name("nowhere") + 1), "'nowhere' has no value"),
        "wrong dtype": (lambda b: _let(b, name("y", "f32"), const(1)), "'y' is f32"),
        "wrong shape": (lambda b: _let(b, name("y", "f32", ("BM",)), const(1.0)), "'y' is f32"),
        "two indices for one axis": (lambda b: b.let("y", read(X, 0, 0, mask=None)), "an access has|has 1 axes"),
        "endless loop": (lambda b: _loop(b, 0), "steps by 0"),
        "backward loop": (lambda b: _loop(b, -1), "steps by -1"),
        "no such head": (lambda b: b.let("y", tile(T, 0, 9, 0, 0, ("BM", 8))), "h = 9"),
        "extent beyond memory": (lambda b: b.let("y", tile(T, 0, 0, 0, 0, ("BM", 8))), "its extent is"),
        "unknown operator": (lambda b: b.let("y", Expr("warp", (const(1),))), "no meaning for 'warp'"),
        "scalar level only": (lambda b: b.let("y", Expr("rows_min", (const(1),))), "no meaning for 'rows_min'"),
    }


def _let(b: Builder, var: Expr, value_: Expr) -> None:
    b.stack[-1].append(Let(var, value_))


def _loop(b: Builder, step: int) -> None:
    with b.loop("n", 0, 3, step) as n:
        b.let("y", n)


@pytest.mark.parametrize("fault", _faults())
def test_faults_are_compiler_bugs(fault: str) -> None:
    write, message = _faults()[fault]
    b = builder(X, T, *scalars("rows"))
    write(b)
    tensors = {"x": np.zeros(3, np.float32), "t": np.zeros((1, 1, 4, 8), np.float32)}
    with pytest.raises(CompilerBug, match=message):
        interp.run(single("fault", b, const(1)), tensors, {"rows": 5}, CONFIGS[0])


@pytest.mark.parametrize("missing", ["x", "y", "N", "BM"])
def test_missing_arguments_are_named(missing: str) -> None:
    tensors = {"x": normal(4), "y": normal(4)}
    numbers, config = {"N": 4}, {"BM": 4, "BN": 4}
    for given_ in (tensors, numbers, config):
        given_.pop(missing, None)
    with pytest.raises(CompilerBug, match=f"'{missing}'"):
        interp.run(copy(), tensors, numbers, config)
