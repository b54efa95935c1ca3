"""The kernel that writes new keys and values into a cache: into pages of the table, as the quantizer holds them.

One program has some tokens of a head, of keys or of values. Where each goes is read from the device, so that a captured
call follows its sequences. Scales of tokens and of groups of columns are found and written with them; those of whole
sequences are given, and what lies beyond their range becomes the greatest number of the format.

Steps that the cache has behind it are taken on the way, in fp32 and in registers, by `steps` as before attention: a
token's position is that of its place. Two codes of int4 that share a byte come from two halves of a row, which steps
may have in tiles of other columns: where these are no halves of one tile, such rows go through scratch memory that only
their program reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce as fold
from typing import Final

from attncc.ir.appending import appends, count, is_packed, tokens, writes_queries
from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, full, half, iota, lanes, quotient, read, reduce, row
from attncc.ir.cache import Cached, beside, cached, find
from attncc.ir.expr import Expr, cast_to, const, eq, ew, name, where
from attncc.ir.keeping import states, writing
from attncc.ir.staircase import levels
from attncc.ir.tile import Kernel, Launch, Param, Program, Scratch
from attncc.passes.lower import descent, recall
from attncc.passes.lower.cache import CODES, NIBBLES, ROPE, buffer
from attncc.passes.lower.columns import Columns, Parts
from attncc.passes.lower.convolution import matrices, matrix_kernel, matrix_params, matrix_scratch
from attncc.passes.lower.entering import steps_of, through
from attncc.passes.lower.flow import Tiles, options
from attncc.passes.lower.grid import size_parameters
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.place import Place, by_heads, kept, params
from attncc.passes.lower.rounding import code_of, scale_of
from attncc.passes.lower.scores import input_param, own_name
from attncc.passes.lower.steps import parts_of
from attncc.passes.lower.tidy import tidy

AT_ONCE: Final = 2048
"""Entries that a program holds."""
TOKENS: Final = 16
"""Tokens of a program, of narrow heads."""

Join = tuple[int, ...]
"""The pieces whose codes share bytes: one, or one of each half of a row."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some columns of the program's tokens, on their way into codes."""

    at: Expr
    """[width] their numbers."""
    inside: Expr | None
    """[1, width] which lanes are columns; None where all are."""
    x: Expr
    """[rows, width] fp32."""


def program_of(attn: Attention) -> Program | None:
    """The program of the call, where there is one."""
    if not appends(attn):
        return None
    if levels(attn, "k"):
        kernel = descent.kernel(attn)
        return Program(f"{attn.name}_append", (kernel,), (Launch(kernel.name),), ())
    written, kernel = writing(attn), _kernel(attn)
    before = [matrix_kernel(written)] if matrices(written) else []
    after = [recall.kernel(attn, TOKENS)] if states(attn) else []
    launches = [*(Launch(k.name, options=options(False)) for k in before), *(Launch(k.name) for k in (kernel, *after))]
    scratch = (*matrix_scratch(written), *(_scratch(attn, operand) for operand in _staged(attn)))
    return Program(f"{attn.name}_append", (*before, kernel, *after), tuple(launches), (), scratch)


def _kernel(attn: Attention) -> Kernel:
    b = Builder(_parameters(attn))
    operands = "k" if attn.is_latent else "qkv" if writes_queries(attn) else "kv"
    grid = by_heads(b, attn, _rows(attn), operands, _write)
    doc = "Writes new keys and values into the cache, some tokens of a head a program."
    return Kernel(f"{attn.name}_append", *tidy(b.params.values(), b.body), (), grid, doc)


def _rows(attn: Attention) -> int:
    """Tokens of a program: of as many as tensor cores multiply where steps do."""
    widest = max(attn.dims.qk, attn.dims.v)
    least = TOKENS if matrices(writing(attn)) else 1
    return max(least, min(TOKENS, AT_ONCE >> (widest - 1).bit_length()))


