"""Kernels that find the mean token of queries or keys, which is taken off before they are quantised.

q k^T = (q' + qm) (k' + km)^T: what is taken off comes back as terms of the products, `q km^T` for each row and
`qm k'^T` for each key, which the score reads. Published as SageAttention, arXiv 2410.02367, and 2411.10958 for queries.
"""

from __future__ import annotations

from typing import Final

from attncc.ir.attention import Attention, Input
from attncc.ir.build import Builder, column, full, iota, program, quotient, read, reduce, remainder, row
from attncc.ir.expr import Expr, cast_to, const, maximum, minimum, name
from attncc.ir.tile import Kernel, Param, Scratch
from attncc.passes.lower.chains import dtype_behind, source
from attncc.passes.lower.grid import cdiv, key_head, size_parameters
from attncc.passes.lower.quantize import Held, all_held, held, terms_of
from attncc.passes.lower.scores import input_param, own_name
from attncc.passes.lower.tidy import tidy

SPAN: Final = 256
"""Tokens of a program."""
AT_ONCE: Final = 4096
"""Entries that it holds."""


def mean_of(attn: Attention, h: Held) -> Param:
    """[B, heads, columns] what is taken off."""
    return Param(own_name(f"{h.operand}_mean", attn), "buffer", "f32", rank=3, doc="the mean token of each head")


def kernels(attn: Attention) -> tuple[Kernel, ...]:
    """What finds means, and what makes terms of them."""
    smoothed = [h for h in all_held(attn) if h.terms]
    return (
        *(_sums(attn, h) for h in smoothed),
        *(_mean(attn, h) for h in smoothed),
        *(_terms(attn, h) for h in smoothed),
    )


def scratch(attn: Attention) -> tuple[Scratch, ...]:
    out: list[Scratch] = []
    for h in (h for h in all_held(attn) if h.terms):
        lead = (name("B"), const(h.heads))
        out.append(Scratch(_sums_of(attn, h).name, (*lead, cdiv(h.tokens, SPAN), const(h.dim)), "f32"))
        out.append(Scratch(mean_of(attn, h).name, (*lead, const(h.dim)), "f32"))
        shape = (name("B"), const(attn.heads.q), _counted(h))
        out.append(Scratch(_into(h).name, shape, "f32"))
    return tuple(out)


def taken_off(attn: Attention, h: Held, x: Expr, at: tuple[Expr, Expr], columns: Expr, inside: Expr) -> Expr:
    """Entries [rows, columns] less the mean of their head; 0 where they are not inside."""
    if not h.terms:
        return x
    mean = read(mean_of(attn, h), *at, columns, mask=columns < h.dim)
    return (x - row(mean)) * cast_to(inside, "f32")


# -- means ---------------------------------------------------------------------------------------


def _sums(attn: Attention, h: Held) -> Kernel:
    """One program a span of tokens of a head."""
    into = _sums_of(attn, h)
    b = _builder(attn, h.operand, into)
    batch, head, begin = _place(b, h.heads, h.tokens)
    columns = b.let("columns", iota(_padded(h)))
    b.let("total", full((_padded(h),), 0.0), f"[{_padded(h)}]")
    with b.loop("first", begin, minimum(begin + SPAN, h.tokens), _rows(h)) as first:
        x = _rows_of(b, attn, h.operand, batch, head, first, h.tokens, columns < h.dim)
        b.let("total", name("total", "f32", (_padded(h),)) + reduce("sum", x, 0))
    at = (batch, head, quotient(begin, SPAN), columns)
    b.store(into, at, name("total", "f32", (_padded(h),)), columns < h.dim)
    doc = f"Sums of the tokens of {h.operand}, by spans of tokens."
    return _kernel(attn, b, f"sums_{h.operand}", name("B") * h.heads * cdiv(h.tokens, SPAN), doc)


def _mean(attn: Attention, h: Held) -> Kernel:
    """One program a head."""
    sums, into = _sums_of(attn, h), mean_of(attn, h)
    b = _builder(attn, h.operand, sums, into)
    batch, head = b.let("b", quotient(program(), h.heads)), b.let("h", remainder(program(), h.heads))
    columns = b.let("columns", iota(_padded(h)))
    total = b.let("total", full((_padded(h),), 0.0), f"[{_padded(h)}]")
    with b.loop("span", 0, cdiv(h.tokens, SPAN)) as span:
        b.let("total", total + read(sums, batch, head, span, columns, mask=columns < h.dim))
    b.store(into, (batch, head, columns), total / cast_to(maximum(h.tokens, 1), "f32"), columns < h.dim)
    doc = f"The mean token of each head of {h.operand}."
    return _kernel(attn, b, f"mean_{h.operand}", name("B") * h.heads, doc)


