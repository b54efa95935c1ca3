"""Blocks of queries and keys: which block each token lies in, what a mask shows of them, and sums over them.

Blocks of a size are cut at rows and keys 0, n, 2n, …; the last one may be short. Clusters are blocks of any
members. Letters in shapes: H query heads, Sq queries, Sk keys, nq and nk their blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from attncc.ir.attention import Part
from attncc.reference.pairs import seen_keys
from attncc.reference.rows import Rows

How = Literal["sum", "mean", "amax", "amin"]

EMPTY: Final[dict[How, float]] = {"sum": 0.0, "mean": 0.0, "amax": -math.inf, "amin": math.inf}
"""What a block without members comes to."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks that a selection chooses among."""

    q_block: Tensor
    """[H, Sq]: the block of each query."""
    k_block: Tensor
    """[H, Sk]: the block of each key; -1 where a key lies in none."""
    nq: int
    nk: int
    seen: Tensor
    """bool [H, Sq, Sk]: the pairs that the part's mask shows."""
    visible: Tensor
    """bool [H, nq, nk]: blocks of which the mask shows a pair."""
    whole: Tensor
    """bool [H, nq, nk]: blocks with members of which the mask shows every pair."""
    q_centers: Tensor | None = None
    """[H, nq, D]: the centroids of clustered queries."""
    k_centers: Tensor | None = None
    """[H, nk, D]: the centroids of clustered keys."""

    @property
    def q_sizes(self) -> Tensor:
        """int64 [H, nq]: how many queries each block has."""
        return sizes(self.q_block, self.nq)

    @property
    def k_sizes(self) -> Tensor:
        """int64 [H, nk]: how many keys each block has."""
        return sizes(self.k_block, self.nk)

    def over_queries(self, x: Tensor, how: How = "sum") -> Tensor:
        """[H, Sq, C] over the queries of each block: [H, nq, C]."""
        return reduced(x, self.q_block, self.nq, how)

    def over_keys(self, x: Tensor, how: How = "sum") -> Tensor:
        """[H, Sk, C] over the keys of each block: [H, nk, C]."""
        return reduced(x, self.k_block, self.nk, how)

    def over_pairs(self, x: Tensor, how: How = "sum") -> Tensor:
        """[H, Sq, Sk] over the pairs of each block: [H, nq, nk]; a mean is one of means."""
        return self.over_keys(self.over_queries(x, how).transpose(1, 2), how).transpose(1, 2)

    def spread(self, x: Tensor) -> Tensor:
        """[H, nq, nk] to the pairs of each block: [H, Sq, Sk]; 0 where a key lies in no block."""
        heads = torch.arange(len(x), device=x.device)[:, None, None]
        pairs = x[heads, self.q_block[:, :, None], self.k_block.clamp(min=0)[:, None, :]] if x.numel() else None
        shape = (*self.q_block.shape, self.k_block.shape[1])
        return x.new_zeros(shape) if pairs is None else torch.where(self.k_block[:, None, :] >= 0, pairs, 0).to(x.dtype)


def cut(part: Part, rows: Rows, q: int, k: int) -> Blocks:
    """Blocks of q queries and k keys."""
    heads, queries, keys = rows.shape
    device = rows.q.device
    q_block = (torch.arange(queries, device=device) // q).expand(heads, queries)
    k_block = (torch.arange(keys, device=device) // k).expand(heads, keys)
    return blocks_of(q_block, k_block, -(-queries // q), -(-keys // k), seen_keys(part, rows))


def blocks_of(
    q_block: Tensor,
    k_block: Tensor,
    nq: int,
    nk: int,
    seen: Tensor,
    q_centers: Tensor | None = None,
    k_centers: Tensor | None = None,
) -> Blocks:
    """The blocks that these labels [H, Sq] and [H, Sk] make, under a mask [H, Sq, Sk]."""
    per_row = reduced(seen.double().transpose(1, 2), k_block, nk, "sum").transpose(1, 2)
    shown = reduced(per_row, q_block, nq, "sum")
    pairs = sizes(q_block, nq)[:, :, None] * sizes(k_block, nk)[:, None, :]
    whole = (shown == pairs) & (pairs > 0)
    return Blocks(q_block, k_block, nq, nk, seen, shown > 0, whole, q_centers, k_centers)


def reduced(x: Tensor, block: Tensor, n: int, how: How) -> Tensor:
    """x [H, N, C] over the members of each block, by the labels [H, N]: [H, n, C]; the label -1 is left out."""
    at = torch.where(block < 0, n, block)[..., None].expand(x.shape)
    out = x.new_full((x.shape[0], n + 1, x.shape[2]), EMPTY[how])
    return out.scatter_reduce(1, at, x, how, include_self=how in ("amax", "amin", "sum"))[:, :n]


def sizes(block: Tensor, n: int) -> Tensor:
    """int64 [H, n]: how many members each block has."""
    return reduced(torch.ones_like(block)[..., None], block, n, "sum")[..., 0]
