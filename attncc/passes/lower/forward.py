"""The skeleton `dense_forward`: one program per query tile and head walks the keys it can see.

Its shape on every target: load Q once; one loop over tiles in which every pair counts and one over tiles that need
the mask, both stepping the normaliser through the device function `key_tile`; then finish and store O and LSE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from functools import reduce as fold
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import (
    Builder,
    column,
    dot,
    full,
    function,
    iota,
    program,
    read,
    reduce,
    reduce_all,
    row,
    trans,
)
from attncc.ir.expr import TRUE, Expr, cast_to, const, eq, ew, maximum, minimum, name, where
from attncc.ir.factors import fold_constants, split_multiplier
from attncc.ir.rewrite import names, transform, walk
from attncc.ir.tile import Function, Kernel, Launch, Param, Program, Scratch
from attncc.passes.lower import classify, quantize, skew, stored
from attncc.passes.lower.grid import CU_K, CU_Q, QueryTile, is_varlen, programs, query_tile, size_parameters
from attncc.passes.lower.knobs import KNOBS, ONE_PASS, WRITE_LSE
from attncc.passes.lower.normalizers import LOG2E, NORMALIZERS, VALUE_DTYPE, Rule, Tile
from attncc.passes.lower.pieces import pieces
from attncc.passes.lower.scores import (
    Scope,
    hoist,
    input_param,
    own_name,
    regroup,
    share_reads,
)
from attncc.passes.lower.skew import Diagonal
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.walk import Runs, for_each_tile, key_tiles_of, solve_runs

MASKED: Final = name("MASKED", "bool")
CAREFUL: Final = name("CAREFUL", "bool")
PASS: Final = name("PASS")
INSIDE: Final = name("inside", "bool", ("BN",))


@dataclass(frozen=True, slots=True)
class Formulas:
    """A part's formulas with everything hoisted that no key moves."""

    score: Expr
    """score = x * multiplier; this is x."""
    c: Expr
    """The multiplier, times log2(e) where the normaliser is exponential."""
    mask: Expr
    diagonals: Mapping[str, Diagonal]
    """Reads of skewed copies, by their names."""
    scope: Scope
    """Rows as columns: what is bound in it broadcasts to [BM, BN]."""


def dense_forward(attn: Attention) -> Program:
    """Tile IR of a softmax-like part over all keys its mask lets through.

    Values that a row does not see must not matter, even where they are NaN, yet 0 * NaN is NaN. Zeroing them would cost
    every call registers, so the kernel is launched twice: the first pass marks tiles that hold NaN, the second, which
    ends at once for all others, redoes those with care.
    """
    attn = quantize.with_scales(attn)
    hides = may_hide_values(attn)
    b = Builder(parameters(attn))
    if hides:
        b.let("work", const(1))
        with b.when(eq(PASS, 1)):
            b.let("work", read(_lost(attn), program()))
    functions: list[Function] = []
    with b.when(name("work") > 0) if hides else nullcontext():
        t = query_tile(b, attn)
        if is_varlen(attn):
            b.note("packed launches have a few tiles too many")
        with b.when(t.row0 < t.queries) if is_varlen(attn) else nullcontext():
            functions.append(one_tile(b, attn, t, careful=eq(PASS, 1)))
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
    launches = tuple(Launch(k.name) for k in kernels)
    knobs = (*KNOBS, WRITE_LSE) if _writes_lse(attn) else KNOBS
    if hides:
        scratch = (*scratch, Scratch(_lost(attn).name, (programs(attn),), "i32"))
        launches = (*launches[:-1], *_passes(forward.name))
        knobs = (*knobs, ONE_PASS)
    return Program(attn.name, kernels, launches, knobs, scratch, "dense_forward")


def _lost(attn: Attention) -> Param:
    return Param(own_name("lost", attn), "buffer", "i32", rank=1, doc="[programs] whether the first pass left NaN")


def _passes(kernel: str) -> tuple[Launch, ...]:
    """Two launches, or one for small calls, whose time is that of launching."""
    at_once, apart = (eq(name(ONE_PASS.name), n) for n in (1, 0))
    return (
        Launch(kernel, (("PASS", 2),), at_once),
        Launch(kernel, (("PASS", 0),), apart),
        Launch(kernel, (("PASS", 1),), apart),
    )


def _writes_lse(attn: Attention) -> bool:
    return attn.wants("lse") and attn.part.normalizer.kind == "softmax"


