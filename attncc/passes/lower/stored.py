"""Kernels that quantise an operand: the greatest magnitude of each group, then its entries as few bits hold them.

Groups of all tokens need two launches: `peaks` has one number a span of tokens, of which every program of `store` takes
the greatest. Blocks and single tokens are the affair of one program. A group in which something is NaN or infinite has
a scale of NaN, and 1 in all its places: what is stored is a number always.

For an engine that multiplies bytes as they are, `turn` writes values in place of `store`: a column's keys side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, full, iota, program, quotient, read, reduce, reduce_all, remainder, row
from attncc.ir.expr import TRUE, Expr, Value, cast_to, const, divide_exactly, eq, ew, maximum, minimum, name, where
from attncc.ir.tile import Kernel, Param, Scratch
from attncc.passes.lower import smoothing
from attncc.passes.lower.chains import dtype_behind, source
from attncc.passes.lower.grid import cdiv, size_parameters
from attncc.passes.lower.quantize import Held, rounded
from attncc.passes.lower.scores import input_param, own_name
from attncc.passes.lower.tidy import tidy

SPAN: Final = 256
"""Tokens of which one program finds the peak."""
AT_ONCE: Final = 4096
"""Entries a program holds."""
PEAKS: Final = 256
"""Peaks it compares at once."""
TURNED: Final = 128
"""Keys of which turned values hold a multiple: the largest tile."""


def kernels(attn: Attention, h: Held) -> tuple[Kernel, ...]:
    """What fills the stored tensor and the scales of an operand."""
    return (*([_peaks(attn, h)] if h.per in ACROSS else []), store(attn, h))


def scratch(attn: Attention, h: Held) -> tuple[Scratch, ...]:
    """The stored tensor, its scales, and the peaks of spans of tokens."""
    b, heads = name("B"), const(h.heads)
    peaks = Scratch(_peaks_of(attn, h).name, (b, heads, cdiv(h.tokens, SPAN), const(_wide(h))), "f32")
    return (
        Scratch(h.tensor, (b, heads, h.tokens, const(h.width)), h.format.dtype),
        Scratch(input_param(h.scales).name, h.scale_shape, "f32"),
        *([peaks] if h.per in ACROSS else []),
    )


def turned(attn: Attention, h: Held) -> Scratch:
    """Values as tensor cores multiply bytes: a column's keys are neighbours, and whole tiles of them."""
    shape = (name("B"), const(h.heads), const(h.width), _positions(h))
    return Scratch(own_name(f"{h.operand}_turned", attn), shape, h.format.dtype)


def _positions(h: Held) -> Expr:
    return cdiv(h.tokens, TURNED) * TURNED


# -- the kernels ---------------------------------------------------------------------------------


def _peaks(attn: Attention, h: Held) -> Kernel:
    """One program a span of tokens of a head."""
    b = _builder(attn, h, _stored(h))
    batch, head, begin = _bind_place(b, h, SPAN)
    most = b.let("most", full((_rows(h), _padded(h)), 0.0))
    with b.loop("first", begin, minimum(begin + SPAN, h.tokens), _rows(h)) as first:
        size = _magnitude(b, _read(b, attn, h, batch, head, first + iota(_rows(h)), h.tokens))
        b.let("most", maximum(most, size))
    peak = b.let("peak", reduce("max", most, 0) if h.per == "channel" else reduce_all("max", most))
    into = _peaks_of(attn, h)
    span = quotient(begin, SPAN)
    if h.per == "channel":
        columns = iota(_padded(h))
        b.store(into, (batch, head, span, columns), peak, columns < h.dim)
    else:
        b.store(into, (batch, head, span, 0), peak)
    return _kernel(attn, h, b, "peaks", SPAN, f"The greatest magnitudes of {h.operand}, by spans of tokens.")


def store(attn: Attention, h: Held) -> Kernel:
    """One program a span of tokens of a head; the span is a block where blocks have scales."""
    span = h.block if h.per == "block" else SPAN
    b = _builder(attn, h, _stored(h))
    batch, head, begin = _bind_place(b, h, span)
    end = b.let("end", minimum(begin + span, h.tokens))
    if h.per in PEAK:
        _bind_scale(b, h, PEAK[h.per](b, attn, h, (batch, head, begin, end)))
        _write_scale(b, h, batch, head, begin)
    with b.loop("first", begin, end, _rows(h)) as first:
        x = _read(b, attn, h, batch, head, first + iota(_rows(h)), end)
        tokens, columns = _tokens(h), _columns(h)
        if h.per == "token":
            _bind_scale(b, h, reduce("max", _magnitude(b, x), 1))
            b.store(input_param(h.scales), (batch, head, tokens), _scale(h), tokens < end)
        place = (batch, head, column(tokens), row(columns))
        b.store(_stored(h), place, _held(b, h, x), column(tokens < end) & row(columns < h.width))
    doc = f"Writes {h.operand} as {h.format.dtype}, and the scales: of its groups' greatest magnitudes."
    return _kernel(attn, h, b, "store", span, doc)