# -- terms ---------------------------------------------------------------------------------------


def _terms(attn: Attention, h: Held) -> Kernel:
    """Products of the mean with what it was not taken off: one program a span of the others' tokens, a query head."""
    other, tokens = ("q", name("Sq")) if h.operand == "k" else ("k", name("Sk"))
    keys = held(attn, "k") if other == "k" else None
    means = [mean_of(attn, x) for x in (h, keys) if x is not None and x.terms]
    b = _builder(attn, other, _into(h), *means)
    batch, head, begin = _place(b, attn.heads.q, tokens)
    serving = b.let("hk", key_head(head, attn, attn.heads.kv))
    columns = b.let("columns", iota(_padded(h)))
    mean = read(mean_of(attn, h), batch, serving if h.operand == "k" else head, columns, mask=columns < h.dim)
    mean = b.let("mean", mean, f"[{_padded(h)}]")
    end = b.let("end", minimum(begin + SPAN, tokens))
    with b.loop("first", begin, end, _rows(h)) as first:
        own = head if other == "q" else serving
        x = _rows_of(b, attn, other, batch, own, first, end, columns < h.dim)
        at = b.let("at", first + iota(_rows(h)))
        if keys is not None:
            x = b.let("x", taken_off(attn, keys, x, (batch, serving), columns, column(at < end) & row(columns < h.dim)))
        b.store(_into(h), (batch, head, at), reduce("sum", x * row(mean), 1), at < end)
    doc = f"What the mean of {h.operand} adds to products of queries and keys."
    return _kernel(attn, b, f"terms_{h.operand}", name("B") * attn.heads.q * cdiv(tokens, SPAN), doc)


# -- pieces of their bodies ----------------------------------------------------------------------


def _counted(h: Held) -> Expr:
    """Rows of queries that the mean of keys has terms for, or the other way round."""
    return name("Sq" if h.operand == "k" else "Sk")


def _into(h: Held) -> Param:
    return input_param(Input(h.terms, terms_of(h.operand)))


def _sums_of(attn: Attention, h: Held) -> Param:
    return Param(own_name(f"{h.operand}_sums", attn), "buffer", "f32", rank=4, doc="sums by spans of tokens")


def _builder(attn: Attention, operand: str, *more: Param) -> Builder:
    given = Param(source(attn, operand), "operand", dtype_behind(attn, operand), rank=4, doc="the operand")
    return Builder({p.name: p for p in (given, *more, *size_parameters(attn))})


def _kernel(attn: Attention, b: Builder, what: str, grid: Expr, doc: str) -> Kernel:
    return Kernel(f"{attn.name}_{what}", *tidy(b.params.values(), b.body), (), grid, doc)


def _padded(h: Held) -> int:
    """Columns a program holds: a power of two."""
    return 1 << (h.width - 1).bit_length()


def _rows(h: Held) -> int:
    return max(1, min(64, AT_ONCE // _padded(h)))


def _place(b: Builder, heads: int, tokens: Expr) -> tuple[Expr, Expr, Expr]:
    """Batch entry, head and first token of this program."""
    spans = b.let("spans", cdiv(tokens, SPAN))
    begin = b.let("begin", remainder(program(), spans) * SPAN)
    rest = b.let("rest", quotient(program(), spans))
    return b.let("b", quotient(rest, heads)), b.let("h", remainder(rest, heads)), begin


def _rows_of(
    b: Builder, attn: Attention, operand: str, batch: Expr, head: Expr, first: Expr, end: Expr, inside: Expr
) -> Expr:
    """Binds entries [rows, columns] of tokens in fp32, 0 past the end."""
    columns = name("columns", "i32", inside.shape)
    rows = max(1, min(64, AT_ONCE // int(inside.shape[0])))
    tokens = b.let("tokens", first + iota(rows), f"[{rows}]")
    mask = column(tokens < end) & row(inside)
    x = read(b.params[source(attn, operand)], batch, head, column(tokens), row(columns), mask=mask)
    return b.let("x", cast_to(x, "f32"), f"[{rows}, {inside.shape[0]}]")
