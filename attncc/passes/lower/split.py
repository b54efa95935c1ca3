"""Calls of few queries: the keys of a row are split between programs, and a second kernel merges what they found.

A program has the query tile of a group of heads and an equal share of the line of key tiles that the tile visits: whole
ones first, then those cut by the mask. It leaves each row's partial state as it stands, not divided by its sum: states
of all normalisers are sums relative to their peaks, so merging them rounds once where outputs and their lse would
be divided and multiplied again, and the state of an empty share is an exact 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, full, iota, program, quotient, read, reduce, remainder, row
from attncc.ir.expr import Expr, cast_to, const, eq, maximum, minimum, name, where
from attncc.ir.tile import Function, Kernel, Launch, Param, Program, Scratch
from attncc.passes.lower import care
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
from attncc.passes.lower.grid import QueryTile, cdiv, fixed_sizes, key_head, offset_of
from attncc.passes.lower.group import group_tiles, groups, members, over_heads, place_group
from attncc.passes.lower.knobs import FILL, SPLIT, WRITE_LSE
from attncc.passes.lower.normalizers import LOWEST, NORMALIZERS, VALUE_DTYPE, Rule, States, merge
from attncc.passes.lower.pieces import pieces
from attncc.passes.lower.scores import Scope, own_name, share_reads
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.walk import BN, for_each_between, key_tiles_of, line_up, solve_runs

ROOM: Final = 8192
"""Numbers of partial outputs that a program merges at once: 64 registers of a thread where it has 128 threads."""
MOST: Final = 64
"""Shares that it merges at once, however narrow heads are."""
LOST: Final = "part_lost"


@dataclass(frozen=True, slots=True)
class Gap:
    """What keeps calls of few queries with the dense kernels."""

    why: str
    holds: Callable[[Attention], bool]


GAPS: Final = (
    Gap("modes without decode", lambda a: "decode" not in a.modes),
    Gap("packed sequences", lambda a: a.layout == "varlen"),
    Gap("key tiles listed from data", lambda a: key_tiles_of(a).listed),
    Gap("quantised operands", lambda a: bool(a.quantize)),
)


def gap(attn: Attention) -> str:
    """Why calls of few queries stay with the dense kernels; empty if they need not."""
    return next((g.why for g in GAPS if g.holds(attn)), "")


def with_split(attn: Attention, dense: Program) -> Program:
    """The program with kernels that split keys beside the dense ones; the config of a call says which are due."""
    if why := gap(attn):
        return replace(dense, split_gap=why)
    forward = next(k for k in dense.kernels if k.name == f"{attn.name}_forward")
    sharer, merging = split(attn, forward.functions[-1]), merger(attn)
    launches = care.passes(sharer.name) if may_hide_values(attn) else (Launch(sharer.name),)
    idle, busy = eq(name(SPLIT.name), 0), name(SPLIT.name) > 0
    return replace(
        dense,
        kernels=(*dense.kernels, sharer, merging),
        launches=(
            *(_only(x, idle) for x in dense.launches),
            *(_only(x, busy) for x in (*launches, Launch(merging.name))),
        ),
        knobs=(*dense.knobs, SPLIT, FILL),
        scratch=(*dense.scratch, *scratch(attn)),
    )


def _only(launch: Launch, where: Expr) -> Launch:
    """A launch where this holds, too."""
    return replace(launch, when=where if launch.when is None else launch.when & where)


def _is_fixed(attn: Attention) -> bool:
    """Whether a sequence's bits must not depend on its neighbours: nor may its shares then."""
    return attn.numerics.reproducible == "batch"


def shares(attn: Attention) -> Expr:
    """Shares of each query tile: as many as fill the GPU, none of fewer than SPLIT key tiles while there are more."""
    most = cdiv(name("Sk"), BN)
    if _is_fixed(attn):
        return cdiv(most, name(SPLIT.name))
    tiles = name("B") * groups(attn) * group_tiles(attn)
    return minimum(cdiv(most, name(SPLIT.name)), maximum(quotient(name(FILL.name), tiles), 1))


# -- partial states ------------------------------------------------------------------------------


def _states(attn: Attention) -> dict[str, Param]:
    """The tensors that hold them, by what they hold: a number for each row and share, of outputs a row of numbers."""
    rule = NORMALIZERS[attn.part.normalizer.kind](attn.part.normalizer)
    numbers = {"m": (rule.peak, "greatest scores"), "l": (rule.sums, "sums")}
    found = {
        text: Param(own_name(f"part_{text}", attn), "buffer", "f32", rank=2, doc=f"[rows, shares] {doc}")
        for text, (has, doc) in numbers.items()
        if has is not None
    }
    return found | {"o": Param(own_name("part_o", attn), "operand", "f32", doc="[1, rows, shares, Dv] outputs as sums")}


def scratch(attn: Attention) -> tuple[Scratch, ...]:
    rows = name("B") * attn.heads.q * name("Sq")
    shapes = {2: (rows, shares(attn)), 0: (const(1), rows, shares(attn), const(attn.dims.v))}
    states = tuple(Scratch(p.name, shapes[p.rank], p.dtype) for p in _states(attn).values())
    if not may_hide_values(attn):
        return states
    lost = care.marks(LOST, attn)
    return (*states, Scratch(lost.name, (_programs(attn),), lost.dtype))


