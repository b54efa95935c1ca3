"""Partial states of rows whose keys are shared out to several programs: how they are kept, and merged.

A program leaves a state as it stands, not divided by its sum: states of all normalisers are sums relative to their
peaks, so merging them rounds once where outputs and their lse would be divided and multiplied again, and the state of
no keys is an exact 0. States lie at two indices; a split has them by row and share, stream-K by slot and row of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, full, iota, quotient, read, reduce, remainder, row
from attncc.ir.cache import cached
from attncc.ir.expr import Expr, Value, cast_to, const, maximum, minimum, name, where
from attncc.ir.staircase import staircase
from attncc.ir.tile import Function, Param, Scratch
from attncc.passes.lower import cache, care, storage
from attncc.passes.lower.chains import output, source
from attncc.passes.lower.forward import parameters
from attncc.passes.lower.fragments import (
    CUT_TILES,
    WHOLE_TILES,
    formulas_of,
    key_tile,
    may_hide_values,
    visits,
    writes_lse,
)
from attncc.passes.lower.grid import QueryTile, fixed_sizes, key_head, offset_of
from attncc.passes.lower.knobs import FILL, SPLIT, WRITE_LSE
from attncc.passes.lower.normalizers import (
    LANES_OF_FEW,
    LOWEST,
    TOTAL,
    VALUE_DTYPE,
    End,
    M,
    Rule,
    States,
    merge,
    rule_of,
)
from attncc.passes.lower.pieces import Piece
from attncc.passes.lower.scores import Scope, own_name, share_reads
from attncc.passes.lower.walk import Line, for_each_between, key_tiles_of, line_up, solve_runs

ROOM: Final = 8192
"""Numbers of partial outputs that a program merges at once: 64 registers of a thread where it has 128 threads."""
MOST: Final = 64
"""States that it merges at once, however narrow heads are."""
LOST: Final = "part_lost"

Place = Callable[[Expr], tuple[Expr, Expr]]
"""Where the states of these shares of a row are: one of the two indices is a vector as they are."""


def rule_of_few(attn: Attention) -> Rule:
    """The normaliser's rule where rows are few; tiles of codes have one warp, whose threads are short of registers."""
    return rule_of(attn) if cached(attn) else rule_of(attn, LANES_OF_FEW)


def walks_early(attn: Attention) -> bool:
    """Whether programs that walk keys may begin before the launch ahead has ended.

    Of codes there are more of them, of one warp, which then lie unevenly: such caches took 5 to 8 % longer on an H200.
    """
    return not cached(attn) and staircase(attn) is None


def states(attn: Attention) -> dict[str, Param]:
    """The tensors that hold them, by what they hold: a number for each state, of outputs a row of numbers."""
    rule = rule_of_few(attn)
    numbers = {"m": (rule.peak, "greatest scores"), "l": (rule.sums, "sums")}
    found = {
        text: Param(own_name(f"part_{text}", attn), "buffer", "f32", rank=2, doc=f"{doc} of partial states")
        for text, (has, doc) in numbers.items()
        if has is not None
    }
    return found | {"o": Param(own_name("part_o", attn), "operand", "f32", doc="[1, …, Dv] their outputs as sums")}


def scratch(attn: Attention, shape: tuple[Expr, Expr], programs: Expr) -> tuple[Scratch, ...]:
    """States at two indices of this shape, and the marks of so many programs."""
    shapes = {2: shape, 0: (const(1), *shape, const(attn.dims.v))}
    made = tuple(Scratch(p.name, shapes[p.rank], p.dtype) for p in states(attn).values())
    if not may_hide_values(attn):
        return made
    lost = care.marks(LOST, attn)
    return (*made, Scratch(lost.name, (programs,), lost.dtype))


def share_parameters(attn: Attention, *knobs: str, more: tuple[Param, ...] = ()) -> dict[str, Param]:
    """Of kernels for few queries. Rows of a group lie apart: queries are read, and outputs written, by pointers."""
    known = parameters(attn)
    params = {text: p for text, p in known.items() if p.role != "constexpr" or text in knobs}
    params |= {text: replace(known[text], tiles=(), extent=None) for text in (source(attn, "q"), output(attn))}
    made = [*more, *states(attn).values(), *([care.marks(LOST, attn)] if may_hide_values(attn) else [])]
    params |= {p.name: p for p in made}
    used = [k for k in (SPLIT, FILL) if k.name in knobs]
    return params | {k.name: Param(k.name, "constexpr", "i32", doc=k.doc) for k in used}


