"""A quantised cache to check with: what the oracle stores of drawn keys and values, laid out as a call wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.check.pages import Pages, pack, poison
from attncc.ir.attention import Attention
from attncc.ir.cache import BY_TOKEN, Cached, cached, scale_axes
from attncc.reference.cache import CODE_DTYPES, hold

Rows = Mapping[str, Tensor]
"""A sequence's keys and values by the names k and v, [S, H, D] each."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of sequences lie."""

    attn: Attention
    length: int
    pages: Pages | None
    device: torch.device
    place: Callable[[Tensor], Tensor]
    """Where in memory a tensor is."""
    dtype: torch.dtype
    """Of operands."""

    def of(self, sequences: list[Tensor], heads: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Rows [H, S, width] of each sequence in one tensor, with the axes that keys have."""
        rows = [x.transpose(0, 1).to(dtype) for x in sequences]
        if self.pages is not None:
            return self.pages.fill(rows, heads, dtype)
        return pack(rows, self.attn.layout, self.length, heads, self.device, dtype)

    def heads_first(self, sequences: list[Tensor], heads: int, groups: int) -> Tensor:
        """Scales [H, S, groups] of each sequence in one tensor, in which heads stand before tokens."""
        wide = self.of(sequences, (heads, groups), torch.float32)
        if self.pages is not None or self.attn.layout == "bshd":
            return wide.transpose(1, 2)
        return wide.transpose(0, 1) if self.attn.layout == "varlen" else wide


def hold_all(attn: Attention, sequences: Sequence[Rows], places: Places) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Keys and values as numbers, and what a package is given; scales lie where `place` puts them, too."""
    given: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for c in cached(attn):
        held = [hold(attn, c, rows[c.operand].float().transpose(0, 1)) for rows in sequences]
        dtype = CODE_DTYPES[c.codes]
        codes = places.of([h.codes for h in held], (c.heads, c.width), _bytes(dtype))
        given[c.operand] = places.place(codes).view(dtype)
        numbers[c.operand] = places.of([h.numbers for h in held], (c.heads, c.dim + c.rope), torch.float32)
        given[c.scales] = places.place(_scales(attn, c, [h.scales for h in held], places))
        if c.has_zeros:
            given[c.zeros] = places.place(_scales(attn, c, [h.zeros for h in held if h.zeros is not None], places))
        if c.rope:
            rope = [h.rope for h in held if h.rope is not None]
            given["k_rope"] = places.place(places.of(rope, (c.heads, c.rope), places.dtype))
    k = numbers["k"]
    return k, numbers.get("v", k), given


def _bytes(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.int8 else torch.uint8


def _scales(attn: Attention, c: Cached, held: list[Tensor], places: Places) -> Tensor:
    if c.per == "token":
        return places.heads_first([x[..., None] for x in held], c.heads, 1)[..., 0]
    if c.per in BY_TOKEN:
        return places.heads_first(held, c.heads, c.groups)
    if held:
        return torch.stack(held)
    axes = (0 if a == "B" else int(a) for a in scale_axes(attn, c))
    return poison(tuple(axes), torch.float32, places.device)
