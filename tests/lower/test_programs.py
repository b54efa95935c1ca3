"""Lowered programs, run by the interpreter of tile IR, against the oracle: no back-end, no GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from attncc import passes, reference
from attncc.ir import interp
from attncc.ir.attention import Align, Attention, Call, Dims, Heads, Input, Normalizer, Numerics, Part, Quantizer
from attncc.ir.expr import TRUE, Expr, bucket, const, eq, ew, load, name, where
from attncc.ir.tile import Program
from attncc.ir.verify import verify_attention, verify_program
from attncc.passes.lower.select import select

b, h, i, j, row = (name(n) for n in ("b", "h", "i", "j", "row"))
qk, scale = name("qk", "f32"), name("scale", "f32")


SOFTMAX = Normalizer()


def variant(score: Expr = qk * scale, mask: Expr = TRUE, normalizer: Normalizer = SOFTMAX, **more: Any) -> Attention:
    whole: dict[str, Any] = {"heads": Heads(4, 2, 2), "dims": Dims(16, 24), "dtype": "fp32", **more}
    return Attention("t", parts=(Part(score, mask, normalizer),), scale=ew("rsqrt", name("Dqk")), **whole)


def inputs(*declared: Input) -> dict[str, Any]:
    return {"inputs": declared}


DOC = load("doc", b, i, dtype="i32"), load("doc", b, j, dtype="i32")

VARIANTS: dict[str, Attention] = {
    "plain": variant(),
    "causal": variant(mask=j <= i),
    "window": variant(mask=(j <= i) & (i - j < 9)),
    "sink and window": variant(mask=(j <= i) & ((i - j < 9) | (j < 3))),
    "prefix": variant(mask=(j <= i) | (j < 7)),
    "chunked": variant(mask=eq(i // 8, j // 8)),
    "dilated": variant(mask=eq((i - j) % 3, 0) & (j <= i)),
    "anticausal": variant(mask=~(j <= i)),
    "by head": variant(mask=(h < 2) | (j <= i)),
    "empty": variant(mask=i < 0),
    "documents": variant(mask=eq(*DOC) & (j <= i), **inputs(Input("doc", ("B", "Sk"), "int32"))),
    "segments": variant(
        mask=eq(bucket("cuts", i), bucket("cuts", j)), **inputs(Input("cuts", ("n",), "int32", sorted=True))
    ),
    "keys": variant(mask=load("on", b, j, dtype="bool"), **inputs(Input("on", ("B", "Sk"), "bool"))),
    "lengths": variant(mask=j < load("lim", b, dtype="i32"), **inputs(Input("lim", ("B",), "int32"))),
    "softcap": variant(ew("tanh", qk * scale / 3.0) * 3.0, j <= i),
    "alibi": variant(qk * scale - (h + 1) * 0.1 * ew("abs", i - j), j <= i),
    "bias": variant(qk * scale + load("bias", b, h, row, j), **inputs(Input("bias", ("B", 1, "Sq", "Sk")))),
    "relative": variant(qk * scale + load("rel", h, i - j + 5), **inputs(Input("rel", ("Hq", 11)))),
    "piecewise": variant(where(i - j < 4, qk * scale, ew("log", ew("abs", qk))), j <= i),
    "sizes": variant(qk * scale * ew("log", name("Sk") * 1.0)),
    "sink": variant(mask=j <= i, normalizer=Normalizer(sink=load("z", h)), **inputs(Input("z", ("Hq",)))),
    "sigmoid": variant(mask=j <= i, normalizer=Normalizer("sigmoid")),
    "relu": variant(mask=j <= i, normalizer=Normalizer("relu")),
    "none": variant(mask=j <= i, normalizer=Normalizer("none")),
    "linear": variant(ew("exp", qk), j <= i, Normalizer("linear", eps=0.1)),
    "tiled heads": variant(mask=j <= i, heads=Heads(4, 2, 4, "tile")),
    "one value head": variant(mask=j <= i, heads=Heads(4, 2, 1)),
    "pieces": variant(mask=j <= i, dims=Dims(72, 40)),
    "top left": variant(mask=j <= i, align=Align("top_left")),
    "offsets": variant(mask=j <= i, align=Align("input", "lim"), **inputs(Input("lim", ("B",), "int32"))),
}
QUANTISED: dict[str, Attention] = {
    "heads": variant(mask=j <= i, quantize=tuple(Quantizer(x, "fp8_e4m3", Call("head")) for x in ("q", "k", "v"))),
    "tensors": variant(mask=j <= i, quantize=tuple(Quantizer(x, "fp8_e5m2") for x in ("q", "k", "v", "p"))),
    "tokens": variant(mask=j <= i, quantize=tuple(Quantizer(x, "int8", Call("token")) for x in ("q", "k"))),
    "blocks": variant(quantize=tuple(Quantizer(x, "int8", Call("block", (const(9),))) for x in ("q", "k"))),
    "channels": variant(quantize=(Quantizer("v", "int8", Call("channel")), Quantizer("p", "int8"))),
}
SHAPES = [(2, 21, 37, {"BM": 16, "BN": 16}), (1, 37, 21, {"BM": 16, "BN": 32}), (2, 33, 33, {"BM": 32, "BN": 16})]


def lowered(attn: Attention) -> Program:
    verify_attention(attn)
    rewritten = passes.run(attn)
    verify_attention(rewritten)
    program = select(rewritten)
    verify_program(program)
    return program


def draw(x: Input, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    shape = [sizes.get(n, 5) if isinstance(n, str) else n for n in x.shape]
    if x.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.7
    if x.dtype == "int32":
        values = torch.randint(0, 4 if "Sk" in x.shape else sizes["Sk"], shape, generator=generator)
        return (values.sort(-1).values if x.sorted else values).int()
    return torch.randn(shape, generator=generator)


def interpret(attn: Attention, operands: dict[str, Tensor], sizes: dict[str, int], knobs: dict[str, int]) -> None:
    """Runs the program; every tensor is given under the kernel's name for it."""
    program = lowered(attn)
    scalars: dict[str, float] = {**sizes, "scale": attn.dims.qk**-0.5}
    tensors = {x: t.numpy() for x, t in operands.items()}
    for x in attn.inputs:
        tensors[f"{x.name}_ptr"] = tensors.pop(x.name)
        for entry, size in zip(x.shape, tensors[f"{x.name}_ptr"].shape, strict=True):
            scalars[f"len_{entry}"] = size
    config = {k.name: k.choices[0] for k in program.knobs} | knobs
    interp.run(program, tensors, scalars, config)


