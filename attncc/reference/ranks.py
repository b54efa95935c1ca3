"""Several ranks in one process: what a partition over devices computes, collective by collective.

q, k, v are [B, H, S, D]; a chunk of an input is cut along the axes that it declares as B, Sq and Sk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Dims
from attncc.reference.combine import merge
from attncc.reference.forward import outputs
from attncc.reference.plans import Chunk, Pair
from attncc.reference.rows import Partial

T = TypeVar("T")


def all_gather(own: Sequence[T]) -> list[list[T]]:
    """What each rank holds once every rank has sent its own to all."""
    return [list(own) for _ in own]


def attend(
    attn: Attention, pairs: Sequence[Pair], q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor] = {}
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, S, Dv] and lse [B, Hq, S] of the pairs, each computed alone and merged where it was computed.

    `attn` aligns its queries by an input, which each pair sets to its offset; scores and masks may read positions
    as i - j alone. What no pair covers is 0, its lse -inf.
    """
    if attn.align.kind != "input":
        raise Unsupported("a pair of chunks stands at an offset: align needs to name an input of offsets", key="align")
    if any(part.normalizer.sink is not None for part in attn.parts):
        raise Unsupported("a sink counts once a row, not once a pair", key="normalizer")
    made: dict[tuple[int, Chunk], Partial] = {}
    for pair in sorted(pairs, key=lambda p: p.step):
        new = _pair(attn, pair, q, k, v, inputs)
        home = pair.rank, pair.q
        made[home] = merge([made[home], new]) if home in made else new
    o = q.new_zeros((*q.shape[:3], attn.dims.v))
    lse = q.new_full(q.shape[:3], -torch.inf)
    for (_, chunk), partial in made.items():
        at = chunk.sequence, slice(None), slice(chunk.start, chunk.stop)
        assert partial.lse is not None
        o[at], lse[at] = partial.o[0], partial.lse[0]
    return o, lse


def _pair(attn: Attention, pair: Pair, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor]) -> Partial:
    """A pair as one call, its queries at their offset."""
    n = pair.q.sequence
    here = _cut(attn, inputs, {"B": (n, n + 1), "Sq": _span(pair.q), "Sk": _span(pair.k)})
    here[attn.align.input] = torch.tensor([pair.offset], device=q.device)
    one = outputs(attn, _at(q, pair.q), _at(k, pair.k), _at(v, pair.k), inputs=here)
    if one.lse is None:
        raise Unsupported("pairs merge by their log-sum-exp, which this variant has not", key="combine")
    return Partial(one.o, one.max_score, one.lse)


# -- recurrences -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Affine:
    """What a chunk of a recurrence does to the state, S -> a S + s: a [B, H, F, F], s [B, H, F, V]."""

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


def recur(
    attn: Attention,
    cuts: Sequence[tuple[int, int]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, S, Dv] and the final state of a recurrence, a rank for each [lo, hi) of the sequence.

    Each rank sends one map of states, however long its chunk, and starts from what those before it made of the
    initial state; where nothing is causal, from what all others did. With `decay: none` this is LASP-2
    (arXiv 2502.07563), whose maps are sums.
    """
    state = attn.part.state
    own = [_cut(attn, inputs, {"Sq": span, "Sk": span}) for span in cuts]
    parts = [(q[:, :, lo:hi], k[:, :, lo:hi], v[:, :, lo:hi]) for lo, hi in cuts]
    maps = [affine(attn, *some, mine) for some, mine in zip(parts, own, strict=True)]
    assert state is not None
    first = inputs[state.initial]
    made: list[tuple[Tensor, Tensor]] = []
    for rank, received in enumerate(all_gather(maps)):
        if state.causal:
            start = prefixes(received)[rank](first)
        else:
            start = first + sum(one.s for n, one in enumerate(received) if n != rank)
        one = outputs(attn, *parts[rank], inputs={**own[rank], state.initial: start})
        made.append((one.o, one.taps["final_state"]))
    return torch.cat([o for o, _ in made], 2), made[-1][1]


def _span(chunk: Chunk) -> tuple[int, int]:
    return chunk.start, chunk.stop


def _at(x: Tensor, chunk: Chunk) -> Tensor:
    return x[chunk.sequence, None, :, chunk.start : chunk.stop]


def _cut(
    attn: Attention, inputs: Mapping[str, Tensor], spans: Mapping[int | str, tuple[int, int]]
) -> dict[str, Tensor]:
    """The inputs, with [lo, hi) of each axis that is declared as one of `spans`."""
    found: dict[str, Tensor] = {}
    for declared in attn.inputs:
        x = inputs.get(declared.name)
        if x is None:
            continue
        for axis, entry in enumerate(declared.shape):
            lo, hi = spans.get(entry, (0, x.shape[axis]))
            x = x.narrow(axis, lo, hi - lo)
        found[declared.name] = x
    return found