def _parameters(attn: Attention) -> dict[str, Param]:
    """Everything the kernel reads and writes, in the order of its signature."""
    dtype = VALUE_DTYPE[attn.dtype]
    out = [Param(x.name.upper(), "operand", dtype, doc=x.doc) for x in tokens(attn)]
    out += [Param("Q", "operand", dtype, doc="queries behind their steps")] * writes_queries(attn)
    for text in "k" if attn.is_latent else "kv":
        c = find(attn, text)
        out.append(Param(text.upper(), "operand", dtype if c is None else CODES[c.codes], doc="the cache"))
    for x in beside(attn):
        rope = Param(ROPE, "operand", dtype, doc=x.doc)
        out.append(rope if x.name == ROPE.lower() else buffer(x))
    out += [Param(_stage(attn, x), "operand", "f32", doc=f"{x} behind its steps") for x in _staged(attn)]
    out += [Param(x.name.upper(), "operand", dtype, doc=x.doc) for x in states(attn)]
    out += [*matrix_params(writing(attn)), *params(attn)]
    if attn.kept is not None:
        known = {p.name for p in out}
        out += map(input_param, attn.kept.inputs)
        out += [p for p in size_parameters(writing(attn)) if p.name not in known]
    return {p.name: p for p in out}


# -- what is stored of them ----------------------------------------------------------------------


def _write(b: Builder, attn: Attention, text: str, place: Place) -> None:
    """Keys, values or queries of the program's tokens; these go where they stand in the call."""
    if text == "q":
        place = replace(place, index=(place.batch, name("at", "i32", (place.rows,))))
    c, steps, into = find(attn, text), steps_of(attn, text), b.params[text.upper()]
    given = b.params[f"{text.upper()}_NEW"]
    if c is None and steps is None:
        _copy(b, text.upper(), given.name, place, 0, attn.dims.v if text == "v" else attn.dims.qk)
    elif c is None and steps is not None:
        for p, x in through(b, attn, steps, place).items():
            b.store(into, _row_of(place, p.at), cast_to(x, into.dtype), lanes(kept(place.rows), p.inside))
    elif c is not None:
        tiles = None if steps is None else _apart(b, c, through(b, attn, steps, place))
        joins = None if tiles is None else _joins(c, tuple(tiles))
        if tiles is not None and joins is not None:
            pieces = [Piece(p.at, None if p.inside is None else row(p.inside), x) for p, x in tiles.items()]
        else:
            pieces = _halves(b, c, place, given if tiles is None else _through_memory(b, attn, text, tiles, place))
            joins = [tuple(range(len(pieces)))]
        _encode(b, attn, c, place, pieces, joins)
        if c.rope:
            _copy(b, ROPE, given.name, place, c.dim, c.rope)


def _encode(
    b: Builder, attn: Attention, c: Cached, place: Place, pieces: Sequence[Piece], joins: Sequence[Join]
) -> None:
    """Scales and codes of all columns."""
    scale, zero = SCALES[c.per](b, attn, c, place, pieces) if c.per in SCALES else _given(b, c, place, pieces)
    for join in joins:
        first = pieces[join[0]]
        codes = [code_of(b, c, pieces[n].x, scale[n], zero[n]) for n in join]
        code = codes[0] + codes[1] * NIBBLES if c.is_packed else codes[0]
        mask = _both(column(kept(place.rows)), first.inside)
        b.store(b.params[c.operand.upper()], _row_of(place, first.at), cast_to(code, CODES[c.codes]), mask)


def _joins(c: Cached, parts: Parts) -> list[Join] | None:
    """Which parts share bytes; None where a part has no other of the same columns in the other half of a row."""
    if not c.is_packed:
        return [(n,) for n in range(len(parts))]
    number = {p: n for n, p in enumerate(parts)}
    found = [(n, number.get(replace(p, first=p.first + c.width), -1)) for p, n in number.items() if p.first < c.width]
    whole = 2 * len(found) == len(parts) and all(other >= 0 for _, other in found)
    return [*found] if whole else None


