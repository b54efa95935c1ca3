"""The algebra of key ranges: what a solved mask leaves of the keys, as a short union of intervals.

A `Cube` is what one conjunction lets one row see, its ends are formulas of i; a `Term` is the same for a tile
of rows. All ends are clipped to [0, Sk] when used, so any formula with the same clip may stand for an end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Final, Literal, TypeVar

from attncc.ir.expr import FALSE, TRUE, Expr, const, ew, name
from attncc.ir.intervals import Bound
from attncc.passes.linear import at_most, choose, tidy

MAX_CUBES: Final = 16
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


def end(e: Expr) -> Expr:
    """An end in its shortest form."""
    return _clip_inside(tidy(e))


def _clip_inside(e: Expr) -> Expr:
    match e:
        case Expr("min" | "max", (a, b)):
            return clip("min" if e.op == "min" else "max", _clip_inside(a), _clip_inside(b))
        case Expr("where", (c, a, b)):
            return choose(c, _clip_inside(a), _clip_inside(b))
        case _:
            return e


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
class Cube:
    """The keys of `span` where `when` (free of j) holds; `loose`: fewer than that, by an unsolved condition."""

    span: Span = Span()
    when: Expr = TRUE
    loose: bool = False

    def __and__(self, other: Cube) -> Cube:
        return Cube(self.span & other.span, self.when & other.when, self.loose or other.loose)

    def merge(self, other: Cube) -> Cube | None:
        """One cube for both, where nothing is lost by it."""
        if self.when != other.when or not self.span.touches(other.span):
            return None
        hull = self.span.hull(other.span)
        loose = [cube.span for cube in (self, other) if cube.loose]
        exact = [cube.span for cube in (self, other) if not cube.loose]
        return Cube(hull, self.when, not exact) if not loose or not exact or hull in exact else None

    @property
    def empty(self) -> bool:
        return self.span.empty or self.when == FALSE


@dataclass(frozen=True, slots=True)
class Term:
    """What a tile of queries sees: some row no more than `seen`, every row all of `full`."""

    seen: Span = Span()
    full: Span | None = Span()
    """None: no key is known to be seen by all rows."""

    def merge(self, other: Term) -> Term | None:
        """One term for both, where nothing is lost by it."""
        if not self.seen.touches(other.seen):
            return None
        seen = self.seen.hull(other.seen)
        if self.full is None or other.full is None:
            return Term(seen, self.full or other.full)
        return Term(seen, self.full.hull(other.full)) if self.full.touches(other.full) else None

    @property
    def empty(self) -> bool:
        return self.seen.empty


NOTHING: Final = Term(Span(FIRST, FIRST), None)


def unite_cubes(cubes: Iterable[Cube]) -> tuple[Cube, ...]:
    """The union of all, in no more than `MAX_CUBES`."""
    kept = _merged(cubes)
    return kept if len(kept) <= MAX_CUBES else (Cube(_hull(c.span for c in kept), loose=True),)


def unite_terms(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The union of all, in no more than `MAX_TERMS`."""
    kept = _merged(terms)
    return kept if len(kept) <= MAX_TERMS else (Term(_hull(t.seen for t in kept), None),)


Piece = TypeVar("Piece", Cube, Term)


def _merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """All pieces that may hold a key; two that make one are one."""
    kept: list[Piece] = []
    for piece in pieces:
        if piece.empty:
            continue
        for at, other in enumerate(kept):
            one = other.merge(piece)
            if one is not None:
                kept[at] = one
                break
        else:
            kept.append(piece)
    return tuple(kept)


def _hull(spans: Iterable[Span]) -> Span:
    return reduce(Span.hull, spans)
