"""The algebra of key ranges: what a solved mask leaves of the keys, as a short union of intervals.

A `Term` holds two intervals of keys for one tile of queries: no row sees a key outside [seen.lo, seen.hi),
every row sees all of [full.lo, full.hi). None is an open end; all ends are clipped to [0, Sk] when used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Final, Literal

from attncc.ir.expr import Expr, const, ew, name, where
from attncc.ir.intervals import Bound
from attncc.passes.linear import at_most, tidy

MAX_TERMS: Final = 4
FIRST: Final = const(0)
END: Final = name("Sk")

Extreme = Literal["min", "max"]


def clip(op: Extreme, a: Expr, b: Expr) -> Expr:
    """The least or greatest of two ends, as short as it gets when only its clip to [0, Sk] counts."""
    for end, other in ((a, b), (b, a)):
        if end in (FIRST, END):
            return end if (end == FIRST) == (op == "min") else other
        if end.op == "where" and (FIRST in end.args or END in end.args):
            c, x, y = end.args
            return choose(c, clip(op, x, other), clip(op, y, other))
    return tidy(ew(op, a, b))


def choose(c: Expr, a: Expr, b: Expr) -> Expr:
    """where(c, a, b), less what c already decides in either branch."""
    if a.op == "where" and a.args[0] == c:
        a = a.args[1]
    if b.op == "where" and b.args[0] == c:
        b = b.args[2]
    if a.op == "where" and a.args[2] == b:
        return where(c & a.args[0], a.args[1], b)
    if b.op == "where" and b.args[1] == a:
        return where(c | b.args[0], a, b.args[2])
    return where(c, a, b)


def end(e: Bound) -> Bound:
    """An end in its shortest form."""
    if e is None:
        return None
    short = tidy(e)
    return clip(short.op, *map(_known, short.args)) if short.op == "min" or short.op == "max" else short


def _known(e: Expr) -> Expr:
    return end(e) or e


@dataclass(frozen=True, slots=True)
class Span:
    """The keys [lo, hi)."""

    lo: Bound = None
    hi: Bound = None

    def __and__(self, other: Span) -> Span:
        return Span(_narrower("max", self.lo, other.lo), _narrower("min", self.hi, other.hi))

    def hull(self, other: Span) -> Span:
        return Span(_wider("min", self.lo, other.lo), _wider("max", self.hi, other.hi))

    def touches(self, other: Span) -> bool:
        """Whether the hull of both is certainly their union."""
        if self.lo == other.lo or self.hi == other.hi:
            return True
        return self._reaches(other) or other._reaches(self)

    def _reaches(self, other: Span) -> bool:
        """Whether `other` certainly begins inside this span, or at its end."""
        if other.lo is None:
            return False
        begins = self.lo is None or at_most(self.lo, other.lo)
        return begins and (self.hi is None or at_most(other.lo, self.hi))

    @property
    def empty(self) -> bool:
        """Whether it certainly holds no key."""
        return self.hi is not None and at_most(self.hi, self.lo or FIRST)


def _narrower(op: Extreme, a: Bound, b: Bound) -> Bound:
    if a is None or b is None:
        return a if b is None else b
    return clip(op, a, b)


def _wider(op: Extreme, a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else clip(op, a, b)


@dataclass(frozen=True, slots=True)
class Term:
    """What one conjunction of a mask lets a tile of queries see."""

    seen: Span = Span()
    full: Span | None = Span()
    """None: no key is known to be seen by all rows."""

    def __and__(self, other: Term) -> Term:
        full = None if self.full is None or other.full is None else self.full & other.full
        return Term(self.seen & other.seen, None if full is None or full.empty else full)

    def merge(self, other: Term) -> Term | None:
        """One term for both, where nothing is lost by it."""
        if not self.seen.touches(other.seen):
            return None
        seen = self.seen.hull(other.seen)
        if self.full is None or other.full is None:
            return Term(seen, self.full or other.full)
        return Term(seen, self.full.hull(other.full)) if self.full.touches(other.full) else None


Union = tuple[Term, ...]
EVERYTHING: Final[Union] = (Term(),)
NOTHING: Final[Union] = ()


def both(a: Union, b: Union) -> Union:
    """The keys in `a` and in `b`."""
    return _compact([x & y for x, y in product(a, b)])


def either(a: Union, b: Union) -> Union:
    """The keys in `a` or in `b`."""
    return _compact([*a, *b])


def _compact(terms: Sequence[Term]) -> Union:
    kept: list[Term] = []
    for term in terms:
        if term.seen.empty:
            continue
        for at, other in enumerate(kept):
            if merged := other.merge(term):
                kept[at] = merged
                break
        else:
            kept.append(term)
    if len(kept) <= MAX_TERMS:
        return tuple(kept)
    return (Term(reduce(Span.hull, (t.seen for t in kept)), None),)
