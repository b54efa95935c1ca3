"""A quantised cache to check with: what the oracle stores of drawn keys and values, laid out as a call wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncc.check.pages import Pages, pack, poison
from attncc.ir.attention import Attention
from attncc.ir.cache import BY_TOKEN, Cached, cached, scale_axes
from attncc.ir.staircase import OPERANDS, Level, levels
from attncc.reference.cache import CODE_DTYPES, hold
from attncc.reference.staircase import descend

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
    for operand in OPERANDS:
        steps = levels(attn, operand)
        if steps:
            rows = [x[operand].float().transpose(0, 1) for x in sequences]
            given |= _rings_and_pages(attn, steps, rows, places)
            found = [descend(attn, steps, x).numbers for x in rows]
            numbers[operand] = places.of(found, (steps[0].heads, steps[0].dim), torch.float32)
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


# -- a staircase ---------------------------------------------------------------------------------


def _rings_and_pages(
    attn: Attention, steps: Sequence[Level], rows: Sequence[Tensor], places: Places
) -> dict[str, Tensor]:
    """The tensors of the steps of keys or values [H, S, D], poison where no token is."""
    held = [descend(attn, steps, x).tensors for x in rows]
    none = descend(attn, steps, torch.zeros((steps[0].heads, 0, steps[0].dim), device=places.device)).tensors
    out: dict[str, Tensor] = {}
    for level in steps:
        for name in (level.name, *([] if level.is_plain else [level.scales]), *([level.zeros] * level.has_zeros)):
            own = [h[name] for h in held]
            if level.room:
                ring = torch.stack(own) if own else none[name][None][:0]
                out[name] = ring.to(places.dtype) if level.is_plain else ring
            else:
                out[name] = _in_pages(level, name, own, none[name], places)
    last = steps[-1].name
    return {name: places.place(x) if name == last else x.contiguous() for name, x in out.items()}


def _in_pages(level: Level, name: str, rows: Sequence[Tensor], none: Tensor, places: Places) -> Tensor:
    """Codes [H, S, width], or scales, of the oldest tokens of each sequence; scales have heads before tokens."""
    assert places.pages is not None
    if name == level.name:
        return places.pages.fill([x.transpose(0, 1) for x in rows], (level.heads, level.width), none.dtype)
    pages = replace(places.pages, size=level.page // level.group) if level.over_tokens else places.pages
    columns = level.scale_axes[3:]
    wide = [x.transpose(0, 1) if columns else x.transpose(0, 1)[..., None] for x in rows]
    found = pages.fill(wide, (level.heads, int(columns[0]) if columns else 1), none.dtype).transpose(1, 2)
    return found if columns else found[..., 0]
