"""Proves the integers of a variant from its sizes' bounds: which divisions round the same way on every machine, and
which index arithmetic fits 32 bits; what is not proven is computed in 64.

Positions are at most 2**24 in magnitude unless the spec's `sizes` say otherwise, so i, j and sums of a few of them are
proven; products of positions, or sums with unbounded integers read from inputs, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from typing import Final

from attncc.ir.attention import Attention, Call, KeyRange, KeyTiles, Part
from attncc.ir.expr import Expr, cast_to, maximum, minimum, name
from attncc.ir.rewrite import rebuild
from attncc.passes.facts import size_ranges

Range = tuple[float, float]

INT32: Final = (-(2.0**31), 2.0**31 - 1)
ANY: Final[Range] = (-inf, inf)


def legalize(attn: Attention) -> Attention:
    """The variant with its integer arithmetic made safe; float formulas stay as they are."""
    ranges = name_ranges(attn)

    def safe(e: Expr) -> Expr:
        return _Prover(ranges).visit(e)[0]

    def steps(found: tuple[Call, ...]) -> tuple[Call, ...]:
        return tuple(replace(step, args=tuple(map(safe, step.args))) for step in found)

    parts = tuple(_part(p, safe) for p in attn.parts)
    kept = None if attn.kept is None else replace(attn.kept, steps=steps(attn.kept.steps))
    return replace(attn, parts=parts, prologue=steps(attn.prologue), epilogue=steps(attn.epilogue), kept=kept)


def _part(part: Part, safe: Callable[[Expr], Expr]) -> Part:
    sink = part.normalizer.sink
    tiles = part.key_tiles
    return replace(
        part,
        score=safe(part.score),
        mask=safe(part.mask),
        normalizer=replace(part.normalizer, sink=None if sink is None else safe(sink)),
        key_tiles=None if tiles is None else _key_tiles(tiles, safe),
    )


def _key_tiles(tiles: KeyTiles, safe: Callable[[Expr], Expr]) -> KeyTiles:
    def end(e: Expr) -> Expr:
        wide = safe(e)
        return wide if wide.dtype == "i32" else cast_to(maximum(minimum(wide, name("Sk")), 0), "i32")

    ranges = tuple(KeyRange(*map(end, (r.lo, r.hi, r.full_lo, r.full_hi))) for r in tiles.ranges)
    return replace(tiles, ranges=ranges, skip=None if tiles.skip is None else safe(tiles.skip))


def name_ranges(attn: Attention) -> dict[str, Range]:
    """What the integer names of a variant's formulas range over."""
    sizes = {s: _known(r) for s, r in size_ranges(attn).items()}
    keys, queries = sizes["Sk"][1], sizes["Sq"][1]
    position: Range = {
        "bottom_right": (-queries, keys),
        "top_left": (0.0, queries),
        "input": INT32,
    }[attn.align.kind]
    key, row = (0.0, keys), (-1.0, queries)  # the last row of an empty tile is -1
    return sizes | {
        "i": position, "i0": position, "i1": (position[0] - 1, position[1]), "j": key, "j0": key, "j1": (-1.0, keys),
        "row": row, "row0": (0.0, queries), "row1": row,
        "b": (0.0, sizes["B"][1]), "h": (0.0, attn.heads.q - 1.0), "hk": (0.0, attn.heads.kv - 1.0),
    }  # fmt: skip


def _known(r: tuple[int | None, int | None]) -> Range:
    return -inf if r[0] is None else float(r[0]), inf if r[1] is None else float(r[1])


def _corners(f: Callable[[float, float], float]) -> Callable[[Range, Range], Range]:
    def rule(a: Range, b: Range) -> Range:
        values = [f(x, y) for x in a for y in b]
        return ANY if any(v != v for v in values) else (min(values), max(values))

    return rule


def _times(x: float, y: float) -> float:
    return 0.0 if 0.0 in (x, y) else x * y


