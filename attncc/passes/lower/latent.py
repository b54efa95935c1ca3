"""The functions by which the latent engine knows a variant, and its place in calls of few queries.

Values are a part of the keys there, so a key tile is read once for both products. The engine (`codegen/_latent.py`)
does what a program of `split` or `stream` does, 64 rows of a group at a time: it leaves the states that their merge
takes, or ends rows whose keys it has all seen.

All rows of a tile must see the same keys: what none of them sees is blanked in shared memory, so that a hidden NaN
reaches nobody, and no tile is done twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, quotient, read, remainder
from attncc.ir.expr import Expr, const, eq, maximum, name
from attncc.ir.rewrite import names, substitute
from attncc.ir.tile import Engine, Function, Knob, Launch, Param, Program
from attncc.passes.lower import split, storage, stream
from attncc.passes.lower.chains import output, source
from attncc.passes.lower.fragments import formulas_of, may_hide_values, may_see_the_same
from attncc.passes.lower.gap import Gap, first
from attncc.passes.lower.grid import QueryTile, size_parameters
from attncc.passes.lower.group import by_groups, group_tiles, groups, members, place_group
from attncc.passes.lower.hopper import is_exact
from attncc.passes.lower.knobs import FILL, LATENT_KNOBS, SPLIT
from attncc.passes.lower.normalizers import rule_of
from attncc.passes.lower.partial import states
from attncc.passes.lower.roles import ROWS, WALK, around, floats_first, is_over_rows, numbered, told
from attncc.passes.lower.scores import input_param, share_reads
from attncc.passes.lower.walk import key_tiles_of, solve_runs

NAME: Final = "latent"
HEIGHT: Final = 64
"""Rows of a query tile, what one wgmma multiplies, and keys of a key tile, of which shared memory holds two."""
SHARED: Final = 225 * 1024
"""Bytes of shared memory for tiles, of the 227 KiB that a block may have."""
BESIDE: Final = (("num_warps", 4),)
"""Of kernels around the engine, which have not much to do in a program: more of them run at once."""
NARROWEST: Final = 128
WIDEST_REST: Final = 64
"""Columns of keys behind the values; those of queries are held in registers."""
AT: Final = ("b", "of_group", "number")
"""What tells where a query tile of a group is."""
CONSTANTS: Final = ("BM", "BN", SPLIT.name, FILL.name)
JOB: Final = (name("job_0"), name("job_1"), name("job_2"), name("job_3"))
"""What tells of the keys that a program has: its share and how many there are, or where a range of the line begins and
ends, the item's own first tile on it, and the range's number."""


def _rest(a: Attention) -> int:
    return a.dims.qk - a.dims.v


def _is_oddly_wide(a: Attention) -> bool:
    return a.dims.v < NARROWEST or a.dims.v & (a.dims.v - 1) > 0 or _rest(a) not in (0, WIDEST_REST)


def _room(a: Attention) -> int:
    """Bytes of the values' part of queries, of two key tiles, and of two tiles of weights."""
    return 2 * HEIGHT * (a.dims.v + 2 * a.dims.qk + 2 * HEIGHT)


GAPS: Final = (
    Gap("values that are no part of the keys", lambda a: not a.is_latent),
    Gap("a normalizer other than softmax", lambda a: a.part.normalizer.kind != "softmax"),
    Gap("quantised operands", lambda a: bool(a.quantize)),
    Gap("products of fp32", lambda a: a.dtype == "fp32"),
    Gap("values that are no power of two from 128 on, or keys other than 0 or 64 columns wider", _is_oddly_wide),
    Gap("keys of which shared memory does not hold two tiles of 64", lambda a: _room(a) > SHARED),
    Gap("pages of no multiple of 64 keys", lambda a: a.page_size > 0 and not storage.has_whole_tiles(a)),
    Gap("heads that share no keys", lambda a: members(a) == 1),
    Gap("a score without qk", lambda a: "qk" not in names(a.part.score)),
    Gap("key tiles skipped by data", lambda a: key_tiles_of(a).skip is not None),
    Gap("a mask that differs from head to head", lambda a: may_hide_values(a) and not may_see_the_same(a)),
    Gap("ranges over all rows of a tile", lambda a: any(map(is_over_rows, _bounds(by_groups(a))))),
)


def _bounds(a: Attention) -> tuple[Expr, ...]:
    return tuple(e for r in key_tiles_of(a).ranges for e in (r.lo, r.hi, r.full_lo, r.full_hi))


def gap(attn: Attention) -> str:
    """Why the latent engine does not carry a variant whose calls of few queries have kernels; empty if it does."""
    return first(GAPS, attn)


def serves_one(attn: Attention) -> bool:
    """Whether it is for calls of one query alone, because tiles would have rows of several."""
    return may_hide_values(attn) and members(attn) % HEIGHT > 0


