"""What a mask leaves of the tiles of 128 x 128: evaluated by the oracle on the call's own inputs, on a sample of rows.

Two calls of one shape are different work if one has short documents and the other a single one; configs are chosen for
what they have in common with the calls they were timed on, and this is how calls are told apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncc.autotune.record import Sparsity
from attncc.check.operands import Operands
from attncc.ir.attention import Attention
from attncc.reference.evaluate import Scope, evaluate
from attncc.reference.operands import Indexing, prepare
from attncc.reference.rows import Numbers, scope_of

TILE: Final = 128
SAMPLE: Final = 24
"""Rows of tiles that are looked at in a sequence."""
SEQUENCES: Final = 4
"""That are looked at in a batch."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a mask leaves."""

    share: float
    """Of the pairs of queries and keys."""
    sparsity: Sparsity


def kept(attn: Attention, x: Operands) -> Kept:
    """What the mask of the first part leaves of a call with these operands."""
    call = prepare(attn, x.q.to(x.k.dtype), x.k, x.v, x.inputs, Indexing(**x.offsets))
    numbers = Numbers(torch.float32, torch.float32, None, 0, call.sizes, x.inputs)
    full = [s for s in call.sequences if s.q.shape[1] and s.k.shape[1]]
    picked = full[:: max(1, len(full) // SEQUENCES)]
    found = [_tile_counts(attn, scope_of(attn, s, numbers), s.q.shape[1], s.k.shape[1]) for s in picked]
    return _summed(found) if found else Kept(0.0, Sparsity(tiles=0.0, variance=0.0, full=0.0, skew=0.0))


def _summed(found: list[Counts]) -> Kept:
    """Over all the rows of tiles that were looked at."""
    rows = torch.cat([f.some.flatten(0, 1).sum(-1) for f in found]).float()
    columns = torch.cat([f.some.flatten(0, 1).sum(0) for f in found]).float()
    some, full = rows.sum().item(), sum(f.full.sum().item() for f in found)
    mean = rows.mean().item()
    spread = rows.var(unbiased=False).item()
    return Kept(
        sum(f.kept for f in found) / sum(f.pairs for f in found),
        Sparsity(
            tiles=round(mean, 2),
            variance=round(spread / mean**2, 3) if mean else 0.0,
            full=round(full / some, 3) if some else 0.0,
            skew=round(columns.max().item() / columns.mean().item(), 2) if some else 0.0,
        ),
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a sequence: kept pairs, all pairs, and which tiles [heads, rows of tiles, columns of tiles] hold some kept
    pair, and which only kept ones."""

    kept: float
    pairs: float
    some: Tensor
    full: Tensor


def _tile_counts(attn: Attention, scope: Scope, queries: int, keys: int) -> Counts:
    starts = range(0, queries, TILE)
    some: list[Tensor] = []
    full: list[Tensor] = []
    kept = pairs = 0.0
    for start in starts[:: max(1, len(starts) // SAMPLE)]:
        names = dict(scope.names)
        for name in ("row", "i"):
            names[name] = names[name][:, start : start + TILE]
        rows = min(TILE, queries - start)
        seen = evaluate(attn.parts[0].mask, replace(scope, names=names))
        seen = seen.expand(len(seen) if seen.ndim == 3 else 1, rows, keys)
        kept += seen.sum().item()
        pairs += seen.numel()
        behind = (0, -keys % TILE)
        blocks = (len(seen), rows, -1, TILE)
        some.append(pad(seen, behind, value=False).view(blocks).any(1).any(-1))
        full.append(pad(seen, behind, value=True).view(blocks).all(1).all(-1))
    return Counts(kept, pairs, torch.stack(some, 1), torch.stack(full, 1))
