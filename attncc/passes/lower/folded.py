"""Which prologues have a kernel whose tiles never leave the registers that products read them from.

It goes along lines of tokens as `lines` does, convolutions that follow each other being one (`folding`), and is printed
in Gluon (`codegen/gluon_kernels.py`), which says in whose registers tiles are: in those where wgmma wants its factors,
and leaves its sums. Shared memory holds matrices, and rows that are on their way to the next token's products.
"""

from __future__ import annotations

from typing import Final

from attncc.ir.attention import Attention
from attncc.passes.lower import lines
from attncc.passes.lower.chains import Chain, chains, option, rope_of
from attncc.passes.lower.convolution import mixes, multiplies, reach
from attncc.passes.lower.folding import count, folds, taps_of
from attncc.passes.lower.gap import Gap, first

WIDTHS: Final = (64, 128)
"""Columns of a head."""
TAPS: Final = 3
"""Tokens of a product: registers hold a tile of each, and shared memory a matrix, two programs a multiprocessor."""
NARROWEST: Final = 64
"""Columns that a rope turns: the halves of fewer lie in several threads."""


def _mixed(a: Attention) -> list[Chain]:
    return [c for c in chains(a) if any(map(mixes, c.steps))]


def _any(a: Attention, step: str) -> bool:
    return any(s.name == step for s in a.prologue)


def _looks_back(a: Attention) -> bool:
    """Whether a step behind the products asks for earlier tokens."""
    return any(reach(a, s, c.widths[0]) > 0 for c in _mixed(a) for s in c.steps[count(c) :])


def _turns_oddly(a: Attention) -> bool:
    ropes = [(rope_of(a, s, c.widths[0]), s) for c in _mixed(a) for s in c.steps if s.name == "rope"]
    return any(
        option(s, "cos") is not None or neighbours or (dims or a.dims.qk) not in (NARROWEST, 2 * NARROWEST)
        for (dims, neighbours), s in ropes
    )


def _differs(a: Attention) -> bool:
    """Whether operands go through different convolutions."""
    return len({tuple(map(str, c.steps[: count(c)])) for c in _mixed(a)}) > 1


GAPS: Final = (
    Gap("no convolution by matrices", lambda a: not any(map(multiplies, a.prologue))),
    Gap("operands other than bf16", lambda a: a.dtype != "bf16"),
    Gap("packed sequences", lambda a: not lines.goes_along(a)),
    Gap("operands of few bits behind the steps", lambda a: bool(a.quantize)),
    Gap("an absorbed matrix, or a Hadamard transform", lambda a: _any(a, "absorb") or _any(a, "hadamard")),
    Gap(
        "other steps before a convolution by matrices than one of each column", lambda a: not all(map(folds, _mixed(a)))
    ),
    Gap("operands behind different convolutions", _differs),
    Gap("heads of other than 64 or 128 columns", lambda a: any(c.widths[0] not in WIDTHS for c in _mixed(a))),
    Gap("more than 3 tokens of a product", lambda a: any(taps_of(a, c) > TAPS for c in _mixed(a))),
    Gap("steps behind a product that look at earlier tokens", _looks_back),
    Gap("ropes by tables, of neighbours, or of other than 64 or 128 columns", _turns_oddly),
)


def gap(attn: Attention) -> str:
    """Why a prologue has no such kernel; empty if it has one."""
    return first(GAPS, attn)