def parameters(attn: Attention) -> dict[str, Param]:
    """Everything the kernel reads and writes, in the order of its signature."""
    dtype = VALUE_DTYPE[attn.dtype]
    rows_q, rows_k = (name("Tq"), name("Tk")) if is_varlen(attn) else (name("Sq"), name("Sk"))

    def operand(text: str, knob: str, rows: Expr, dim: int, doc: str) -> Param:
        shapes = tuple(dict.fromkeys((knob, p.width) for p in pieces(dim)))
        given = Param(text, "operand", dtype, tiles=shapes, extent=(rows, dim), doc=doc)
        return quantize.operand(attn, text.lower(), given)

    out = [
        operand("Q", "BM", rows_q, attn.dims.qk, "queries"),
        operand("K", "BN", rows_k, attn.dims.qk, "keys"),
        operand("V", "BN", rows_k, attn.dims.v, "values"),
        operand("O", "BM", rows_q, attn.dims.v, "output"),
    ]
    if is_varlen(attn):  # a whole tile would overwrite the rows of the next sequence
        out[-1] = replace(out[-1], tiles=())
    if attn.wants("lse"):
        out.append(
            Param(
                "LSE", "buffer", "f32", rank=2 if is_varlen(attn) else 3, doc="natural log of the sum of exponentials"
            )
        )
    out += [CU_Q, CU_K] if is_varlen(attn) else []
    out += map(input_param, attn.inputs)
    out += classify.lists(attn) if key_tiles_of(attn).listed else ()
    out += [d.operand for d in skew.split_diagonals(attn)[1]]
    out += [_lost(attn)] if may_hide_values(attn) else []
    out += size_parameters(attn)
    out.append(Param("scale", "scalar", "f32"))
    flags = (WRITE_LSE,) if _writes_lse(attn) else ()
    out += [Param(k.name, "constexpr", "i32", doc=k.doc) for k in (*KNOBS, *flags)]
    if may_hide_values(attn):
        out.append(Param("PASS", "constexpr", "i32", doc="0: all tiles; 1: those lost to NaN; 2: both at once"))
    return {p.name: p for p in out}


def one_tile(b: Builder, attn: Attention, t: QueryTile, careful: Expr) -> Function:
    """Everything one program does; returns the device function it calls.

    `careful`: whether hidden values may be NaN; where that is not known to be, tiles that they spoil are seen to.
    """
    rule = NORMALIZERS[attn.part.normalizer.kind](attn.part.normalizer)
    columns = pieces(attn.dims.qk)
    quantize.bind_unit(b, attn, t.batch, {"q": t.h, "k": t.scope.values["hk"]})
    for p in columns:
        q = quantize.read_tile(b, attn, "q", (t.batch, t.h, t.first_query + t.row0), "BM", p)
        b.let("q" + p.suffix(columns), quantize.poison(attn, q), f"[BM, {p.width}]")
    if attn.heads.v != attn.heads.kv:
        b.let("hv", t.key_head(attn, attn.heads.v))
    formulas = formulas_of(b, attn, t, rule)
    runs = solve_runs(b, key_tiles_of(attn), t.keys, lambda e: share_reads(b, e, t.scope))
    step = _key_tile(b, attn, t, rule, formulas)
    _begin(b, attn, rule)
    _walk(b, attn, t, runs, step, careful)
    if may_hide_values(attn) and careful != TRUE:
        _redo_lost(b, attn, t, rule, runs, step)
    _finish(b, attn, t, rule)
    return step


def _begin(b: Builder, attn: Attention, rule: Rule) -> None:
    """The state of no keys at all."""
    rule.init(b)
    values = pieces(attn.dims.v)
    for p in values:
        b.let("acc" + p.suffix(values), full(("BM", p.width), 0.0), f"[BM, {p.width}]")


def _redo_lost(b: Builder, attn: Attention, t: QueryTile, rule: Rule, runs: Runs, step: Function) -> None:
    """What becomes of a tile that holds NaN, into which hidden values may have leaked: marked, or done again."""
    values = pieces(attn.dims.v)
    accumulators = [name("acc" + p.suffix(values), "f32", ("BM", p.width)) for p in values]
    lost = fold(maximum, [reduce_all("max", cast_to(ew("ne", acc, acc), "i32")) for acc in accumulators])
    with b.when(eq(PASS, 0)):
        b.store(_lost(attn), (program(),), lost)
    with b.when(eq(PASS, 2)):
        b.let("lost_here", lost)
        with b.when(name("lost_here") > 0):
            _begin(b, attn, rule)
            _walk(b, attn, t, runs, step, careful=const(True))