def _programs(attn: Attention) -> Expr:
    return name("B") * groups(attn) * group_tiles(attn) * shares(attn)


def _params(attn: Attention, *knobs: str) -> dict[str, Param]:
    """Of both kernels: rows of a group lie apart, so queries and outputs are read and written by pointers."""
    known = parameters(attn)
    params = {text: p for text, p in known.items() if p.role != "constexpr" or text in knobs}
    params |= {text: replace(known[text], tiles=(), extent=None) for text in "QO"}
    made = [*_states(attn).values(), *([care.marks(LOST, attn)] if may_hide_values(attn) else [])]
    params |= {p.name: p for p in made}
    used = (SPLIT,) if _is_fixed(attn) else (SPLIT, FILL)
    return params | {k.name: Param(k.name, "constexpr", "i32", doc=k.doc) for k in used}


# -- a share -------------------------------------------------------------------------------------


def split(attn: Attention, dense: Function) -> Kernel:
    """One program per query tile and share; where its step is the dense kernel's, it is that."""
    if members(attn) > 1:
        attn = replace(attn, parts=(replace(attn.part, key_tiles=over_heads(key_tiles_of(attn))),))
    b, lost = Builder(_params(attn, "BM", "BN", care.PASS.name)), care.marks(LOST, attn)
    steps: list[Function] = []
    with care.unless_done(b, attn, lost):
        steps.append(_one_share(b, attn, lost, dense))
    doc = f"Few queries of {attn.name}: one program per query tile of a group of heads and share of its keys."
    return Kernel(f"{attn.name}_split", *tidy(b.params.values(), b.body), tuple(steps), _programs(attn), doc)


def _one_share(b: Builder, attn: Attention, lost: Param, dense: Function) -> Function:
    """Everything one program does; returns the device function it calls."""
    rule = NORMALIZERS[attn.part.normalizer.kind](attn.part.normalizer)
    tiles, count = b.let("tiles", group_tiles(attn)), b.let("shares", shares(attn))
    number, rest = b.let("number", remainder(program(), tiles)), b.let("rest", quotient(program(), tiles))
    share, group = b.let("share", remainder(rest, count)), b.let("of", quotient(rest, count))
    batch = b.let("b", quotient(group, groups(attn)))
    t = place_group(b, attn, batch, remainder(group, groups(attn)), number)
    _load_queries(b, attn, t)
    formulas = formulas_of(b, attn, t, rule, skewed=False)
    step = key_tile(b, attn, t, rule, formulas)
    step = step if step == dense else replace(step, name="group_key_tile")
    care.walk_twice(b, attn, rule, lost, _walk_of_share(b, attn, t, step, share, count))
    _store_states(b, attn, t, rule, share)
    return step


def _load_queries(b: Builder, attn: Attention, t: QueryTile) -> None:
    columns = pieces(attn.dims.qk)
    h, query = (column(e) if e.shape else e for e in (t.h, t.scope.values["row"]))
    for p in columns:
        at = p.column + iota(p.width)
        inside = row(at < attn.dims.qk) if p.column + p.width > attn.dims.qk else None
        q = read(b.params["Q"], t.batch, h, query, row(at), mask=inside)
        b.let("q" + p.suffix(columns), q, f"[BM, {p.width}]")


def _walk_of_share(
    b: Builder, attn: Attention, t: QueryTile, step: Function, share: Expr, count: Expr
) -> Callable[[Expr], None]:
    """Binds where the share begins and ends; what is returned walks it, with care if told so."""
    runs = solve_runs(b, key_tiles_of(attn), t.keys, lambda e: share_reads(b, e, t.scope))
    whole, cut = line_up(b, runs.full, "whole"), line_up(b, runs.masked, "cut")
    in_all = whole.tiles + cut.tiles
    size = name(SPLIT.name) if _is_fixed(attn) else b.let("size", maximum(cdiv(in_all, count), name(SPLIT.name)))
    first = b.let("first", share * size)
    last = b.let("last", minimum(first + size, in_all))

    def walk(careful: Expr) -> None:
        on_whole, on_cut = visits(b, attn, t, step, careful)
        if runs.full:
            b.note(WHOLE_TILES)
            for_each_between(b, whole, first, minimum(last, whole.tiles), on_whole)
        b.note(CUT_TILES)
        for_each_between(b, cut, maximum(first, whole.tiles) - whole.tiles, last - whole.tiles, on_cut)

    return walk


def _row_number(attn: Attention, batch: Expr, h: Expr, query: Expr) -> Expr:
    return (batch * attn.heads.q + h) * name("Sq") + query


