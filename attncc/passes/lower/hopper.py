"""The functions by which the Hopper engine knows a variant: where its tiles are, what it scores, what it hides.

The engine itself is fixed (`codegen/_hopper.py`); portable kernels stand beside it, for small calls, for operands that
TMA does not take, and to do rows again into which a hidden NaN may have leaked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, function, quotient, read
from attncc.ir.expr import FLOATS, Expr, const, eq, maximum, name, where
from attncc.ir.rewrite import names, substitute
from attncc.ir.tile import (
    Engine,
    Function,
    Knob,
    Launch,
    Let,
    Param,
    Program,
    Scratch,
    Statement,
)
from attncc.passes.lower import again, classify, limits, quantize, ribbon, skew, stored
from attncc.passes.lower.chains import output, source
from attncc.passes.lower.fragments import formulas_of, may_hide_values
from attncc.passes.lower.gap import Gap, first
from attncc.passes.lower.grid import (
    CU_K,
    CU_Q,
    PACKED_AT,
    QueryTile,
    at_packed_row,
    at_row,
    is_varlen,
    key_head,
    order,
    place_dense,
    place_packed,
    programs,
    size_parameters,
    split_head,
)
from attncc.passes.lower.knobs import E_KEYS, E_POLY, E_TURNS, ENGINE_KNOBS
from attncc.passes.lower.normalizers import rule_of
from attncc.passes.lower.parts import has_parts
from attncc.passes.lower.pieces import pieces
from attncc.passes.lower.roles import (
    WALK,
    around,
    ends_of,
    floats_first,
    is_over_rows,
    numbered,
    ramp_of,
    shift_of,
    told,
)
from attncc.passes.lower.scores import input_param, share_reads
from attncc.passes.lower.walk import BN, key_tiles_of, solve_runs

NAME: Final = "hopper"
ROWS: Final = 64
"""Of a query tile that one consumer multiplies."""
PIECES: Final = 2
"""At most, of a head dim."""
WIDEST: Final = 256
POWERS: Final = (64, 128)
"""Keys of a tile that Gluon's tensors hold."""
MULTIPLIED: Final = dict.fromkeys("qkvp", "fp8_e4m3")
"""The one way in which operands of few bits are multiplied as they are stored."""
WIDEST_QUANTISED: Final = 128
"""Their values take accumulators twice: wgmma's own keep some 14 bits, sums of them are ours."""
FIXED: Final = (name("c", "f32"), name("Sq"), name("Sk"))
"""What the engine itself reads of a tile: the factor from scores to units of log 2, how many queries, how many keys."""
DENSE_AT: Final = ("b", "h", "number", "row0")
"""What tells where a query tile is."""


GAPS: Final = (
    Gap("a normalizer other than softmax", lambda a: a.part.normalizer.kind != "softmax"),
    Gap("quantised operands other than q, k, v and p, all of fp8_e4m3", lambda a: _formats(a) not in ({}, MULTIPLIED)),
    Gap("operands whose mean was taken off", lambda a: any(z.smooth for z in a.quantize)),
    Gap("quantised values per channel", lambda a: _per(a, "v") == "channel"),
    Gap("quantised heads wider than 128", lambda a: bool(a.quantize) and max(a.dims.qk, a.dims.v) > WIDEST_QUANTISED),
    Gap("products of fp32", lambda a: a.dtype == "fp32"),
    Gap("keys in pages", lambda a: a.page_size > 0),
    Gap("values that are a part of the keys", lambda a: a.is_latent),
    Gap("heads wider than 256", lambda a: max(a.dims.qk, a.dims.v) > WIDEST),
    Gap("rows that are no multiple of 16 bytes", lambda a: a.dims.qk % 8 > 0 or a.dims.v % 8 > 0),
    Gap("key tiles skipped by data", lambda a: key_tiles_of(a).skip is not None),
    Gap("a score without qk", lambda a: "qk" not in names(a.part.score)),
    Gap("several tables of relative positions", lambda a: len(skew.split_diagonals(a)[1]) > 1),
    Gap(
        "relative positions that are no floats",
        lambda a: any(d.dtype not in FLOATS for d in skew.split_diagonals(a)[1]),
    ),
    Gap(
        "relative positions beside listed tiles", lambda a: bool(skew.split_diagonals(a)[1]) and key_tiles_of(a).listed
    ),
    Gap("ranges over all rows of a tile", lambda a: any(map(is_over_rows, _bounds(a)))),
)


def gap(attn: Attention) -> str:
    """Why the engine does not carry a variant that the dense skeleton does; empty if it does."""
    return first(GAPS, attn)


