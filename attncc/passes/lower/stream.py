"""Calls of few queries by stream-K: the key tiles of all sequences and heads are one line, cut in equal ranges.

An item of the line is a query tile of a group of heads with the key tiles that it visits. `plan` counts those of each
item, from lengths that only the device knows. A program walks its range item by item: what it finds whole it ends; of
the others, at most its first and its last, it leaves the states, in two slots of its own, which `merge` collects. No
program waits for another. Published as LeanAttention, arXiv 2405.10480, whose programs wait.

Where a group's heads are more than one tile, items of the same keys lie a whole number of ranges apart, if ranges are
a multiple of them in number. Neighbouring programs have these: they read the same keys at about the same time, and
multiprocessors side by side are given what both ask for at once. On an H200 that halves what the L2 cache is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, iota, program, quotient, read, reduce, remainder
from attncc.ir.expr import Expr, cast_to, const, eq, ew, maximum, minimum, name, where
from attncc.ir.tile import Function, Kernel, Param, Scratch
from attncc.passes.lower import care
from attncc.passes.lower.fragments import may_hide_values
from attncc.passes.lower.grid import BM, QueryTile, cdiv
from attncc.passes.lower.group import by_groups, group_tiles, groups, members, place_group
from attncc.passes.lower.knobs import FILL, SPLIT, WRITE_LSE
from attncc.passes.lower.partial import (
    LOST,
    Part,
    end_row,
    end_tile,
    line_of,
    load_queries,
    merge_states,
    place_row,
    rows_of,
    rule_of_few,
    scratch,
    share_parameters,
    step_of,
    store_states,
    walk_part,
    walks_early,
)
from attncc.passes.lower.scores import own_name
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.words import has_words

AT_ONCE: Final = 1024
"""Items whose tiles are added up at once."""
AT_ONCE_BY_A_WARP: Final = 256
"""The same in programs of one warp, as those that read codes are: 1024 are 32 of each thread, and take 5 us."""
SLOTS: Final = 2
"""A program's: one for the item in whose midst its range begins, one for the item in whose midst it ends."""
PROGRAMS: Final = name(FILL.name)
OWN: Final = "own_range"
FEW: Final = 4
"""States of a row, of which most rows that are cut have no more."""
COLLECTORS: Final = 4
"""To a range, of those that merge states behind an engine: a multiprocessor has so many at once."""
LOOKED_AT: Final = 16
"""Rows of which one of those sees at once whether any is to be merged: mostly none is."""
NEAR: Final = 20
"""One program of so many may have no range, for the others' to end where items do."""


def kernels(attn: Attention, dense: Function) -> tuple[Kernel, Kernel, Kernel]:
    """What counts tiles, what walks them and what merges; `dense`: the dense kernel's step."""
    return _plan(attn), _walker(attn, dense), _merger(attn)


def temporaries(attn: Attention) -> tuple[Scratch, ...]:
    """The tiles of each item; states by slot and row of a query tile."""
    counts = _counts(attn)
    return (
        Scratch(counts.name, (_items(attn),), counts.dtype),
        *scratch(attn, (PROGRAMS * SLOTS, BM), PROGRAMS),
    )


def _items(attn: Attention) -> Expr:
    return name("B") * groups(attn) * group_tiles(attn)


def _counts(attn: Attention) -> Param:
    return Param(own_name("tiles_of", attn), "buffer", "i32", rank=1, doc="[items] key tiles that each visits")


def _place(b: Builder, attn: Attention, item: Expr) -> QueryTile:
    """Binds the query tile of an item."""
    each = b.let("each", of_a_tile(attn))
    number, of = b.let("number", quotient(item, each)), b.let("of", remainder(item, each))
    return place_group(b, attn, b.let("b", quotient(of, groups(attn))), remainder(of, groups(attn)), number)


def of_a_tile(attn: Attention) -> Expr:
    """Items that have the first tile of their group; those that have the second one follow them, and so on."""
    return name("B") * groups(attn)


# -- the plan ------------------------------------------------------------------------------------


def _plan(attn: Attention) -> Kernel:
    """One program per item."""
    attn = by_groups(attn)
    counts = _counts(attn)
    b = Builder(share_parameters(attn, "BM", "BN", more=(counts,)))
    t = _place(b, attn, program())
    b.store(counts, (program(),), line_of(b, attn, t).tiles)
    doc = "Counts the key tiles that each query tile of a group of heads visits."
    return Kernel(f"{attn.name}_plan", *tidy(b.params.values(), b.body), (), _items(attn), doc, early=True)