def _floordiv(a: Range, b: Range) -> Range:
    if b[0] < 1:
        return (0.0, a[1]) if a[0] >= 0 and b[0] >= 0 else ANY
    low = a[0] // b[0] if a[0] != -inf else -inf
    return min(low, a[0] // b[1] if a[0] != -inf and b[1] != inf else low), max(
        a[1] // b[0] if a[1] != inf else inf, 0.0
    )


def _mod(a: Range, b: Range) -> Range:
    return (0.0, b[1] - 1) if b[0] >= 0 else ANY


def _one(f: Callable[[Range], Range]) -> Callable[..., Range]:
    return f


def _two(f: Callable[[Range, Range], Range]) -> Callable[..., Range]:
    return f


def _abs(a: Range) -> Range:
    return (0.0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))), max(abs(a[0]), abs(a[1]))


def _where(_: Range, a: Range, b: Range) -> Range:
    return min(a[0], b[0]), max(a[1], b[1])


RANGES: Final[Mapping[str, Callable[..., Range]]] = {
    "add": _corners(lambda x, y: x + y),
    "sub": _corners(lambda x, y: x - y),
    "mul": _corners(_times),
    "min": _two(lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
    "max": _two(lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
    "neg": _one(lambda a: (-a[1], -a[0])),
    "abs": _abs,
    "where": _where,
    "floordiv": _floordiv,
    "mod": _mod,
}
"""What an operator's value ranges over, of those that make integers from integers."""

COMPARISONS: Final = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
WIDENED: Final = frozenset({"add", "sub", "mul", "neg", "abs"})
"""Operators whose value can leave the range of their arguments."""


class _Prover:
    """One walk over a formula: rewrites each node over its safe arguments, with the range of its value."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self.ranges = ranges

    def visit(self, e: Expr) -> tuple[Expr, Range]:
        parts = [self.visit(a) for a in e.args]
        args, ranges = tuple(p[0] for p in parts), [p[1] for p in parts]
        if e.op in COMPARISONS:
            return rebuild(e, _narrow(args, ranges)), ANY
        if e.dtype == "bool":
            return rebuild(e, args), (0.0, 1.0)
        if e.dtype not in ("i32", "i64"):
            return rebuild(e, args), ANY
        if e.op == "const" and e.value is not None:
            return e, (float(e.value), float(e.value))
        if e.op == "name":
            return e, self.ranges.get(str(e.attr), INT32)
        if e.op not in RANGES:
            return self._read(rebuild(e, args), ranges)
        found = RANGES[e.op](*ranges)
        if e.op in ("floordiv", "mod") and ranges[0][0] >= 0 and ranges[1][0] >= 0:
            return _nonneg(rebuild(e, args)), found
        if e.op in WIDENED and e.dtype == "i32" and not (INT32[0] <= found[0] and found[1] <= INT32[1]):
            args = tuple(cast_to(a, "i64") for a in args)
        return rebuild(e, args), found

    def _read(self, e: Expr, ranges: list[Range]) -> tuple[Expr, Range]:
        """Reads and what keeps the range of its argument."""
        if e.op in ("rows_min", "rows_max"):
            return replace(e, dtype=e.args[0].dtype), ranges[0]
        if e.op == "cast":
            return e, ranges[0]
        if e.op == "bucket":
            return e, (0.0, INT32[1])
        return e, INT32 if e.dtype == "i32" else ANY


def _narrow(args: tuple[Expr, ...], ranges: list[Range]) -> tuple[Expr, ...]:
    """Compares in 32 bits what is proven to fit on one side: a wide other side is clamped to just outside of it."""
    for one, other in ((0, 1), (1, 0)):
        low, high = ranges[one]
        if args[one].dtype == "i32" and args[other].dtype == "i64" and INT32[0] < low and high < INT32[1]:
            clamped = cast_to(minimum(maximum(args[other], int(low) - 1), int(high) + 1), "i32")
            return (args[0], clamped) if one == 0 else (clamped, args[1])
    return args


def _nonneg(e: Expr) -> Expr:
    return replace(e, attr="nonneg") if e.op in ("floordiv", "mod") else e
