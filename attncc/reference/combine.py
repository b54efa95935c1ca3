"""Several parts as one output: merged by their log-sum-exp, added, gated or interpolated."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attncc.ir.attention import Attention
from attncc.reference.normalize import logaddexp, softmax
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
        case _:
            pass
    return Partial(torch.stack(outputs).sum(0), _greatest(parts))


def _greatest(parts: list[Partial]) -> Tensor:
    return torch.stack([p.top for p in parts]).amax(0)


def merge(parts: list[Partial]) -> Partial:
    """The parts as one softmax over all their keys, then the sinks' share taken off."""
    first = parts[0]
    if len(parts) > 1:
        lses = torch.stack([p.lse for p in parts if p.lse is not None], -1)
        share, lse, _ = softmax(lses)
        o = (share[..., None] * torch.stack([p.o for p in parts], -2)).sum(-2)
        first = Partial(o, _greatest(parts), lse)
    sinks = [p.sink for p in parts if p.sink is not None]
    if first.lse is None or not sinks:
        return first
    sink = sinks[0] if len(sinks) == 1 else logaddexp(*sinks)
    empty = first.lse == -math.inf
    share = torch.sigmoid(torch.where(empty, 0.0, first.lse) - sink)
    return replace(first, o=torch.where(empty, 0.0, share)[..., None] * first.o, sink=None)
