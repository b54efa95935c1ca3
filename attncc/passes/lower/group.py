"""Query tiles of a whole group: the query heads that share their keys and values stand side by side in one tile.

Each key is then read once for all of them. Row r of a group is query r // n of its member r % n, n being how many
heads a group has, so that the rows of a tile are of neighbouring positions and see about the same keys.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from attncc.ir.attention import Attention, KeyRange, KeyTiles
from attncc.ir.build import Builder, iota, quotient, remainder
from attncc.ir.expr import Expr, cast_to, const, minimum, name
from attncc.ir.rewrite import names
from attncc.passes.lower import storage
from attncc.passes.lower.grid import BM, QueryTile, cdiv, fixed_sizes, offset_of, place_dense
from attncc.passes.lower.scores import Scope
from attncc.passes.lower.walk import key_tiles_of


def groups(attn: Attention) -> int:
    """Groups of query heads: those of one have the same key head and the same value head."""
    return lcm(attn.heads.kv, attn.heads.v)


def members(attn: Attention) -> int:
    """Query heads of a group."""
    return attn.heads.q // groups(attn)


def group_rows(attn: Attention) -> Expr:
    return name("Sq") * members(attn)


def group_tiles(attn: Attention) -> Expr:
    """Query tiles of a group."""
    return cdiv(group_rows(attn), BM)


def place_group(b: Builder, attn: Attention, batch: Expr, group: Expr, number: Expr) -> QueryTile:
    """The tile of a group, with a head for each row of it; of a lone head its own."""
    if members(attn) == 1:
        t = place_dense(b, attn, batch, b.let("h", group), number)
        if attn.heads.v != attn.heads.kv:
            b.let("hv", t.key_head(attn, attn.heads.v))
        return t
    if group.value != 0:
        group = b.let("hk" if attn.heads.kv == groups(attn) else "group", group)
    hk, hv = (_shared(b, attn, group, *of) for of in (("hk", attn.heads.kv), ("hv", attn.heads.v)))
    if attn.heads.v != attn.heads.kv and hv.op != "name":
        b.let("hv", hv)
    rows_of_group = b.let("group_rows", group_rows(attn))
    row0 = b.let("row0", number * BM)
    rows = b.let("rows", row0 + iota("BM"), "[BM]")
    last = b.let("last_row", minimum(row0 + BM, rows_of_group) - 1)
    r = b.let("r", minimum(rows, last), "[BM] past the end, the last one again")
    member = remainder(r, members(attn))
    h = member * groups(attn) + group if attn.heads.map == "tile" else group * members(attn) + member
    first, end = (quotient(x, members(attn)) for x in (row0, last))
    row = b.let("row", quotient(r, members(attn)), "[BM] queries")
    keys = storage.keys_of(b, attn, batch)
    values = {"b": batch, "h": b.let("h", h, "[BM] heads"), "hk": hk, "row": row, "Sq": name("Sq"), "Sk": keys}
    values |= {"row0": b.let("first_query", first), "row1": b.let("last_query", end)} | fixed_sizes(attn)
    scope = Scope(values, {x.name: x for x in attn.inputs})
    offset = offset_of(b, attn, scope)
    for position, at in (("i0", "row0"), ("i1", "row1")):
        values[position] = values[at] if offset is None else b.let(position, values[at] + offset)
    values["i"] = row if offset is None else b.let("i", row + offset, "[BM] positions")
    zero = const(0)
    return QueryTile(batch, values["h"], number, row0, rows, rows_of_group, keys, zero, zero, scope)


def _shared(b: Builder, attn: Attention, group: Expr, text: str, heads: int) -> Expr:
    """The key (or value) head of a group."""
    if heads == 1:
        return const(0)
    if heads == groups(attn):
        return group
    of = remainder(group, heads) if attn.heads.map == "tile" else quotient(group, groups(attn) // heads)
    return b.let(text, of)


def by_groups(attn: Attention) -> Attention:
    """The variant as query tiles of groups see it: their keys are those of all heads in a tile."""
    if members(attn) == 1:
        return attn
    return replace(attn, parts=(replace(attn.part, key_tiles=over_heads(key_tiles_of(attn))),))


def over_heads(key_tiles: KeyTiles) -> KeyTiles:
    """Ranges of a tile whose rows are of several heads: keys that some head may see, and those that all do."""

    def over(op: str, e: Expr) -> Expr:
        return Expr(op, (e,), None, e.dtype) if "h" in names(e) else e

    def widened(r: KeyRange) -> KeyRange:
        seen = over("rows_min", r.lo), over("rows_max", r.hi)
        return KeyRange(*seen, over("rows_max", r.full_lo), over("rows_min", r.full_hi))

    skip = key_tiles.skip
    if skip is not None and "h" in names(skip):
        skip = over("rows_max", cast_to(skip, "i32")) > 0
    return replace(key_tiles, ranges=tuple(map(widened, key_tiles.ranges)), skip=skip)
