"""What the kernels of a softmax-like part are made of: formulas, the step over a key tile, the walk over key tiles.

The dense kernel, the split one and the engine share these; they differ in who works on which rows and keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, dot, full, function, iota, reduce, row, tile, trans
from attncc.ir.cache import cached, find
from attncc.ir.expr import TRUE, Expr, Value, broadcast, cast_to, const, eq, ew, minimum, name, where
from attncc.ir.factors import fold_constants, split_multiplier
from attncc.ir.rewrite import names, transform, walk
from attncc.ir.staircase import levels
from attncc.ir.tile import Function, Param
from attncc.passes.lower import cache, classify, halves, quantize, skew, slope, staircase, storage
from attncc.passes.lower.chains import source
from attncc.passes.lower.grid import QueryTile, is_varlen
from attncc.passes.lower.normalizers import LOG2E, VALUE_DTYPE, Rule, Tile
from attncc.passes.lower.pieces import Piece
from attncc.passes.lower.quantize import QK
from attncc.passes.lower.scores import Scope, hoist, regroup, share_reads
from attncc.passes.lower.skew import Diagonal
from attncc.passes.lower.slope import Sloped
from attncc.passes.lower.walk import Runs, for_each_tile, key_tiles_of

MASKED: Final = name("MASKED", "bool")
CARE: Final = name("CARE")
FOR_EACH_ROW: Final = 1
"""Care: a cut tile's values reach the rows that see them, and no other, even where they are NaN."""
FOR_ALL_ROWS: Final = 3
"""The same where all rows see the same keys: values that none of them sees are left out."""
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
    unit: Expr | None = None
    """What products of lifted queries [BM] are multiplied by, where c does not."""
    sloped: Sloped | None = None
    """Terms of the score that are linear in the key, where they are told apart; `score` then lacks them."""


def writes_lse(attn: Attention) -> bool:
    return attn.wants("lse") and attn.part.normalizer.kind == "softmax"


def begin(b: Builder, attn: Attention, rule: Rule) -> None:
    """The state of no keys at all."""
    rule.init(b)
    values = cache.value_pieces(attn)
    for p in values:
        b.let("acc" + p.suffix(values), full(("BM", p.width), 0.0), f"[BM, {p.width}]")


def formulas_of(
    b: Builder, attn: Attention, t: QueryTile, rule: Rule, skewed: bool = True, sloped: bool = False
) -> Formulas:
    """Binds what no key moves. `skewed`: reads along diagonals are of skewed copies; `sloped`: lines are told apart."""
    part = attn.part
    cache.bind(b, attn, t, {"k": t.scope.values["hk"], "v": value_head(attn, t)})
    moving = {text: t.scope.values[text] for text in ("i", "row", "h")}
    columns = t.scope.with_(**{text: column(e) for text, e in moving.items() if e.shape})
    score, diagonals = skew.split_diagonals(attn) if skewed else (part.score, ())
    if attn.numerics.exp == "fast" and attn.dtype != "fp32":
        score = transform(score, lambda e: replace(e, attr="fast") if e.op == "tanh" else e)
    score, multiplier = quantize.with_unit(attn, *split_multiplier(regroup(score)))
    c = t.scope.bind(fold_constants(multiplier * LOG2E) if rule.exponential else multiplier)
    if c.value is None:
        c = b.let("c", c, "to units of log 2" if rule.exponential else "")
    found = slope.split(score) if sloped else None
    if found is not None:
        line = hoist(b, found.line, t.scope, "line")
        slope_ = b.let(b.fresh("slope"), share_reads(b, fold_constants(found.slope), t.scope))
        found = Sloped(hoist(b, found.rest, t.scope, "score"), line, slope_)
    score = hoist(b, score, t.scope, "score") if found is None else found.rest
    mask = hoist(b, part.mask, t.scope, "mask")
    unit = halves.Q_UNIT if cache.lifts(attn) else None
    if unit is not None and score == QK and found is None:
        c, unit = b.let("c", c * unit, "[BM]"), None
    return Formulas(score, c, mask, {d.name: d for d in diagonals}, columns, unit, found)


Visit = Callable[[Expr], None]
"""What is done with the tile whose first key this is."""