def _store_states(b: Builder, attn: Attention, t: QueryTile, rule: Rule, share: Expr) -> None:
    into, values = _states(attn), pieces(attn.dims.v)
    at = b.let("state", _row_number(attn, t.batch, t.h, t.scope.values["row"]), "[BM]")
    inside = t.rows < t.queries
    if rule.peak is not None:
        b.store(into["m"], (at, share), rule.peak, inside)
    if rule.sums is not None:
        b.store(into["l"], (at, share), reduce("sum", rule.sums, 1), inside)
    for p in values:
        acc, columns = name("acc" + p.suffix(values), "f32", ("BM", p.width)), p.column + iota(p.width)
        kept = column(inside)
        if p.column + p.width > attn.dims.v:
            kept = kept & row(columns < attn.dims.v)
        b.store(into["o"], (0, column(at), share, row(columns)), acc, kept)


# -- the merge -----------------------------------------------------------------------------------


def merger(attn: Attention) -> Kernel:
    """One program per row: the states of its shares become one, which ends as any other."""
    b = Builder(_params(attn, "BM", "BN", WRITE_LSE.name))
    rule = NORMALIZERS[attn.part.normalizer.kind](attn.part.normalizer)
    number, sequence = program(), b.let("sequence", quotient(program(), name("Sq")))
    query = b.let("row", remainder(number, name("Sq")))
    batch, h = b.let("b", quotient(sequence, attn.heads.q)), b.let("h", remainder(sequence, attn.heads.q))
    count = b.let("shares", shares(attn))
    _merge_states(b, attn, rule, number, count)
    sink = attn.part.normalizer.sink
    bound = None if sink is None else _scope(b, attn, batch, h, query).bind(sink)
    end = rule.finish(b, name("m", "f32"), name("total", "f32"), bound)
    if end.lse is not None and writes_lse(attn):
        with b.when(name(WRITE_LSE.name) > 0):
            b.store(b.params["LSE"], (batch, h, query), end.lse)
    for text, p in zip(_accumulators(attn), pieces(attn.dims.v), strict=True):
        columns = p.column + iota(p.width)
        inside = columns < attn.dims.v if p.column + p.width > attn.dims.v else None
        o = cast_to(end.of(name(text, "f32", (p.width,))), VALUE_DTYPE[attn.dtype])
        b.store(b.params["O"], (batch, h, query, columns), o, inside)
    grid = name("B") * attn.heads.q * name("Sq")
    doc = "Merges what the shares of each row found, and ends the row."
    return Kernel(f"{attn.name}_merge", *tidy(b.params.values(), b.body), (), grid, doc)


def _accumulators(attn: Attention) -> tuple[str, ...]:
    values = pieces(attn.dims.v)
    return tuple("acc" + p.suffix(values) for p in values)


def _merge_states(b: Builder, attn: Attention, rule: Rule, number: Expr, count: Expr) -> None:
    """Binds m, total and accumulators of a row, as far as the normaliser has them."""
    held, values = _states(attn), pieces(attn.dims.v)
    together = min(MOST, 1 << (ROOM // sum(p.width for p in values)).bit_length() - 1)
    if rule.peak is not None:
        b.let("m", const(LOWEST))
        with b.loop("first", 0, count, together) as first:
            share, inside = _some(b, first, together, count)
            peaks = b.let("peaks", _peaks(held["m"], number, share, inside))
            b.let("m", maximum(name("m", "f32"), reduce("max", peaks, 0)))
    if rule.sums is not None:
        b.let("total", const(0.0))
    for text, p in zip(_accumulators(attn), values, strict=True):
        b.let(text, full((p.width,), 0.0), f"[{p.width}]")
    with b.loop("first", 0, count, together) as first:
        share, inside = _some(b, first, together, count)
        columns = [p.column + iota(p.width) for p in values]
        cut = [p.column + p.width > attn.dims.v for p in values]
        masks = [
            column(inside) & row(c < attn.dims.v) if x else column(inside) for c, x in zip(columns, cut, strict=True)
        ]
        outputs = (
            read(held["o"], 0, number, column(share), row(c), mask=k) for c, k in zip(columns, masks, strict=True)
        )
        peaks = None if rule.peak is None else _peaks(held["m"], number, share, inside)
        totals = None if rule.sums is None else read(held["l"], number, share, mask=inside)
        merge(b, States(peaks, totals, tuple(outputs)), _accumulators(attn))


def _some(b: Builder, first: Expr, together: int, count: Expr) -> tuple[Expr, Expr]:
    share = b.let("share", first + iota(together), f"[{together}]")
    return share, b.let("inside", share < count)


def _peaks(m: Param, number: Expr, share: Expr, inside: Expr) -> Expr:
    return where(inside, read(m, number, share, mask=inside), LOWEST)


def _scope(b: Builder, attn: Attention, batch: Expr, h: Expr, query: Expr) -> Scope:
    """What formulas of a row may name."""
    values = {"b": batch, "h": h, "hk": key_head(h, attn, attn.heads.kv), "row": query}
    values |= {"Sq": name("Sq"), "Sk": name("Sk")} | fixed_sizes(attn)
    scope = Scope(values, {x.name: x for x in attn.inputs})
    offset = offset_of(b, attn, scope)
    values["i"] = query if offset is None else query + offset
    return scope
