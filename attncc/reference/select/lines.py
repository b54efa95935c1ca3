"""Columns and diagonals of keys, as the windows and columns that a kernel of square tiles computes (MInference)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncc.ir.attention import Call, Part
from attncc.ir.expr import Expr
from attncc.reference.rows import Rows
from attncc.reference.select.blocks import Blocks, reduced
from attncc.reference.select.scores import voting


def lines(rule: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """The pairs [H, Sq, Sk] on the best columns and diagonals of the part's exact masses.

    `sink(n)` forces the first n columns, `local(n)` the n diagonals nearest to the query. The result is wider than
    the lines, as the published kernel is: see `windows`.
    """
    assert part.select is not None
    p, some = voting(part.select.score, part, rows)
    forced = {call.name: _number(call.args[0]) for call in part.select.force if call.args}
    offset = _offsets(some)
    heads, keys = p.shape[0], p.shape[2]
    flat = torch.where(offset < 0, -1, offset).flatten().expand(heads, -1)
    farthest = int(offset.max()) if offset.numel() else 0
    mass = reduced(p.flatten(1)[..., None], flat, max(keys, farthest + 1), "sum")[..., 0]
    columns = _best(p.sum(1), _number(rule.args[0]), forced.get("sink", 0), part.select.charge)
    diagonals = _best(mass, _number(rule.args[1]), forced.get("local", 0), part.select.charge)
    first = blocks.over_queries(rows.scope.names["i"].expand(heads, -1, 1).double(), "amin")[..., 0].long()
    size = part.select.block[0] if isinstance(part.select.block[0], int) else 1
    chosen = [windows(c, d, first[h].tolist(), size) for h, (c, d) in enumerate(zip(columns, diagonals, strict=True))]
    return torch.stack(chosen).gather(1, blocks.q_block[..., None].expand(-1, -1, keys))


def windows(columns: Tensor, diagonals: Tensor, starts: list[int], size: int) -> Tensor:
    """The keys [query blocks, Sk] that the kernel of one head computes; columns and diagonals are bool, by number.

    For the queries [m, m + size) a diagonal d becomes the window of `size` keys that ends at max(m + size - d, size).
    From the farthest diagonal on, a window that begins behind the last one's end begins anew; one that overlaps it
    lengthens it by `size`, so up to size - 1 keys more than its own. A column counts where it lies before the last
    window and in none.
    """
    keys = len(columns)
    far_to_near = diagonals.nonzero().flatten().flip(0).tolist()
    made = torch.zeros(len(starts), keys, dtype=torch.bool, device=columns.device)
    for block, m in enumerate(starts):
        ranges: list[list[int]] = []
        for end in (max(m + size - d, size) for d in far_to_near if d < m + size):
            if not ranges or end > ranges[-1][1] + size:
                ranges.append([end - size, end])
            elif end > ranges[-1][1]:
                ranges[-1][1] += size
        if ranges:
            made[block, : ranges[-1][0]] = columns[: ranges[-1][0]]
        for lo, hi in ranges:
            made[block, lo:hi] = True
    return made


def _offsets(rows: Rows) -> Tensor:
    """i - j of every pair [1, R, Sk]."""
    return rows.scope.names["i"] - rows.scope.names["j"]


def _best(mass: Tensor, count: int, forced: int, charge: bool) -> Tensor:
    """The `count` greatest of mass [H, N] as bool, the first `forced` among them, or beside them if not charged."""
    first = torch.arange(mass.shape[1], device=mass.device) < forced
    ranked = torch.where(first, math.inf if charge else -math.inf, mass)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(mass, dtype=torch.bool).scatter(1, order[:, :count], True)
    return chosen | first


def _number(e: Expr) -> int:
    return int(e.value or 0)