def _bind_cut(b: Builder, total: Expr, items: Expr) -> None:
    """Binds into how many ranges the line is cut, and their sizes: `longer` of them, which lie evenly among the others,
    have one tile more than `size`.

    Where it costs few programs there are as many ranges to an item as to any other: items of equal length then end
    where ranges do, which leaves fewer states to merge, and those that share their keys are walked side by side.
    """
    b.note("ranges of equal size, none of fewer than SPLIT tiles while there are more; whole ones to an item if near")
    even = b.let("even", quotient(PROGRAMS, maximum(items, 1)) * items)
    most = b.let("most", where(even * NEAR >= PROGRAMS * (NEAR - 1), even, PROGRAMS))
    ranges = b.let("ranges", maximum(minimum(most, quotient(total, name(SPLIT.name))), 1))
    b.let("size", quotient(total, ranges))
    b.let("longer", remainder(total, ranges))


def _begin(range_: Expr) -> Expr:
    """Where a range begins."""
    return range_ * name("size") + quotient(range_ * name("longer"), name("ranges"))


def _range_of(tile: Expr, total: Expr) -> Expr:
    """The range that a tile of the line is in."""
    before = (cast_to(tile, "i64") + 1) * name("ranges") - 1
    return cast_to(quotient(before, maximum(total, 1)), "i32")


# -- a range -------------------------------------------------------------------------------------


def _walker(attn: Attention, dense: Function) -> Kernel:
    """One program per range."""
    attn = by_groups(attn)
    counts, lost = _counts(attn), care.marks(LOST, attn)
    knobs = ("BM", "BN", WRITE_LSE.name, care.PASS.name, SPLIT.name, FILL.name)
    b = Builder(share_parameters(attn, *knobs, more=(counts,)))
    steps: list[Function] = []
    with care.unless_done(b, attn, lost):
        _bind_range(b, attn, counts)
        b.let("left_nan", const(0))
        with b.loop("item", name("first_item"), name("end_item")) as item:
            count = b.let("count", read(counts, item))
            first = b.let("first", first_of(name("range_begin"), name("item_begin")))
            last = b.let("last", last_of(name("range_end"), name("item_begin"), count))
            t = _place(b, attn, item)
            load_queries(b, attn, t)
            step = step_of(b, attn, t, dense)
            walk = walk_part(b, attn, t, line_of(b, attn, t), step, Part(first, last))
            care.walk_twice(b, attn, rule_of_few(attn), lambda spoilt: _keep_mark(b, spoilt), walk)
            with b.when(eq(last - first, count)):
                end_tile(b, attn, t)
            with b.when(last - first < count):
                store_states(b, attn, t, _slot(b, name(OWN), first > 0), iota("BM"))
            b.let("item_begin", name("item_begin") + count)
            steps.append(step)
        if may_hide_values(attn):
            with b.when(eq(care.NUMBER, 0)):
                b.store(lost, (program(),), name("left_nan"))
    doc = f"Few queries of {attn.name}: one program per range of the line of all key tiles."
    body = tidy(b.params.values(), b.body)
    return Kernel(f"{attn.name}_stream", *body, tuple(steps), PROGRAMS, doc, early=walks_early(attn))


def _keep_mark(b: Builder, spoilt: Expr) -> None:
    b.let("left_nan", maximum(name("left_nan"), spoilt))


def _bind_range(
    b: Builder, attn: Attention, counts: Param, each: Callable[[Expr, Expr, Expr], None] | None = None
) -> None:
    """Binds the tiles of this program's range, its items, and where the first of them begins.

    `each` is told of all items, some at once: their numbers of tiles, which are none, and where on the line they end.
    """
    items = b.let("items", _items(attn))
    _add_up(b, attn, counts, items, "line")
    _bind_cut(b, name("line"), name("items"))
    tiles = b.let("of_group", group_tiles(attn), "that neighbours have, where they are whole ranges apart")
    beside = remainder(program(), tiles) * quotient(name("ranges"), tiles) + quotient(program(), tiles)
    apart = eq(remainder(name("ranges"), tiles), 0) & (program() < name("ranges"))
    own = b.let(OWN, where(apart, beside, program()))
    begin = b.let("range_begin", minimum(_begin(own), name("line")))
    end = b.let("range_end", minimum(_begin(own + 1), name("line")))
    for text in ("first_item", "item_begin", "end_item", "before"):
        b.let(text, const(0))
    b.note("items that end before the range, how many tiles they have, and items that begin before its end")
    with b.loop("chunk", 0, items, _at_once(attn)) as chunk:
        tiles, inside = _some(b, attn, counts, chunk, items)
        ends = b.let("ends", name("before") + Expr("cumsum", (tiles,), None, "i32", tiles.shape))
        over = b.let("over", cast_to(inside & (ends <= begin), "i32"))
        begun = cast_to(inside & (ends - tiles < end), "i32")
        b.let("first_item", name("first_item") + reduce("sum", over, 0))
        b.let("item_begin", name("item_begin") + reduce("sum", over * tiles, 0))
        b.let("end_item", name("end_item") + reduce("sum", begun, 0))
        b.let("before", name("before") + reduce("sum", tiles, 0))
        if each is not None:
            each(tiles, inside, ends)
    b.let("end_item", where(begin < end, name("end_item"), name("first_item")))