def knobs(attn: Attention) -> tuple[Knob, ...]:
    """With the choices that suit the values: each consumer has a piece of its own at least."""
    half = attn.dims.v // 2
    return tuple(replace(k, choices=tuple(n for n in k.choices if n <= half)) for k in LATENT_KNOBS)


def accelerated(attn: Attention, program: Program, streams: bool) -> Program:
    """The program with the engine in the place of what walks keys for few queries, where it carries the variant.

    Args:
        streams: whether the key tiles of all sequences are one line.
    """
    if why := gap(attn):
        if attn.is_latent and program.engine is None:
            return replace(program, engine_gap=why)
        return program
    walker, merger = program.kernels[-2].name, program.kernels[-1].name
    count = substitute(split.shares(attn).count, {SPLIT.name: maximum(name(SPLIT.name), 1)})  # asked of all calls
    several = None if streams or attn.is_apart else count > 1
    made = replace(
        _engine(attn, streams), replaces=(walker, merger), after=(Launch(merger, when=several, options=BESIDE),)
    )
    if not streams:
        return replace(program, engine=made, engine_gap="")
    kernel, tables = stream.ranges(attn)
    collector = stream.collector(attn)
    after = (Launch(collector.name, options=BESIDE),)
    made = replace(made, before=(Launch(kernel.name, options=BESIDE),), after=after, scratch=tables)
    return replace(program, engine=made, engine_gap="", kernels=(*program.kernels, kernel, collector))


def _engine(attn: Attention, streams: bool) -> Engine:
    """What the engine asks of a variant."""
    seen = by_groups(attn)
    rule = rule_of(seen)
    line = [stream.ranges(attn)[1][0]] if streams else []
    tensors = [*storage.index_params(seen), *map(input_param, seen.inputs)]
    tensors += [Param(s.name, "buffer", s.dtype, rank=len(s.shape)) for s in line]
    params = [*tensors, *size_parameters(seen), Param("scale", "scalar", "f32")]
    b = Builder({p.name: p for p in params})
    t = _tile(b, seen)
    formulas = formulas_of(b, seen, t, rule, skewed=False)
    factor = name("c", "f32")
    if formulas.c != factor:
        b.let("c", formulas.c, "to units of log 2")
    runs = solve_runs(b, key_tiles_of(seen), t.keys, lambda e: share_reads(b, e, t.scope))
    cut, cuts = numbered(b, runs.masked, "cut")
    whole, wholes = numbered(b, runs.full, "whole")
    b.let("cuts", cuts)
    b.let("wholes", wholes)
    heads = name("h", "i32", ("BM",))
    queries = t.scope.values["row"]
    at = tuple(map(name, AT))
    state = _state(seen, streams)
    made = told(b, seen, t, rule, formulas, at, (factor, t.keys), (cut, whole, state), (ROWS, queries, heads))
    tile = floats_first(made.tile)
    walk = around("walk", b, made.numbers, [name("cuts"), name("wholes"), *tile], WALK)
    job, part = _of_line(attn, b) if streams else _of_shares(attn)
    functions = (job, part, _place(seen, streams), walk, cut, whole, _locate(seen), state, *made.functions)
    due = name(SPLIT.name) > 0
    jobs = stream.PROGRAMS if streams else _items(attn) * split.shares(attn).count
    key, place = source(attn, "k").lower(), output(attn).lower()
    return Engine(
        NAME,
        (),
        functions,
        tuple(params),
        (),
        at,
        tile,
        made.rows,
        (attn.dims.qk,),
        (attn.dims.v,),
        jobs,
        is_exact(attn),
        knobs=knobs(attn),
        tensors=(source(attn, "q").lower(), key, key),
        output=place,
        job=JOB,
        states=tuple(states(attn)[text].name for text in ("m", "l", "o")),
        serves=due & eq(name("Sq"), 1) if serves_one(attn) else due,
    )


def _tile(b: Builder, attn: Attention) -> QueryTile:
    batch, of_group, number = map(name, AT)
    return place_group(b, attn, batch, const(0) if groups(attn) == 1 else of_group, number)


def _items(attn: Attention) -> Expr:
    return name("B") * groups(attn) * group_tiles(attn)


# -- functions -----------------------------------------------------------------------------------


