"""The kernel that writes new keys and values into a cache: into pages of the table, as the quantizer holds them.

One program has some tokens of a head, of keys or of values. Where each goes is read from the device, so that a captured
call follows its sequences. Scales of tokens and of groups of columns are found and written with them; those of whole
sequences are given, and what lies beyond their range becomes the greatest number of the format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce as fold
from typing import Final

from attncc.ir.appending import appends, count, finds_sequences, is_packed, room, tokens
from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, full, iota, program, quotient, read, reduce, remainder, row
from attncc.ir.cache import Cached, beside, find
from attncc.ir.expr import Expr, cast_to, const, eq, ew, maximum, name, where
from attncc.ir.staircase import levels
from attncc.ir.tile import Kernel, Launch, Param, Program
from attncc.passes.lower import descent, storage
from attncc.passes.lower.cache import CODES, NIBBLES, ROPE, buffer
from attncc.passes.lower.grid import cdiv
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.rounding import code_of, scale_of
from attncc.passes.lower.tidy import tidy

AT_ONCE: Final = 2048
"""Entries that a program holds."""
TOKENS: Final = 16
"""Tokens of a program, of narrow heads."""
POSITIONS: Final = "positions"
SEQUENCES: Final = Param("cu_seqlens_new", "buffer", "i32", rank=1, doc="[B + 1] where each sequence's tokens begin")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens of a program are, and where they go."""

    batch: Expr
    """Index on the batch axis of the new tokens: 0 where they are packed."""
    sequence: Expr
    """Of each token, or of all."""
    head: Expr
    index: tuple[Expr, ...]
    """Batch entry or page, and row, of each token in the cache; the head stands between them."""
    rows: int


def program_of(attn: Attention) -> Program | None:
    """The program of the call, where there is one."""
    if not appends(attn):
        return None
    kernel = descent.kernel(attn) if levels(attn, "k") else _kernel(attn)
    return Program(f"{attn.name}_append", (kernel,), (Launch(kernel.name),), ())


def _kernel(attn: Attention) -> Kernel:
    rows = _rows(attn)
    b = Builder(_parameters(attn))
    spans, heads = b.let("spans", _spans(attn)), _heads(attn)
    rest, batch = program(), const(0)
    if not is_packed(attn):
        rest, batch = b.let("rest", quotient(program(), name("B"))), b.let("b", remainder(program(), name("B")))
    begin, number = b.let("begin", remainder(rest, spans) * rows), b.let("number", quotient(rest, spans))
    at = b.let("at", begin + iota(rows), f"[{rows}] tokens")
    place = _place(b, attn, batch, at, rows)
    for text, first, h in zip("kv", (0, heads[0]), heads, strict=False):
        inside = number < first + h if first == 0 else number >= first
        with b.when(inside):
            h_ = b.let("h", number - first)
            _write(b, attn, text, Place(place.batch, place.sequence, h_, place.index, rows))
    sequences = const(1) if is_packed(attn) else name("B")
    doc = "Writes new keys and values into the cache, some tokens of a head a program."
    return Kernel(
        f"{attn.name}_append", *tidy(b.params.values(), b.body), (), sequences * sum(heads) * _spans(attn), doc
    )


def _spans(attn: Attention) -> Expr:
    """Programs of a head of a sequence."""
    return cdiv(name(count(attn)), _rows(attn))


def _heads(attn: Attention) -> tuple[int, ...]:
    return (attn.heads.kv,) if attn.is_latent else (attn.heads.kv, attn.heads.v)


def _rows(attn: Attention) -> int:
    widest = max(attn.dims.qk, attn.dims.v)
    return max(1, min(TOKENS, AT_ONCE >> (widest - 1).bit_length()))


def _parameters(attn: Attention) -> dict[str, Param]:
    """Everything the kernel reads and writes, in the order of its signature."""
    dtype = VALUE_DTYPE[attn.dtype]
    out = [Param(x.name.upper(), "operand", dtype, doc=x.doc) for x in tokens(attn)]
    for text in "k" if attn.is_latent else "kv":
        c = find(attn, text)
        out.append(Param(text.upper(), "operand", dtype if c is None else CODES[c.codes], doc="the cache"))
    for x in beside(attn):
        rope = Param(ROPE, "operand", dtype, doc=x.doc)
        out.append(rope if x.name == ROPE.lower() else buffer(x))
    out.append(Param(POSITIONS, "buffer", "i32", rank=1 if is_packed(attn) else 2, doc="where each token goes"))
    out += [SEQUENCES] if finds_sequences(attn) else []
    out += [storage.TABLE] if attn.page_size else []
    out += [Param(text, "scalar", "i32") for text in ("B", count(attn), room(attn))]
    return {p.name: p for p in out}