def _at_once(attn: Attention) -> int:
    return AT_ONCE_BY_A_WARP if has_words(attn) else AT_ONCE


def _some(b: Builder, attn: Attention, counts: Param, chunk: Expr, items: Expr) -> tuple[Expr, Expr]:
    """Binds the tiles of some items, 0 behind the last, and which are none."""
    at = b.let("at", chunk + iota(_at_once(attn)), f"[{_at_once(attn)}]")
    inside = b.let("is_item", at < items)
    return b.let("some", read(counts, at, mask=inside)), inside


def _add_up(b: Builder, attn: Attention, counts: Param, items: Expr, text: str) -> None:
    """Binds how many tiles the first items have."""
    b.let(text, const(0))
    with b.loop("chunk", 0, items, _at_once(attn)) as chunk:
        b.let(text, name(text) + reduce("sum", _some(b, attn, counts, chunk, items)[0], 0))


def first_of(begin: Expr, item: Expr) -> Expr:
    """The first tile that a range has of an item which begins there on the line."""
    return maximum(begin - item, 0)


def last_of(end: Expr, item: Expr, count: Expr) -> Expr:
    """The one behind the last of them, of so many."""
    return minimum(end - item, count)


def slot_of(range_: Expr, begun_before: Expr) -> Expr:
    """Where a range leaves the state of an item: one which it does not begin, or one which it does not end."""
    return range_ * SLOTS + where(begun_before, 0, 1)


def _slot(b: Builder, range_: Expr, begun_before: Expr) -> Expr:
    return b.let("slot", slot_of(range_, begun_before))


def ranges(attn: Attention) -> tuple[Kernel, tuple[Scratch, Scratch]]:
    """What finds the ranges beforehand, for an engine; and where: of each its first item and the one behind its last,
    its ends, where that item begins, and its number; and of each item which ranges have it, for its merge."""
    counts, held = _counts(attn), _held(attn)
    numbers = ("first_item", "end_item", "range_begin", "range_end", "item_begin", OWN)
    found = Param(
        own_name("line_ranges", attn), "buffer", "i32", rank=2, doc=f"[ranges, {len(numbers)}] {', '.join(numbers)}"
    )
    b = Builder(share_parameters(attn, "BM", "BN", SPLIT.name, FILL.name, more=(counts, found, held)))

    def keep_holders(tiles: Expr, inside: Expr, ends: Expr) -> None:
        """By the program in whose range an item begins, and that in whose it ends; none for those of no tiles."""
        begins, at = b.let("begins", ends - tiles), name("at", "i32", (_at_once(attn),))
        none = eq(tiles, 0) & eq(program(), 0)
        begun = (tiles > 0) & (begins >= name("range_begin")) & (begins < name("range_end"))
        ended = (tiles > 0) & (ends > name("range_begin")) & (ends <= name("range_end"))
        b.store(held, (at, 0), name(OWN), inside & (none | begun))  # the first program has the first range
        b.store(held, (at, 1), where(none, 0, name(OWN) + 1), inside & (none | ended))

    _bind_range(b, attn, counts, keep_holders)
    for at, text in enumerate(numbers):
        b.store(found, (program(), at), name(text))
    doc = "Finds each range of the line of all key tiles, and its items."
    kernel = Kernel(f"{attn.name}_ranges", *tidy(b.params.values(), b.body), (), PROGRAMS, doc, early=True)
    return kernel, (
        Scratch(found.name, (PROGRAMS, const(len(numbers))), found.dtype),
        Scratch(held.name, (_items(attn), const(2)), held.dtype),
    )


def _held(attn: Attention) -> Param:
    return Param(
        own_name("held_by", attn),
        "buffer",
        "i32",
        rank=2,
        doc="[items, 2] the first range of each, and the one behind its last",
    )


# -- the merge -----------------------------------------------------------------------------------


