"""A cache that loses bits as it ages, as kernels read it: a tile's age says on which step of the staircase it stands.

A tile of keys lies in one segment, so that one branch is taken for all of it. Whatever the format, what is multiplied
are numbers of the operands' own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce as fold
from typing import Final

from attncc.ir.attention import Attention, Quantizer
from attncc.ir.build import Builder, column, expand, full, iota, quotient, read, remainder, reshape, row
from attncc.ir.expr import Dim, Expr, Shape, cast_to, const, eq, ew, name, where
from attncc.ir.primitives import on
from attncc.ir.staircase import BITS, Level, levels, tensors
from attncc.ir.staircase import staircase as of
from attncc.passes.lower import storage
from attncc.passes.lower.grid import QueryTile
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.pieces import MIN_WIDTH, Piece

GROUPS: Final = (16, 32)
"""Entries that may share a scale: those of a tile of keys are of whole groups."""
MOST_COLUMNS: Final = 128

# -- what is carried -----------------------------------------------------------------------------


def _of(holds: Callable[[Attention, Quantizer], bool]) -> Callable[[Attention], bool]:
    return lambda a: (z := of(a)) is not None and holds(a, z)


def _has_other_steps(a: Attention, z: Quantizer) -> bool:
    dtypes = [x.dtype for x in levels(a, "k")]
    return dtypes[0] != a.dtype or not set(dtypes[1:]) <= set(BITS) or len({*dtypes}) < max(len(dtypes), 2)


def _has_other_groups(a: Attention, z: Quantizer) -> bool:
    groups = {x.group for x in levels(a, "k")}
    return z.per is None or z.per.name not in ("token", "group") or (z.per.name == "group" and not groups <= {*GROUPS})


def _has_odd_columns(a: Attention, z: Quantizer) -> bool:
    return any(d & (d - 1) or not max(GROUPS) <= d <= MOST_COLUMNS for d in (a.dims.qk, a.dims.v))


def _has_odd_segments(a: Attention, z: Quantizer) -> bool:
    return any(x.segment % max(x.group, MIN_WIDTH) for x in levels(a, "k"))


def _steps_on_keys(a: Attention, z: Quantizer) -> bool:
    return any(not {"k", "v"}.isdisjoint(on(step)) for step in a.prologue)


LIMITS: Final[tuple[tuple[Callable[[Attention], bool], str], ...]] = (
    (_of(lambda a, z: not storage.has_whole_tiles(a)), f"staircases in pages of a multiple of {storage.WHOLE} keys"),
    (_of(lambda a, z: a.is_latent), "staircases of keys and values of their own"),
    (_of(lambda a, z: bool(z.smooth)), "caches whose keys have no mean taken off"),
    (_of(_has_other_steps), f"staircases from the dtype of q down steps of {', '.join(BITS)}, each there once"),
    (_of(_has_other_groups), f"staircases per token, {', '.join(f'group({n})' for n in GROUPS)}"),
    (_of(_has_odd_columns), f"staircases of head dims that are powers of two from {max(GROUPS)} to {MOST_COLUMNS}"),
    (_of(_has_odd_segments), f"staircases whose first age is a multiple of {MIN_WIDTH}, and of the group"),
    (_of(_steps_on_keys), "steps on queries alone, where tokens lose bits as they age"),
    (_of(lambda a, z: len(a.quantize) > 1), "the cache alone, or q, k, v and p"),
    (
        _of(lambda a, z: bool({x.name for x in a.inputs} & {x.name for x in tensors(a)})),
        "inputs of other names: those of rings and scales are the cache's",
    ),
)
"""What is not carried yet, and what is instead."""


# -- where tokens stand --------------------------------------------------------------------------


def step_at(steps: tuple[Level, ...], age: Expr) -> Expr:
    """The number of the step on which a segment stands; an age below 0, of what is to come, is the first's."""
    return fold(lambda a, b: a + b, (cast_to(ew("ge", age, const(x.begin)), "i32") for x in steps[1:]))


def lead(level: Level, sequence: Expr, page: Expr, head: Expr) -> tuple[Expr, Expr]:
    """The first two indices of a tensor of this step, wide enough for what lies behind the first."""
    return (cast_to(sequence if level.room else page, "i64"), head)


def row_of(level: Level, token: Expr) -> Expr:
    """The row of a token that begins a group: in its ring, or in its page."""
    return remainder(token, level.room or level.page)


# -- codes and numbers ---------------------------------------------------------------------------