def accelerated(attn: Attention, program: Program) -> Program:
    """The program with the engine beside its kernels, where it carries the variant."""
    if why := gap(attn):
        return replace(program, engine_gap=why)
    made = replace(engine(attn), replaces=(program.kernels[-1].name,), knobs=_knobs(attn))
    q, k, v = (source(attn, x).lower() for x in "qkv")
    made = replace(made, tensors=(q, k, v), output=output(attn).lower())
    _, beside = ribbon.split(attn)
    if beside is not None:
        program, made = _with_ribbon(attn, beside, program, made)
    if attn.quantize:
        return _over_stored(quantize.with_scales(attn), program, made)
    if not may_hide_values(attn):
        return replace(program, engine=made)
    kernel = again.kernel(attn)
    entries = Scratch(again.listed(attn).name, (made.grid * name("E_CONSUMERS") + 1,), "i32")
    made = replace(made, after=(Launch(kernel.name),), scratch=(*made.scratch, entries), lost=entries.name)
    return replace(program, engine=made, kernels=(*program.kernels, kernel))


def _knobs(attn: Attention) -> tuple[Knob, ...]:
    """Those of the engine, without the choices that only cost time in this variant.

    Of 16 bits turns that last until scores are there cost two consumers 16 to 35 %, and polynomials 3 to 7 % for each
    eighth (`benchmarks/results/turns-nvidia_h200.json`, `polynomial-nvidia_h200.json`).
    """
    left: dict[Knob, tuple[int, ...]] = {} if has_parts(attn) else {E_KEYS: POWERS}
    if not attn.quantize:
        left[E_TURNS] = (0, 1)
    if not attn.quantize or is_exact(attn):
        left[E_POLY] = (0,)
    return tuple(replace(k, choices=left.get(k, k.choices)) for k in ENGINE_KNOBS)


def _over_stored(attn: Attention, program: Program, engine: Engine) -> Program:
    """The engine over operands as they are stored; its own values are turned, and may not hide what is no number."""
    q, k, values = quantize.all_held(attn)
    kernel, scratch = stored.turn(attn, values), stored.turned(attn, values)
    engine = replace(
        engine,
        replaces=(stored.store(attn, values).name, *engine.replaces),
        before=(*engine.before, Launch(kernel.name)),
        scratch=(*engine.scratch, scratch),
        tensors=(q.tensor, k.tensor, scratch.name),
        turned=True,
    )
    return replace(program, engine=engine, kernels=(*program.kernels, kernel))


def _with_ribbon(attn: Attention, r: ribbon.Ribbon, program: Program, engine: Engine) -> tuple[Program, Engine]:
    """The engine with lines that are written before it, in place of skewed copies."""
    kernel = ribbon.kernel(attn, r)
    copies = (skew.kernel(attn, d).name for d in skew.split_diagonals(attn)[1])
    engine = replace(
        engine,
        replaces=(*copies, *engine.replaces),
        before=(Launch(kernel.name),),
        scratch=(ribbon.scratch(attn, r),),
        beside=r.operand,
        opens=r.opens,
    )
    return replace(program, kernels=(kernel, *program.kernels)), engine


def engine(attn: Attention) -> Engine:
    """What the engine asks of a variant."""
    parts, base = has_parts(attn), _base(attn)
    attn, beside = ribbon.split(quantize.with_scales(attn))
    rule = rule_of(attn)
    tensors = [*([CU_Q, CU_K] if is_varlen(attn) else []), *map(input_param, attn.inputs)]
    tensors += classify.lists(attn) if key_tiles_of(attn).listed else ()
    params = [*tensors, *size_parameters(attn), Param("scale", "scalar", "f32")]
    b = Builder({p.name: p for p in params})
    t = at_packed_row(b, attn) if is_varlen(attn) else at_row(b, attn, *map(name, DENSE_AT))
    quantize.bind_unit(b, attn, t.batch, {"q": t.h, "k": t.scope.values["hk"]})
    quantize.bind_ends(b, attn, t.batch, t.key_head(attn, attn.heads.v))
    formulas = formulas_of(b, attn, t, rule, sloped=True)
    if formulas.c != FIXED[0]:
        b.let("c", formulas.c, "to units of log 2")
    cut, whole = _walk(b, attn, t)

    place = _place(attn)
    at = place.results[: len(PACKED_AT if is_varlen(attn) else DENSE_AT)]
    ramp, shift, ends = ramp_of(b, formulas), shift_of(b, formulas), ends_of(b, formulas)
    made = told(b, attn, t, rule, formulas, at, FIXED, (cut, whole, ramp, shift, ends))
    known = _known(made.numbers, made.tile, {p.name for p in params})
    tile = (*known, *floats_first(e for e in made.tile if e not in known))
    walk_ = around("walk", b, made.numbers, [name("cuts"), name("wholes"), *tile], WALK)
    known_ = around("known", b, made.numbers, known, "What is known before any query tile is.")
    functions = (known_, place, walk_, cut, whole, _beside(attn, beside), ramp, shift, ends, base, *made.functions)
    return Engine(
        NAME,
        (),
        functions,
        tuple(params),
        known,
        at,
        tile,
        (*made.rows, *ramp.results),
        tuple(p.width for p in pieces(attn.dims.qk, PIECES)),
        tuple(p.width for p in pieces(attn.dims.v, PIECES)),
        substitute(programs(attn), {"BM": name("E_CONSUMERS") * ROWS}),
        is_exact(attn),
        parts=parts,
    )


