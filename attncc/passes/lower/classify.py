"""Masks that depend on data: one kernel lists, for every query tile, the key tiles worth a visit.

Each query tile owns a row of `tile_list`: key tiles that need the mask from the left, those in which every pair counts
from the right, and how many of either in `tile_counts`. Memory is that of the tiles; nothing is ever Sq x Sk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, iota, program, quotient, read, reduce, reduce_all, remainder, row
from attncc.ir.expr import Expr, cast_to, const, maximum, minimum, name, where
from attncc.ir.rewrite import names
from attncc.ir.tile import Kernel, Param, Scratch
from attncc.passes.lower import storage
from attncc.passes.lower.grid import (
    CU_K,
    CU_Q,
    QueryTile,
    cdiv,
    is_varlen,
    key_rows,
    place_dense,
    place_packed,
    query_tiles,
    size_parameters,
)
from attncc.passes.lower.knobs import KNOBS, largest
from attncc.passes.lower.scores import hoist, input_param, own_name
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.walk import BN, clip, key_tiles_of

CHUNK: Final = 64
"""Key tiles classified at once where two keys of each speak for all of it."""


def lists(attn: Attention) -> tuple[Param, Param]:
    """Positions of key tiles, and how many there are."""
    tiles, counts = (own_name(text, attn) for text in ("tile_list", "tile_counts"))
    return (
        Param(tiles, "buffer", "i32", rank=2, doc="[query tiles, key tiles] positions of key tiles"),
        Param(counts, "buffer", "i32", rank=2, doc="[query tiles, 2] how many are masked, whole"),
    )


def scratch(attn: Attention) -> tuple[Scratch, ...]:
    rows = query_tiles(attn) * _maps(attn)
    tiles, counts = lists(attn)
    return (
        Scratch(tiles.name, (rows, maximum(cdiv(key_rows(attn), BN), 1)), tiles.dtype),
        Scratch(counts.name, (rows, const(2)), counts.dtype),
    )


def kernel(attn: Attention) -> Kernel:
    """One program per query tile of each map; masks that ignore batch or head share one."""
    params = [*([CU_Q, CU_K] if is_varlen(attn) else []), *storage.index_params(attn)]
    params += [*map(input_param, attn.inputs), *lists(attn)]
    params += size_parameters(attn)
    params += [Param(k.name, "constexpr", "i32", doc=k.doc) for k in KNOBS if k.name in ("BM", "BN")]
    b = Builder({p.name: p for p in params})
    count = b.let("query_tiles", query_tiles(attn))
    number = b.let("number", remainder(program(), count))
    batch, h = _map(b, attn, quotient(program(), count))
    t = place_packed(b, attn, h, number) if is_varlen(attn) else place_dense(b, attn, batch, h, number)
    with b.when(t.row0 < t.queries) if is_varlen(attn) else nullcontext():
        _classify(b, attn, t)
    doc = f"Lists the key tiles that each query tile of {attn.name} has to visit."
    grid = query_tiles(attn) * _maps(attn)
    return Kernel(f"{attn.name}_classify", *tidy(params, b.body), (), grid, doc)


def find(b: Builder, attn: Attention, t: QueryTile) -> tuple[Expr, Expr]:
    """Binds a query tile's row of the lists, and the row's last entry."""
    count = query_tiles(attn)
    which: Expr = const(0)
    if _by_head(attn):
        which = t.h
    if _by_batch(attn):
        which = t.scope.values["b"] * attn.heads.q + t.h if _by_head(attn) else t.scope.values["b"]
    listed = b.let("listed", which * count + t.number)
    return listed, _last(b, attn, t)


def _last(b: Builder, attn: Attention, t: QueryTile) -> Expr:
    """The last entry of a row of the lists, from which whole tiles stand to the left."""
    keys = key_rows(attn) if is_varlen(attn) else t.keys
    return b.let("last_tile", maximum(cdiv(keys, BN), 1) - 1)


def walk(b: Builder, attn: Attention, t: QueryTile, visit: Callable[[bool], Callable[[Expr], None]]) -> None:
    """Both loops of the attention kernel, over the listed tiles."""
    tiles, counts = lists(attn)
    listed, last = find(b, attn, t)
    b.note("listed from the right: tiles in which every pair counts")
    with b.loop("entry", 0, read(counts, listed, 1)) as entry:
        visit(False)(b.let("n", read(tiles, listed, last - entry) * BN))
    b.note("listed from the left: tiles cut by the mask or by the end of the keys")
    with b.loop("entry", 0, read(counts, listed, 0)) as entry:
        visit(True)(b.let("n", read(tiles, listed, entry) * BN))


def _by_head(attn: Attention) -> bool:
    return bool(names(attn.part.mask) & {"h", "hk"})


def _by_batch(attn: Attention) -> bool:
    """Packed sequences are told apart by their tiles already; those in pages differ in length."""
    if is_varlen(attn):
        return False
    return "b" in names(attn.part.mask) or attn.align.kind == "input" or attn.page_size > 0


def _map(b: Builder, attn: Attention, which: Expr) -> tuple[Expr, Expr]:
    """Batch entry and head whose map a program writes; the first one's where all share it."""
    if not _by_batch(attn):
        return const(0), b.let("h", which) if _by_head(attn) else const(0)
    if not _by_head(attn):
        return b.let("b", which), const(0)
    which = b.let("which", which)
    return b.let("b", quotient(which, attn.heads.q)), b.let("h", remainder(which, attn.heads.q))


