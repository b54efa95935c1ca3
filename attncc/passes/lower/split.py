"""Calls of few queries by split-KV: the keys of a row are shared out equally, and a second kernel merges the shares.

A program has the query tile of a group of heads and an equal share of the line of key tiles that the tile visits: whole
ones first, then those cut by the mask. Shares are dealt out tile by tile, so that programs that run side by side read
what lies side by side. `schedule: split_kv(n)` wishes for n shares; without a wish there are as many as fill the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, program, quotient, remainder
from attncc.ir.expr import Expr, lift, maximum, minimum, name, where
from attncc.ir.tile import Function, Kernel, Scratch
from attncc.passes.lower import care
from attncc.passes.lower.grid import cdiv
from attncc.passes.lower.group import by_groups, group_tiles, groups, place_group
from attncc.passes.lower.knobs import FILL, SPLIT, WRITE_LSE
from attncc.passes.lower.partial import (
    LOST,
    Part,
    end_row,
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
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.walk import BN


@dataclass(frozen=True, slots=True)
class Shares:
    """How the line of a query tile is shared out."""

    count: Expr
    part: Callable[[Expr, Expr], Part]
    """Of a share, by its number and the tiles of the line."""
    knobs: tuple[str, ...]
    """What they depend on."""


def shares(attn: Attention) -> Shares:
    """As many equal ones as the spec wishes for, or of SPLIT tiles in a row where that is fixed; else as many as fill
    the GPU, none of fewer than SPLIT tiles while there are more."""
    if attn.schedule.name == "split_kv":
        wished = attn.schedule.args[0]
        return Shares(wished, lambda share, tiles: Part(share, tiles, wished), ())
    least = name(SPLIT.name)
    most = cdiv(cdiv(name("Sk"), BN), least)
    if attn.is_apart:
        return Shares(
            most,
            lambda share, tiles: Part(share * least, minimum(share * least + least, tiles)),
            (SPLIT.name,),
        )
    query_tiles = name("B") * groups(attn) * group_tiles(attn)
    filling = minimum(most, maximum(quotient(name(FILL.name), query_tiles), 1))

    def dealt(share: Expr, tiles: Expr) -> Part:
        worthwhile = maximum(minimum(name("shares"), cdiv(tiles, least)), 1)
        return Part(share, where(share < name("stride"), tiles, 0), worthwhile)

    return Shares(filling, dealt, (SPLIT.name, FILL.name))


def kernels(attn: Attention, dense: Function) -> tuple[Kernel, Kernel]:
    """What makes the states of shares, and what merges them; `dense`: the dense kernel's step."""
    return _sharer(attn, dense), _merger(attn)


def temporaries(attn: Attention) -> tuple[Scratch, ...]:
    """States by row, counted over the batch, and share."""
    return scratch(attn, (rows_of(attn), shares(attn).count), _programs(attn))


def _programs(attn: Attention) -> Expr:
    return name("B") * groups(attn) * group_tiles(attn) * shares(attn).count


# -- a share -------------------------------------------------------------------------------------


def _sharer(attn: Attention, dense: Function) -> Kernel:
    """One program per query tile and share; where its step is the dense kernel's, it is that."""
    attn = by_groups(attn)
    b = Builder(share_parameters(attn, "BM", "BN", care.PASS.name, *shares(attn).knobs))
    lost = care.marks(LOST, attn)
    steps: list[Function] = []
    with care.unless_done(b, attn, lost):
        tiles, count = b.let("tiles", group_tiles(attn)), b.let("shares", shares(attn).count)
        number, rest = b.let("number", remainder(program(), tiles)), b.let("rest", quotient(program(), tiles))
        share, group = b.let("share", remainder(rest, count)), b.let("of", quotient(rest, count))
        batch = b.let("b", quotient(group, groups(attn)))
        t = place_group(b, attn, batch, remainder(group, groups(attn)), number)
        load_queries(b, attn, t)
        step = step_of(b, attn, t, dense)
        line = line_of(b, attn, t)
        part = shares(attn).part(share, line.tiles)
        stride = part.stride if lift(part.stride).value else b.let("stride", part.stride)
        first, last = b.let("first", part.first), b.let("last", part.last)
        walk = walk_part(b, attn, t, line, step, Part(first, last, stride))
        care.walk_twice(b, attn, rule_of_few(attn), lambda spoilt: b.store(lost, (program(),), spoilt), walk)
        state = b.let("state", (t.batch * attn.heads.q + t.h) * name("Sq") + t.scope.values["row"], "[BM]")
        store_states(b, attn, t, state, share)
        steps.append(step)
    doc = f"Few queries of {attn.name}: one program per query tile of a group of heads and share of its keys."
    body = tidy(b.params.values(), b.body)
    return Kernel(f"{attn.name}_split", *body, tuple(steps), _programs(attn), doc, early=walks_early(attn))


# -- the merge -----------------------------------------------------------------------------------


def _merger(attn: Attention) -> Kernel:
    """One program per row: the states of its shares become one, which ends as any other."""
    b = Builder(share_parameters(attn, "BM", "BN", WRITE_LSE.name, *shares(attn).knobs))
    batch, h, query = place_row(b, attn, program())
    merge_states(b, attn, b.let("shares", shares(attn).count), lambda share: (program(), share))
    end_row(b, attn, batch, h, query)
    doc = "Merges what the shares of each row found, and ends the row."
    return Kernel(f"{attn.name}_merge", *tidy(b.params.values(), b.body), (), rows_of(attn), doc, early=True)
