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
from attncc.ir.build import Builder, function, quotient, read, row
from attncc.ir.expr import FLOATS, Expr, const, eq, maximum, name, where
from attncc.ir.rewrite import names, substitute, walk
from attncc.ir.tile import (
    Engine,
    Function,
    Launch,
    Let,
    Note,
    Param,
    Program,
    Scratch,
    Statement,
    binds,
    block,
    reads,
    reads_memory,
)
from attncc.passes.lower import again, classify, quantize, skew, stored
from attncc.passes.lower.chains import output, source
from attncc.passes.lower.ends import with_end
from attncc.passes.lower.fragments import Formulas, formulas_of, may_hide_values, read_early
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
from attncc.passes.lower.knobs import ENGINE_KNOBS
from attncc.passes.lower.normalizers import TOTAL, M, Rule, rule_of
from attncc.passes.lower.pieces import pieces
from attncc.passes.lower.scores import input_param, share_reads
from attncc.passes.lower.walk import BN, Run, key_tiles_of, number_tiles, solve_runs, tile_at

NAME: Final = "hopper"
ROWS: Final = 64
"""Of a query tile that one consumer multiplies."""
PIECES: Final = 2
"""At most, of a head dim."""
WIDEST: Final = 256
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
        "relative positions beside listed tiles", lambda a: bool(skew.split_diagonals(a)[1]) and key_tiles_of(a).listed
    ),
    Gap("ranges over all rows of a tile", lambda a: any(map(_is_over_rows, _bounds(a)))),
)


def gap(attn: Attention) -> str:
    """Why the engine does not carry a variant that the dense skeleton does; empty if it does."""
    return first(GAPS, attn)


def accelerated(attn: Attention, program: Program) -> Program:
    """The program with the engine beside its kernels, where it carries the variant."""
    if why := gap(attn):
        return replace(program, engine_gap=why)
    knobs = tuple(replace(k, choices=(0,)) if k.name == "E_POLY" and is_exact(attn) else k for k in ENGINE_KNOBS)
    made = replace(engine(attn), replaces=(program.kernels[-1].name,), knobs=knobs)
    q, k, v = (source(attn, x).lower() for x in "qkv")
    made = replace(made, tensors=(q, k, v), output=output(attn).lower())
    if attn.quantize:
        return _over_stored(quantize.with_scales(attn), program, made)
    if not may_hide_values(attn):
        return replace(program, engine=made)
    kernel = again.kernel(attn)
    entries = Scratch(again.listed(attn).name, (made.grid * name("E_CONSUMERS") + 1,), "i32")
    made = replace(made, after=(Launch(kernel.name),), scratch=(entries,), lost=entries.name)
    return replace(program, engine=made, kernels=(*program.kernels, kernel))


def _over_stored(attn: Attention, program: Program, engine: Engine) -> Program:
    """The engine over operands as they are stored; its own values are turned, and may not hide what is no number."""
    q, k, values = quantize.all_held(attn)
    kernel, scratch = stored.turn(attn, values), stored.turned(attn, values)
    engine = replace(
        engine,
        replaces=(stored.store(attn, values).name, *engine.replaces),
        before=(Launch(kernel.name),),
        scratch=(scratch,),
        tensors=(q.tensor, k.tensor, scratch.name),
        turned=True,
    )
    return replace(program, engine=engine, kernels=(*program.kernels, kernel))