def _merger(attn: Attention) -> Kernel:
    """One program per row: nothing to do where one range has all of its item."""
    counts = _counts(attn)
    b = Builder(share_parameters(attn, "BM", "BN", WRITE_LSE.name, SPLIT.name, FILL.name, more=(counts,)))
    at, item = _place_row_of_item(b, attn, program())
    _add_up(b, attn, counts, b.let("items", _items(attn)), "line")
    _bind_cut(b, name("line"), name("items"))
    _add_up(b, attn, counts, item, "item_begin")
    count = b.let("count", read(counts, item))
    first = b.let("first_range", _range_of(name("item_begin"), name("line")))
    last = _range_of(name("item_begin") + count - 1, name("line"))
    _merge_and_end(b, attn, at, first, b.let("held", where(count > 0, last - first + 1, 0)))
    doc = "Merges what several ranges found of a row, and ends it."
    return Kernel(f"{attn.name}_merge", *tidy(b.params.values(), b.body), (), rows_of(attn), doc, early=True)


def collector(attn: Attention) -> Kernel:
    """The same behind an engine, whose ranges were found beforehand: several rows to a program where they are many, as
    most of the time there is nothing to do in any."""
    held = _held(attn)
    b = Builder(share_parameters(attn, "BM", WRITE_LSE.name, FILL.name, more=(held,)))
    rows = b.let("all_rows", rows_of(attn))
    each = b.let("each", cdiv(rows, _collectors(attn)))
    end = b.let("end", minimum(program() * each + each, rows))
    with b.loop("some", program() * each, end, LOOKED_AT) as some:
        numbers = b.let("numbers", some + iota(LOOKED_AT), f"[{LOOKED_AT}]")
        heads, query = quotient(numbers, name("Sq")), remainder(numbers, name("Sq"))
        batch, h = quotient(heads, attn.heads.q), remainder(heads, attn.heads.q)
        item = b.let("items", _item_of(attn, batch, h, _row_of_group(attn, h, query)), f"[{LOOKED_AT}]")
        inside = numbers < end
        after, before = (read(held, item, side, mask=inside) for side in (1, 0))
        cut = b.let("cut", inside & ew("ne", after - before, 1), f"[{LOOKED_AT}]")
        any_cut = reduce("max", cast_to(cut, "i32"), 0) > 0
        with b.when(any_cut), b.loop("number", some, minimum(some + LOOKED_AT, end)) as number:
            at, item = _place_row_of_item(b, attn, number)
            first = b.let("first_range", read(held, item, 0))
            _merge_and_end(b, attn, at, first, b.let("held", read(held, item, 1) - first), FEW)
    doc = "Merges what several ranges found of a row, and ends it; which they are is known."
    return Kernel(f"{attn.name}_collect", *tidy(b.params.values(), b.body), (), _collectors(attn), doc, early=True)


def _collectors(attn: Attention) -> Expr:
    return minimum(rows_of(attn), PROGRAMS * COLLECTORS)


def _place_row_of_item(b: Builder, attn: Attention, number: Expr) -> tuple[tuple[Expr, Expr, Expr], Expr]:
    """Binds a row of so many: batch entry, head and query; and the item that it is in, with its place there."""
    batch, h, query = place_row(b, attn, number)
    r = b.let("r", _row_of_group(attn, h, query))
    item = b.let("item", _item_of(attn, batch, h, r))
    b.let("row_of_tile", remainder(r, BM))
    return (batch, h, query), item


def _row_of_group(attn: Attention, h: Expr, query: Expr) -> Expr:
    member = quotient(h, groups(attn)) if attn.heads.map == "tile" else remainder(h, members(attn))
    return query * members(attn) + member


def _item_of(attn: Attention, batch: Expr, h: Expr, r: Expr) -> Expr:
    """`r`: the row of the head's group."""
    group = remainder(h, groups(attn)) if attn.heads.map == "tile" else quotient(h, members(attn))
    return quotient(r, BM) * of_a_tile(attn) + batch * groups(attn) + group


def _merge_and_end(
    b: Builder, attn: Attention, at: tuple[Expr, Expr, Expr], first: Expr, count: Expr, few: int = 0
) -> None:
    """`few`: so many states are merged at once where there are no more of them."""

    def merge(most: int | None) -> None:
        merge_states(b, attn, count, lambda share: (_slot(b, first + share, share > 0), name("row_of_tile")), most)
        end_row(b, attn, *at)

    if few:
        with b.when(ew("ne", count, 1) & (count <= few)):
            merge(few)
    with b.when(count > few if few else ew("ne", count, 1)):
        merge(None)