def _parts_of(c: Cached, parts: Parts) -> Parts:
    """Both halves of a row whose columns share bytes, where one tile has all of it and no more."""
    halves = Columns(0, c.width), Columns(c.width, c.width)
    whole = c.is_packed and parts == (Columns(0, c.dim),) and parts[0].width == 2 * halves[0].width == c.dim
    return halves if whole else parts


def _apart(b: Builder, c: Cached, tiles: Tiles) -> Tiles:
    """The tiles, and of a whole row its halves."""
    parts = _parts_of(c, tuple(tiles))
    if parts == (*tiles,):
        return tiles
    (x,) = tiles.values()
    shape = f"[{x.shape[0]}, {c.width}]"
    return {p: b.let(f"x_{n}", half(x, n), shape) for n, p in enumerate(parts)}


def _both(a: Expr, b: Expr | None) -> Expr:
    return a if b is None else a & b


# -- rows in scratch memory ----------------------------------------------------------------------


def _staged(attn: Attention) -> list[str]:
    """The operands that are written and read again, as codes want other columns than steps do."""
    found: list[str] = []
    for c in cached(attn):
        steps = steps_of(attn, c.operand)
        if steps is not None and _joins(c, _parts_of(c, parts_of(writing(attn), steps)[-1])) is None:
            found.append(c.operand)
    return found


def _stage(attn: Attention, operand: str) -> str:
    return own_name(f"{operand}_staged", writing(attn))


def _scratch(attn: Attention, operand: str) -> Scratch:
    c = find(attn, operand)
    assert c is not None, "only codes are staged"
    batch = const(1) if is_packed(attn) else name("B")
    return Scratch(_stage(attn, operand), (batch, const(c.heads), name(count(attn)), const(c.dim)), "f32")


def _through_memory(b: Builder, attn: Attention, operand: str, tiles: Tiles, place: Place) -> Param:
    """Where the program's tokens are then."""
    stage, at = b.params[_stage(attn, operand)], column(name("at", "i32", (place.rows,)))
    for p, x in tiles.items():
        b.store(stage, (place.batch, place.head, at, row(p.at)), x, lanes(kept(place.rows), p.inside))
    b.barrier()
    return stage


def _row_of(place: Place, columns: Expr) -> tuple[Expr, ...]:
    """Columns of each token in the cache."""
    first, last = place.index
    return (column(first) if first.shape else first, place.head, column(last), row(columns))


def _copy(b: Builder, into: str, of: str, place: Place, begin: int, dim: int) -> None:
    """Columns as they come."""
    columns = iota(1 << (dim - 1).bit_length())
    mask = column(kept(place.rows)) & row(columns < dim)
    at = name("at", "i32", (place.rows,))
    x = read(b.params[of], place.batch, place.head, column(at), row(begin + columns), mask=mask)
    b.store(b.params[into], _row_of(place, columns), x, mask)


def _padded(c: Cached) -> int:
    return 1 << (c.width - 1).bit_length()


def _columns(c: Cached) -> Expr:
    return name("columns", "i32", (_padded(c),))


def _inside(c: Cached) -> Expr:
    return name("inside", "bool", (1, _padded(c)))


def _halves(b: Builder, c: Cached, place: Place, given: Param) -> list[Piece]:
    """The rows of `given`, as two pieces where two codes share a byte."""
    b.let("columns", iota(_padded(c)), f"[{_padded(c)}]")
    b.let("inside", row(_columns(c) < c.width))
    return [_half(b, c, place, which, given) for which in range(2 if c.is_packed else 1)]


def _half(b: Builder, c: Cached, place: Place, which: int, given: Param) -> Piece:
    columns = which * c.width + _columns(c)
    mask = column(kept(place.rows)) & _inside(c)
    at = name("at", "i32", (place.rows,))
    x = cast_to(read(given, place.batch, place.head, column(at), row(columns), mask=mask), "f32")
    x = b.let(f"x_{which}" if c.is_packed else "x", x, f"[{place.rows}, {_padded(c)}]")
    return Piece(columns, _inside(c), x)


Numbers = list[Expr]
"""Of each piece, what broadcasts against its entries."""


