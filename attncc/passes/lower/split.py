"""Calls of few queries by split-KV: the keys of a row are shared out equally, and a second kernel merges the shares.

A program has the query tile of a group of heads and an equal share of the line of key tiles that the tile visits: whole
ones first, then those cut by the mask. `schedule: split_kv(n)` wishes for n shares; without a wish there are as many as
fill the GPU.
"""

from __future__ import annotations

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, program, quotient, remainder
from attncc.ir.expr import Expr, const, maximum, minimum, name
from attncc.ir.tile import Function, Kernel, Scratch
from attncc.passes.lower import care
from attncc.passes.lower.grid import cdiv
from attncc.passes.lower.group import by_groups, group_tiles, groups, place_group
from attncc.passes.lower.knobs import FILL, SPLIT, WRITE_LSE
from attncc.passes.lower.partial import (
    LOST,
    KeyLine,
    end_row,
    line_of,
    load_queries,
    merge_states,
    rule_of,
    scratch,
    share_parameters,
    step_of,
    store_states,
    walk_between,
)
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.walk import BN


def is_fixed(attn: Attention) -> bool:
    """Whether a sequence's bits must not depend on its neighbours: nor may its shares then."""
    return attn.numerics.reproducible == "batch"


def wished(attn: Attention) -> int | None:
    """How many shares the spec wishes for."""
    return int(attn.schedule.args[0].value or 1) if attn.schedule.name == "split_kv" else None


def shares(attn: Attention) -> Expr:
    """Shares of each query tile: as many as fill the GPU, none of fewer than SPLIT key tiles while there are more."""
    count = wished(attn)
    if count is not None:
        return const(count)
    most = cdiv(name("Sk"), BN)
    if is_fixed(attn):
        return cdiv(most, name(SPLIT.name))
    tiles = name("B") * groups(attn) * group_tiles(attn)
    return minimum(cdiv(most, name(SPLIT.name)), maximum(quotient(name(FILL.name), tiles), 1))


def _knobs(attn: Attention) -> tuple[str, ...]:
    """What `shares` and their sizes depend on."""
    return (SPLIT.name,) if is_fixed(attn) else () if wished(attn) else (SPLIT.name, FILL.name)


def kernels(attn: Attention, dense: Function) -> tuple[Kernel, Kernel]:
    """What makes the states of shares, and what merges them; `dense`: the dense kernel's step."""
    return _sharer(attn, dense), _merger(attn)


def temporaries(attn: Attention) -> tuple[Scratch, ...]:
    """States by row, counted over the batch, and share."""
    rows = name("B") * attn.heads.q * name("Sq")
    return scratch(attn, (rows, shares(attn)), _programs(attn))


def _programs(attn: Attention) -> Expr:
    return name("B") * groups(attn) * group_tiles(attn) * shares(attn)


# -- a share -------------------------------------------------------------------------------------


def _sharer(attn: Attention, dense: Function) -> Kernel:
    """One program per query tile and share; where its step is the dense kernel's, it is that."""
    attn = by_groups(attn)
    b = Builder(share_parameters(attn, "BM", "BN", care.PASS.name, *_knobs(attn)))
    lost = care.marks(LOST, attn)
    steps: list[Function] = []
    with care.unless_done(b, attn, lost):
        tiles, count = b.let("tiles", group_tiles(attn)), b.let("shares", shares(attn))
        number, rest = b.let("number", remainder(program(), tiles)), b.let("rest", quotient(program(), tiles))
        share, group = b.let("share", remainder(rest, count)), b.let("of", quotient(rest, count))
        batch = b.let("b", quotient(group, groups(attn)))
        t = place_group(b, attn, batch, remainder(group, groups(attn)), number)
        load_queries(b, attn, t)
        step = step_of(b, attn, t, dense)
        line = line_of(b, attn, t)
        first, last = _ends(b, attn, line, share, count)
        walk = walk_between(b, attn, t, line, step, first, last)
        care.walk_twice(b, attn, rule_of(attn), lambda spoilt: b.store(lost, (program(),), spoilt), walk)
        state = b.let("state", _row_number(attn, t.batch, t.h, t.scope.values["row"]), "[BM]")
        store_states(b, attn, t, state, share)
        steps.append(step)
    doc = f"Few queries of {attn.name}: one program per query tile of a group of heads and share of its keys."
    return Kernel(f"{attn.name}_split", *tidy(b.params.values(), b.body), tuple(steps), _programs(attn), doc)


def _ends(b: Builder, attn: Attention, line: KeyLine, share: Expr, count: Expr) -> tuple[Expr, Expr]:
    """Binds the tiles of the line between which a share lies."""
    size = name(SPLIT.name)
    if not is_fixed(attn):
        equal = cdiv(line.tiles, count)
        size = b.let("size", equal if wished(attn) else maximum(equal, size))
    first = b.let("first", share * size)
    return first, b.let("last", minimum(first + size, line.tiles))


def _row_number(attn: Attention, batch: Expr, h: Expr, query: Expr) -> Expr:
    return (batch * attn.heads.q + h) * name("Sq") + query


# -- the merge -----------------------------------------------------------------------------------


def _merger(attn: Attention) -> Kernel:
    """One program per row: the states of its shares become one, which ends as any other."""
    b = Builder(share_parameters(attn, "BM", "BN", WRITE_LSE.name, *_knobs(attn)))
    number, sequence = program(), b.let("sequence", quotient(program(), name("Sq")))
    query = b.let("row", remainder(number, name("Sq")))
    batch, h = b.let("b", quotient(sequence, attn.heads.q)), b.let("h", remainder(sequence, attn.heads.q))
    merge_states(b, attn, b.let("shares", shares(attn)), lambda share: (number, share))
    end_row(b, attn, batch, h, query)
    grid = name("B") * attn.heads.q * name("Sq")
    doc = "Merges what the shares of each row found, and ends the row."
    return Kernel(f"{attn.name}_merge", *tidy(b.params.values(), b.body), (), grid, doc)