def step_of(b: Builder, attn: Attention, t: QueryTile, dense: Function) -> Function:
    """Binds the formulas of a tile, and makes its step: the dense kernel's, where it is the same."""
    formulas = formulas_of(b, attn, t, rule_of_few(attn), skewed=False)
    step = key_tile(b, attn, t, rule_of_few(attn), formulas)
    return step if step == dense else replace(step, name="group_key_tile")


@dataclass(frozen=True, slots=True)
class KeyLine:
    """The key tiles of a query tile in one line: whole ones, then those cut by the mask."""

    whole: Line
    cut: Line

    @property
    def tiles(self) -> Expr:
        return self.whole.tiles + self.cut.tiles


def line_of(b: Builder, attn: Attention, t: QueryTile) -> KeyLine:
    """Binds what tells of the line."""
    runs = solve_runs(b, key_tiles_of(attn), t.keys, lambda e: share_reads(b, e, t.scope))
    return KeyLine(line_up(b, runs.full, "whole"), line_up(b, runs.masked, "cut"))


@dataclass(frozen=True, slots=True)
class Part:
    """Every `stride`-th tile of [first, last) of a line."""

    first: Expr
    last: Expr
    stride: Value = 1

    def behind(self, tiles: Expr) -> Expr:
        """How many tiles behind so many its next one is."""
        if self.stride == 1:
            return maximum(self.first, tiles) - tiles
        missing = remainder(tiles - self.first, self.stride)
        return where(self.first < tiles, remainder(self.stride - missing, self.stride), self.first - tiles)


def walk_part(
    b: Builder, attn: Attention, t: QueryTile, line: KeyLine, step: Function, part: Part
) -> Callable[[Value], None]:
    """What walks a part of the line, with the care it is told to take."""
    whole, cut = line.whole, line.cut
    first_cut = part.behind(whole.tiles)
    if part.stride != 1:
        first_cut = b.let("first_cut", first_cut)

    def walk(with_care: Value) -> None:
        on_whole, on_cut = visits(b, attn, t, step, with_care)
        if whole.runs:
            b.note(WHOLE_TILES)
            for_each_between(b, whole, part.first, minimum(part.last, whole.tiles), part.stride, on_whole)
        b.note(CUT_TILES)
        for_each_between(b, cut, first_cut, part.last - whole.tiles, part.stride, on_cut)

    return walk


def load_queries(b: Builder, attn: Attention, t: QueryTile) -> None:
    """Binds the tile of queries of a group."""
    columns = cache.key_pieces(attn)
    h, query = (column(e) if e.shape else e for e in (t.h, t.scope.values["row"]))
    for p in columns:
        inside = _kept(p, attn.dims.qk)
        q = read(
            b.params[source(attn, "q")], t.batch, h, query, row(p.columns), mask=None if inside is None else row(inside)
        )
        b.let("q" + p.suffix(columns), q, f"[BM, {p.width}]")


def store_states(b: Builder, attn: Attention, t: QueryTile, first: Expr, second: Expr) -> None:
    """Writes the states of a tile's rows; one of the indices is [BM]."""
    rule, into, values = rule_of_few(attn), states(attn), cache.value_pieces(attn)
    inside = t.rows < t.queries
    if rule.peak is not None:
        b.store(into["m"], (first, second), rule.peak, inside)
    if rule.sums is not None:
        b.store(into["l"], (first, second), reduce("sum", rule.sums, 1), inside)
    places = [column(e) if e.shape else e for e in (first, second)]
    for p in values:
        acc, columns = name("acc" + p.suffix(values), "f32", ("BM", p.width)), p.columns
        b.store(into["o"], (0, *places, row(columns)), acc, _kept(p, attn.dims.v, inside))


