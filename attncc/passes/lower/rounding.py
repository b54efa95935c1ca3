"""What a format of few bits holds of numbers, found by a kernel: scales, zero points, codes, with the oracle's bits."""

from __future__ import annotations

import math
from typing import Final, Protocol

from attncc.ir.build import Builder
from attncc.ir.expr import Expr, cast_to, divide_exactly, eq, maximum, minimum, name, where
from attncc.passes.lower.cache import CODES
from attncc.passes.lower.quantize import FORMATS, WHOLE_BEYOND

LEVELS: Final = {"int8": 255, "int4": 15, "int2": 3}
"""The greatest code of an integer with a zero point."""
MOST: Final = {"int4": 7.0, "int2": 1.0, **{text: form.most for text, form in FORMATS.items()}}


class Coded(Protocol):
    """What holds codes."""

    @property
    def dtype(self) -> str: ...
    @property
    def has_zeros(self) -> bool: ...
    @property
    def codes(self) -> str: ...
    @property
    def offset(self) -> int: ...


def scale_of(b: Builder, c: Coded, peak: Expr, low: Expr | None, high: Expr | None) -> tuple[Expr, Expr | None]:
    """Binds scale and zero point of groups by their greatest magnitudes, infinite where one is no finite number, and by
    their ends where there are zero points: NaN where something is no finite number."""
    peak = b.let("peak", peak)
    spread, most = peak, MOST.get(c.dtype, 1.0)
    if low is not None and high is not None:
        b.let("low", low)
        spread, most = b.let("spread", high - name("low", "f32", peak.shape)), float(LEVELS[c.dtype])
    known = b.let("known", (peak < math.inf) & (spread < math.inf))
    scale = b.let("scale", divide_exactly(spread, most))
    scale = b.let("scale", where(known, where(eq(scale, 0.0), 1.0, scale), math.nan))
    if not c.has_zeros:
        return scale, None
    return scale, b.let("zero", where(known, name("low", "f32", peak.shape), math.nan))


def code_of(b: Builder, c: Coded, x: Expr, scale: Expr, zero: Expr | None) -> Expr:
    """Entries as the format holds them; what is no number, or has no scale, is 1."""
    y = b.let("y", divide_exactly(x if zero is None else x - zero, scale))
    low, high = (0.0, float(LEVELS[c.dtype])) if c.has_zeros else (-MOST[c.dtype], MOST[c.dtype])
    y = b.let("y", where(eq(y, y), maximum(minimum(y, high), low), 1.0))
    if c.dtype not in LEVELS:
        return cast_to(y, CODES[c.codes])
    y = b.let("y", (y + WHOLE_BEYOND) - WHOLE_BEYOND, "past 2**23 numbers are whole, and sums round half to even")
    return b.let(b.fresh("code"), cast_to(y, "i32") + c.offset)
