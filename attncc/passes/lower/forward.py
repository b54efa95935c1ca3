"""The skeleton `dense_forward`: one program per query tile and head walks the keys it can see.

Its shape on every target: load Q once; one loop over tiles in which every pair counts and one over tiles that need
the mask, both stepping the normaliser through the device function `key_tile`; then finish and store O and LSE.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, program, read, reduce, row
from attncc.ir.expr import Expr, cast_to, name
from attncc.ir.tile import Function, Kernel, Knob, Launch, Param, Program, Scratch
from attncc.passes.lower import cache, care, classify, quantize, skew, smoothing, storage, stored
from attncc.passes.lower.chains import output, source
from attncc.passes.lower.fragments import (
    FOR_EACH_ROW,
    begin,
    formulas_of,
    key_tile,
    may_hide_values,
    value_head,
    walk_keys,
    writes_lse,
)
from attncc.passes.lower.grid import CU_K, CU_Q, QueryTile, is_varlen, key_rows, programs, query_tile, size_parameters
from attncc.passes.lower.knobs import KNOBS, ONE_PASS, WRITE_LSE
from attncc.passes.lower.normalizers import TOTAL, VALUE_DTYPE, M, Rule, rule_of
from attncc.passes.lower.pieces import Piece
from attncc.passes.lower.scores import input_param, share_reads
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.walk import key_tiles_of, solve_runs
from attncc.passes.lower.words import has_words

LOST: Final = "lost"


def dense_forward(attn: Attention) -> Program:
    """Tile IR of a softmax-like part over all keys its mask lets through."""
    attn = quantize.with_scales(attn)
    lost = care.marks(LOST, attn)
    b = Builder(parameters(attn))
    functions: list[Function] = []
    with care.unless_done(b, attn, lost):
        t = query_tile(b, attn)
        if is_varlen(attn):
            b.note("packed launches have a few tiles too many")
        with b.when(t.row0 < t.queries) if is_varlen(attn) else nullcontext():
            functions.append(one_tile(b, attn, t, lost))
    params, body = tidy(b.params.values(), b.body)
    forward = Kernel(
        f"{attn.name}_forward",
        params,
        body,
        tuple(functions),
        programs(attn),
        f"Forward pass of {attn.name}: one program per query tile and head.",
    )
    _, diagonals = skew.split_diagonals(attn)
    kernels: tuple[Kernel, ...] = (*(skew.kernel(attn, d) for d in diagonals), forward)
    scratch = skew.scratch(attn, diagonals)
    if key_tiles_of(attn).listed:
        kernels, scratch = (classify.kernel(attn), *kernels), (*classify.scratch(attn), *scratch)
    for h in quantize.all_held(attn):
        kernels, scratch = (*stored.kernels(attn, h), *kernels), (*stored.scratch(attn, h), *scratch)
    kernels, scratch = (*smoothing.kernels(attn), *kernels), (*smoothing.scratch(attn), *scratch)
    launches = tuple(Launch(k.name) for k in kernels)
    knobs = tuple(_fitting(attn, k) for k in KNOBS)
    knobs = (*knobs, WRITE_LSE) if writes_lse(attn) else knobs
    if may_hide_values(attn):
        scratch = (*scratch, Scratch(lost.name, (programs(attn),), lost.dtype))
        launches = (*launches[:-1], *care.passes(forward.name))
        knobs = (*knobs, ONE_PASS)
    return Program(attn.name, kernels, launches, knobs, scratch, "dense_forward")


def _fitting(attn: Attention, knob: Knob) -> Knob:
    """The knob with the choices that suit the pages; tiles of 8 rows are worth it where each key is much work."""
    if knob.name == "BM" and has_words(attn):
        return replace(knob, choices=(*knob.choices, 8))
    if knob.name != "BN":
        return knob
    return replace(knob, choices=tuple(n for n in knob.choices if storage.fits_tiles(attn, n)))


def parameters(attn: Attention) -> dict[str, Param]:
    """Everything the kernel reads and writes, in the order of its signature."""
    dtype = VALUE_DTYPE[attn.dtype]
    rows_q, rows_k = name("Tq") if is_varlen(attn) else name("Sq"), key_rows(attn)

    of_keys, of_values = cache.key_pieces(attn), cache.value_pieces(attn)

    def operand(text: str, knob: str, rows: Expr, dim: int, seen: tuple[Piece, ...], doc: str) -> Param:
        shapes = tuple(dict.fromkeys((knob, p.width) for p in seen))
        name_ = output(attn) if text == "O" else text
        given = Param(name_, "operand", dtype, tiles=shapes, extent=(rows, dim), doc=doc)
        if text in "QO" and any(p.step > 1 for p in seen):  # columns apart from each other are no tile
            given = replace(given, tiles=(), extent=None)
        return cache.operand(attn, text.lower(), quantize.operand(attn, text.lower(), given))

    out = [
        operand("Q", "BM", rows_q, attn.dims.qk, of_keys, "queries"),
        operand("K", "BN", rows_k, attn.dims.qk, of_keys + (of_values if attn.is_latent else ()), "keys"),
        operand("V", "BN", rows_k, attn.dims.v, of_values, "values"),
        operand("O", "BM", rows_q, attn.dims.v, of_values, "output"),
    ]
    out[1:3] = (storage.as_stored(attn, p) for p in out[1 : 2 if attn.is_latent else 3])
    if is_varlen(attn):  # a whole tile would overwrite the rows of the next sequence
        out[-1] = replace(out[-1], tiles=())
    if attn.wants("lse"):
        out.append(
            Param(
                "LSE", "buffer", "f32", rank=2 if is_varlen(attn) else 3, doc="natural log of the sum of exponentials"
            )
        )
    out += [CU_Q, CU_K] if is_varlen(attn) else []
    out += cache.parameters(attn, rows_k)
    out += storage.index_params(attn)
    out += map(input_param, attn.inputs)
    out += classify.lists(attn) if key_tiles_of(attn).listed else ()
    out += [d.operand for d in skew.split_diagonals(attn)[1]]
    out += [care.marks(LOST, attn)] if may_hide_values(attn) else []
    out += size_parameters(attn)
    out.append(Param("scale", "scalar", "f32"))
    flags = (WRITE_LSE,) if writes_lse(attn) else ()
    out += [Param(k.name, "constexpr", "i32", doc=k.doc) for k in (*KNOBS, *flags)]
    if may_hide_values(attn):
        out.append(care.PASS)
    return {p.name: p for p in out}


def one_tile(b: Builder, attn: Attention, t: QueryTile, lost: Param | None = None, *, skewed: bool = True) -> Function:
    """Everything one program does; returns the device function it calls.

    `lost`: where tiles are marked that hidden values have spoilt; without it, care is taken from the first.
    """
    rule = rule_of(attn)
    columns = cache.key_pieces(attn)
    quantize.bind_unit(b, attn, t.batch, {"q": t.h, "k": t.scope.values["hk"]})
    for p in columns:
        q = _queries(b, attn, t, p)
        b.let("q" + p.suffix(columns), quantize.poison(attn, q), f"[BM, {p.width}]")
    if attn.heads.v != attn.heads.kv:
        b.let("hv", t.key_head(attn, attn.heads.v))
    formulas = formulas_of(b, attn, t, rule, skewed)
    runs = solve_runs(b, key_tiles_of(attn), t.keys, lambda e: share_reads(b, e, t.scope))
    step = key_tile(b, attn, t, rule, formulas)
    if not skewed and skew.split_diagonals(attn)[1]:  # another function than that of the kernel that reads copies
        step = replace(step, name="unskewed_key_tile")
    if lost is None:
        begin(b, attn, rule)
        walk_keys(b, attn, t, runs, step, FOR_EACH_ROW)
    else:
        mark = partial(b.store, lost, (program(),))
        care.walk_twice(b, attn, rule, mark, partial(walk_keys, b, attn, t, runs, step))
    _finish(b, attn, t, rule)
    return step


def _queries(b: Builder, attn: Attention, t: QueryTile, p: Piece) -> Expr:
    """The tile of queries; of columns that are no neighbours, by pointers."""
    if p.step == 1:
        return quantize.read_tile(b, attn, "q", (t.batch, t.h, t.first_query + t.row0), "BM", p)
    at = (t.batch, t.h, column(t.first_query + t.rows), row(p.columns))
    return read(b.params[source(attn, "q")], *at, mask=column(t.rows < t.queries))


def _finish(b: Builder, attn: Attention, t: QueryTile, rule: Rule) -> None:
    values = cache.value_pieces(attn)
    accumulators = tuple(name("acc" + p.suffix(values), "f32", ("BM", p.width)) for p in values)
    sink = attn.part.normalizer.sink
    if rule.sums is not None:
        b.let("total", reduce("sum", rule.sums, 1), "[BM]")
    end = rule.finish(b, M, TOTAL, None if sink is None else t.scope.bind(sink))
    rows = name("rows", "i32", ("BM",))
    if end.lse is not None and writes_lse(attn):
        at = (t.h, t.first_query + rows) if is_varlen(attn) else (t.batch, t.h, rows)
        with b.when(name(WRITE_LSE.name) > 0):
            b.store(b.params["LSE"], at, end.lse, rows < t.queries)
    for p, o in zip(values, map(end.of, accumulators), strict=True):
        o = quantize.rescale(b, attn, cache.ended(b, attn, o), t.batch, value_head(attn, t), p)
        o = cast_to(o, VALUE_DTYPE[attn.dtype])
        if not is_varlen(attn) and p.step == 1:
            b.store_tile(b.params[output(attn)], t.batch, t.h, t.row0, p.column, o)
            continue
        at = (t.batch, t.h, column(t.first_query + rows), row(p.columns))
        inside = column(rows < t.queries) & row(p.columns < attn.dims.v)
        b.store(b.params[output(attn)], at, o, inside)
