"""The kernel behind an engine: query tiles into which a hidden NaN may have leaked are done again, with care.

An engine lists such tiles. There are hardly ever any, so this has few programs: they end at once, or share the list.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, program, quotient, read, remainder
from attncc.ir.expr import Expr, const
from attncc.ir.tile import Function, Kernel, Param
from attncc.passes.lower.forward import LOST, one_tile, parameters
from attncc.passes.lower.grid import is_varlen, place_dense, place_packed, query_tiles, split_head
from attncc.passes.lower.scores import own_name
from attncc.passes.lower.tidy import tidy

PROGRAMS: Final = 264
"""Two a multiprocessor of the largest GPU that has an engine."""


def listed(attn: Attention) -> Param:
    """The list: how many entries it has, and then those."""
    return Param(own_name("again", attn), "buffer", "i32", rank=1, doc="a number, and so many numbers of query tiles")


def number_of(attn: Attention, head: Expr, tile: Expr) -> Expr:
    """A query tile's number in the list: the head is counted over the batch, the tile over all of the head."""
    return head * query_tiles(attn) + tile


def kernel(attn: Attention) -> Kernel:
    """One program works on every `PROGRAMS`th entry."""
    others = ("PASS", "GROUP", own_name(LOST, attn))
    params = {n: p for n, p in parameters(attn).items() if n not in others}
    found = params[listed(attn).name] = listed(attn)
    b = Builder(params)
    functions: list[Function] = []
    with b.loop("entry", program(), read(found, 0), PROGRAMS) as entry:
        which = b.let("which", read(found, entry + 1))
        head, number = quotient(which, query_tiles(attn)), b.let("number", remainder(which, query_tiles(attn)))
        if is_varlen(attn):
            t = place_packed(b, attn, b.let("h", head), number)
        else:
            t = place_dense(b, attn, *split_head(b, attn, head), number)
        with b.when(t.row0 < t.queries) if is_varlen(attn) else nullcontext():
            functions.append(one_tile(b, attn, t, skewed=False))
    doc = "Does the query tiles again into which the engine may have let a hidden NaN leak."
    return Kernel(f"{attn.name}_again", *tidy(params.values(), b.body), tuple(functions), const(PROGRAMS), doc)
