"""Kernels for calls of few queries beside the dense ones: split-KV, or stream-K where sequences differ in length."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.expr import Expr, eq, name
from attncc.ir.tile import Launch, Program
from attncc.passes.lower import care, latent, split, stream
from attncc.passes.lower.fragments import may_hide_values, may_see_the_same
from attncc.passes.lower.gap import Gap, first
from attncc.passes.lower.knobs import FILL, SPLIT
from attncc.passes.lower.walk import key_tiles_of

GAPS: Final = (
    Gap("modes without decode", lambda a: "decode" not in a.modes),
    Gap("the wish for a program a query tile", lambda a: a.schedule.name == "tile"),
    Gap("packed sequences", lambda a: a.layout == "varlen"),
    Gap("key tiles listed from data", lambda a: key_tiles_of(a).listed),
    Gap("quantised operands", lambda a: any(z.operand != "cache" for z in a.quantize)),
)


def gap(attn: Attention) -> str:
    """Why calls of few queries stay with the dense kernels; empty if they need not."""
    return first(GAPS, attn)


def streams(attn: Attention) -> bool:
    """Whether the key tiles of all sequences are one line: as wished, or because sequences differ in length.

    The ends of the ranges depend on all sequences then, and so do bits.
    """
    wish = attn.schedule.name
    return wish == "stream_k" or (wish == "auto" and attn.page_size > 0 and not attn.is_apart)


def told(attn: Attention) -> str:
    """How calls of few queries are served, in words."""
    if why := gap(attn):
        return f"the same kernels, because of {why}"
    if streams(attn):
        return "the key tiles of all sequences are one line, cut in equal ranges, then merged"
    return "keys are shared out to programs, then merged"


def with_short(attn: Attention, dense: Program) -> Program:
    """The program with kernels for few queries beside the dense ones; the config of a call says which are due."""
    if why := gap(attn):
        return replace(dense, short_gap=why)
    step = next(k for k in dense.kernels if k.name == f"{attn.name}_forward").functions[-1]
    way = stream if streams(attn) else split
    *before, sharer, merging = way.kernels(attn, step)
    alike = may_see_the_same(attn)
    passes = care.passes(sharer.name, may_see_the_same=alike) if may_hide_values(attn) else (Launch(sharer.name),)
    launches = (*(Launch(k.name) for k in before), *passes, Launch(merging.name))
    idle, busy = eq(name(SPLIT.name), 0), name(SPLIT.name) > 0
    made = replace(
        dense,
        kernels=(*dense.kernels, *before, sharer, merging),
        launches=(*(_only(x, idle) for x in dense.launches), *(_only(x, busy) for x in launches)),
        knobs=(*dense.knobs, SPLIT, FILL),
        scratch=(*dense.scratch, *way.temporaries(attn)),
    )
    return latent.accelerated(attn, made, streams(attn))


def _only(launch: Launch, where: Expr) -> Launch:
    """A launch where this holds, too."""
    return replace(launch, when=where if launch.when is None else launch.when & where)