def agree(attn: Attention, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> None:
    soft = attn.part.normalizer.kind == "softmax"
    agreement = reference.acceptance((o, lse) if soft else o, attn, q, k, v, **arguments)
    assert agreement.ok, str(agreement)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [*VARIANTS, *QUANTISED])
def test_dense(case: str, shape: tuple[int, int, int, dict[str, int]]) -> None:
    compare((VARIANTS | QUANTISED)[case], *shape)


def compare(attn: Attention, B: int, Sq: int, Sk: int, knobs: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(Sq)
    heads, dims = attn.heads, attn.dims
    q, k, v = (
        torch.randn(B, n, s, d, generator=generator)
        for n, s, d in ((heads.q, Sq, dims.qk), (heads.kv, Sk, dims.qk), (heads.v, Sk, dims.v))
    )
    sizes = {"B": B, "Sq": Sq, "Sk": Sk, "Hq": heads.q}
    given = {x.name: draw(x, sizes, generator) for x in attn.inputs}
    o, lse = torch.full((B, heads.q, Sq, dims.v), torch.nan), torch.full((B, heads.q, Sq), torch.nan)
    interpret(attn, {"Q": q, "K": k, "V": v, "O": o, "LSE": lse, **given}, sizes, knobs)
    agree(attn, o, lse, q, k, v, inputs=given)


SPLIT_SHAPES: list[tuple[int, int, int, dict[str, int], Literal["run", "batch"]]] = [
    (2, 5, 90, {"BM": 16, "BN": 16, "SPLIT": 1, "FILL": 20}, "run"),
    (1, 9, 5, {"BM": 16, "BN": 32, "SPLIT": 1, "FILL": 64}, "run"),
    (1, 1, 70, {"BM": 16, "BN": 16, "SPLIT": 2, "ONE_PASS": 1}, "batch"),
]
LISTED = ("documents", "keys")


@pytest.mark.parametrize("case", [c for c in VARIANTS if c not in LISTED])
def test_split(case: str) -> None:
    """Few queries: heads of a group in one tile, and keys shared out to several programs."""
    assert not lowered(VARIANTS[case]).short_gap
    for B, Sq, Sk, knobs, reproducible in SPLIT_SHAPES:
        compare(replace(VARIANTS[case], numerics=Numerics(reproducible)), B, Sq, Sk, knobs)


@pytest.mark.parametrize("case", LISTED)
def test_what_is_not_split(case: str) -> None:
    program = lowered(VARIANTS[case])
    assert program.short_gap == "key tiles listed from data"
    assert "SPLIT" not in {k.name for k in program.knobs}
    assert lowered(replace(VARIANTS["causal"], layout="varlen")).short_gap == "packed sequences"
    assert lowered(QUANTISED["tokens"]).short_gap == "quantised operands"
    assert lowered(replace(VARIANTS["causal"], modes=("prefill",))).short_gap == "modes without decode"


@pytest.mark.parametrize("case", [c for c, attn in VARIANTS.items() if attn.align.kind != "input"])
def test_packed(case: str) -> None:
    attn = replace(VARIANTS[case], layout="varlen")
    queries, keys = [21, 3, 0, 17], [37, 5, 4, 0]
    generator = torch.Generator().manual_seed(1)
    heads, dims = attn.heads, attn.dims
    q, k, v = (
        torch.randn(sum(s), n, d, generator=generator)
        for s, n, d in ((queries, heads.q, dims.qk), (keys, heads.kv, dims.qk), (keys, heads.v, dims.v))
    )
    sizes = {"B": 4, "Sq": 21, "Sk": 37, "Hq": heads.q}
    given = {x.name: draw(x, sizes, generator) for x in attn.inputs}
    cuts = [torch.tensor([0, *accumulate(s)], dtype=torch.int32) for s in (queries, keys)]
    o, lse = torch.full((len(q), heads.q, dims.v), torch.nan), torch.full((heads.q, len(q)), torch.nan)
    views = {x: t.transpose(0, 1)[None] for x, t in {"Q": q, "K": k, "V": v, "O": o}.items()}
    offsets = {"cu_seqlens_q": cuts[0], "cu_seqlens_k": cuts[1]}
    totals = {"B": 4, "Tq": len(q), "Tk": len(k)}
    interpret(attn, {**views, "LSE": lse, **offsets, **given}, totals, {"BM": 16, "BN": 16})
    agree(attn, o, lse, q, k, v, inputs=given, **offsets)


def test_hidden_values_that_are_no_numbers() -> None:
    attn = VARIANTS["causal"]
    q, k, v = (torch.randn(1, n, 40, d) for n, d in ((4, 16), (2, 16), (2, 24)))
    v[:, :, 25] = torch.nan
    o, lse = torch.full((1, 4, 40, 24), torch.nan), torch.full((1, 4, 40), torch.nan)
    sizes = {"B": 1, "Sq": 40, "Sk": 40}
    interpret(attn, {"Q": q, "K": k, "V": v, "O": o, "LSE": lse}, sizes, {"BM": 16, "BN": 16})
    assert bool(o[:, :, :25].isfinite().all())
    agree(attn, o, lse, q, k, v)


def test_rounded_operands() -> None:
    """bf16 operands and outputs: the interpreter rounds where the kernel would."""
    attn = replace(VARIANTS["causal"], dtype="bf16")
    q, k, v = (torch.randn(1, n, 40, d).bfloat16() for n, d in ((4, 16), (2, 16), (2, 24)))
    o, lse = torch.full((1, 4, 40, 24), torch.nan), torch.full((1, 4, 40), torch.nan)
    operands = {"Q": q.float(), "K": k.float(), "V": v.float(), "O": o, "LSE": lse}
    interpret(attn, operands, {"B": 1, "Sq": 40, "Sk": 40}, {"BM": 16, "BN": 16})
    assert np.array_equal(o.numpy(), o.bfloat16().float().numpy())
    agree(attn, o.bfloat16(), lse, q, k, v)