def grouped(level: Level, rows: Dim) -> tuple[Shape, int]:
    """The shape [rows, columns] cut into groups, and the axis of what shares a scale."""
    if not level.group:
        return (rows, level.dim), 1
    if level.over_tokens:
        return (_part(rows, level.group), level.group, level.dim), 1
    return (rows, level.dim // level.group, level.group), 2


def _part(rows: Dim, group: int) -> Dim:
    return rows // group if isinstance(rows, int) else f"{rows}/{group}"


def scale_index(level: Level, at: tuple[Expr, Expr], start: Expr, rows: Dim) -> tuple[Expr, ...]:
    """Where the scales of the rows from `start` on are."""
    if not level.group:
        return (*at, start + iota(rows))
    if level.over_tokens:
        own = quotient(start, level.group) + iota(_part(rows, level.group))
        return (*at, column(own), row(iota(level.dim)))
    return (*at, column(start + iota(rows)), row(iota(level.dim // level.group)))


def row_index(level: Level, at: tuple[Expr, Expr], start: Expr, rows: Dim) -> tuple[Expr, ...]:
    """Where the codes of the rows from `start` on are."""
    return (*at, column(start + iota(rows)), row(iota(level.width)))


def unpacked(b: Builder, level: Level, stored: Expr) -> Expr:
    """Entries [rows, width] as numbers [rows, columns] of the format."""
    if level.shared == 1:
        return cast_to(stored, "f32")
    rows, radix = stored.shape[0], 1 << BITS[level.dtype]
    both = expand(
        b.let(f"{level.operand}_entries", cast_to(stored, "i32"), f"[{rows}, {level.width}] {level.shared} codes each"),
        1,
    )
    digit = share_numbers(b, level)
    digits = [remainder(quotient(both, radix**n), radix) for n in range(level.shared)]
    picked = fold(lambda x, n: where(eq(digit, n), digits[n], x), range(1, level.shared), digits[0])
    picked = b.let(f"{level.operand}_shares", full((rows, level.shared, level.width), 0, "i32") + picked)
    codes = cast_to(reshape(picked, (rows, level.dim)), "f32")
    return codes - float(level.offset) if level.offset else codes


def share_numbers(b: Builder, level: Level) -> Expr:
    """Binds the number of each code that shares a byte, so that it broadcasts against [rows, shares, width]."""
    return b.let(f"{level.operand}_digit", expand(row(iota(level.shared)), 2), f"[1, {level.shared}, 1]")


def scaled(level: Level, codes: Expr, scale: Expr, zero: Expr | None) -> Expr:
    """What codes [rows, columns] stand for; scales and zero points are one a group."""
    shape, axis = grouped(level, codes.shape[0])
    found = reshape(codes, shape) * expand(scale, axis) if level.group else codes * expand(scale, axis)
    found = found if zero is None else found + expand(zero, axis)
    return reshape(found, codes.shape) if level.group else found


def numbers(b: Builder, level: Level, at: tuple[Expr, Expr], start: Expr, rows: Dim, mask: Expr | None = None) -> Expr:
    """[rows, columns] of this step from row `start` on, in fp32; 0 where the mask is not."""
    tensor = b.params[f"{level.name}_ptr"] if level.room else b.params[level.name.upper()]
    stored = read(tensor, *row_index(level, at, start, rows), mask=mask)
    if level.is_plain:
        return cast_to(stored, "f32")
    codes = b.let(f"{level.operand}_codes", unpacked(b, level, stored), f"[{rows}, {level.dim}]")
    index = scale_index(level, at, start, rows)
    parts = [(level.scales, "scale"), *([(level.zeros, "zero")] if level.has_zeros else [])]
    found = [b.let(f"{level.operand}_{text}", read(b.params[f"{x}_ptr"], *index)) for x, text in parts]
    return scaled(level, codes, found[0], found[1] if level.has_zeros else None)


# -- a tile of keys ------------------------------------------------------------------------------


def read_tile(b: Builder, attn: Attention, which: str, t: QueryTile, head: Expr, p: Piece) -> Expr:
    """The [BN, columns] tile of keys or values from key n on, in the dtype that is multiplied."""
    steps, dtype = levels(attn, which), VALUE_DTYPE[attn.dtype]
    assert p == Piece(0, steps[0].dim)
    n, sequence = name("n"), t.scope.values["b"]
    age = b.let(f"{which}_age", quotient(t.keys, steps[0].segment) - quotient(n, steps[0].segment), "of its segment")
    step = b.let(f"{which}_step", step_at(steps, age), "of the staircase")
    text = f"{which}_numbers"
    b.let(text, full(("BN", p.width), 0.0, dtype), f"[BN, {p.width}]")
    for number, level in enumerate(steps):
        with b.when(eq(step, number)):
            start = b.let(f"{which}_start", row_of(level, n) if level.room else name("slot"), f"{level.dtype}")
            mask = column(n + iota("BN") < t.keys) if level.is_plain else None
            x = numbers(b, level, lead(level, sequence, name("page"), head), start, "BN", mask)
            b.let(text, cast_to(x, dtype))
    return name(text, dtype, ("BN", p.width))
