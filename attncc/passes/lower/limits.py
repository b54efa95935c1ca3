"""Scores whose limits are known when a kernel is made, as a softcap's are: weights then need no running maximum.

A weight is 2 ** (x - base), x a score in units of log 2, and base a number for all rows in place of each row's highest
score so far. Any base gives the same output; what it must do is keep weights, their sums, and their sums times values
inside fp32, and weights inside the format in which they are multiplied.
"""

from __future__ import annotations

import math
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.expr import OPS, Expr, name
from attncc.ir.intervals import UNKNOWN, interval
from attncc.ir.rewrite import names, transform
from attncc.passes.lower.gap import Gap, first
from attncc.passes.lower.normalizers import LOG2E

LIGHTEST: Final = -106
"""The least weight, as a power of 2: where all scores of a row are at their lowest, its products with values down to
2 ** -20 still are normal numbers of fp32 and bf16, whose least is 2 ** -126. fp16's is 2 ** -14: no span fits there."""
HEAVIEST: Final = 40
"""The greatest: where all are at their highest, 2 ** 24 keys with values up to 2 ** 63 add up to 2 ** 127."""
READS: Final = ("load", "bucket", "qdot")
"""What comes from memory."""

GAPS: Final = (
    Gap("another normalizer than softmax", lambda a: a.part.normalizer.kind != "softmax"),
    Gap("weights of another format than bf16", lambda a: a.dtype != "bf16" or bool(a.quantize)),
    Gap("scores without limits", lambda a: limits(a.part.score) is None),
    Gap("limits further apart than weights may be", lambda a: _above(a) > HEAVIEST),
)


def gap(attn: Attention) -> str:
    """Why weights of a variant are relative to maxima; empty if one base does for all."""
    return first(GAPS, attn)


def base_of(attn: Attention) -> float | None:
    """What weights of a softmax are relative to, where that can be one number for all rows: no weight is above 1, but
    where limits are so far apart that the lightest would be too light."""
    return None if gap(attn) else _ends(attn)[1] - _above(attn)


def limits(e: Expr) -> tuple[float, float] | None:
    """The least and the greatest value of a formula, whatever its names and tensors are; None where either is none.

    What an instruction adds to a limit, as tanh's may by 2 ** -11 of it, is of no account: it moves no result, and
    powers of 2 by less than one.
    """
    e = transform(e, lambda node: name("read", node.dtype) if node.op in READS else None)
    ends = interval(e, dict.fromkeys(names(e), UNKNOWN))
    low, high = (None if end is None else _number(end) for end in ends)
    return None if low is None or high is None or not math.isfinite(high - low) else (low, high)


def _ends(attn: Attention) -> tuple[float, float]:
    """Limits in units of log 2."""
    low, high = limits(attn.part.score) or (-math.inf, math.inf)
    return low * LOG2E, high * LOG2E


def _above(attn: Attention) -> float:
    """By which power of 2 the greatest weight is more than 1."""
    low, high = _ends(attn)
    return max(0, math.ceil(high - low + LIGHTEST))


def _number(e: Expr) -> float | None:
    """The value of a formula of numbers alone."""
    if e.value is not None:
        return float(e.value)
    args = [_number(a) for a in e.args]
    if not args or None in args or e.op not in OPS:
        return None
    return float(OPS[e.op].numpy(*args))
