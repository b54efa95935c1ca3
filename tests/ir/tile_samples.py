"""Small programs of tile IR written by hand with the builder: what the interpreter and the verifier are tried on."""

from __future__ import annotations

import math

from attncc.ir.build import (
    Builder,
    column,
    dot,
    full,
    iota,
    program,
    quotient,
    read,
    reduce,
    remainder,
    row,
    tile,
    trans,
)
from attncc.ir.build import function as device_function
from attncc.ir.expr import Expr, cast_to, const, ew, maximum, minimum, name, where
from attncc.ir.tile import Function, Kernel, Knob, Launch, Param, Program, Scratch

BM, BN = name("BM"), name("BN")
KNOBS = (Knob("BM", (16, 8, 4)), Knob("BN", (16, 8, 4)))
CONSTEXPRS = (Param("BM", "constexpr", "i32"), Param("BN", "constexpr", "i32"))


def single(
    text: str,
    b: Builder,
    grid: Expr,
    functions: tuple[Function, ...] = (),
    scratch: tuple[Scratch, ...] = (),
) -> Program:
    kernel = Kernel(text, tuple(b.params.values()), b.body, functions, grid)
    return Program(text, (kernel,), (Launch(text),), KNOBS, scratch)


def builder(*params: Param) -> Builder:
    return Builder({p.name: p for p in (*params, *CONSTEXPRS)})


def scalars(*names: str) -> tuple[Param, ...]:
    return tuple(Param(n, "scalar", "i32") for n in names)


def blocks(size: str) -> Expr:
    return quotient(name(size) + (BM - 1), BM)


def copy() -> Program:
    """y[n] = x[n], by masked loads and stores."""
    b = builder(Param("x", "buffer", "f32", rank=1), Param("y", "buffer", "f32", rank=1), *scalars("N"))
    at = b.let("at", program() * BM + iota("BM"))
    inside = b.let("inside", at < name("N"))
    b.store(b.params["y"], (at,), read(b.params["x"], at, mask=inside), inside)
    return single("copy", b, blocks("N"))


def matmul(dtype: str = "f32") -> Program:
    """Z[b, h] = X[b, h] @ Y[b, h]^T, by tiles with ragged edges on all sides; K has 24 columns in tiles of 16."""
    a = Param("X", "operand", dtype, tiles=(("BM", 16),), extent=(name("M"), 24))
    other = Param("Y", "operand", dtype, tiles=(("BN", 16),), extent=(name("N"), 24))
    out = Param("Z", "buffer", "f32", rank=4)
    b = builder(a, other, out, *scalars("M", "N", "H", "B"))
    tiles = b.let("tiles", blocks("M"))
    head, row0 = b.let("head", quotient(program(), tiles)), b.let("row0", remainder(program(), tiles) * BM)
    where_ = b.let("batch", quotient(head, name("H"))), b.let("h", remainder(head, name("H")))
    rows = b.let("rows", row0 + iota("BM"))
    with b.loop("n", 0, name("N"), BN) as n:
        acc = b.let("acc", full(("BM", "BN"), 0.0))
        for k in (0, 16):
            left, right = tile(a, *where_, row0, k, ("BM", 16)), tile(other, *where_, n, k, ("BN", 16))
            acc = b.let("acc", dot(left, trans(right), acc))
        columns = b.let("columns", n + iota("BN"))
        inside = column(rows < name("M")) & row(columns < name("N"))
        b.store(out, (*where_, column(rows), row(columns)), acc, inside)
    return single("matmul", b, blocks("M") * name("B") * name("H"))


M, L, ACC = name("m", "f32", ("BM",)), name("l", "f32", ("BM",)), name("acc", "f32", ("BM", 16))
MASKED = name("MASKED", "bool")


def attention(dtype: str = "f32") -> Program:
    """Causal attention, Sq = Sk = S and D = 16: whole tiles in one loop, cut ones in another, one device function."""
    shapes = {"Q": "BM", "K": "BN", "V": "BN", "O": "BM"}
    operands = {
        x: Param(x, "operand", dtype, tiles=((knob, 16),), extent=(name("S"), 16)) for x, knob in shapes.items()
    }
    lse = Param("lse", "buffer", "f32", rank=2)
    b = builder(*operands.values(), lse, *scalars("S", "H"), Param("scale", "scalar", "f32"))
    b.note("heads side by side; one program a query tile")
    h, row0 = b.let("h", program() % name("H")), b.let("row0", program() // name("H") * BM)
    b.let("rows", row0 + iota("BM"))
    b.let("q", tile(operands["Q"], 0, h, row0, 0, ("BM", 16)))
    b.let("m", full(("BM",), -1e30))
    b.let("l", full(("BM",), 0.0))
    b.let("acc", full(("BM", 16), 0.0))
    step = _step(b, operands)
    cut = b.let("cut", quotient(row0, BN) * BN)
    with b.loop("n", 0, cut, BN):
        b.call(step, step.results, MASKED=False)
    with b.loop("n", cut, minimum(row0 + BM, name("S")), BN):
        b.call(step, step.results, MASKED=True)
    b.store_tile(operands["O"], 0, h, row0, 0, cast_to(ACC / column(L), dtype))
    rows = name("rows", "i32", ("BM",))
    b.store(lse, (h, rows), M + ew("log", L), rows < name("S"))
    return single("attention", b, blocks("S") * name("H"), (step,))


def _step(outer: Builder, operands: dict[str, Param]) -> Function:
    b = Builder(outer.params)
    q, n, h = name("q", operands["Q"].dtype, ("BM", 16)), name("n"), name("h")
    s = b.let("s", dot(q, trans(tile(operands["K"], 0, h, n, 0, ("BN", 16)))) * name("scale", "f32"))
    with b.when(MASKED):
        b.let("s", where(row(n + iota("BN")) <= column(name("rows", "i32", ("BM",))), s, -math.inf))
    m_new = b.let("m_new", maximum(M, reduce("max", s, 1)))
    p = b.let("p", ew("exp", s - column(m_new)))
    alpha = b.let("alpha", ew("exp", M - m_new))
    b.let("l", L * alpha + reduce("sum", p, 1))
    v = tile(operands["V"], 0, h, n, 0, ("BN", 16))
    b.let("acc", dot(cast_to(p, v.dtype), v, ACC * column(alpha)))
    b.let("m", m_new)
    return device_function("step", b, [ACC, M, L], ("MASKED", "BM", "BN"))


def two_kernels() -> Program:
    """out = sum of x, the partial sums of its blocks in a scratch buffer between two kernels."""
    x, part = Param("x", "buffer", "f32", rank=1), Param("part", "buffer", "f32", rank=1)
    out = Param("out", "buffer", "f32", rank=1)
    first = builder(x, part, *scalars("N"))
    at = first.let("at", program() * BM + iota("BM"))
    first.store(part, (program(),), reduce("sum", read(x, at, mask=at < name("N")), 0))
    second = builder(part, out, *scalars("N"))
    second.let("total", const(0.0))
    with second.loop("n", 0, blocks("N")) as n:
        second.let("total", name("total", "f32") + read(part, n))
    second.store(out, (0,), name("total", "f32"))
    kernels = (
        Kernel("partial", tuple(first.params.values()), first.body, (), blocks("N")),
        Kernel("total", tuple(second.params.values()), second.body, (), const(1)),
    )
    launches = (Launch("partial"), Launch("total"))
    return Program("sum", kernels, launches, KNOBS, (Scratch("part", (blocks("N"),), "f32"),))


ALL = {"copy": copy, "matmul": matmul, "attention": attention, "two_kernels": two_kernels}
