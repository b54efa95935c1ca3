"""Solves each part's mask for the keys: which key ranges a tile of queries visits, and where no mask is due.

The mask goes through `solve` (comparisons become `j <= g`, `j >= g`), every literal becomes a term of
`ranges` by interval analysis over the rows of the tile, and `&` and `|` join the terms. What cannot be
solved narrows nothing: it gets a test per key tile, or a classification kernel where it reads data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from typing import Final

from attncc.ir.attention import Attention, KeyRange, KeyTiles, Part
from attncc.ir.expr import FALSE, FLOATS, TRUE, Expr, cast_to, name, where
from attncc.ir.intervals import Interval, interval
from attncc.ir.rewrite import names, transform, walk
from attncc.passes.linear import tidy
from attncc.passes.ranges import END, EVERYTHING, FIRST, NOTHING, Span, Term, Union, both, either, end
from attncc.passes.solve import J, Solver, moves_with_key, push_not

ROWS: Final[Mapping[str, Interval]] = {"i": (name("i0"), name("i1")), "row": (name("row0"), name("row1"))}
TILE: Final[Mapping[str, Interval]] = {**ROWS, "j": (name("j0"), name("j1"))}

SMALLEST_TILE: Final = 16
"""No kernel has tiles of fewer keys."""

ANY_BLOCK: Final = 2**24
"""Granularity of a mask that a position is not part of: no sequence is longer."""

NEVER_NAN: Final = frozenset(
    "add sub mul neg abs min max where floor sigmoid tanh erf sin cos div floordiv cast const name".split()
)
"""Float operators that give a number for all positions (div and floordiv are known for sizes alone)."""


def sparsify(attn: Attention) -> Attention:
    """Sets `key_tiles` of every part."""
    solver = Solver({i.name: i for i in attn.inputs if i.sorted})
    return replace(attn, parts=tuple(_sparsify(part, solver) for part in attn.parts))


def _sparsify(part: Part, solver: Solver) -> Part:
    mask = solver.solve(push_not(part.mask))
    literals = frozenset(_literals(mask))
    rising = frozenset(solver.sorted_inputs)
    terms = _Terms(rising).of(mask)
    listed = any(_is_data(e) for e in literals)
    return replace(
        part,
        key_tiles=KeyTiles(
            ranges=tuple(sorted(map(_key_range, terms), key=lambda r: r.lo != FIRST)),
            skip=None if listed else _skip(mask, rising),
            listed=listed,
            granularity=(_granularity(part.mask, "i"), _granularity(part.mask, "j")) if listed else (1, 1),
        ),
    )


def _literals(e: Expr) -> Iterator[Expr]:
    if e.op in ("and", "or"):
        for a in e.args:
            yield from _literals(a)
    else:
        yield e


def _is_solved(literal: Expr) -> bool:
    if not moves_with_key(literal):
        return True
    return literal.op in ("le", "ge") and literal.args[0] == J and not moves_with_key(literal.args[1])


def _is_data(literal: Expr) -> bool:
    """Whether the literal reads data that moves with the keys, in a way no range can say."""
    reads = (n for n in walk(literal) if n.op in ("load", "bucket"))
    return not _is_solved(literal) and any(map(moves_with_key, reads))


def _is_trusted(literal: Expr) -> bool:
    """Whether interval analysis holds for the literal: in floats, none of its values may be NaN."""
    floats = [n for n in walk(literal) if n.dtype in FLOATS]
    return all(n.op in NEVER_NAN for n in floats) or not names(literal) & {"i", "j", "row"}


@dataclass(frozen=True, slots=True)
class _Terms:
    """Reads a solved mask as a union of key ranges."""

    rising: frozenset[str]

    def of(self, mask: Expr) -> Union:
        match mask:
            case Expr("and", (a, b)):
                return both(self.of(a), self.of(b))
            case Expr("or", (a, b)):
                return either(self.of(a), self.of(b))
            case Expr("le" | "ge", (left, g)) if left == J and _is_solved(mask):
                return self._ray(mask.op, g)
            case _ if _is_solved(mask):
                return self._switch(mask)
            case _:
                return (Term(full=None),)

    def _ray(self, op: str, g: Expr) -> Union:
        """j <= g or j >= g: seen by some row up to the farthest g, by all up to the nearest."""
        low, high = interval(g, ROWS, self.rising)
        if op == "ge":
            return (Term(Span(lo=end(low)), None if high is None else Span(lo=end(high))),)
        after_low, after_high = (None if e is None else end(e + 1) for e in (low, high))
        return (Term(Span(hi=after_high), None if after_low is None else Span(hi=after_low)),)

    def _switch(self, literal: Expr) -> Union:
        """A condition on the rows alone: all keys or none."""
        every, some = interval(literal, ROWS, self.rising) if _is_trusted(literal) else (FALSE, TRUE)
        every, some = tidy(every or FALSE), tidy(some or TRUE)
        if some == FALSE:
            return NOTHING
        full = None if every == FALSE else Span(hi=_all_keys_if(every))
        return (Term(Span(hi=_all_keys_if(some)), full),)


def _all_keys_if(condition: Expr) -> Expr | None:
    return None if condition == TRUE else where(condition, END, FIRST)


def _key_range(term: Term) -> KeyRange:
    full = term.full or Span(FIRST, FIRST)
    ends = (term.seen.lo or FIRST, term.seen.hi or END, full.lo or FIRST, full.hi or END)
    return KeyRange(*ends)


def _skip(mask: Expr, rising: frozenset[str]) -> Expr | None:
    """Whether a key tile may hold a visible key, from the conjuncts that the ranges do not say exactly."""
    loose = [e for e in _conjuncts(mask) if not all(map(_is_solved, _literals(e)))]
    if not loose:
        return None
    told = transform(reduce(Expr.__and__, loose), lambda e: TRUE if _tells_nothing(e) else None)
    some = tidy(interval(told, TILE, rising)[1] or TRUE)
    return None if some == TRUE else some


def _conjuncts(e: Expr) -> tuple[Expr, ...]:
    return tuple(c for a in e.args for c in _conjuncts(a)) if e.op == "and" else (e,)


def _tells_nothing(e: Expr) -> bool:
    """Whether a literal says nothing about a whole tile: it repeats within any, or may be NaN."""
    if e.dtype != "bool" or e.op in ("and", "or", "const"):
        return False
    periods = [n.args[1].value for n in walk(e) if n.op == "mod" and moves_with_key(n.args[0])]
    return any(p is not None and 0 < p <= SMALLEST_TILE for p in periods) or not _is_trusted(e)


def _granularity(mask: Expr, position: str) -> int:
    """The mask is constant on blocks of this many positions: all it knows of one is `position // n`."""
    divisors: list[int] = []

    def visit(e: Expr) -> None:
        names_it = e.op == "name" and (e.attr == position or (e.attr == "row" and position == "i"))
        if e.op == "floordiv" and e.args[0] == name(position) and isinstance(e.args[1].value, int):
            divisors.append(abs(e.args[1].value))
        elif names_it:
            divisors.append(1)
        else:
            for a in e.args:
                visit(a)

    visit(mask)
    return reduce(gcd, divisors) if divisors else ANY_BLOCK