def formulas_of(b: Builder, attn: Attention, t: QueryTile, rule: Rule) -> Formulas:
    """Binds what no key moves."""
    part = attn.part
    columns = t.scope.with_(i=column(t.scope.values["i"]), row=column(t.scope.values["row"]))
    score, diagonals = skew.split_diagonals(attn)
    score, multiplier = quantize.with_unit(attn, *split_multiplier(regroup(score)))
    c = t.scope.bind(fold_constants(multiplier * LOG2E) if rule.exponential else multiplier)
    if c.value is None:
        c = b.let("c", c, "to units of log 2" if rule.exponential else "")
    score = hoist(b, score, t.scope, "score")
    mask = hoist(b, part.mask, t.scope, "mask")
    return Formulas(score, c, mask, {d.name: d for d in diagonals}, columns)


def _walk(b: Builder, attn: Attention, t: QueryTile, runs: Runs, step: Function, careful: Expr) -> None:
    """Both loops over key tiles; where every pair counts no value is hidden, so no care is due."""
    key_tiles = key_tiles_of(attn)

    def visit(masked: bool) -> Callable[[Expr], None]:
        return lambda n: b.call(step, step.results, n=n, MASKED=masked, CAREFUL=careful if masked else False)

    def visit_unless_empty(n: Expr) -> None:
        assert key_tiles.skip is not None
        ends = t.scope.with_(j0=n, j1=minimum(n + name("BN"), t.keys) - 1)
        with b.when(b.let("some", ends.bind(key_tiles.skip))):
            visit(masked=True)(n)

    if key_tiles.listed:
        classify.walk(b, attn, t, visit)
        return
    if runs.full:
        b.note("tiles in which every pair counts")
        for_each_tile(b, runs.full, "whole", visit(masked=False))
    b.note("tiles cut by the mask or by the end of the keys")
    for_each_tile(b, runs.masked, "cut", visit(masked=True) if key_tiles.skip is None else visit_unless_empty)


def _key_tile(outer: Builder, attn: Attention, t: QueryTile, rule: Rule, formulas: Formulas) -> Function:
    """The device function that adds one key tile, at key `n`, to the state."""
    b, n = Builder(outer.params), name("n")
    columns = pieces(attn.dims.qk) if "qk" in names(formulas.score) else ()
    values = pieces(attn.dims.v)
    at = t.first_key + n
    keys = [
        b.let(
            "k" + p.suffix(columns),
            quantize.read_tile(b, attn, "k", (t.batch, t.scope.values["hk"], at), "BN", p),
            f"[BN, {p.width}]",
        )
        for p in columns
    ]
    j = b.let("j", n + iota("BN"), "[BN]")
    with b.when(MASKED):
        b.let("inside", j < t.keys)
        if _reads_at_keys(formulas.score, formulas.diagonals) or _reads_at_keys(formulas.mask):
            b.let("j", minimum(j, t.keys - 1), "past the end, the last one again, so that reads stay inside")
    scope = formulas.scope.with_(j=row(j))
    score = read_early(b, formulas, scope, lambda d: skew.read_tile(d, attn, t, n))
    s: Expr | None = None
    for p, k in zip(columns, keys, strict=True):
        s = dot(name("q" + p.suffix(columns), k.dtype, ("BM", p.width)), trans(k), s)
    x = (scope if s is None else scope.with_(qk=b.let("s", s, "[BM, BN]"))).bind(score)
    if x.shape != ("BM", "BN"):  # a score of rows or keys alone
        x = full(("BM", "BN"), 0.0) + x

    def keep() -> Expr:
        mask = scope.bind(formulas.mask)
        return b.let("keep", row(INSIDE) & mask, "[BM, BN]") if mask != TRUE else b.let("keep", row(INSIDE), "[1, BN]")

    def load_values() -> tuple[Expr, ...]:
        place = (t.batch, _value_head(attn, t), at)
        return tuple(
            _values(b, attn, quantize.read_tile(b, attn, "v", place, "BN", p), p.suffix(values)) for p in values
        )

    accumulators = tuple("acc" + p.suffix(values) for p in values)
    weigh = partial(quantize.weigh, attn)
    rule.step(b, Tile(x, formulas.c, MASKED, keep, load_values, accumulators, weigh))
    state = [name(a, "f32", ("BM", p.width)) for a, p in zip(accumulators, values, strict=True)]
    flags = ("MASKED", "CAREFUL") if may_hide_values(attn) else ("MASKED",)
    return function("key_tile", b, [*state, *rule.state], (*flags, "BM", "BN"), "Adds the keys from n on to the state.")


