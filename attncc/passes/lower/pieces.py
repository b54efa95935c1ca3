"""Head sizes as pieces: tiles of power-of-two widths that cover a head dim with little padding."""

from __future__ import annotations

from typing import Final, NamedTuple

from attncc.ir.build import iota
from attncc.ir.expr import Expr

MIN_WIDTH: Final = 16
"""The least width a tensor core multiplies over."""
MAX_PIECES: Final = 3
MAX_DIM: Final = 576


class Piece(NamedTuple):
    """Every `step`-th of an operand's columns from `column` on, `width` of them; what sticks out of the head dim reads
    as 0."""

    column: int
    width: int
    step: int = 1

    @property
    def columns(self) -> Expr:
        """[width] their numbers."""
        numbers = iota(self.width)
        return self.column + (numbers if self.step == 1 else numbers * self.step)

    @property
    def end(self) -> int:
        """The column behind the last one."""
        return self.column + (self.width - 1) * self.step + 1

    def suffix(self, pieces: tuple[Piece, ...]) -> str:
        """What tells this piece's variables from the others': nothing where it is the only one."""
        return "" if len(pieces) == 1 else f"_{self.column}"


def pieces(dim: int, most: int = MAX_PIECES) -> tuple[Piece, ...]:
    """A head dim cut at powers of two, widest first: 192 = 128 + 64, 80 = 64 + 16, 72 = 64 + 16 (8 of padding).

    At most `most`: each costs a product of its own, so the narrowest are rounded up together.
    """
    covered = -(-dim // MIN_WIDTH) * MIN_WIDTH
    widths = [1 << bit for bit in range(covered.bit_length() - 1, 3, -1) if covered >> bit & 1]
    if len(widths) > most:
        rest = sum(widths[most - 1 :])
        widths = [*widths[: most - 1], 1 << (rest - 1).bit_length()]
        if widths[-1] == widths[-2]:  # rounding up met its neighbour: one piece twice as wide
            return pieces(sum(widths), most)
    columns = [sum(widths[:n]) for n in range(len(widths))]
    return tuple(Piece(c, w) for c, w in zip(columns, widths, strict=True))
