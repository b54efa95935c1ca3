"""A quantised cache as a call is given it: codes, scales and zero points of whole sequences, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Attention
from attncc.ir.cache import Cached, quantizer
from attncc.reference.formats import FP8, Codes, encode

UNKNOWN: Final = 1
"""The code in all places of a group whose scale is no number: what is stored is a number always."""
CODE_DTYPES: Final = {"int8": torch.int8, "uint8": torch.uint8, **FP8}


@dataclass(frozen=True, slots=True)
class Held:
    """Keys or values of a sequence in a cache."""

    codes: Tensor
    """[H, S, entries of a row], as bytes where they are fp8."""
    scales: Tensor
    """fp32: [H, S] a token, [H, S, groups] a group, [H] a head, [H, D] a channel, [] for all."""
    zeros: Tensor | None
    numbers: Tensor
    """[H, S, D] fp32, what codes stand for."""
    rope: Tensor | None = None
    """[H, S, columns] of the columns that are held as they come."""


def hold(attn: Attention, c: Cached, x: Tensor) -> Held:
    """x [H, S, D] fp32 as a cache holds it; a group in which something is no number has a scale of NaN."""
    z = quantizer(attn)
    assert z is not None
    plain, rope = x[..., : c.dim].contiguous(), x[..., c.dim :]
    found = _encoded(c, plain, encode(plain, z.dtype, z.per, z.symmetric, c.operand) if x.shape[1] else None)
    known = found.scale.isfinite()
    scale = torch.where(known, found.scale, torch.nan)
    zero = None if found.zero is None else torch.where(known & found.zero.isfinite(), found.zero, torch.nan)
    codes = torch.where(known.expand_as(found.codes), found.codes, UNKNOWN)
    numbers = Codes(codes, scale, zero).read_back()
    return Held(
        as_stored(c, codes),
        _one_a_group(c, scale),
        None if zero is None else _one_a_group(c, zero),
        torch.cat([numbers, rope], -1) if c.rope else numbers,
        rope if c.rope else None,
    )


def _encoded(c: Cached, x: Tensor, found: Codes | None) -> Codes:
    """Codes with scales of [H, S or 1, D or 1]; no tokens have any."""
    ones = x.new_ones((len(x), 1, 1))
    if found is None:
        wide = {"group": x.new_ones(x.shape), "token": x.new_ones((*x.shape[:2], 1))}.get(c.per, ones)
        wide = wide.expand(-1, -1, c.dim) if c.per == "channel" else wide
        return Codes(x, wide, wide if c.has_zeros else None)
    return Codes(found.codes, found.scale * ones, None if found.zero is None else found.zero * ones)


def _one_a_group(c: Cached, x: Tensor) -> Tensor:
    """Scales or zero points, one for each group that has one of its own."""
    match c.per:
        case "group":
            return x[..., :: c.group]
        case "token":
            return x[..., 0]
        case "channel":
            return x[:, 0]
        case _:
            return x[:, 0, 0] if c.per == "head" else x[0, 0, 0]


def as_stored(c: Cached, codes: Tensor) -> Tensor:
    """Numbers of the format [..., D] as a cache has them in memory."""
    if c.codes in FP8:
        return codes.to(FP8[c.codes]).view(torch.uint8)
    whole = codes + c.offset
    if c.is_packed:
        low, high = whole.chunk(2, -1)
        whole = low + 16 * high
    return whole.to(CODE_DTYPES[c.codes])
