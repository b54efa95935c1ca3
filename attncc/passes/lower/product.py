"""Products of tiles by matrices that are finer than their operands: sums of fp16 halves, of numbers at most 1.

What a product makes is rounded to the operands' dtype once. Were its own operands rounded to that, their errors would
be as large as the last one; so bf16 has factors of fp16, which are eight times as fine, and fp16 factors of two
halves each. They are divided by the greatest magnitude of their row, or of the matrix, and so stay in fp16's range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce as fold
from typing import Final

from attncc.ir.build import column, dot, reduce, reduce_all
from attncc.ir.expr import Dtype, Expr, cast_to, ew, maximum, where

HALVES: Final[Mapping[Dtype, int]] = {"bf16": 1, "f16": 2, "f32": 0}
"""Of a factor, by the dtype of operands; 0 multiplies fp32 as it is."""

LEAST: Final = 2.0**-100
"""A magnitude below which numbers count as 0: their reciprocal would leave fp32's range."""

Bind = Callable[[str, Expr, str], Expr]


@dataclass(frozen=True, slots=True)
class Factor:
    """One side of a product: halves that add up to it, but for a scale ([rows, 1], or one number)."""

    halves: tuple[Expr, ...]
    scale: Expr | None = None


def of_rows(bind: Bind, tiles: Sequence[Expr], dtype: Dtype, *, exact: bool = False) -> tuple[Factor, ...]:
    """Tiles [rows, columns] on the left, whose rows share a scale; `exact`: their numbers are the operands' own."""
    if exact and dtype != "bf16":
        return tuple(Factor((cast_to(x, dtype),)) for x in tiles)
    peaks = [reduce("max", ew("abs", x), 1) for x in tiles]
    return _scaled(bind, tiles, dtype, peaks, 1 if exact else HALVES[dtype])


def of_matrix(bind: Bind, w: Expr, dtype: Dtype) -> Factor:
    """A tile [columns, width] on the right; fp16 is taken as it is."""
    if w.dtype == "f16" and dtype != "f32":
        return Factor((w,))
    (found,) = _scaled(bind, [cast_to(w, "f32")], dtype, [reduce_all("max", ew("abs", w))], HALVES[dtype])
    return found


def _scaled(bind: Bind, tiles: Sequence[Expr], dtype: Dtype, peaks: Sequence[Expr], halves: int) -> tuple[Factor, ...]:
    if not halves:
        return tuple(Factor((x,)) for x in tiles)
    most = bind("most", cast_to(fold(maximum, peaks), "f32"), "")
    scale = bind("scale", where(most > LEAST, most, 1.0), "")
    unit = bind("unit", 1.0 / scale, "")
    scale, unit = (column(e) if e.shape else e for e in (scale, unit))
    return tuple(Factor(_halves(bind, x * unit, halves), scale) for x in tiles)


def _halves(bind: Bind, x: Expr, count: int) -> tuple[Expr, ...]:
    """Numbers of fp16 that add up to x, the greatest first."""
    half = bind("half", cast_to(x, "f16"), "")
    if count == 1:
        return (half,)
    return (half, *_halves(bind, x - cast_to(half, "f32"), count - 1))


def summed(bind: Bind, left: Sequence[Factor], right: Sequence[Factor], note: str) -> Expr:
    """Binds the sum of products, fp32, less the least of those of halves; factors on the left share a scale."""
    total: Expr | None = None
    for a, b in zip(left, right, strict=True):
        most, product = max(len(a.halves), len(b.halves)), None
        for n, x in enumerate(a.halves):
            for y in b.halves[: most - n]:
                product = dot(x, y, product)
        assert product is not None
        product = product if b.scale is None else product * b.scale
        total = bind("total", product if total is None else total + product, note)
    assert total is not None
    return total if left[0].scale is None else bind("total", total * left[0].scale, note)
