"""Tensors that are read by pair, and the squares in registers that turn them around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import agrees, built, in_turn
from codegen.emitted import normal
from codegen.test_packages import HEADS, PLAIN
from jitted import RUNNABLE
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.codegen.tvm.build import compiled
from attncc.codegen.tvm.formulas import Array
from attncc.codegen.tvm.isa import Isa
from attncc.codegen.tvm.pairs import pair_loads
from attncc.codegen.tvm.transposing import transposed, unaligned
from attncc.codegen.tvm.vector import whole
from attncc.ir.attention import Attention

EACH_ISA = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
DTYPES = ("bool", "int8", "uint8", "int32", "int64", "fp16", "bf16", "fp32")
CASES = [
    Case(2, 70, 150),
    Case(1, 150, 70),
    Case(2, 21, 37, "nan_around"),
    Case(2, 2, 150),
    Case(2, 70, 150, "nan_keys"),
]


def inputs(**declared: str) -> str:
    return PLAIN + "inputs: {" + ", ".join(f"{name}: {{{x}}}" for name, x in declared.items()) + "}\n"


def of_every_dtype(index: str) -> str:
    reads = {dtype: f"x_{dtype}[{index}] * 0.1" for dtype in ("fp16", "bf16", "fp32")}
    reads |= {dtype: f"x_{dtype}[{index}] % 7 * 0.1" for dtype in ("int8", "uint8", "int32", "int64")}
    reads |= {"bool": f"where(x_bool[{index}], 1.5, -0.5)"}
    declared = {f"x_{dtype}": f"shape: [Sq, Sk], dtype: {dtype}" for dtype in DTYPES}
    return f"{inputs(**declared)}score: qk * scale + {' + '.join(reads.values())}"


TABLE = {
    "every dtype": of_every_dtype("row, j"),
    "every dtype, falling": of_every_dtype("row, 60 - j"),
    "every dtype, beside": of_every_dtype("row - 3, j + 5"),
    "a bias a head": inputs(x="shape: [B, Hq, Sq, Sk]") + "score: qk * scale + x[b, h, row, j]\nmask: causal",
    "axes that are 1": inputs(x="shape: [1, 1, Sq, Sk]") + "score: qk * scale + x[b, h, row, j]",
    "one key for all": inputs(x="shape: [Sq, 1]") + "score: qk * scale + x[row, j]",
    "a mask": inputs(x="shape: [B, Sq, Sk], dtype: bool") + "mask: x[b, row, j]",
    "a mask, causal": inputs(x="shape: [Sq, Sk], dtype: bool") + "mask: causal & ~x[row, j]",
    "in score and mask": inputs(x="shape: [Sq, Sk]") + "score: qk * scale * x[row, j]\nmask: x[row, j] > -0.5",
    "relative": inputs(x="shape: [Hq, n]") + "score: qk * scale + x[h, i - j + n // 2] + x[hk, 9 + (j - i)]",
    "relative, masked": inputs(x="shape: [n], dtype: bool") + "mask: x[i - j + 3] | (j == 0)",
    "rows by data": inputs(a="shape: [Sq], dtype: int8", x="shape: [9, Sk]") + "score: qk * scale + x[a[row] % 9, j]",
    "a read of a read": inputs(a="shape: [Sq, Sk], dtype: int32", x="shape: [5]")
    + "score: qk * scale + x[a[row, j] % 5]",
    "far outside": inputs(x="shape: [9, 40]") + "score: qk * scale + x[row * 1000000, j] + x[row, j + 4000000000]",
    "long formulas": inputs(x="shape: [Sq, Sk]") + "score: tanh(qk * scale + x[row, j]) * 3 + exp(x[row, j + 1] * 0.1)",
    "a step of two": inputs(x="shape: [Sq, Sk]", y="shape: [Sk, Sq]") + "score: qk * scale + x[row, 2 * j] + y[j, row]",
}


@pytest.mark.parametrize("name", TABLE)
def test_reads_by_pair(name: str) -> None:
    number = list(TABLE).index(name)
    layout = ("bhsd", "varlen", "bshd")[number // 2 % 3]
    agrees(built(f"{TABLE[name]}\nlayout: {layout}", in_turn(number), level=0), CASES)


def lowered(body: str) -> Attention:
    return driver.lower(spec.loads(f"attncc: 1\nname: pairs\n{body}\n").attention)[0]


RULE = {
    "x[row, j]": 1, "x[i, j + 3]": 1, "x[3, i - j]": 1, "x[i // 2, 7 - (j - h)]": 1, "x[row, -j + 100]": 1,
    "x[h, j]": 0, "x[row, 2 * j]": 0, "x[j, row]": 0, "x[j + row, j]": 0, "x[row, j - j // 2]": 0, "x[row, h]": 0,
}  # fmt: skip


@pytest.mark.parametrize("read", RULE)
def test_which_reads_are_by_pair(read: str) -> None:
    part = lowered(inputs(x="shape: [m, n]") + f"score: qk * scale + {read}").part
    arrays = {"x": Array(None, (None, None), (None, None), (False, False), "fp32")}
    assert len(pair_loads([part.score], arrays)) == RULE[read]


# -- where the tensor lies ------------------------------------------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "off every alignment": lambda x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
    "rows apart": lambda x: torch.empty(*x.shape[:-1], x.shape[-1] + 7, dtype=x.dtype)[..., : x.shape[-1]].copy_(x),
    "keys apart": lambda x: torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x),
    "turned around": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bool"])
@EACH_ISA
def test_views_of_a_bias(isa: Isa, dtype: str) -> None:
    """The same bits wherever it lies."""
    use = "mask: x[h, row, j]" if dtype == "bool" else "score: qk * scale + x[h, row, j]"
    p = built(f"{HEADS}dims: 16\ndtype: fp32\ninputs: {{x: {{shape: [Hq, Sq, Sk], dtype: {dtype}}}}}\n{use}", isa.name)
    q, k = normal(1, 4, 90, 16), normal(1, 2, 200, 16, seed=1)
    x = normal(4, 90, 200, seed=2)
    x = x > 0 if dtype == "bool" else x.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    want = p(q, k, k, x=x)
    for name, view in VIEWS.items():
        assert torch.equal(p(q, k, k, x=view(x)), want), name
    one = x[:1, :1].expand(4, 90, 200)
    assert torch.equal(p(q, k, k, x=one), p(q, k, k, x=one.contiguous()))
    one = x[:, :, 5:6].expand(4, 90, 200)
    assert torch.equal(p(q, k, k, x=one), p(q, k, k, x=one.contiguous()))


@EACH_ISA
def test_what_a_mask_hides_may_be_anything(isa: Isa) -> None:
    """A bias of hidden pairs may be NaN or infinite, and one may hide by itself."""
    p = built(inputs(x="shape: [Sq, Sk]") + "score: qk * scale + x[row, j]\nmask: causal", isa.name)
    q, k = normal(1, 4, 90, 16), normal(1, 2, 90, 16, seed=1)
    x = normal(90, 90, seed=2)
    above = torch.ones(90, 90, dtype=torch.bool).triu(1)
    want = p(q, k, k, x=x)
    for bad in (torch.nan, torch.inf):
        assert torch.equal(p(q, k, k, x=x.masked_fill(above, bad)), want)
    hides = built(inputs(x="shape: [Sq, Sk]") + "score: qk * scale + x[row, j]", isa.name)
    torch.testing.assert_close(hides(q, k, k, x=x.masked_fill(above, -torch.inf)), want)


# -- squares -------------------------------------------------------------------------------------


def square(isa: Isa, kind: str) -> Any:
    """b = a^T of as many rows and columns as there are lanes; rows of a are `s` elements apart."""
    lanes = isa.lanes
    with IRBuilder() as builder, T.prim_func():
        T.func_name("f")
        handles = [T.arg(name, T.handle()) for name in "ab"]
        step = T.arg("s", T.int64())
        a, b = (T.match_buffer(handle, (1 << 20,), kind, align=1) for handle in handles)
        columns = transposed([unaligned(a, step * whole(r, "int64"), lanes, kind) for r in range(lanes)])
        for c, column in enumerate(columns):
            T.buffer_store(b, column, [T.ramp(whole(c * lanes), 1, lanes)])
    return builder.get()


@pytest.mark.parametrize("kind", ["float32", "int32", "int64"])
@EACH_ISA
def test_squares(isa: Isa, kind: str) -> None:
    n = isa.lanes
    a, b = torch.arange(1 << 20).to(getattr(torch, kind)), torch.zeros(1 << 20, dtype=getattr(torch, kind))
    compiled({"f": square(isa, kind)}, isa)["f"](a, b, 1001)
    rows = a[torch.arange(n)[:, None] * 1001 + torch.arange(n)]
    assert torch.equal(b[: n * n].view(n, n), rows.T)
