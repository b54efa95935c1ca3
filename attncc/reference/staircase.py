"""A staircase's cache as a call is given it: rings and pages of codes, found by taking segments down step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Attention
from attncc.ir.staircase import BITS, Level, staircase
from attncc.reference.cache import UNKNOWN
from attncc.reference.formats import WIDE, Codes, encode

WHOLE: Final = {"int8": torch.int8, "uint8": torch.uint8}
POISON: Final = {torch.int8: 127, torch.uint8: 255}
"""What is in rows without a token."""


@dataclass(frozen=True, slots=True)
class Descended:
    """Keys or values of a sequence in such a cache."""

    tensors: Mapping[str, Tensor]
    """By name: of rings all rows [H, room, …], of what lies in pages the rows of its tokens [H, S, …], or of groups."""
    numbers: Tensor
    """[H, S, D] fp32, what all of it stands for."""


def descend(attn: Attention, steps: Sequence[Level], x: Tensor) -> Descended:
    """x [H, S, D] fp32, numbers of the variant's dtype, as a cache holds it to which its tokens came one by one.

    A group in which something is no number has a scale of NaN and codes of 1, as elsewhere in a cache.
    """
    length = steps[0].segment
    full = x.shape[1] // length
    oldest = max(0, full - steps[-1].begin + 1)
    tensors = {name: t for level in steps for name, t in _empty(level, x, oldest * length).items()}
    numbers: list[Tensor] = []
    for n in range(full + 1):
        piece, at = x[:, n * length : (n + 1) * length], 0
        piece = piece.to(WIDE[steps[0].dtype]).float()
        stored = {steps[0].name: piece}
        while at + 1 < len(steps) and full - n >= steps[at + 1].begin:
            at += 1
            stored, piece = _lower(attn, steps[at], piece)
        begin = n * length % steps[at].room if steps[at].room else n * length
        for name, rows in stored.items():
            share = piece.shape[1] // rows.shape[1] if rows.shape[1] else 1
            tensors[name][:, begin // share : begin // share + rows.shape[1]] = rows
        numbers.append(piece)
    return Descended(tensors, torch.cat(numbers, 1))


def _empty(level: Level, x: Tensor, oldest: int) -> dict[str, Tensor]:
    """The tensors of a step with nothing in them."""
    heads, tokens = len(x), level.room or oldest
    dtype = torch.float32 if level.is_plain else WHOLE[level.codes]
    found = {level.name: x.new_full((heads, tokens, level.width), POISON.get(dtype, torch.nan), dtype=dtype)}
    tail = level.scale_axes[3:]
    groups = tokens // level.group if level.over_tokens else tokens
    for name in (*([] if level.is_plain else [level.scales]), *([level.zeros] * level.has_zeros)):
        found[name] = x.new_full((heads, groups, *map(int, tail)), torch.nan)
    return found


def _lower(attn: Attention, level: Level, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a step stores of a whole segment [H, L, D], by tensors' names, and what is left of it as numbers."""
    z = staircase(attn)
    assert z is not None
    turned = x.mT if level.over_tokens else x
    found = encode(turned.contiguous(), level.dtype, z.per, z.symmetric, level.operand)
    known = found.scale.isfinite()
    scale = torch.where(known, found.scale, torch.nan)
    zero = None if found.zero is None else torch.where(known & found.zero.isfinite(), found.zero, torch.nan)
    held = Codes(torch.where(known.expand_as(found.codes), found.codes, UNKNOWN), scale, zero)
    kept, codes = held.read_back(), held.codes
    if level.over_tokens:
        kept, codes = kept.mT, codes.mT
    parts = {level.scales: scale, **({} if zero is None else {level.zeros: zero})}
    return {level.name: _stored(level, codes), **{k: _one_a_group(level, s) for k, s in parts.items()}}, kept


def _one_a_group(level: Level, x: Tensor) -> Tensor:
    """Scales or zero points [H, L, D or 1], turned where groups are of tokens, one for each group."""
    if not level.group:
        return x[..., 0]
    return x[..., :: level.group].mT if level.over_tokens else x[..., :: level.group]


def _stored(level: Level, codes: Tensor) -> Tensor:
    """Numbers of the format [H, L, D] as entries [H, L, width]."""
    whole = codes + level.offset
    shares = whole.chunk(level.shared, -1)
    packed = sum((x * 2 ** (BITS[level.dtype] * n) for n, x in enumerate(shares)), torch.zeros_like(shares[0]))
    return packed.to(WHOLE[level.codes])
