"""Makes every conversion from integer to float a node, and moves it to the rows and columns of a tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.dims import Range, bounds
from attncc.ir.expr import FLOATS, OPS, Dtype, Expr, cast_to, ew
from attncc.ir.intervals import Interval
from attncc.ir.rewrite import names
from attncc.passes.facts import positions, size_ranges
from attncc.passes.solve import is_simple

EXACT: Final = 2**24
"""fp32 holds every integer up to this."""

COMPARISONS: Final = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
SAME_IN_FLOAT: Final = frozenset({"add", "sub", "min", "max", "abs", "where"})
"""Integer operators whose float twin gives the same number, and 0 rather than -0, where all are exact."""


@dataclass(frozen=True, slots=True)
class Casts:
    """Places conversions; knows the ranges that make moving one exact."""

    sizes: Mapping[str, Range]
    positions: Mapping[str, Interval]

    @classmethod
    def of(cls, attn: Attention) -> Casts:
        return cls(size_ranges(attn), positions(attn))

    def explicit(self, e: Expr) -> Expr:
        """An operator that computes in floats, over floats."""
        wide = _computing_dtype(e)
        if wide is None:
            return e
        first = 1 if e.op == "where" else 0
        args = tuple(a if n < first or a.dtype in FLOATS else self.to_float(a, wide) for n, a in enumerate(e.args))
        return e if args == e.args else ew(e.op, *args)

    def to_float(self, e: Expr, dtype: Dtype) -> Expr:
        """An integer formula as a float; one over rows and columns as a float formula of either."""
        if dtype != "f32" or not self._can_move(e):
            return cast_to(e, dtype)
        first = 1 if e.op == "where" else 0
        return ew(e.op, *e.args[:first], *(self.to_float(a, dtype) for a in e.args[first:]))

    def _can_move(self, e: Expr) -> bool:
        read = names(e)
        over_a_tile = "j" in read and bool(read & {"i", "row"})
        if not over_a_tile or e.op not in SAME_IN_FLOAT or not is_simple(e):
            return False
        return all(self._is_exact(x) for x in (e, *e.args) if x.dtype != "bool")

    def _is_exact(self, e: Expr) -> bool:
        least, greatest = bounds(e, self.sizes, self.positions)
        return least is not None and greatest is not None and least >= -EXACT and greatest <= EXACT


def _computing_dtype(e: Expr) -> Dtype | None:
    """The float dtype that an operator computes in, or None for integers and booleans."""
    if e.op not in OPS:
        return None
    if e.op not in COMPARISONS:
        return e.dtype if e.dtype in FLOATS else None
    joined = OPS["add"].dtype(tuple(a.dtype for a in e.args))
    return joined if joined in FLOATS else None