def _maps(attn: Attention) -> Expr:
    heads = const(attn.heads.q if _by_head(attn) else 1)
    return name("B") * heads if _by_batch(attn) else heads


def _classify(b: Builder, attn: Attention, t: QueryTile) -> None:
    key_tiles = key_tiles_of(attn)
    lo: Expr = const(0)
    hi: Expr = t.keys
    if len(key_tiles.ranges) == 1:
        (r,) = key_tiles.ranges
        lo, hi = (clip(b, text, t.scope.bind(e), t.keys) for text, e in (("key_lo", r.lo), ("key_hi", r.hi)))
    coarse_rows, coarse_keys = (
        grain >= largest(knob) for grain, knob in zip(key_tiles.granularity, ("BM", "BN"), strict=True)
    )
    i, row_ = t.scope.values["i"], t.scope.values["row"]
    if coarse_rows:
        b.note("the mask is constant on blocks no smaller than a tile: its first and last row speak for all")
        end = iota(2)
        i = b.let("ends", where(end < 1, t.scope.values["i0"], t.scope.values["i1"]))
        row_ = where(end < 1, t.row0, t.scope.values["row1"])
    mask = hoist(b, attn.part.mask, t.scope.with_(i=i, row=row_), "mask")
    scope = t.scope.with_(i=column(i), row=column(row_))
    b.let("masked", const(0))
    b.let("whole", const(0))
    last = _last(b, attn, t)
    first, end = lo if lo.value == 0 else b.let("first", quotient(lo, BN)), cdiv(hi, BN)

    def holds(j: Expr) -> Expr:
        return scope.with_(j=row(minimum(j, t.keys - 1))).bind(mask)

    listed = program()
    tiles, counts = lists(attn)
    if coarse_keys:
        b.note("the same goes for keys: a whole chunk of tiles at once")
        with b.loop("chunk", first, end, CHUNK) as chunk:
            _chunk(b, chunk, end, t, holds, tiles, last)
    else:
        with b.loop("tile", first, end) as tile:
            _single(b, tile, t, holds, tiles, last)
    b.store(counts, (listed, 0), name("masked"))
    b.store(counts, (listed, 1), name("whole"))


def _single(b: Builder, tile: Expr, t: QueryTile, holds: Callable[[Expr], Expr], tiles: Param, last: Expr) -> None:
    """One tile, every pair of it."""
    j = b.let("j", tile * BN + iota("BN"), "[BN]")
    seen = b.let("seen", cast_to(holds(j), "i32"))
    inside = row(cast_to(j < t.keys, "i32"))
    some = b.let("some", reduce_all("max", seen * inside))
    every = b.let("every", reduce_all("min", seen * inside))
    masked, whole = name("masked"), name("whole")
    b.store(tiles, (program(), where(every > 0, last - whole, masked)), tile, some > 0)
    b.let("masked", masked + (some - every))
    b.let("whole", whole + every)


def _chunk(
    b: Builder, chunk: Expr, end: Expr, t: QueryTile, holds: Callable[[Expr], Expr], tiles: Param, last: Expr
) -> None:
    """`CHUNK` tiles by their first and last key; a running sum gives each its place in the list."""
    tile = b.let("tile", chunk + iota(CHUNK), f"[{CHUNK}]")
    head = b.let("head", cast_to(holds(tile * BN), "i32"))
    tail = b.let("tail", cast_to(holds(tile * BN + (BN - 1)), "i32"))
    valid = cast_to(tile < end, "i32")
    some = b.let("some", reduce("max", maximum(head, tail), 0) * valid)
    complete = cast_to(tile * BN + BN <= t.keys, "i32")
    every = b.let("every", reduce("min", minimum(head, tail), 0) * valid * complete)
    part = b.let("part", some - every)
    masked, whole = name("masked"), name("whole")
    before = Expr("cumsum", (part,), None, "i32", part.shape) - part
    b.store(tiles, (program(), masked + before), tile, part > 0)
    before = Expr("cumsum", (every,), None, "i32", every.shape) - every
    b.store(tiles, (program(), last - (whole + before)), tile, every > 0)
    b.let("masked", masked + reduce("sum", part, 0))
    b.let("whole", whole + reduce("sum", every, 0))