def engine(attn: Attention) -> Engine:
    """What the engine asks of a variant."""
    attn = quantize.with_scales(attn)
    rule = rule_of(attn)
    _, diagonals = skew.split_diagonals(attn)
    tensors = [*([CU_Q, CU_K] if is_varlen(attn) else []), *map(input_param, attn.inputs)]
    tensors += classify.lists(attn) if key_tiles_of(attn).listed else ()
    params = [*tensors, *size_parameters(attn), Param("scale", "scalar", "f32")]
    b = Builder({p.name: p for p in params})
    t = at_packed_row(b, attn) if is_varlen(attn) else at_row(b, attn, *map(name, DENSE_AT))
    quantize.bind_unit(b, attn, t.batch, {"q": t.h, "k": t.scope.values["hk"]})
    quantize.bind_ends(b, attn, t.batch, t.key_head(attn, attn.heads.v))
    formulas = formulas_of(b, attn, t, rule)
    if formulas.c != FIXED[0]:
        b.let("c", formulas.c, "to units of log 2")
    cut, whole = _walk(b, attn, t)

    score, keep, finish = _score(b, formulas), _keep(b, formulas), _finish(b, attn, t, rule)
    if not (reads_memory(score) or reads_memory(keep)):
        keep = _keep(b, replace(formulas, mask=with_end(formulas.mask)), "")
    of_tile, of_rows = _parted(b.body)
    wanted = {*_parameters((score, keep, finish))}
    given = name("rows", "i32", ("BM",))
    shaped = [e for e in (given, *_bound(of_rows)) if str(e.attr) in wanted] or [given]
    rows = _function("rows", b, of_rows, shaped, "What the formulas know of rows, [rows] or [rows, 1] each.")
    place = _place(attn)
    at = place.results[: len(PACKED_AT if is_varlen(attn) else DENSE_AT)]
    numbers = {str(e.attr): e for e in (*at, *_bound(of_tile), *FIXED)}
    used = dict.fromkeys((*(str(e.attr) for e in FIXED), *_parameters((rows, score, keep, finish, cut, whole))))
    own = [numbers[text] for text in used if text in numbers]
    known = _known(of_tile, own, {p.name for p in params})
    tile = (*known, *(e for e in own if e not in known and e.dtype in FLOATS))
    tile = (*tile, *(e for e in own if e not in tile))
    assert all(e.dtype in ("i32", "f32") for e in tile), tile
    walk_ = _function("walk", b, of_tile, [name("cuts"), name("wholes"), *tile], WALK)
    known_ = _function("known", b, of_tile, known, "What is known before any query tile is.")
    functions = (known_, place, walk_, cut, whole, _beside(attn, diagonals), rows, score, keep, finish)
    return Engine(
        NAME,
        (),
        functions,
        tuple(params),
        known,
        at,
        tile,
        tuple(shaped),
        tuple(p.width for p in pieces(attn.dims.qk, PIECES)),
        tuple(p.width for p in pieces(attn.dims.v, PIECES)),
        substitute(programs(attn), {"BM": name("E_CONSUMERS") * ROWS}),
        is_exact(attn),
        next((d.operand for d in diagonals), None),
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


WALK: Final = "Tiles cut by the mask or by the end of the keys, whole tiles, and what is known of the query tile."


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


def _is_over_rows(e: Expr) -> bool:
    return any(node.op in ("rows_min", "rows_max") for node in walk(e))


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
    return _function("place", b, b.body, [name(text) for text in (*at, *coordinates)], PLACE)


PLACE: Final = "Where a query tile is: in the sequence; batch entry, heads and rows by which TMA finds it; its number."


def _walk(b: Builder, attn: Attention, t: QueryTile) -> tuple[Function, Function]:
    """Binds how many tiles are cut and whole; the functions from a tile's number to its first key."""
    key_tiles = key_tiles_of(attn)
    if key_tiles.listed:
        cut, whole, cuts = _listed(b, attn, t)
    else:
        runs = solve_runs(b, key_tiles, t.keys, lambda e: share_reads(b, e, t.scope))
        cut, cuts = _numbered(b, runs.masked, "cut")
        whole, wholes = _numbered(b, runs.full, "whole")
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


def _beside(attn: Attention, diagonals: Sequence[skew.Diagonal]) -> Function:
    b = Builder({p.name: p for p in size_parameters(attn)})
    table, column, doc = const(0), const(0), "Nothing is read beside the products."
    for d in diagonals:
        table, column = skew.place(d, attn, name("b"), name("h"), name("row0"), name("n"), ROWS)
        doc = f"Where the block of {d.name} is that goes with {ROWS} rows and the keys from n on."
    return function("beside", b, [b.let("table", table), b.let("column", column)], (), doc)


def _numbered(b: Builder, runs: tuple[Run, ...], text: str) -> tuple[Function, Expr]:
    """The function from a tile's number to its first key, and how many tiles there are."""
    n, t = Builder(b.params), name("t")
    count: Expr = const(0)
    if runs:
        ends = number_tiles(b, runs, text)
        count = ends[-1]
        n.let("n", tile_at(t, runs, ends))
    else:
        n.let("n", const(0))
    return function(text, n, [name("n")], ("BN",), f"The first key of {text} tile t."), count


def _score(b: Builder, formulas: Formulas) -> Function:
    inner = Builder(b.params)
    qk = name("qk", "f32", ("BM", "BN"))
    scope = formulas.scope.with_(j=row(name("j", "i32", ("BN",))))
    score = read_early(inner, formulas, scope, lambda d: name("beside", d.dtype, ("BM", "BN")))
    inner.let("x", scope.with_(qk=qk).bind(score), "[rows, BN]")
    return function("score", inner, [name("x", "f32", ("BM", "BN"))], (), "Scores of products, but for the factor c.")


def _keep(b: Builder, formulas: Formulas, but: str = "; keys behind the last aside") -> Function:
    inner = Builder(b.params)
    mask = formulas.scope.with_(j=row(name("j", "i32", ("BN",)))).bind(formulas.mask)
    kept = inner.let("keep", mask)
    return function("keep", inner, [kept], (), f"Which pairs count{but}.")


def _finish(b: Builder, attn: Attention, t: QueryTile, rule: Rule) -> Function:
    inner = Builder(b.params)
    sink = attn.part.normalizer.sink
    end = rule.finish(inner, M, TOTAL, None if sink is None else t.scope.bind(sink))
    assert end.lse is not None
    factor = 1.0 / end.divisor if end.divisor is not None else end.factor
    assert factor is not None
    factor, lse = quantize.ended(attn, factor, end.lse)
    results = [inner.let("factor", factor), inner.let("lse", lse)]
    return function("finish", inner, results, (), "What a row's accumulator is multiplied by, and its lse.")


def _function(text: str, b: Builder, body: Iterable[Statement], results: Sequence[Expr], doc: str) -> Function:
    """A function around some of a builder's statements, less those that no result needs."""
    used = {str(e.attr) for e in results}
    kept: list[Statement] = []
    for s in reversed([*body]):
        bound = {str(e.attr) for e in (*binds(s), *_bound(block(s)))}
        if bound & used:
            inside = [e for inner in block(s) for e in reads(inner)]
            used = (used - bound if isinstance(s, Let) else used).union(*map(names, (*reads(s), *inside)))
            kept.insert(0, s)
    inner = Builder(b.params, [kept])
    return function(text, inner, results, ("BM", "BN", "GROUP", "AGAIN"), doc)


# -- statements ----------------------------------------------------------------------------------


def _parted(body: Iterable[Statement]) -> tuple[list[Statement], list[Statement]]:
    """Statements that make numbers, and those that make vectors of rows; the rows themselves are given."""
    numbers: list[Statement] = []
    vectors: list[Statement] = []
    shaped = {"rows"}
    for s in body:
        match s:
            case Note():
                continue
            case Let(var) if str(var.attr) == "rows":
                continue
            case Let(var) if var.shape or any(shaped & names(e) for e in reads(s)):
                assert var.shape, f"{var.attr} is a number made of rows"
                shaped.add(str(var.attr))
                vectors.append(s)
            case Let():
                numbers.append(s)
            case _:
                raise AssertionError(f"{type(s).__name__} among what no key moves")
    return numbers, vectors


def _bound(body: Iterable[Statement]) -> Iterator[Expr]:
    for s in body:
        if isinstance(s, Let):
            yield s.var


def _parameters(functions: Iterable[Function]) -> Iterator[str]:
    for f in functions:
        yield from (p.name for p in f.params)