def turn(attn: Attention, h: Held) -> Kernel:
    """One program a span of positions of a head, each of which holds the key that `key_at` says."""
    into = Param(turned(attn, h).name, "operand", h.format.dtype, rank=4, doc="the operand as it is stored, turned")
    b = _builder(attn, h, into)
    batch, head, begin = _bind_place(b, h, SPAN)
    end = b.let("end", minimum(begin + SPAN, _positions(h)))
    _bind_scale(b, h, PEAK[h.per](b, attn, h, (batch, head, begin, end)))
    _write_scale(b, h, batch, head, begin)
    with b.loop("first", begin, end, _rows(h)) as first:
        at = b.let("at", first + iota(_rows(h)), f"[{_rows(h)}] positions")
        x = _read(b, attn, h, batch, head, key_at(at), h.tokens)
        place = (batch, head, row(_columns(h)), column(at))
        b.store(into, place, _held(b, h, x), column(at < end) & row(_columns(h) < h.width))
    doc = f"Writes {h.operand} as {h.format.dtype} for tensor cores, which want keys as neighbours, and the scales."
    return _kernel(attn, h, b, "turn", SPAN, doc)


def key_at(at: Expr) -> Expr:
    """The key at a position of turned values.

    Of 16 weights a thread's sums are two neighbours in each half, its operands four neighbours in all: with keys in
    this order the ones are the others.
    """
    half, pair = quotient(remainder(at, 4), 2), quotient(remainder(at, 16), 4)
    return quotient(at, 16) * 16 + half * 8 + pair * 2 + remainder(at, 2)


def _held(b: Builder, h: Held, x: Expr) -> Expr:
    """Entries in units of their scale, as the format holds them; 1 where the scale is no number."""
    scale, most = ALONG.get(h.per, _of_all)(_scale(h)), h.format.most
    y = b.let("y", where(eq(scale, scale), divide_exactly(x, scale), 1.0))
    return rounded(maximum(minimum(y, most), -most), h.format)


def _builder(attn: Attention, h: Held, into: Param) -> Builder:
    params = [_given(attn, h), smoothing.mean_of(attn, h), _peaks_of(attn, h), into, input_param(h.scales)]
    params += size_parameters(attn)
    return Builder({p.name: p for p in params})


def _kernel(attn: Attention, h: Held, b: Builder, what: str, span: int, doc: str) -> Kernel:
    grid = name("B") * h.heads * cdiv(h.tokens, span)
    return Kernel(f"{attn.name}_{what}_{h.operand}", *tidy(b.params.values(), b.body), (), grid, doc)


def _given(attn: Attention, h: Held) -> Param:
    doc = "the operand as it came, or behind its steps"
    return Param(source(attn, h.operand), "operand", dtype_behind(attn, h.operand), rank=4, doc=doc)


def _stored(h: Held) -> Param:
    return Param(h.tensor, "operand", h.format.dtype, rank=4, doc="the operand as it is stored")


def _peaks_of(attn: Attention, h: Held) -> Param:
    return Param(own_name(f"{h.operand}_peaks", attn), "buffer", "f32", rank=4, doc="greatest magnitudes by spans")


def _wide(h: Held) -> int:
    return h.dim if h.per == "channel" else 1


def _padded(h: Held) -> int:
    """Columns a program holds: a power of two."""
    return 1 << (h.width - 1).bit_length()


