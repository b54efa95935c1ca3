"""The Walsh-Hadamard transform of a head's columns in registers: a butterfly over each bit of a column's number."""

from __future__ import annotations

from attncc.ir.build import expand, full, iota, reduce, reshape, row
from attncc.ir.expr import Expr, eq, where
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.flow import Before, Flow, Tiles


def transformed(f: Flow, n: int, back: int, before: Before) -> Tiles:
    """Products of queries and keys that both go through it stay as they are."""
    width, x = f.chain.widths[n], _whole(f, before(0), f.chain.widths[n])
    for bit in range(width.bit_length() - 1):
        x = f.let(f"{f.chain.operand}_crossed", _butterfly(f, x, 1 << bit), f"[{f.rows}, {width}]")
    x = f.let(f"{f.chain.operand}_transformed", x * width**-0.5, f"[{f.rows}, {width}]")
    parts = f.parts[n + 1]
    return {c: x if c == Columns(0, width) else f.let(f"{f.chain.operand}_part", _picked(x, c)) for c in parts}


def _butterfly(f: Flow, x: Expr, apart: int) -> Expr:
    """Sums of entries so many columns apart in the place of the first, differences in that of the second."""
    rows, width = x.shape
    pairs = f.let("pairs", reshape(x, (rows, int(width) // (2 * apart), 2, apart)), f"columns {apart} apart")
    second = f.once("second", eq(_along(2, 2), 1))
    sums = f.let("sums", expand(reduce("sum", pairs, 2), 2))
    differences = f.let("differences", expand(reduce("sum", where(second, -pairs, pairs), 2), 2))
    return reshape(where(second, differences, sums), x.shape)


def _along(size: int, axis: int) -> Expr:
    """The numbers along an axis of four, so that they broadcast."""
    x = row(iota(size))
    for at in (a for a in range(1, 4) if a != axis):
        x = expand(x, at) if at < axis else expand(x, len(x.shape))
    return x


def _place(c: Columns, width: int) -> tuple[tuple[int, int, int], Expr]:
    """All columns as blocks of runs of so many that are dealt out in turn, and which of these are the part's."""
    run = c.count * c.step
    shape = (width // run, c.count, c.step)
    return shape, eq(_along(shape[0], 1), c.first // run) & eq(_along(c.step, 3), c.first % c.step)


def _whole(f: Flow, tiles: Tiles, width: int) -> Expr:
    """[rows, columns] of a head whose columns are in several tiles."""
    if len(tiles) == 1:
        return next(iter(tiles.values()))
    total: Expr | None = None
    for c, tile in tiles.items():
        shape, mine = _place(c, width)
        zeros = full((f.rows, *shape), 0.0)
        spread = reshape(where(mine, expand(expand(tile, 1), 3), zeros), (f.rows, width))
        total = spread if total is None else total + spread
    assert total is not None
    return f.let(f"{f.chain.operand}_whole", total, f"[{f.rows}, {width}]")


def _picked(x: Expr, c: Columns) -> Expr:
    """The tile of a part."""
    rows, width = x.shape
    shape, mine = _place(c, int(width))
    return reduce("sum", reduce("sum", where(mine, reshape(x, (rows, *shape)), full((rows, *shape), 0.0)), 3), 1)