def walk_keys(b: Builder, attn: Attention, t: QueryTile, runs: Runs, step: Function, care: Value) -> None:
    """Both loops over key tiles; `care`: of a cut tile's hidden values, as `CARE` has it."""
    if key_tiles_of(attn).listed:
        classify.walk(b, attn, t, lambda masked: _call(b, step, care, masked))
        return
    whole, cut = visits(b, attn, t, step, care)
    if runs.full:
        b.note(WHOLE_TILES)
        for_each_tile(b, runs.full, "whole", whole)
    b.note(CUT_TILES)
    for_each_tile(b, runs.masked, "cut", cut)


WHOLE_TILES: Final = "tiles in which every pair counts"
CUT_TILES: Final = "tiles cut by the mask or by the end of the keys"


def visits(b: Builder, attn: Attention, t: QueryTile, step: Function, care: Value) -> tuple[Visit, Visit]:
    """What is done with whole tiles and with cut ones."""
    skip, whole, cut = key_tiles_of(attn).skip, _call(b, step, care, False), _call(b, step, care, True)
    if skip is None:
        return whole, cut

    def cut_unless_empty(n: Expr) -> None:
        ends = t.scope.with_(j0=n, j1=minimum(n + name("BN"), t.keys) - 1)
        with b.when(b.let("some", ends.bind(skip))):
            cut(n)

    return whole, cut_unless_empty


def _call(b: Builder, step: Function, care: Value, masked: bool) -> Visit:
    """Where every pair counts no value is hidden, so no care is due."""
    return lambda n: b.call(step, step.results, n=n, MASKED=masked, CARE=care if masked else 0)