def _value_head(attn: Attention, t: QueryTile) -> Expr:
    return t.scope.values["hk"] if attn.heads.v == attn.heads.kv else name("hv")


def _reads_at_keys(e: Expr, tiled: Collection[str] = ()) -> bool:
    """Whether a formula reads single elements at keys; those of `tiled` come as whole tiles."""
    return any(node.op in ("load", "bucket") and node.attr not in tiled and "j" in names(node) for node in walk(e))


def read_early(b: Builder, formulas: Formulas, scope: Scope, tile_of: Callable[[Diagonal], Expr]) -> Expr:
    """Binds the reads that move with the key but not with qk, before the product whose latency hides theirs."""

    bound: dict[Expr, Expr] = {}

    def bind(node: Expr) -> Expr:
        diagonal = formulas.diagonals.get(str(node.attr))
        if diagonal is None:
            return b.let(b.fresh(f"{node.attr}_ij"), scope.bind(node))
        return cast_to(b.let(b.fresh(f"{diagonal.read.attr}_ij"), tile_of(diagonal)), node.dtype)

    def step(node: Expr) -> Expr | None:
        if node.op not in ("load", "bucket") or "qk" in names(node):
            return None
        if node not in bound:
            bound[node] = bind(node)
        return bound[node]

    return transform(formulas.score, step)


def _values(b: Builder, attn: Attention, v: Expr, suffix: str) -> Expr:
    """A V tile. With CAREFUL, what is not finite in it reaches the rows that see it (as NaN) and no other."""
    v = b.let("v" + suffix, v, f"[BN, {v.shape[1]}]")
    if not may_hide_values(attn):
        return v
    with b.when(CAREFUL):
        dtype, acc = v.dtype, name("acc" + suffix, "f32", ("BM", v.shape[1]))
        bad = b.let("bad", ew("ne", v - v, const(0.0, dtype)))
        keep = name("keep", "bool", ("BM" if names(attn.part.mask) & {"i", "row"} else 1, "BN"))
        seen = full(("BM", "BN"), 1.0, dtype) * where(keep, const(1.0, dtype), const(0.0, dtype))
        hits = dot(seen, where(bad, const(1.0, dtype), const(0.0, dtype)))
        b.let("acc" + suffix, where(hits > 0.0, math.nan, acc))
        b.let("v" + suffix, where(bad, const(0.0, dtype), v))
    return v


def may_hide_values(attn: Attention) -> bool:
    """Whether a tile can hold keys that some of its rows must not see: their values, even NaN, must not matter.

    Stored values are numbers always.
    """
    return quantize.held(attn, "v") is None and (attn.part.mask != TRUE or is_varlen(attn))


def _finish(b: Builder, attn: Attention, t: QueryTile, rule: Rule) -> None:
    values = pieces(attn.dims.v)
    accumulators = tuple(name("acc" + p.suffix(values), "f32", ("BM", p.width)) for p in values)
    sink = attn.part.normalizer.sink
    if rule.sums is not None:
        b.let("total", reduce("sum", rule.sums, 1), "[BM]")
    end = rule.finish(b, None if sink is None else t.scope.bind(sink))
    rows = name("rows", "i32", ("BM",))
    if end.lse is not None and _writes_lse(attn):
        at = (t.h, t.first_query + rows) if is_varlen(attn) else (t.batch, t.h, rows)
        with b.when(name(WRITE_LSE.name) > 0):
            b.store(b.params["LSE"], at, end.lse, rows < t.queries)
    for p, o in zip(values, map(end.of, accumulators), strict=True):
        o = cast_to(quantize.rescale(b, attn, o, t.batch, _value_head(attn, t), p), VALUE_DTYPE[attn.dtype])
        if not is_varlen(attn):
            b.store_tile(b.params["O"], t.batch, t.h, t.row0, p.column, o)
            continue
        at = (t.batch, t.h, column(t.first_query + rows), row(p.column + iota(p.width)))
        inside = column(rows < t.queries) & row(p.column + iota(p.width) < attn.dims.v)
        b.store(b.params["O"], at, o, inside)
