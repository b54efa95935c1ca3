"""Several parts as one output: merged by their log-sum-exp, added, gated or interpolated."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attncc.ir.attention import Attention
from attncc.reference.normalize import logaddexp
from attncc.reference.rows import Partial, Rows


def combine(attn: Attention, parts: list[Partial], rows: Rows) -> Partial:
    if len(parts) == 1 or attn.combine.name == "lse":
        return merge(parts)
    outputs = [merge([p]).o for p in parts]
    factors = [rows.per_row(e)[..., None] for e in attn.combine.args]
    match attn.combine.name:
        case "lerp":
            first, second = outputs
            outputs = [first, factors[0] * (second - first)]
        case "gate":
            ungated = len(outputs) - len(factors)
            outputs[ungated:] = [g * o for g, o in zip(factors, outputs[ungated:], strict=True)]
        case "add" if attn.combine.words:
            proj = rows.scope.inputs[attn.combine.words[0]]
            outputs[1:] = [_projected(o, proj, rows) for o in outputs[1:]]
        case _:
            pass
    return Partial(torch.stack(outputs).sum(0), _greatest(parts))


def _projected(o: Tensor, proj: Tensor, rows: Rows) -> Tensor:
    """o W^T; W [Dv, Dv] is one for all heads, or [H, Dv, Dv] one each."""
    matmul = rows.numbers.matmul
    return (o.to(matmul) @ proj.to(matmul).mT).to(o.dtype)


def _greatest(parts: list[Partial]) -> Tensor:
    return torch.stack([p.top for p in parts]).amax(0)


def _relative(part: Partial, base: Tensor) -> Tensor:
    """A part's values summed and, behind them, its weights [H, R, Dv + 1], in units of exp(base)."""
    if part.mass is None:
        assert part.lse is not None
        weight = torch.exp(part.lse - base)
        return torch.cat([weight[..., None] * part.o, weight[..., None]], -1)
    # a mass of 0 trains too, so it is no matter for logarithms; only beside such a one the unit may overflow
    unit = torch.exp(torch.clamp(-base, max=math.log(torch.finfo(base.dtype).max) - 1))
    divisor = torch.where(part.mass == 0, 1.0, part.mass)
    return unit[..., None] * torch.cat([divisor[..., None] * part.o, part.mass[..., None]], -1)


def merge(parts: list[Partial]) -> Partial:
    """The parts as one softmax over all their keys, then the sinks' share taken off."""
    first = parts[0]
    if first.mass is not None:
        first = replace(first, o=torch.where((first.mass == 0)[..., None], 0.0, first.o))
    if len(parts) > 1:
        top = torch.stack([p.lse for p in parts if p.lse is not None]).detach().amax(0)
        base = torch.where(top == -math.inf, 0.0, top)
        sums = torch.stack([_relative(p, base) for p in parts]).sum(0)
        total = sums[..., -1]
        empty = total == 0
        safe = torch.where(empty, 1.0, total)
        o = torch.where(empty, 0.0, 1.0 / safe)[..., None] * sums[..., :-1]
        first = Partial(o, _greatest(parts), torch.where(empty, -math.inf, base + torch.log(safe)))
    sinks = [p.sink for p in parts if p.sink is not None]
    if first.lse is None or not sinks:
        return first
    sink = sinks[0] if len(sinks) == 1 else logaddexp(*sinks)
    empty = first.lse == -math.inf
    share = torch.sigmoid(torch.where(empty, 0.0, first.lse) - sink)
    return replace(first, o=torch.where(empty, 0.0, share)[..., None] * first.o, sink=None)
