"""Which key tiles a query tile walks: solved ranges become disjoint runs of whole tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from attncc.ir.attention import Attention, KeyRange, KeyTiles
from attncc.ir.build import Builder, quotient
from attncc.ir.expr import Expr, Value, const, maximum, minimum, name, where

BN = name("BN")


@dataclass(frozen=True, slots=True)
class Run:
    """Keys [lo, hi), lo a multiple of BN: whole tiles, the last of them perhaps cut by the sequence's end."""

    lo: Expr
    hi: Expr

    @property
    def empty(self) -> bool:
        return self.lo == self.hi


@dataclass(frozen=True, slots=True)
class Runs:
    """Tiles in which every pair counts, and tiles that need the mask; no tile is in two runs.

    `lo` and `hi` bound every visible key: what lies outside is never used.
    """

    full: tuple[Run, ...]
    masked: tuple[Run, ...]
    lo: Expr
    hi: Expr


def key_tiles_of(attn: Attention) -> KeyTiles:
    """Where the mask lets keys count, as sparsify solved it."""
    found = attn.part.key_tiles
    assert found is not None, "sparsify runs before lowering"
    return found


def solve_runs(b: Builder, key_tiles: KeyTiles, keys: Expr, bind: Callable[[Expr], Expr]) -> Runs:
    """Binds the ends of every run; `keys` is the sequence's length, `bind` makes a bound a scalar."""
    ranges = [_clip(b, r, keys, bind, n, len(key_tiles.ranges)) for n, r in enumerate(key_tiles.ranges)]
    lo, hi = ranges[0].lo, ranges[0].hi
    if len(ranges) > 1:
        b.note("several ranges: in order, and each only from where the one before it ended")
        ranges = _sort(b, ranges)
        lo = ranges[0].lo
        for r in ranges[1:]:
            hi = maximum(hi, r.hi)
        hi = b.let("key_end", hi)
    full: list[Run] = []
    masked: list[Run] = []
    cursor: Expr = const(0)
    for n, r in enumerate(ranges):
        suffix = f"_{n}" if len(ranges) > 1 else ""
        start = r.lo if r.lo.value == 0 else b.let(f"lo{suffix}", quotient(r.lo, BN) * BN)
        if n:
            start = b.let(f"lo{suffix}", maximum(start, cursor))
        full_lo, full_hi = _full_part(b, r, start, suffix)
        full.append(Run(full_lo, full_hi))
        masked += [Run(start, full_lo), Run(full_hi, r.hi)]
        if n + 1 < len(ranges):
            cursor = b.let("cursor", maximum(cursor, round_up(r.hi)))
    return Runs(tuple(r for r in full if not r.empty), tuple(r for r in masked if not r.empty), lo, hi)


def clip(b: Builder, text: str, e: Expr, keys: Expr) -> Expr:
    """A bound kept inside [0, keys], bound to a name where that takes any work."""
    return e if e == keys or e.value == 0 else b.let(text, maximum(minimum(e, keys), 0))


def _clip(b: Builder, r: KeyRange, keys: Expr, bind: Callable[[Expr], Expr], n: int, of: int) -> KeyRange:
    suffix = f"_{n}" if of > 1 else ""
    lo, hi, full_lo, full_hi = map(bind, (r.lo, r.hi, r.full_lo, r.full_hi))

    return KeyRange(
        clip(b, "key_lo" + suffix, lo, keys),
        clip(b, "key_hi" + suffix, hi, keys),
        clip(b, "full_lo" + suffix, full_lo, keys),
        clip(b, "full_hi" + suffix, full_hi, keys),
    )


