"""Products of tiles by matrices that are finer than their operands: sums of fp16 halves, of numbers at most 1.

What a product makes is rounded to the operands' dtype once. Were its own operands rounded to that, their errors would
be as large as the last one; so bf16 has factors of fp16, which are eight times as fine, and fp16 factors of two
halves each. They are divided by the greatest magnitude of their row, or of the matrix, and so stay in fp16's range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from attncc.ir.build import column, dot, reduce, reduce_all
from attncc.ir.expr import Dtype, Expr, cast_to, ew, where

HALVES: Final[Mapping[Dtype, int]] = {"bf16": 1, "f16": 2, "f32": 0}
"""Of a factor, by the dtype of operands; 0 multiplies fp32 as it is."""

Bind = Callable[[str, Expr, str], Expr]


@dataclass(frozen=True, slots=True)
class Factor:
    """One side of a product: halves that add up to it, but for a scale ([rows, 1], or one number)."""

    halves: tuple[Expr, ...]
    scale: Expr | None = None


def of_rows(bind: Bind, x: Expr, dtype: Dtype, *, exact: bool = False) -> Factor:
    """A tile [rows, columns] on the left; `exact`: its numbers are the operands' own."""
    if exact and dtype != "bf16":
        return Factor((cast_to(x, dtype),))
    return _scaled(bind, x, dtype, 1, 1 if exact else HALVES[dtype])


def of_matrix(bind: Bind, w: Expr, dtype: Dtype) -> Factor:
    """A tile [columns, width] on the right, of fp32 or of numbers that are fewer bits."""
    if w.dtype == "f16" and dtype != "f32":
        return Factor((w,))
    return _scaled(bind, cast_to(w, "f32"), dtype, None, HALVES[dtype])


def _scaled(bind: Bind, x: Expr, dtype: Dtype, axis: int | None, halves: int) -> Factor:
    """`axis`: along which numbers share a scale; None for all."""
    if not halves:
        return Factor((x,))
    size = ew("abs", x)
    most = bind("most", reduce_all("max", size) if axis is None else reduce("max", size, axis), "")
    scale = bind("scale", where(most > 0.0, most, 1.0), "")
    scale = column(scale) if scale.shape else scale
    rest = x / scale
    found: list[Expr] = []
    for last in range(halves - 1, -1, -1):
        rest = bind("rest", rest, "") if last else rest
        half = bind("half", cast_to(rest, "f16"), "")
        found.append(half)
        rest = rest - cast_to(half, "f32")
    return Factor(tuple(found), scale)


def multiplied(a: Factor, b: Factor) -> Expr:
    """The product, fp32; of the halves' products the least is left out."""
    total: Expr | None = None
    most = max(len(a.halves), len(b.halves))
    for n, x in enumerate(a.halves):
        for y in b.halves[: most - n]:
            total = dot(x, y, total)
    assert total is not None
    for scale in (a.scale, b.scale):
        total = total if scale is None else total * scale
    return total
