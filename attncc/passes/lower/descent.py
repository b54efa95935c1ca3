"""The kernel that writes new keys and values into a staircase's cache, and takes segments down it that have aged.

Each step reads what the one before has left. One program has a few rows of every segment of a head, and takes those
that change one after the other, the oldest first: where a segment goes another has left by then. Segments of new tokens
that go all the way into pages have programs of their own. How many tokens a sequence has is read from the device, so
that a captured call follows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce as fold
from typing import Final

from attncc.ir.appending import count, is_packed, places, tokens
from attncc.ir.attention import Attention
from attncc.ir.build import (
    Builder,
    column,
    expand,
    full,
    iota,
    program,
    quotient,
    read,
    reduce,
    remainder,
    reshape,
    row,
)
from attncc.ir.cache import beside
from attncc.ir.expr import Expr, cast_to, const, eq, ew, maximum, minimum, name, where
from attncc.ir.staircase import BITS, Level, levels
from attncc.ir.tile import Kernel, Param
from attncc.passes.lower import storage
from attncc.passes.lower.cache import CODES, buffer
from attncc.passes.lower.grid import cdiv
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.pieces import MIN_WIDTH
from attncc.passes.lower.rounding import code_of, scale_of
from attncc.passes.lower.staircase import (
    grouped,
    lead,
    numbers,
    row_index,
    row_of,
    scale_index,
    scaled,
    share_numbers,
    step_at,
)
from attncc.passes.lower.tidy import tidy

LENGTHS: Final = Param("lengths", "buffer", "i32", rank=1, doc="[B] how many keys each sequence has")


@dataclass(frozen=True, slots=True)
class Rows:
    """What a program has of a segment."""

    steps: tuple[Level, ...]
    batch: Expr
    """Index on the batch axis of the new tokens: 0 where they are packed."""
    sequence: Expr
    head: Expr
    count: int

    @property
    def operand(self) -> str:
        return self.steps[0].operand


def kernel(attn: Attention) -> Kernel:
    """Of a variant whose cache is a staircase."""
    b = Builder(_parameters(attn))
    rows, segment = _rows(attn), levels(attn, "k")[0].segment
    parts, heads = segment // rows, (attn.heads.kv, attn.heads.v)
    spans = b.let("spans", _spans(attn))
    sequence, rest = b.let("b", remainder(program(), name("B"))), b.let("rest", quotient(program(), name("B")))
    part, rest = b.let("part", remainder(rest, parts)), b.let("rest", quotient(rest, parts))
    span, number = b.let("span", remainder(rest, spans)), b.let("number", quotient(rest, spans))
    _bind_lengths(b, attn, sequence, segment)
    batch = const(0) if is_packed(attn) else sequence
    for operand, first, h in zip("kv", (0, heads[0]), heads, strict=True):
        with b.when(number < first + h if first == 0 else number >= first):
            held = Rows(levels(attn, operand), batch, sequence, b.let("h", number - first), rows)
            turns = b.let("turns", where(eq(span, 0), name("held") + name("end") - name("last"), _alone(span)))
            with b.loop("turn", 0, turns) as turn:
                own = where(turn < name("held"), name("lowest") + turn, name("last") + turn - name("held"))
                n = b.let("n", where(span > 0, name("fresh") + span - 1, own), "segment")
                _move(b, attn, held, b.let("begin", n * segment + part * rows), n)
                b.barrier()
    doc = "Writes new keys and values into the cache, and takes older segments down its staircase."
    body = tidy(b.params.values(), b.body)
    return Kernel(f"{attn.name}_append", *body, (), name("B") * parts * sum(heads) * _spans(attn), doc)


def _rows(attn: Attention) -> int:
    """Tokens that a program has at a time: a group of keys."""
    return max(levels(attn, "k")[0].group, MIN_WIDTH)


def _spans(attn: Attention) -> Expr:
    """Programs of the same rows: one for segments that are there, and one for each that is new from its first token."""
    return cdiv(name(count(attn)), levels(attn, "k")[0].segment) + 1


def _alone(span: Expr) -> Expr:
    return cast_to(name("fresh") + span - 1 < name("last"), "i32")


def _parameters(attn: Attention) -> dict[str, Param]:
    """Everything the kernel reads and writes, in the order of its signature."""
    dtype = VALUE_DTYPE[attn.dtype]
    out = [Param(x.name.upper(), "operand", dtype, doc=x.doc) for x in tokens(attn)]
    out += [Param(x.upper(), "operand", CODES[levels(attn, x)[-1].codes], doc="the cache") for x in "kv"]
    out += [*map(buffer, beside(attn)), LENGTHS]
    out += [Param(x.name, "buffer", "i32", rank=1, doc=x.doc) for x in places(attn) if x.name == "cu_seqlens_new"]
    out += [storage.TABLE, *(Param(text, "scalar", "i32") for text in ("B", count(attn), "Sk"))]
    return {p.name: p for p in out}


def _bind_lengths(b: Builder, attn: Attention, sequence: Expr, segment: int) -> None:
    """Binds how many tokens the sequence has before the call and behind it, and the segments that change."""
    first, new = b.let("first", 0), name(count(attn))
    if is_packed(attn):
        starts = b.params["cu_seqlens_new"]
        first = b.let("first", read(starts, sequence))
        new = read(starts, sequence + 1) - first
    given = b.let("given", read(LENGTHS, sequence))
    before = b.let("before", maximum(given, 0))
    after = where(given < 0, before, maximum(minimum(before + new, name("Sk")), before))
    after = b.let("after", after, "what there is no room for is left out")
    oldest = levels(attn, "k")[-1].begin
    b.let("was_full", quotient(before, segment))
    b.let("is_full", quotient(after, segment))
    b.let("lowest", maximum(name("was_full") - (oldest - 1), 0), "the first segment that is not on the last step")
    end = b.let("end", cdiv(after, segment))
    fresh = b.let("fresh", minimum(cdiv(before, segment), end), "the first that only has new tokens")
    b.let("last", minimum(maximum(name("is_full") - (oldest - 1), fresh), end), "the first new one that stays above")
    b.let("held", fresh - name("lowest"))


def _move(b: Builder, attn: Attention, r: Rows, begin: Expr, n: Expr) -> None:
    """Takes rows of a segment, the first being token `begin`, to the step on which they stand behind the call."""
    was = b.let("was", step_at(r.steps, b.let("age", name("was_full") - n)), "the step before")
    now = b.let("now", step_at(r.steps, b.let("age", name("is_full") - n)), "that behind the call")
    before, after = name("before"), name("after")
    with b.when((now > was) | ((begin + r.count > before) & (begin < after))):
        own = b.let("own", begin + iota(r.count), f"[{r.count}] tokens")
        new = b.let("new", (own >= before) & (own < after))
        x = _new(b, r, own, new)
        for step, level in enumerate(r.steps[:-1]):
            with b.when((now > was) & eq(was, step)):
                mask = column(own < before) if level.is_plain else None
                at = lead(level, r.sequence, const(0), r.head)
                old = numbers(b, level, at, b.let("start", row_of(level, begin), level.dtype), r.count, mask)
                b.let("x", where(column(new), x, old))
        with b.when(eq(now, 0)):
            ring, plain = b.params[f"{r.steps[0].name}_ptr"], r.steps[0]
            at = row_index(plain, lead(plain, r.sequence, const(0), r.head), row_of(plain, begin), r.count)
            b.store(ring, at, cast_to(x, VALUE_DTYPE[attn.dtype]), column(new))
        for step, level in enumerate(r.steps[1:], 1):
            with b.when((was < step) & (now >= step)):
                _descend(b, attn, r, level, begin, eq(now, step), level is not r.steps[-1])


def _new(b: Builder, r: Rows, own: Expr, new: Expr) -> Expr:
    """Binds the numbers of new tokens, and 0 for others."""
    tensor = b.params[f"{r.operand.upper()}_NEW"]
    at = (r.batch, r.head, column(name("first") + own - name("before")), row(iota(r.steps[0].dim)))
    x = read(tensor, *at, mask=column(new))
    return b.let("x", cast_to(x, "f32"), f"[{r.count}, {r.steps[0].dim}]")


def _descend(b: Builder, attn: Attention, r: Rows, level: Level, begin: Expr, stays: Expr, goes_on: bool) -> None:
    """One step down: x becomes what this format leaves of it, which is stored where it goes no further."""
    x = name("x", "f32", (r.count, level.dim))
    shape, axis = grouped(level, r.count)
    parts = b.let(f"x_{level.dtype}", reshape(x, shape) if level.group else x, level.dtype)
    size = b.let("size", ew("abs", parts))
    peak = reduce("max", where(size < math.inf, size, math.inf), axis)
    ends = (reduce("min", parts, axis), reduce("max", parts, axis)) if level.has_zeros else (None, None)
    scale, zero = scale_of(b, level, peak, *ends)
    code = code_of(b, level, parts, expand(scale, axis), None if zero is None else expand(zero, axis))
    code = b.let(f"{level.dtype}_codes", reshape(code, x.shape) if level.group else code)
    with b.when(stays):
        page = const(0)
        if not level.room:
            page = b.let("page", read(storage.TABLE, r.sequence, quotient(begin, attn.page_size)))
        at, start = lead(level, r.sequence, page, r.head), b.let("start", row_of(level, begin))
        tensor = b.params[f"{level.name}_ptr"] if level.room else b.params[level.name.upper()]
        b.store(tensor, row_index(level, at, start, r.count), cast_to(_packed(b, level, code), CODES[level.codes]))
        for text, value in ((level.scales, scale), (level.zeros, zero)):
            if value is not None:
                b.store(b.params[f"{text}_ptr"], scale_index(level, at, start, r.count), value)
    if goes_on:
        kept = cast_to(code - level.offset if level.offset else code, "f32")
        b.let("x", scaled(level, kept, scale, zero), "what is left of it")


def _packed(b: Builder, level: Level, code: Expr) -> Expr:
    """Codes [rows, columns] as entries [rows, width]."""
    if level.shared == 1:
        return code
    digit, bits = share_numbers(b, level), BITS[level.dtype]
    units = fold(
        lambda x, n: where(eq(digit, n), 1 << bits * n, x), range(1, level.shared), full(digit.shape, 1, "i32")
    )
    shares = reshape(code, (code.shape[0], level.shared, level.width))
    return reduce("sum", shares * b.let("unit", units), 1)
