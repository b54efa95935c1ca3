"""Keeps solved bounds right in 32-bit arithmetic: sums that may leave it are computed in 64 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attncc.ir.attention import Attention, KeyRange
from attncc.ir.dims import Range, bounds, fits
from attncc.ir.expr import Expr, cast_to, ew, maximum, minimum, name
from attncc.ir.intervals import Interval
from attncc.ir.rewrite import transform
from attncc.passes.facts import size_ranges, tile_positions

GROWING: Final = frozenset({"add", "sub", "mul", "neg", "abs"})


@dataclass(frozen=True, slots=True)
class Widths:
    """Widens formulas over positions and sizes of one variant."""

    sizes: Mapping[str, Range]
    positions: Mapping[str, Interval]

    @classmethod
    def of(cls, attn: Attention) -> Widths:
        return cls(size_ranges(attn), tile_positions(attn))

    def widen(self, e: Expr) -> Expr:
        """The same value, whatever numbers the tensors hold."""
        return transform(e, self._widen)

    def _widen(self, e: Expr) -> Expr | None:
        if e.op not in GROWING or e.dtype != "i32" or fits(bounds(e, self.sizes, self.positions), "i32"):
            return None
        return ew(e.op, *(cast_to(a, "i64") for a in e.args))

    def key_range(self, r: KeyRange) -> KeyRange:
        return KeyRange(*map(self._end, (r.lo, r.hi, r.full_lo, r.full_hi)))

    def _end(self, e: Expr) -> Expr:
        wide = self.widen(e)
        return wide if wide.dtype == "i32" else cast_to(maximum(minimum(wide, name("Sk")), 0), "i32")
