"""Solves each part's mask for the keys: which key ranges a tile of queries visits, and where no mask is due.

The mask goes through `solve` (comparisons become `j <= g`, `j >= g`), every literal becomes a term of
`ranges` by interval analysis over the rows of the tile, and `&` and `|` join the terms. What cannot be
solved narrows nothing: it gets a test per key tile, or a classification kernel where it reads data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import product
from math import gcd
from typing import Final

from attncc.ir.attention import Attention, KeyRange, KeyTiles, Part
from attncc.ir.expr import FALSE, TRUE, Expr, ew, name, where
from attncc.ir.intervals import UNKNOWN, Bound, Interval, interval
from attncc.ir.rewrite import conjuncts, names, walk
from attncc.passes.ieee import is_finite
from attncc.passes.linear import tidy
from attncc.passes.ranges import END, FIRST, NOTHING, Cube, Span, Term, end, unite_cubes, unite_terms
from attncc.passes.solve import J, Solver, compares_conditions, is_simple, length, moves_with_key, push_not

ROWS: Final[Mapping[str, Interval]] = {"i": (name("i0"), name("i1")), "row": (name("row0"), name("row1"))}
TILE: Final[Mapping[str, Interval]] = {**ROWS, "j": (name("j0"), name("j1"))}

SMALLEST_TILE: Final = 16
"""No kernel has tiles of fewer keys."""

ANY_BLOCK: Final = 2**24
"""Granularity of a mask that a position is not part of: no sequence is longer."""


def sparsify(attn: Attention) -> Attention:
    """Sets `key_tiles` of every part."""
    solver = Solver({i.name: i for i in attn.inputs if i.sorted})
    return replace(attn, parts=tuple(_sparsify(part, solver) for part in attn.parts))


def _sparsify(part: Part, solver: Solver) -> Part:
    mask = solver.solve(push_not(part.mask))
    rising = {text: length(x) for text, x in solver.sorted_inputs.items()}
    terms = unite_terms(_term(cube, rising) for cube in _cubes(mask)) or (NOTHING,)
    listed = any(map(_is_data, _literals(mask)))
    key_tiles = KeyTiles(
        ranges=tuple(sorted(map(_key_range, terms), key=lambda r: r.lo != FIRST)),
        skip=None if listed else _skip(mask, rising),
        listed=listed,
        granularity=(_granularity(part.mask, "i"), _granularity(part.mask, "j")) if listed else (1, 1),
    )
    return replace(part, mask=_cheaper(part.mask, mask), key_tiles=key_tiles)


COST: Final[Mapping[str, int]] = {"load": 8, "bucket": 32, "floordiv": 4, "mod": 4}
"""Operators of a mask that take more than one instruction, in instructions."""


def _cheaper(mask: Expr, solved: Expr) -> Expr:
    """The form a kernel evaluates: the solved one compares keys with bounds that only rows move, mostly with less work
    a pair than the mask as it was written (no division, no search)."""
    return solved if _work(solved) <= _work(mask) else mask


def _work(mask: Expr) -> int:
    """What of a formula is done for every pair: operations that move with the key, by their cost."""
    return sum(COST.get(n.op, 1) for n in walk(mask) if n.op not in ("const", "name") and moves_with_key(n))


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
    """Whether interval analysis holds for the literal, in a short formula: in floats, no value may be NaN."""
    if any(map(compares_conditions, walk(literal))) or not is_simple(literal):
        return False
    return is_finite(literal) or not names(literal) & {"i", "j", "row"}


def _cubes(mask: Expr) -> tuple[Cube, ...]:
    """A solved mask as a union of conjunctions."""
    match mask:
        case Expr("and", (a, b)):
            return unite_cubes(x & y for x, y in product(_cubes(a), _cubes(b)))
        case Expr("or", (a, b)):
            return unite_cubes((*_cubes(a), *_cubes(b)))
        case _ if not moves_with_key(mask):
            return (Cube(when=tidy(mask)),)
        case Expr("le", (_, g)) if _is_solved(mask):
            return (Cube(Span(hi=tidy(g + 1))),)
        case Expr("ge", (_, g)) if _is_solved(mask):
            return (Cube(Span(lo=g)),)
        case _:
            return (Cube(loose=True),)


def _term(cube: Cube, rising: Mapping[str, Expr]) -> Term:
    """A cube over the rows of a tile: some row sees up to the farthest ends, all of them up to the nearest."""
    conditions = [interval(e, ROWS, rising) if _is_trusted(e) else UNKNOWN for e in conjuncts(cube.when)]
    every = tidy(reduce(Expr.__and__, (c[0] or FALSE for c in conditions)))
    some = tidy(reduce(Expr.__and__, (c[1] or TRUE for c in conditions)))
    span = cube.span
    lo, hi = (UNKNOWN if e is None else _interval(e, rising) for e in (span.lo, span.hi))
    seen = _if(some, Span(_end(lo[0]), _end(hi[1])))
    unknown = every == FALSE or (span.lo is not None and lo[1] is None) or (span.hi is not None and hi[0] is None)
    full = None if cube.loose or unknown else _if(every, Span(_end(lo[1]), _end(hi[0])))
    return Term(seen, None if full is None or full.empty else full)


def _if(condition: Expr, span: Span) -> Span:
    """`span` where the condition holds, else no key."""
    return span if condition == TRUE else span & Span(hi=where(condition, END, FIRST))


def _interval(e: Expr, rising: Mapping[str, Expr]) -> Interval:
    return interval(e, ROWS, rising) if is_simple(e) else UNKNOWN


def _end(e: Bound) -> Bound:
    return None if e is None else end(e)


def _key_range(term: Term) -> KeyRange:
    full = term.full or Span(FIRST, FIRST)
    ends = (term.seen.lo or FIRST, term.seen.hi or END, full.lo or FIRST, full.hi or END)
    return KeyRange(*ends)


def _skip(mask: Expr, rising: Mapping[str, Expr]) -> Expr | None:
    """Whether a key tile may hold a visible key, from the conjuncts that the ranges do not say exactly."""
    loose = [e for e in conjuncts(mask) if not all(map(_is_solved, _literals(e)))]
    if not loose:
        return None
    some = tidy(interval(_telling(reduce(Expr.__and__, loose)), TILE, rising)[1] or TRUE)
    return None if some == TRUE else some


def _telling(e: Expr) -> Expr:
    """`e` without the literals that say nothing of a whole tile: they repeat within any, or may be NaN."""
    if e.op in ("and", "or"):
        return ew(e.op, *map(_telling, e.args))
    periods = [n.args[1].value for n in walk(e) if n.op == "mod" and moves_with_key(n.args[0])]
    repeats = any(p is not None and 0 < p <= SMALLEST_TILE for p in periods)
    return TRUE if repeats or not _is_trusted(e) else e


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