# -- where tokens go -----------------------------------------------------------------------------


def _place(b: Builder, attn: Attention, batch: Expr, at: Expr, rows: int) -> Place:
    """Binds the sequence of each token, its position, and whether it is stored at all."""
    packed, there, sequence = is_packed(attn), at < name(count(attn)), batch
    if finds_sequences(attn):
        begun = Expr("bucket", (at, name("B") + 1), SEQUENCES.name, "i32", (rows,))
        sequence = b.let("seq", begun - 1, f"[{rows}] the last that begins at a token or before it")
        there = there & (sequence >= 0) & (sequence < name("B"))
    there = b.let("there", there)
    positions = b.params[POSITIONS]
    given = read(positions, at, mask=there) if packed else read(positions, batch, at, mask=there)
    position = b.let("position", where(there, given, -1), f"[{rows}]")
    b.let("kept", (position >= 0) & (position < name(room(attn))), "tokens without a place are left out")
    position = b.let("position", maximum(position, 0))
    zero = const(0)
    if not attn.page_size:
        return Place(zero if packed else batch, sequence, zero, (zero if packed else batch, position), rows)
    known = _kept(rows)
    page = read(storage.TABLE, sequence, quotient(position, attn.page_size), mask=known)
    page = b.let("page", page, f"[{rows}]")
    slot = b.let("slot", remainder(position, attn.page_size), f"[{rows}]")
    return Place(zero if packed else batch, sequence, zero, (page, slot), rows)


def _kept(rows: int) -> Expr:
    return name("kept", "bool", (rows,))


# -- what is stored of them ----------------------------------------------------------------------


def _write(b: Builder, attn: Attention, text: str, place: Place) -> None:
    """Keys or values of the program's tokens."""
    c = find(attn, text)
    dim = attn.dims.qk if text == "k" else attn.dims.v
    if c is None:
        _copy(b, text.upper(), f"{text.upper()}_NEW", place, 0, dim)
        return
    b.let("columns", iota(_padded(c)), f"[{_padded(c)}]")
    b.let("inside", row(_columns(c) < c.width))
    halves = [_read(b, c, place, half) for half in range(2 if c.is_packed else 1)]
    scale, zero = SCALES[c.per](b, attn, c, place, halves) if c.per in SCALES else _given(b, c, place, halves)
    codes = [code_of(b, c, x, s, z) for x, s, z in zip(halves, scale, zero, strict=True)]
    code = codes[0] + codes[1] * NIBBLES if c.is_packed else codes[0]
    first, last = place.index
    into = _row_of(first, place, last, _columns(c))
    b.store(b.params[text.upper()], into, cast_to(code, CODES[c.codes]), column(_kept(place.rows)) & _inside(c))
    if c.rope:
        _copy(b, ROPE, f"{text.upper()}_NEW", place, c.dim, c.rope)


def _row_of(first: Expr, place: Place, last: Expr, columns: Expr) -> tuple[Expr, ...]:
    return (column(first) if first.shape else first, place.head, column(last), row(columns))


def _copy(b: Builder, into: str, of: str, place: Place, begin: int, dim: int) -> None:
    """Columns as they come."""
    columns = iota(1 << (dim - 1).bit_length())
    mask = column(_kept(place.rows)) & row(columns < dim)
    at = name("at", "i32", (place.rows,))
    x = read(b.params[of], place.batch, place.head, column(at), row(begin + columns), mask=mask)
    first, last = place.index
    b.store(b.params[into], _row_of(first, place, last, columns), x, mask)


def _padded(c: Cached) -> int:
    return 1 << (c.width - 1).bit_length()


def _columns(c: Cached) -> Expr:
    return name("columns", "i32", (_padded(c),))


def _inside(c: Cached) -> Expr:
    return name("inside", "bool", (1, _padded(c)))