def _full_part(b: Builder, r: KeyRange, start: Expr, suffix: str) -> tuple[Expr, Expr]:
    """The whole tiles of [full_lo, full_hi) inside [start, hi); an empty run where there are none."""
    if r.full_hi.value == 0:
        return start, start
    if r.full_lo.value == 0 and start.value == 0:
        end = minimum(r.full_hi, r.hi) if r.full_hi != r.hi else r.hi
        return start, b.let(f"full_end{suffix}", quotient(end, BN) * BN)
    stop = maximum(round_up(r.hi), start)
    lo = b.let(f"full_start{suffix}", minimum(maximum(round_up(r.full_lo), start), stop))
    end = quotient(minimum(r.full_hi, r.hi), BN) * BN
    return lo, b.let(f"full_end{suffix}", maximum(end, lo))


def round_up(e: Expr) -> Expr:
    """The least multiple of BN that is >= e, which is not negative."""
    return e if e.value == 0 else quotient(e + (BN - 1), BN) * BN


def _sort(b: Builder, ranges: list[KeyRange]) -> list[KeyRange]:
    """Orders ranges by their start with a sorting network of selects; a start of 0 needs none."""
    out = list(ranges)
    for x, y in combinations(range(len(out)), 2):
        first, second = out[x], out[y]
        if first.lo.value == 0:
            continue
        swap = b.let(f"swap_{x}{y}", first.lo > second.lo)
        out[x] = _select(b, swap, second, first, f"first_{x}{y}")
        out[y] = _select(b, swap, first, second, f"second_{x}{y}")
    return out


def _select(b: Builder, c: Expr, yes: KeyRange, no: KeyRange, text: str) -> KeyRange:
    def pick(part: str) -> Expr:
        return b.let(f"{text}_{part}", where(c, getattr(yes, part), getattr(no, part)))

    return KeyRange(pick("lo"), pick("hi"), pick("full_lo"), pick("full_hi"))


def for_each_tile(b: Builder, runs: tuple[Run, ...], text: str, body: Callable[[Expr], None]) -> None:
    """One loop over the tiles of all runs: `body` gets the position of each tile's first key."""
    if not runs:
        return
    if len(runs) == 1:
        with b.loop("n", runs[0].lo, runs[0].hi, BN) as n:
            body(n)
        return
    ends = number_tiles(b, runs, text)
    with b.loop("t", 0, ends[-1]) as t:
        body(b.let("n", tile_at(t, runs, ends)))


@dataclass(frozen=True, slots=True)
class Line:
    """The tiles of some runs, one behind the other."""

    runs: tuple[Run, ...]
    ends: tuple[Expr, ...]
    """How many tiles there are up to the end of each run."""

    @property
    def tiles(self) -> Expr:
        return self.ends[-1] if self.ends else const(0)


def line_up(b: Builder, runs: tuple[Run, ...], text: str) -> Line:
    return Line(runs, number_tiles(b, runs, text) if runs else ())


def for_each_between(
    b: Builder, line: Line, first: Expr, last: Expr, stride: Value, body: Callable[[Expr], None]
) -> None:
    """One loop over every `stride`-th tile of [first, last) of a line: `body` gets the position of its first key."""
    if line.runs:
        with b.loop("t", first, last, stride) as t:
            body(b.let("n", tile_at(t, line.runs, line.ends)))


def number_tiles(b: Builder, runs: tuple[Run, ...], text: str) -> tuple[Expr, ...]:
    """Binds, for each run, how many tiles there are up to its end."""
    ends: list[Expr] = []
    for k, run in enumerate(runs):
        tiles = quotient(maximum(run.hi - run.lo, 0) + (BN - 1), BN)
        ends.append(b.let(f"{text}_{k}", tiles if k == 0 else ends[-1] + tiles))
    return tuple(ends)


def tile_at(t: Expr, runs: tuple[Run, ...], ends: tuple[Expr, ...]) -> Expr:
    """The first key of tile t of all runs, which `number_tiles` counted."""

    def of_run(k: int) -> Expr:
        begun: Value = t if k == 0 else t - ends[k - 1]
        return runs[k].lo + begun * BN

    at = of_run(len(runs) - 1)
    for k in reversed(range(len(runs) - 1)):
        at = where(t < ends[k], of_run(k), at)
    return at
