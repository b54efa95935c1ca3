"""A tile of tokens times a matrix of its head, as queries and outputs absorb the projections of a latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attncc.ir.attention import Attention, Call
from attncc.ir.build import Builder, column, iota, lanes, read, row
from attncc.ir.expr import Expr, const
from attncc.ir.widths import matrix
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.pieces import MIN_WIDTH
from attncc.passes.lower.product import Bind, Factor, of_matrix, summed
from attncc.passes.lower.scores import input_param

BLOCK: Final = 32
"""Columns of the matrix that are multiplied at once."""

Write = Callable[[Expr, Expr, Expr | None], None]
"""Columns [width], their values [rows, width], and which columns there are; None for all."""


def absorbed(
    b: Builder, bind: Bind, attn: Attention, step: Call, head: Expr, tiles: Mapping[Columns, Factor], write: Write
) -> None:
    """Writes products of tiles [rows, …] by a matrix [n, r], or one of each head [H, n, r].

    `bind` gives names that nothing else has. Method: DeepSeek-V2, arXiv 2405.04434.
    """
    x = attn.input(step.words[0])
    _, r = matrix(attn, step)
    width = min(BLOCK, max(MIN_WIDTH, 1 << (r - 1).bit_length()))
    lead = [const(0) if size == 1 else head for size in x.shape[:-2]]
    with b.loop("block", 0, r, width) as block:
        columns = b.let("columns", block + iota(width), f"[{width}]")
        inside = columns < r if r % width else None
        right: list[Factor] = []
        for c in tiles:
            w = read(input_param(x), *lead, column(c.at), row(columns), mask=lanes(c.inside, inside))
            right.append(of_matrix(bind, bind("w", w, f"[{c.width}, {width}]"), VALUE_DTYPE[attn.dtype]))
        write(columns, summed(bind, list(tiles.values()), right, f"[…, {width}]"), inside)