def key_tile(outer: Builder, attn: Attention, t: QueryTile, rule: Rule, formulas: Formulas) -> Function:
    """The device function that adds one key tile, at key `n`, to the state."""
    b, n = Builder(outer.params), name("n")
    columns = cache.key_pieces(attn) if "qk" in names(formulas.score) else ()
    values, few = cache.value_pieces(attn), bool(cached(attn)) and attn.dtype != "fp32"
    if attn.page_size:
        storage.find_pages(b, attn, t.scope.values["b"], n, t.keys)
    keys = [
        b.let("k" + p.suffix(columns), _read_rows(b, attn, "k", t, t.scope.values["hk"], p), f"[BN, {p.width}]")
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
        s = dot(name("q" + p.suffix(columns), k.dtype, ("BM", p.width)), trans(k), s, few=few)
        s = cache.scaled(b, attn, t, p, s, formulas.unit)
    x = (scope if s is None else scope.with_(qk=b.let("s", s, "[BM, BN]"))).bind(score)
    if x.shape != ("BM", "BN"):  # a score of rows or keys alone
        x = full(("BM", "BN"), 0.0) + x

    def keep() -> Expr:
        mask = scope.bind(formulas.mask)
        return b.let("keep", row(INSIDE) & mask, "[BM, BN]") if mask != TRUE else b.let("keep", row(INSIDE), "[1, BN]")

    kept = broadcast((1, "BN"), scope.bind(formulas.mask).shape)

    def hide(w: Expr) -> Expr:
        with b.when(MASKED):
            b.let(str(w.attr), where(name("keep", "bool", kept), w, 0.0))
        return w

    def scaled(p: Expr) -> tuple[tuple[Expr, ...], Expr | None]:
        return cache.weighted(b, attn, t, value_head(attn, t), p, hide)

    def above() -> Expr | None:
        return cache.above(b, attn, t, value_head(attn, t), name("keep", "bool", kept))

    def load_values() -> tuple[Expr, ...]:
        if may_see_the_same(attn):
            with b.when(eq(CARE, FOR_ALL_ROWS)):
                b.let("seen", reduce("max", cast_to(name("keep", "bool", kept), "i32"), 0) > 0, "[BN]")
        tiles = ((p.suffix(values), _value_tile(b, attn, t, p, columns)) for p in values)
        return tuple(_values(b, attn, v, suffix, name("keep", "bool", kept)) for suffix, v in tiles)

    accumulators = tuple("acc" + p.suffix(values) for p in values)
    weigh = partial(quantize.weigh, attn)
    rule.step(b, Tile(x, formulas.c, MASKED, keep, load_values, accumulators, weigh, scaled, above, few))
    state = [name(a, "f32", ("BM", p.width)) for a, p in zip(accumulators, values, strict=True)]
    flags = ("MASKED", "CARE") if may_hide_values(attn) else ("MASKED",)
    return function("key_tile", b, [*state, *rule.state], (*flags, "BM", "BN"), "Adds the keys from n on to the state.")


def _value_tile(b: Builder, attn: Attention, t: QueryTile, p: Piece, columns: tuple[Piece, ...]) -> Expr:
    """The values of a tile; where they are a part of the keys, those that were read are not read again."""
    if not attn.is_latent:
        return _read_rows(b, attn, "v", t, value_head(attn, t), p)
    if p in columns:
        return name("k" + p.suffix(columns), VALUE_DTYPE[attn.dtype], ("BN", p.width))
    return _read_rows(b, attn, "k", t, t.scope.values["hk"], p)


def _read_rows(b: Builder, attn: Attention, which: str, t: QueryTile, head: Expr, p: Piece) -> Expr:
    """The tile of keys or values from key n of a sequence on."""

    def stored(x: Param, p: Piece, dim: int) -> Expr:
        if attn.page_size:
            return storage.read_tile(attn, x, head, p, dim)
        return tile(x, t.batch, head, t.first_key + name("n"), p.column, ("BN", p.width))

    if levels(attn, which):
        return staircase.read_tile(b, attn, which, t, head, p)
    if find(attn, which) is not None:
        return cache.read_tile(b, attn, which, t, head, p, stored)
    if attn.page_size:
        return stored(b.params[source(attn, which)], p, attn.dims.qk if which == "k" else attn.dims.v)
    return quantize.read_tile(b, attn, which, (t.batch, head, t.first_key + name("n")), "BN", p)


def value_head(attn: Attention, t: QueryTile) -> Expr:
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


def _values(b: Builder, attn: Attention, v: Expr, suffix: str, keep: Expr) -> Expr:
    """A V tile. With care, what is not finite in it reaches the rows that see it (as NaN) and no other."""
    v = b.let("v" + suffix, v, f"[BN, {v.shape[1]}]")
    if cache.has_finite_values(attn):
        return v
    if storage.has_whole_tiles(attn):
        with b.when(MASKED):
            b.let(
                "v" + suffix, where(column(INSIDE), v, const(0.0, v.dtype)), "a page may hold NaN behind the last key"
            )
    if not may_hide_values(attn):
        return v
    if may_see_the_same(attn):
        with b.when(eq(CARE, FOR_ALL_ROWS)):
            b.let("v" + suffix, where(column(name("seen", "bool", ("BN",))), v, const(0.0, v.dtype)))
    with b.when(eq(CARE, FOR_EACH_ROW)):
        dtype, acc = v.dtype, name("acc" + suffix, "f32", ("BM", v.shape[1]))
        bad = b.let("bad", ew("ne", v - v, const(0.0, dtype)))
        seen = full(("BM", "BN"), 1.0, dtype) * where(keep, const(1.0, dtype), const(0.0, dtype))
        hits = dot(seen, where(bad, const(1.0, dtype), const(0.0, dtype)))
        b.let("acc" + suffix, where(hits > 0.0, math.nan, acc))
        b.let("v" + suffix, where(bad, const(0.0, dtype), v))
    return v


def may_see_the_same(attn: Attention) -> bool:
    """Whether a tile's rows may be known to see the same keys: those of one query, if its heads are alike."""
    plain = attn.layout != "varlen" and not key_tiles_of(attn).listed
    return may_hide_values(attn) and plain and "decode" in attn.modes and not {"h", "hk"} & names(attn.part.mask)


def may_hide_values(attn: Attention) -> bool:
    """Whether a tile can hold keys that some of its rows must not see: their values, even NaN, must not matter.

    Stored values are numbers always, and so are codes; scales of these are hidden with the weights that they multiply.
    """
    if quantize.held(attn, "v") is not None or cache.has_finite_values(attn):
        return False
    return attn.part.mask != TRUE or is_varlen(attn)
