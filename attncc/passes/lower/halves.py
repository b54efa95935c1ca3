"""Numbers of f16 in kernels of bf16, where codes are multiplied: few instructions make f16 of codes, and it has three
digits more. The range that it lacks it is given: queries are lifted, and weights are relative to a peak that tells of
the scales, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce as fold
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, full, reduce, row
from attncc.ir.expr import Expr, cast_to, ew, maximum, minimum, name, where

LIFTED: Final = 7.0
"""The greatest of a row of queries is lifted to about 2**7: products with codes are far from the end of fp32, too."""
POWERS: Final = 112.0
"""Of 2, by which queries are divided at most."""
Q_UNIT: Final = name("q_unit", "f32", ("BM",))
ROOM: Final = 15.0
"""Weights are at most 2**15, so that those of 2**28 times less still have all their digits."""
LEAST_ABOVE: Final = -100.0
"""Sums are relative to peaks as well: to none that makes 2**100 of a key."""
MASKED: Final = name("MASKED", "bool")


def lift(b: Builder, tiles: Mapping[str, Expr]) -> None:
    """Binds tiles of queries [BM, width] as f16, each row multiplied by a power of 2, and what products are multiplied
    by: no digit is lost but of numbers 2**22 times less than the greatest of the row."""
    sizes = [reduce("max", ew("abs", cast_to(q, "f32")), 1) for q in tiles.values()]
    power = ew("floor", ew("log2", b.let("q_size", fold(maximum, sizes))))
    power = b.let("q_power", minimum(maximum(power, -POWERS), POWERS) - LIFTED, "[BM]")
    up = b.let("q_lift", ew("exp2", -power))
    b.let(str(Q_UNIT.attr), ew("exp2", power), "[BM] what products are multiplied by")
    for text, q in tiles.items():
        b.let(text, cast_to(cast_to(q, "f32") * column(up), "f16"))


def serve_weights(attn: Attention) -> bool:
    """Whether weights of codes are f16: where they are relative to a peak."""
    return attn.dtype != "fp32" and attn.part.normalizer.kind == "softmax"


def above(b: Builder, scale: Expr, keep: Expr) -> Expr:
    """How far above a tile's greatest score a row's peak is to be, for weights times scales, a number or [BN], to be at
    most 2**ROOM.

    Scales that are no finite numbers spoil what they are for in any case, and nothing else.
    """
    size = where(ew("abs", scale) < math.inf, ew("abs", scale), 0.0)
    if scale.shape:
        size = _greatest(b, b.let("size", size, "[BN]"), keep)
    return b.let("above", maximum(ew("log2", size) - ROOM, LEAST_ABOVE))


def _greatest(b: Builder, sizes: Expr, keep: Expr) -> Expr:
    """Of what a row sees: a number where all see the same keys, else [BM]."""
    if keep.shape[0] == 1:
        with b.when(MASKED):
            b.let("size", where(name("inside", "bool", ("BN",)), sizes, 0.0))
        return reduce("max", sizes, 0)
    most = b.let("most", full(("BM",), 0.0) + reduce("max", sizes, 0), "[BM]")
    with b.when(MASKED):
        b.let("most", reduce("max", where(keep, row(sizes), 0.0), 1))
    return most