def _rows(h: Held) -> int:
    return max(1, min(64, AT_ONCE // _padded(h)))


# -- pieces of their bodies ----------------------------------------------------------------------


def _bind_place(b: Builder, h: Held, span: int) -> tuple[Expr, Expr, Expr]:
    """Batch entry, head and first token of this program."""
    spans = b.let("spans", cdiv(h.tokens, span))
    begin = b.let("begin", remainder(program(), spans) * span)
    heads = b.let("heads", quotient(program(), spans))
    return b.let("b", quotient(heads, h.heads)), b.let("h", remainder(heads, h.heads)), begin


def _read(b: Builder, attn: Attention, h: Held, batch: Expr, head: Expr, tokens: Expr, end: Expr) -> Expr:
    """Binds entries [rows, columns] of tokens, 0 past the end."""
    tokens = b.let("tokens", tokens, f"[{_rows(h)}]")
    columns = b.let("columns", iota(_padded(h)), f"[{_padded(h)}]")
    inside = column(tokens < end) & row(columns < h.dim)
    x = cast_to(read(_given(attn, h), batch, head, column(tokens), row(columns), mask=inside), "f32")
    x = smoothing.taken_off(attn, h, x, (batch, head), columns, inside)
    return b.let("x", x, f"[{_rows(h)}, {_padded(h)}]")


def _tokens(h: Held) -> Expr:
    return name("tokens", "i32", (_rows(h),))


def _columns(h: Held) -> Expr:
    return name("columns", "i32", (_padded(h),))


def _magnitude(b: Builder, x: Expr) -> Expr:
    """|x|, infinite where x is no number: a maximum over NaN differs from machine to machine."""
    size = b.let("size", ew("abs", x))
    return b.let("size", where(size < math.inf, size, math.inf))


def _nothing(h: Held) -> Expr:
    return full((_padded(h),), 0.0) if h.per == "channel" else const(0.0)


def _scale(h: Held) -> Expr:
    return name("scale", "f32", {"token": (_rows(h),), "channel": (_padded(h),)}.get(h.per, ()))


def _of_all(scale: Expr) -> Expr:
    return scale


ALONG: Final[Mapping[str, Callable[[Expr], Expr]]] = {"token": column, "channel": row}
"""How the scales of a program's entries broadcast to [rows, columns]; others are one number."""


def _bind_scale(b: Builder, h: Held, peak: Expr) -> None:
    scale = b.let("scale", divide_exactly(peak, h.format.most))
    b.let("scale", where(peak < math.inf, where(eq(scale, 0.0), 1.0, scale), math.nan))


def _write_scale(b: Builder, h: Held, batch: Expr, head: Expr, begin: Expr) -> None:
    """By the first program of the group."""
    columns = b.let("columns", iota(_padded(h)))
    place: dict[str, tuple[Value, ...]] = {
        "tensor": (batch, 0, 0),
        "head": (batch, head, 0),
        "channel": (batch, head, columns),
        "block": (batch, head, quotient(begin, h.block)),
    }
    first = {"tensor": eq(begin + head, 0), "block": TRUE}.get(h.per, eq(begin, 0))
    with nullcontext() if first == TRUE else b.when(first):
        b.store(input_param(h.scales), place[h.per], _scale(h), columns < h.dim if h.per == "channel" else None)


Place = tuple[Expr, Expr, Expr, Expr]
"""Batch entry, head, first token and the one behind the last."""


def _peak_of_block(b: Builder, attn: Attention, h: Held, at: Place) -> Expr:
    batch, head, begin, end = at
    peak = b.let("peak", const(0.0))
    with b.loop("first", begin, end, _rows(h)) as first:
        x = _read(b, attn, h, batch, head, first + iota(_rows(h)), end)
        b.let("peak", maximum(peak, reduce_all("max", _magnitude(b, x))))
    return peak


def _peak_of_head(b: Builder, attn: Attention, h: Held, at: Place) -> Expr:
    spans = name("spans")
    return _greatest(b, spans, lambda n: read(_peaks_of(attn, h), at[0], at[1], n, 0, mask=n < spans))


def _peak_of_all(b: Builder, attn: Attention, h: Held, at: Place) -> Expr:
    spans = name("spans")
    peaks, count = _peaks_of(attn, h), spans * h.heads
    return _greatest(b, count, lambda n: read(peaks, at[0], quotient(n, spans), remainder(n, spans), 0, mask=n < count))


def _greatest(b: Builder, count: Expr, some: Callable[[Expr], Expr]) -> Expr:
    """Of so many peaks; `some` reads those of these numbers."""
    peak = b.let("peak", const(0.0))
    with b.loop("first", 0, count, PEAKS) as first:
        n = b.let("n", first + iota(PEAKS), f"[{PEAKS}]")
        b.let("peak", maximum(peak, reduce("max", some(n), 0)))
    return peak


def _peaks_of_channels(b: Builder, attn: Attention, h: Held, at: Place) -> Expr:
    columns = iota(_padded(h))
    peak = b.let("peak", _nothing(h))
    with b.loop("span", 0, name("spans")) as span:
        b.let("peak", maximum(peak, read(_peaks_of(attn, h), at[0], at[1], span, columns, mask=columns < h.dim)))
    return peak


PEAK: Final[Mapping[str, Callable[[Builder, Attention, Held, Place], Expr]]] = {
    "tensor": _peak_of_all,
    "head": _peak_of_head,
    "channel": _peaks_of_channels,
    "block": _peak_of_block,
}
"""How a program of `store` comes by the peak of the group it writes."""
ACROSS: Final = ("tensor", "head", "channel")
"""Groups that no program sees whole."""