def _known(body: Iterable[Statement], wanted: Sequence[Expr], given: set[str]) -> tuple[Expr, ...]:
    """Those of the wanted numbers that are the same for every query tile; what is bound twice is not looked at."""
    lets = [s for s in body if isinstance(s, Let)]
    bound = Counter(str(s.var.attr) for s in lets)
    known = {*given}
    for s in lets:
        if bound[str(s.var.attr)] == 1 and names(s.value) <= known:
            known.add(str(s.var.attr))
    return tuple(e for e in wanted if str(e.attr) in known)


def _bounds(attn: Attention) -> Iterator[Expr]:
    for r in key_tiles_of(attn).ranges:
        yield from (r.lo, r.hi, r.full_lo, r.full_hi)


def is_exact(attn: Attention) -> bool:
    """Whether exponentials are the GPU's own, and tanh is made of them."""
    return attn.numerics.exp == "exact"


def _formats(attn: Attention) -> dict[str, str]:
    return {z.operand: z.dtype for z in attn.quantize}


def _per(attn: Attention, operand: str) -> str:
    """Which values share a scale; empty where they have none."""
    found = quantize.held(attn, operand)
    return "" if found is None else found.per


# -- functions -----------------------------------------------------------------------------------


def _place(attn: Attention) -> Function:
    """Results: what tells where the tile is, then where TMA finds it, and its number in the list of lost ones."""
    b = Builder({p.name: p for p in (CU_Q, CU_K)} if is_varlen(attn) else {})
    head, number = order(b, attn, name("number"))
    if is_varlen(attn):
        at, head = PACKED_AT, b.let("h", head)
        t = place_packed(b, attn, head, number)
        before = quotient(t.first_query, name("BM")) + name("seq")
    else:
        at, (batch, h) = DENSE_AT, split_head(b, attn, head)
        t = place_dense(b, attn, batch, h, number)
        head, before = name("head"), const(0)
    b.let("batch", t.batch)
    for text, heads in (("hk", attn.heads.kv), ("hv", attn.heads.v)):
        b.let(text, key_head(t.h, attn, heads))
    b.let("first_query", t.first_query + t.row0)
    b.let("first_key", t.first_key)
    number = again.number_of(attn, head, before + quotient(t.row0, name("BM")))
    b.let("again", substitute(number, {"BM": name("AGAIN")}))
    coordinates = ("batch", "h", "hk", "hv", "first_query", "first_key", "row0", "again")
    return around("place", b, b.body, [name(text) for text in (*at, *coordinates)], PLACE)


PLACE: Final = "Where a query tile is: in the sequence; batch entry, heads and rows by which TMA finds it; its number."


def _walk(b: Builder, attn: Attention, t: QueryTile) -> tuple[Function, Function]:
    """Binds how many tiles are cut and whole; the functions from a tile's number to its first key."""
    key_tiles = key_tiles_of(attn)
    if key_tiles.listed:
        cut, whole, cuts = _listed(b, attn, t)
    else:
        runs = solve_runs(b, key_tiles, t.keys, lambda e: share_reads(b, e, t.scope))
        cut, cuts = numbered(b, runs.masked, "cut")
        whole, wholes = numbered(b, runs.full, "whole")
        b.let("wholes", wholes)
    b.let("cuts", where(eq(maximum(cuts, name("wholes")), const(0)), 1, cuts), "one at least, that hides all")
    return cut, whole


def _listed(b: Builder, attn: Attention, t: QueryTile) -> tuple[Function, Function, Expr]:
    """Tiles of the list that another kernel made: what is cut stands on its left, what is whole on its right."""
    tiles, counts = classify.lists(attn)
    listed, last = classify.find(b, attn, t)
    cuts, number = b.let("listed_cuts", read(counts, listed, 0)), name("t")
    b.let("wholes", read(counts, listed, 1))
    inner = Builder(b.params)
    inner.let("n", read(tiles, listed, number, mask=number < cuts) * BN)
    cut = function("cut", inner, [name("n")], ("BN",), "The first key of cut tile t, or 0.")
    inner = Builder(b.params)
    inner.let("n", read(tiles, listed, last - number) * BN)
    return cut, function("whole", inner, [name("n")], ("BN",), "The first key of whole tile t."), cuts


def _base(attn: Attention) -> Function:
    """Results: none, or one."""
    b, base = Builder({}), limits.base_of(attn)
    if base is None:
        return function("base", b, [], (), f"Nothing does for all weights: {limits.gap(attn)}.")
    return function("base", b, [b.let("base", const(base))], (), "What all weights are relative to, in units of log 2.")


def _beside(attn: Attention, r: ribbon.Ribbon | None) -> Function:
    b = Builder({p.name: p for p in size_parameters(attn)})
    (table, column), doc = (const(0), const(0)), "Nothing is read beside the products."
    if r is not None:
        (table, column), doc = ribbon.place(attn, r), f"Lines of {r.name} that go with 64 rows and the keys from n on."
    return function("beside", b, [b.let("table", table), b.let("column", column)], (), doc)