def _of_tokens(
    b: Builder, attn: Attention, c: Cached, place: Place, pieces: Sequence[Piece]
) -> tuple[Numbers, list[Expr | None]]:
    """Scales of whole tokens, found and written."""
    scale, zero = _found(b, c, pieces)
    _store(b, c, place, scale, zero)
    return [column(scale)] * len(pieces), [None if zero is None else column(zero)] * len(pieces)


def _of_groups(
    b: Builder, attn: Attention, c: Cached, place: Place, pieces: Sequence[Piece]
) -> tuple[Numbers, list[Expr | None]]:
    """Those of groups of columns, one after the other."""
    groups = [quotient(p.at, c.group) for p in pieces]
    scales: Numbers = [full(p.x.shape, 1.0) for p in pieces]
    zeros: Numbers = [full(p.x.shape, 0.0) for p in pieces]
    for g in range(c.groups):
        of = [row(eq(group, g)) for group in groups]
        members = [replace(p, inside=_both(mine, p.inside)) for p, mine in zip(pieces, of, strict=True)]
        scale, zero = _found(b, c, members)
        _store(b, c, place, scale, zero, g)
        for n, mine in enumerate(of):
            scales[n] = b.let(f"scales_{n}", where(mine, column(scale), scales[n]))
            zeros[n] = zeros[n] if zero is None else b.let(f"zeros_{n}", where(mine, column(zero), zeros[n]))
    return scales, [z if c.has_zeros else None for z in zeros]


SCALES: Final = {"token": _of_tokens, "group": _of_groups}


def _found(b: Builder, c: Cached, pieces: Sequence[Piece]) -> tuple[Expr, Expr | None]:
    """Binds scale and zero point [rows] of the entries inside: NaN where one is no finite number."""

    def over(op: str, xs: list[Expr]) -> Expr:
        return fold(lambda x, y: ew(op, x, y), [reduce(op, x, 1) for x in xs])

    def inside(p: Piece, x: Expr, other: float) -> Expr:
        return x if p.inside is None else where(p.inside, x, other)

    sizes = [b.let(f"size_{n}", inside(p, ew("abs", p.x), 0.0)) for n, p in enumerate(pieces)]
    peak = over("max", [where(size < math.inf, size, math.inf) for size in sizes])
    if not c.has_zeros:
        return scale_of(b, c, peak, None, None)
    low = over("min", [inside(p, p.x, math.inf) for p in pieces])
    return scale_of(b, c, peak, low, over("max", [inside(p, p.x, -math.inf) for p in pieces]))


def _store(b: Builder, c: Cached, place: Place, scale: Expr, zero: Expr | None, *group: int) -> None:
    first, last = place.index
    packed = first.value == 0
    at = (place.head, last) if packed else (first, place.head, last)
    for text, x in ((c.scales, scale), (c.zeros, zero)):
        if x is not None:
            b.store(b.params[f"{text}_ptr"], (*at, *group), x, kept(place.rows))


def _given(b: Builder, c: Cached, place: Place, pieces: Sequence[Piece]) -> tuple[Numbers, list[Expr | None]]:
    """Scales of whole sequences, as they are."""

    def of(text: str, n: int) -> Expr:
        x, several = b.params[f"{text}_ptr"], bool(place.sequence.shape)
        at = (place.sequence,) if c.per == "tensor" else (place.sequence, place.head)
        if c.per == "channel":
            at = (column(place.sequence) if several else place.sequence, place.head, row(pieces[n].at))
            rows = column(kept(place.rows)) if several else None
            mask = pieces[n].inside if rows is None else _both(rows, pieces[n].inside)
            return b.let(f"{text}_{n}", read(x, *at, mask=mask))
        found = read(x, *at, mask=kept(place.rows) if several else None)
        return b.let(f"{text}_{n}", column(found) if several else found)

    numbers = range(len(pieces))
    return [of(c.scales, n) for n in numbers], [of(c.zeros, n) if c.has_zeros else None for n in numbers]