def _read(b: Builder, c: Cached, place: Place, half: int) -> Expr:
    """Binds the numbers of new tokens, [rows, columns] of a half of them where two share a byte."""
    columns = half * c.width + _columns(c)
    mask = column(_kept(place.rows)) & _inside(c)
    at = name("at", "i32", (place.rows,))
    x = read(b.params[f"{c.operand.upper()}_NEW"], place.batch, place.head, column(at), row(columns), mask=mask)
    return b.let(f"x_{half}" if c.is_packed else "x", cast_to(x, "f32"), f"[{place.rows}, {_padded(c)}]")


Numbers = list[Expr]
"""Of each half, what broadcasts against its entries."""


def _of_tokens(
    b: Builder, attn: Attention, c: Cached, place: Place, halves: Numbers
) -> tuple[Numbers, list[Expr | None]]:
    """Scales of whole tokens, found and written."""
    scale, zero = _found(b, c, halves, [_inside(c)] * len(halves))
    _store(b, c, place, scale, zero)
    return [column(scale)] * len(halves), [None if zero is None else column(zero)] * len(halves)


def _of_groups(
    b: Builder, attn: Attention, c: Cached, place: Place, halves: Numbers
) -> tuple[Numbers, list[Expr | None]]:
    """Those of groups of columns, one after the other."""
    shape = (place.rows, _padded(c))
    groups = [quotient(half * c.width + _columns(c), c.group) for half in range(len(halves))]
    scales: Numbers = [full(shape, 1.0)] * len(halves)
    zeros: Numbers = [full(shape, 0.0)] * len(halves)
    for g in range(c.groups):
        of = [row(eq(group, g)) for group in groups]
        scale, zero = _found(b, c, halves, [_inside(c) & mine for mine in of])
        _store(b, c, place, scale, zero, g)
        for n, mine in enumerate(of):
            scales[n] = b.let(f"scales_{n}", where(mine, column(scale), scales[n]))
            zeros[n] = zeros[n] if zero is None else b.let(f"zeros_{n}", where(mine, column(zero), zeros[n]))
    return scales, [z if c.has_zeros else None for z in zeros]


SCALES: Final = {"token": _of_tokens, "group": _of_groups}


def _found(b: Builder, c: Cached, halves: Numbers, masks: list[Expr]) -> tuple[Expr, Expr | None]:
    """Binds scale and zero point [rows] of the entries that the masks leave: NaN where one is no finite number."""

    def over(op: str, xs: list[Expr]) -> Expr:
        return fold(lambda x, y: ew(op, x, y), [reduce(op, x, 1) for x in xs])

    pairs = [*zip(halves, masks, strict=True)]
    sizes = [b.let(f"size_{n}", where(mask, ew("abs", x), 0.0)) for n, (x, mask) in enumerate(pairs)]
    peak = over("max", [where(size < math.inf, size, math.inf) for size in sizes])
    if not c.has_zeros:
        return scale_of(b, c, peak, None, None)
    low = over("min", [where(mask, x, math.inf) for x, mask in pairs])
    return scale_of(b, c, peak, low, over("max", [where(mask, x, -math.inf) for x, mask in pairs]))


def _store(b: Builder, c: Cached, place: Place, scale: Expr, zero: Expr | None, *group: int) -> None:
    first, last = place.index
    packed = first.value == 0
    at = (place.head, last) if packed else (first, place.head, last)
    for text, x in ((c.scales, scale), (c.zeros, zero)):
        if x is not None:
            b.store(b.params[f"{text}_ptr"], (*at, *group), x, _kept(place.rows))


def _given(b: Builder, c: Cached, place: Place, halves: Numbers) -> tuple[Numbers, list[Expr | None]]:
    """Scales of whole sequences, as they are."""

    def of(text: str, half: int) -> Expr:
        x, several = b.params[f"{text}_ptr"], bool(place.sequence.shape)
        at = (place.sequence,) if c.per == "tensor" else (place.sequence, place.head)
        if c.per == "channel":
            columns = half * c.width + _columns(c)
            at = (column(place.sequence) if several else place.sequence, place.head, row(columns))
            mask = _inside(c) & column(_kept(place.rows)) if several else _inside(c)
            return b.let(f"{text}_{half}", read(x, *at, mask=mask))
        found = read(x, *at, mask=_kept(place.rows) if several else None)
        return b.let(f"{text}_{half}", column(found) if several else found)

    numbers = range(len(halves))
    return [of(c.scales, n) for n in numbers], [of(c.zeros, n) if c.has_zeros else None for n in numbers]