def _of_shares(attn: Attention) -> tuple[Function, Function]:
    """Of a program that has a share of one query tile."""
    shares = split.shares(attn)
    b = Builder({p.name: p for p in size_parameters(attn)})
    tiles, count = b.let("tiles", group_tiles(attn)), b.let("shares", shares.count)
    rest = b.let("rest", quotient(name("program"), tiles))
    item = b.let("first_item", quotient(rest, count) * tiles + remainder(name("program"), tiles))
    b.let("end_item", item + 1)
    for e, value in zip(JOB, (remainder(rest, count), count, const(0), const(0)), strict=True):
        b.let(str(e.attr), value)
    job = around("job", b, b.body, [name("first_item"), name("end_item"), *JOB], JOBS, CONSTANTS)
    b = Builder({p.name: p for p in size_parameters(attn)})
    share, count = b.let("share", JOB[0]), b.let("shares", JOB[1])
    part = shares.part(share, name("count"))
    b.let("stride", part.stride)
    b.let("first", part.first)
    b.let("last", part.last)
    b.note("a merge ends all rows where it must not matter who stands beside a sequence; Triton 3.6 takes no constant")
    b.let("ends", name("count") < 0 if attn.is_apart else eq(count, 1))
    b.let("slot", share)
    return job, around("part", b, b.body, [name(text) for text in PART], PARTS, CONSTANTS)


def _of_line(attn: Attention, params: Builder) -> tuple[Function, Function]:
    """Of a program that has a range of the line of all key tiles."""
    ranges = params.params[stream.ranges(attn)[1][0].name]
    b = Builder({ranges.name: ranges})
    results = [name("first_item"), name("end_item"), *JOB]
    for at, e in enumerate(results):
        b.let(str(e.attr), read(ranges, name("program"), at))
    job = around("job", b, b.body, results, JOBS, CONSTANTS)
    b = Builder({})
    begin, end, item, range_ = JOB
    first_, last = b.let("first", stream.first_of(begin, item)), b.let("last", stream.last_of(end, item, name("count")))
    b.let("stride", const(1))
    b.let("ends", eq(last - first_, name("count")))
    b.let("slot", stream.slot_of(range_, first_ > 0))
    return job, around("part", b, b.body, [name(text) for text in PART], PARTS, CONSTANTS)


JOBS: Final = "The query tiles that a program works on, and what tells of its keys."
PART: Final = ("first", "last", "stride", "ends", "slot")
PARTS: Final = "Which of so many key tiles are a program's; whether it ends the rows, or where it leaves their state."


def _place(attn: Attention, streams: bool) -> Function:
    """Results: what tells where a query tile is, then its keys' head, its first row, and how many rows there are."""
    b = Builder({p.name: p for p in size_parameters(attn)})
    if streams:
        each = b.let("each", stream.of_a_tile(attn))
        rest, of_tiles = remainder(name("number"), each), quotient(name("number"), each)
    else:
        tiles = b.let("tiles", group_tiles(attn))
        rest, of_tiles = quotient(name("number"), tiles), remainder(name("number"), tiles)
    b.let("rest", rest)
    b.let("b", quotient(name("rest"), groups(attn)))
    b.let("of_group", remainder(name("rest"), groups(attn)))
    b.let("of_tiles", of_tiles)
    b.let("first_row", name("of_tiles") * name("BM"))
    b.let("end_row", name("Sq") * members(attn))
    hk = b.let("hk", _key_head(attn))
    results = [name("b"), name("of_group"), name("of_tiles"), hk, name("first_row"), name("end_row")]
    return around("place", b, b.body, results, "Where a query tile is; its keys' head, its first row, and its end.")


def _key_head(attn: Attention) -> Expr:
    if attn.heads.kv == 1:
        return const(0)
    if attn.heads.kv == groups(attn):
        return name("of_group")
    if attn.heads.map == "tile":
        return remainder(name("of_group"), attn.heads.kv)
    return quotient(name("of_group"), groups(attn) // attn.heads.kv)


def _locate(attn: Attention) -> Function:
    """Where TMA finds keys."""
    b = Builder({p.name: p for p in storage.index_params(attn)})
    n, batch = name("n"), name(AT[0])
    if attn.page_size:
        b.let("lies_in", read(storage.TABLE, batch, quotient(n, attn.page_size)))
        b.let("lies_at", remainder(n, attn.page_size))
    else:
        b.let("lies_in", batch)
        b.let("lies_at", n)
    return around("locate", b, b.body, [name("lies_in"), name("lies_at")], "Where the keys from n on lie.")


def _state(attn: Attention, streams: bool) -> Function:
    """Where the states of a tile's rows lie."""
    b = Builder({p.name: p for p in size_parameters(attn)})
    if streams:
        first_, second = name("slot"), ROWS - name("row0")
    else:
        head = name(AT[0]) * attn.heads.q + name("h", "i32", ("BM",))
        first_, second = head * name("Sq") + name("row", "i32", ("BM",)), name("slot")
    b.let("one", first_)
    b.let("other", second)
    return around("state", b, b.body, [name("one"), name("other")], "The two indices of the states of rows.")
