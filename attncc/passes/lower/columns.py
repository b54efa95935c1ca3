"""Columns of a head as steps hold them in registers: sets that are the lanes of one tile each."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir.build import iota
from attncc.ir.expr import Expr
from attncc.passes.lower.pieces import MIN_WIDTH, pieces


@dataclass(frozen=True, slots=True)
class Columns:
    """`count` columns from `first` on, every `step`-th; lanes behind the last hold 0."""

    first: int
    count: int
    step: int = 1

    @property
    def width(self) -> int:
        """Lanes of the tile."""
        return max(MIN_WIDTH, 1 << (self.count - 1).bit_length())

    @property
    def at(self) -> Expr:
        """[width] their numbers."""
        return iota(self.width) * self.step + self.first

    @property
    def inside(self) -> Expr | None:
        """[width] which lanes are columns; None where all are."""
        return None if self.width == self.count else iota(self.width) < self.count


Parts = tuple[Columns, ...]
"""All columns of a head, each once."""


def cut(first: int, count: int, widest: int = 1024, step: int = 1) -> Parts:
    """`count` columns from `first` on as tiles of powers of two, of at most `widest` lanes, with little padding."""
    found: list[Columns] = []
    for p in pieces(count):
        for at in range(p.column, min(p.column + p.width, count), widest):
            found.append(Columns(first + at * step, min(widest, p.width, count - at), step))
    return tuple(found)


def pairs(width: int, dims: int, neighbours: bool) -> tuple[tuple[tuple[Columns, Columns, Columns], ...], Parts]:
    """The columns that a rope turns, and the others.

    Of `dims` columns each first half goes with a second one, or each with its neighbour. A pair comes with its number
    among the pairs.
    """
    turned = [
        (p, Columns(2 * p.first, p.count, 2), Columns(2 * p.first + 1, p.count, 2))
        if neighbours
        else (p, p, Columns(dims // 2 + p.first, p.count))
        for p in cut(0, dims // 2)
    ]
    return tuple(turned), cut(dims, width - dims) if width > dims else ()
