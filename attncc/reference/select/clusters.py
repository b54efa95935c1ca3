"""Blocks of alike keys and queries: Lloyd's iterations from given centroids (SVG2, RetroInfer)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Call, Part
from attncc.ir.expr import Expr
from attncc.reference.rows import Rows
from attncc.reference.select.blocks import Blocks, blocks_of, reduced, sizes

TOLERANCE: Final = 1e-4
"""Iterations end when no centroid of a head moves as far."""


def clustered(call: Call, part: Part, rows: Rows, seen: Tensor) -> Blocks:
    """The blocks of `centroid_dot(K, q=Q, iters, metric)`; only keys that some row sees (seen [H, Sq, Sk]) have one.

    K [B, Hk, KC, D] and Q [B, Hq, QC, D] are the centroids to start from. Without Q the query side is the part's
    query blocks, and their means are its centroids.
    """
    assert part.select is not None
    options, run = dict(call.kwargs), part.select.block[0]
    iters, metric = options.get("iters"), str(options.get("metric", "euclidean"))
    steps = int(iters.value or 0) if isinstance(iters, Expr) else 0
    k_block, k_centers = lloyd(rows.k, _initial(rows, call.words[0]), seen.any(1), steps, metric)
    if "q" in options:
        every = torch.ones_like(rows.q[..., 0], dtype=torch.bool)
        q_block, q_centers = lloyd(rows.q, _initial(rows, str(options["q"])), every, steps, metric)
    else:
        size = run if isinstance(run, int) else 1
        q_block = (torch.arange(rows.shape[1], device=rows.q.device) // size).expand(rows.shape[:2])
        q_centers = reduced(rows.q, q_block, -(-rows.shape[1] // size), "mean")
    return blocks_of(q_block, k_block, q_centers.shape[1], k_centers.shape[1], seen, q_centers, k_centers)


def lloyd(x: Tensor, centroids: Tensor, used: Tensor, steps: int, metric: str) -> tuple[Tensor, Tensor]:
    """x [H, N, D] by its nearest centroid: labels [H, N], -1 where not used, and centroids [H, C, D].

    As published, labels belong to the centroids before the last update; a cluster without members keeps its
    centroid, and a head whose centroids rest keeps them all.
    """
    labels = nearest(x, centroids, used, metric)
    resting = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step in range(steps):
        if step:
            labels = torch.where(resting[:, None], labels, nearest(x, centroids, used, metric))
        count = centroids.shape[1]
        empty = sizes(labels, count)[..., None] == 0
        moved = torch.where(empty, centroids, reduced(x, labels, count, "mean"))
        resting = resting | ((moved - centroids).norm(dim=-1).amax(1) < TOLERANCE)
        centroids = torch.where(resting[:, None, None], centroids, moved)
    return labels, centroids


def nearest(x: Tensor, centroids: Tensor, used: Tensor, metric: str) -> Tensor:
    """The label of each x: the centroid at the least distance, or of the greatest product; the lower one at a tie."""
    product = x @ centroids.transpose(1, 2)
    far = -product if metric == "dot" else centroids.square().sum(-1)[:, None] - 2 * product
    return torch.where(used, far.argmin(-1), -1)


def _initial(rows: Rows, name: str) -> Tensor:
    """Centroids of an input [B, H, C, D] for each query head."""
    x = rows.scope.inputs[name]
    if x.shape[-1] != rows.q.shape[-1]:
        raise ValueError(f"{name}: expected centroids of {rows.q.shape[-1]} columns, got shape {list(x.shape)}")
    mine = x[rows.scope.names["b"] if len(x) > 1 else 0].to(rows.q.dtype)
    heads = rows.scope.names["h" if len(mine) == rows.shape[0] else "hk"].flatten()
    return mine[heads if len(mine) > 1 else heads * 0]