def merge_states(b: Builder, attn: Attention, count: Expr, place: Place, most: int | None = None) -> None:
    """Binds m, total and accumulators of a row from so many shares, as far as the normaliser has them; no more than
    `most` at once, if that is told."""
    rule, held, values = rule_of_few(attn), states(attn), cache.value_pieces(attn)
    together = min(most or MOST, 1 << (ROOM // sum(p.width for p in values)).bit_length() - 1)
    if rule.peak is not None:
        b.let("m", const(LOWEST))
    if rule.sums is not None:
        b.let("total", const(0.0))
    for text, p in zip(accumulators(attn), values, strict=True):
        b.let(text, full((p.width,), 0.0), f"[{p.width}]")
    with b.loop("first", 0, count, together) as first:
        share, inside = _some(b, first, together, count)
        at = place(share)
        places = [column(e) if e.shape else e for e in at]
        peaks = None if rule.peak is None else b.let("peaks", _peaks(held["m"], at, inside))
        totals = None if rule.sums is None else b.let("totals", read(held["l"], *at, mask=inside))
        outputs: list[Expr] = []
        for p in values:
            seen = read(held["o"], 0, *places, row(p.columns), mask=_kept(p, attn.dims.v, inside))
            outputs.append(b.let("outputs" + p.suffix(values), seen, f"[{together}, {p.width}]"))
        merge(b, States(peaks, totals, tuple(outputs)), accumulators(attn))


def rows_of(attn: Attention) -> Expr:
    """Rows of a call, counted over the batch: programs of a merge."""
    return name("B") * attn.heads.q * name("Sq")


def place_row(b: Builder, attn: Attention, number: Expr) -> tuple[Expr, Expr, Expr]:
    """Binds batch entry, head and query of the row that has this number."""
    sequence, query = b.let("sequence", quotient(number, name("Sq"))), b.let("row", remainder(number, name("Sq")))
    return b.let("b", quotient(sequence, attn.heads.q)), b.let("h", remainder(sequence, attn.heads.q)), query


def end_row(b: Builder, attn: Attention, batch: Expr, h: Expr, query: Expr) -> None:
    """Ends a row whose states were merged: writes its output and its lse."""
    rule, sink = rule_of_few(attn), attn.part.normalizer.sink
    bound = None if sink is None else _scope(b, attn, batch, h, query).bind(sink)
    end = rule.finish(b, name("m", "f32"), name("total", "f32"), bound)
    _store_end(b, attn, end, (batch, h, query), scale=cache.reader(attn, batch, key_head(h, attn, attn.heads.v)))


def end_tile(b: Builder, attn: Attention, t: QueryTile) -> None:
    """Ends the rows of a group's tile that this program has walked as a whole."""
    rule, sink = rule_of_few(attn), attn.part.normalizer.sink
    if rule.sums is not None:
        b.let("total", reduce("sum", rule.sums, 1), "[BM]")
    end = rule.finish(b, M, TOTAL, None if sink is None else t.scope.bind(sink))
    _store_end(b, attn, end, (t.batch, t.h, t.scope.values["row"]), t.rows < t.queries)


def _store_end(
    b: Builder,
    attn: Attention,
    end: End,
    at: tuple[Expr, Expr, Expr],
    rows: Expr | None = None,
    scale: Callable[[Param], Expr] | None = None,
) -> None:
    """Writes output and lse at (batch entry, head, query): of one row, or of those of a tile for which `rows` holds.

    `scale`: reads the scale of a head's values, where none is bound.
    """
    if end.lse is not None and writes_lse(attn):
        with b.when(name(WRITE_LSE.name) > 0):
            b.store(b.params["LSE"], at, end.lse, rows)
    several = () if rows is None else ("BM",)
    places = [column(e) if e.shape else e for e in at]
    for text, p in zip(accumulators(attn), cache.value_pieces(attn), strict=True):
        columns = p.columns
        o = cache.ended(b, attn, end.of(name(text, "f32", (*several, p.width))), scale)
        o = cast_to(o, VALUE_DTYPE[attn.dtype])
        within = row(columns) if several else columns
        b.store(b.params[output(attn)], (*places, within), o, _kept(p, attn.dims.v, rows))


def _kept(p: Piece, dim: int, rows: Expr | None = None) -> Expr | None:
    """Which columns of a piece lie inside the head dim, of one row or of the rows that `rows` keeps; None for all."""
    columns = p.columns < dim if p.end > dim else None
    if rows is None:
        return columns
    return column(rows) if columns is None else column(rows) & row(columns)


def accumulators(attn: Attention) -> tuple[str, ...]:
    values = cache.value_pieces(attn)
    return tuple("acc" + p.suffix(values) for p in values)


def _some(b: Builder, first: Expr, together: int, count: Expr) -> tuple[Expr, Expr]:
    share = b.let("share", first + iota(together), f"[{together}]")
    return share, b.let("inside", share < count)


def _peaks(m: Param, at: tuple[Expr, Expr], inside: Expr) -> Expr:
    return where(inside, read(m, *at, mask=inside), LOWEST)


def _scope(b: Builder, attn: Attention, batch: Expr, h: Expr, query: Expr) -> Scope:
    """What formulas of a row may name."""
    values = {"b": batch, "h": h, "hk": key_head(h, attn, attn.heads.kv), "row": query}
    values |= {"Sq": name("Sq"), "Sk": storage.keys_of(b, attn, batch)} | fixed_sizes(attn)
    scope = Scope(values, {x.name: x for x in attn.inputs})
    offset = offset_of(b, attn, scope)
    values["i"] = query if offset is None else query + offset
    return scope
