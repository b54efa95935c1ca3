"""Chunks of a recurrence as affine maps of the state, and their composition, which is associative.

One map serves the scan over chunks, ranks that share a sequence, and a prefix kept for later. For softmax the like
is `combine.merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Dims
from attncc.reference.forward import outputs


@dataclass(frozen=True, slots=True)
class Affine:
    """S -> a S + s; a [B, H, F, F], s [B, H, F, V]."""

    a: Tensor
    s: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        return self.a @ state + self.s

    def after(self, first: Affine) -> Affine:
        """This map behind `first`."""
        return Affine(self.a @ first.a, self(first.s))


def prefixes(maps: Sequence[Affine]) -> list[Affine]:
    """For each map the composition of those before it; the identity for the first."""
    first = maps[0]
    unit = torch.eye(first.a.shape[-1], dtype=first.a.dtype, device=first.a.device).expand_as(first.a)
    found = [Affine(unit, torch.zeros_like(first.s))]
    for one in maps[:-1]:
        found.append(one.after(found[-1]))
    return found


def affine(attn: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor]) -> Affine:
    """What a chunk of keys does to the state: s from a state of zeros, a from the unit state and values of zero."""
    state = attn.part.state
    if state is None or not state.initial or not attn.wants("final_state") or attn.part.normalizer.kind != "none":
        raise Unsupported("a map of states needs a state with `initial` and `final_state`, not normalised", key="state")
    name, (features, _) = state.initial, inputs[state.initial].shape[2:]
    zeros = torch.zeros_like(inputs[name])
    s = outputs(attn, q, k, v, inputs={**inputs, name: zeros}).taps["final_state"]
    unit = torch.eye(features, dtype=zeros.dtype, device=zeros.device).expand(*zeros.shape[:2], -1, -1)
    square = replace(attn, dims=Dims(attn.dims.qk, features))
    nothing = v.new_zeros((*v.shape[:-1], features))
    a = outputs(square, q, k, nothing, inputs={**inputs, name: unit}).taps["final_state"]
    return Affine(a, s)
