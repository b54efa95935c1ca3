"""The acceptance rule: a result may be at most twice as far from float64 as eager torch is at its dtype.

Quantised q, k and v are given numbers, in float64 too. Quantised weights are not: they never leave a kernel, and where
they are rounded depends on the greatest weight it has met so far. So their format is the dtype of a product like any
other: float64 does not round them, eager torch does, and a kernel may err as twice that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from attncc.ir.attention import Attention
from attncc.ir.rewrite import walk
from attncc.reference.formats import read_back
from attncc.reference.forward import Outputs, outputs

ATOL: Final[dict[torch.dtype, float]] = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 2e-4,
    torch.bfloat16: 1e-3,
}
"""What is added to the limit, times the greatest finite magnitude of the output (at least 1)."""
TANH: Final = 2.0**-11
"""By how much of it a GPU's own tanh is off, which `numerics.exp: fast` allows scores of 16-bit operands to use: `lse`,
which is fp32 in eager torch too, tells."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """One output's greatest distance from float64, that of eager torch, and what is allowed."""

    output: str
    error: float
    eager: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return f"{self.output}: error {self.error:.2e}, eager {self.eager:.2e}, limit {self.limit:.2e}, {verdict}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far each output is from the oracle; `ok` when all are near enough."""

    deviations: tuple[Deviation, ...]

    @property
    def ok(self) -> bool:
        return all(d.ok for d in self.deviations)

    def __str__(self) -> str:
        return "; ".join(map(str, self.deviations))


def acceptance(
    out: Tensor | tuple[Tensor, Tensor | None],
    attn: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    atol: float | None = None,
    **arguments: Any,
) -> Agreement:
    """Judges `o` or (`o`, `lse`) of a kernel: err(kernel) <= 2 * err(eager) + atol, for each output.

    `arguments` are those of `outputs`, but dtype. `atol` replaces the table's value of q's dtype.
    """
    o, lse = out if isinstance(out, tuple) else (out, None)
    with torch.no_grad():
        attn, (sq, sk, sv) = stored(attn, q, k, v)
        exact = outputs(_unrounded(attn), sq, sk, sv, **arguments, dtype=torch.float64)
        rounded = sq.to(q.dtype), sk.to(q.dtype), None if sv is None else sv.to(q.dtype)
        eager = _eager(attn, exact.o, *rounded, arguments)
    pairs = [("o", o, exact.o, eager.o, q.dtype)]
    if lse is not None and exact.lse is not None and eager.lse is not None:
        pairs.append(("lse", lse, exact.lse, eager.lse, eager.lse.dtype))
    fast = TANH if _has_fast_tanh(attn) else 0.0
    return Agreement(tuple(judge(*p, atol=atol, relative=fast if p[0] == "lse" else 0.0) for p in pairs))


Operands = tuple[Tensor, Tensor, Tensor | None]


def stored(attn: Attention, q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Attention, Operands]:
    """The operands as their quantizers hold them, found in fp32 as every kernel does, and the variant without those.

    Of bf16 numbers many lie half way between two of a format, and fall to one side or the other by the last bit of a
    quotient. Where steps come before a quantizer, it does more than round, or sequences do not stand one by one in the
    operands, everything stays as it is. Keys and values of fp32 beside a narrower q are numbers that are given, as
    the codes of a cache stand for them; eager torch rounds them.
    """
    plain = [z for z in attn.quantize if z.operand in "qkv" and not (z.smooth or z.staircase)]
    others = [z for z in attn.quantize if z not in plain and z.operand != "p"]
    if k.dtype != q.dtype:
        return attn, (q.float(), k, v)
    dense = attn.layout != "varlen" and all(p.kv.kind == "dense" for p in attn.parts)
    if not plain or others or attn.prologue or not dense or v is None:
        return attn, (q, k, v)
    by = {z.operand: z for z in plain}
    axis = attn.layout.index("h")

    def held(x: Tensor, operand: str) -> Tensor:
        z, x = by.get(operand), x.float()
        if z is None or not x.numel():
            return x
        heads = x.movedim(axis, 1)
        kept = [read_back(sequence, z.dtype, z.per, z.symmetric, operand) for sequence in heads]
        return torch.stack(kept).movedim(1, axis)

    rest = replace(attn, quantize=tuple(z for z in attn.quantize if z.operand == "p"))
    return rest, (held(q, "q"), held(k, "k"), held(v, "v"))


def _unrounded(attn: Attention) -> Attention:
    """The variant with its weights as they are."""
    return replace(attn, quantize=tuple(z for z in attn.quantize if z.operand != "p"))


def _has_fast_tanh(attn: Attention) -> bool:
    fast = attn.numerics.exp == "fast" and attn.dtype != "fp32"
    return fast and any(node.op == "tanh" for part in attn.parts for node in walk(part.score))


def _eager(
    attn: Attention, exact: Tensor, q: Tensor, k: Tensor, v: Tensor | None, arguments: dict[str, Any]
) -> Outputs:
    """The variant in q's dtype; where that overflows, in float32 and rounded, so that the rule keeps teeth."""
    eager = outputs(attn, q, k, v, **arguments, dtype=None)
    if bool((eager.o.isfinite() | ~exact.isfinite()).all()):
        return eager
    wide = outputs(attn, q, k, v, **arguments, dtype=torch.float32, operands=q.dtype)
    return Outputs(wide.o.to(q.dtype), wide.lse, wide.max_score)


def judge(
    output: str,
    got: Tensor,
    exact: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    atol: float | None = None,
    relative: float = 0.0,
) -> Deviation:
    """The rule for one tensor: an output, or a gradient; `relative` is allowed beside the dtype's own."""
    if got.shape != exact.shape:
        raise ValueError(f"{output}: expected shape {list(exact.shape)}, got {list(got.shape)}")
    finite = exact[exact.isfinite()]
    magnitude = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    allowance = (ATOL[dtype] + relative) * magnitude if atol is None else atol
    eager_error = distance(eager, exact)
    return Deviation(output, distance(got, exact), eager_error, 2 * eager_error + allowance)


def distance(got: Tensor, exact: Tensor) -> float:
    """The greatest absolute difference; equal infinities are 0 apart, NaN is infinitely far from a number."""
    got, exact = got.double(), exact.double()
    same = (got == exact) | (got.isnan() & exact.isnan())
    apart = torch.where(same, 0.0, (got - exact).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(apart.max()) if apart.numel() else 0.0
