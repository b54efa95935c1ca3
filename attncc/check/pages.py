"""Sequences in one tensor: side by side, packed, or in pages whose owners are drawn, all that none owns poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SPARE: Final = 2
"""Pages that belong to no sequence."""
POISON: Final = {torch.int8: 127, torch.uint8: 255}
"""All ones but the sign, or all: as fp8 both are no number."""
WILD: Final = (-1, 2**31 - 1)
"""Entries of the table behind a sequence's last page: nobody may follow them."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the keys of each sequence lie."""

    table: Tensor
    """[B, pages of a sequence] int32"""
    used: Tensor
    """[B] int32"""
    count: int
    size: int

    @property
    def room(self) -> int:
        """Keys that a row of the table has room for."""
        return self.table.shape[1] * self.size

    def fill(self, sequences: list[Tensor], heads: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        """The cache [pages, size, heads, D] of sequences [S, heads, D], poison where no key is."""
        dtype = sequences[0].dtype if sequences else dtype or torch.float32
        cache = poison((self.count * self.size, *heads), dtype, self.table.device)
        for rows, pages in zip(sequences, self.table.long(), strict=True):
            at = torch.arange(len(rows), device=cache.device)
            cache[pages[at // self.size] * self.size + at % self.size] = rows
        return cache.view(self.count, self.size, *heads)


def lay_out(lengths: list[int], most: int, size: int, generator: torch.Generator) -> Pages:
    """Pages in no order for sequences of these lengths, each of which may have `most`."""
    device = generator.device
    owned = [-(-n // size) for n in lengths]
    count = sum(owned) + SPARE
    order = torch.randperm(count, generator=generator, device=device).int()
    table = torch.tensor(WILD, dtype=torch.int32, device=device).repeat(len(lengths), most)[:, :most].clone()
    begin = 0
    for row, pages in zip(table, owned, strict=True):
        row[:pages] = order[begin : begin + pages]
        begin += pages
    return Pages(table, torch.tensor(lengths, dtype=torch.int32, device=device), count, size)


def poison(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of which nothing must matter: NaN, of which fp8 has bits too; bytes are the greatest of both signs."""
    value = torch.nan if dtype.is_floating_point else POISON[dtype]
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


def pack(
    sequences: list[Tensor],
    layout: str,
    length: int,
    heads: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The sequences of a batch in one tensor; `length` is theirs, which an empty batch has too."""
    if layout == "varlen":
        return torch.cat(sequences) if sequences else torch.zeros((0, *heads), device=device, dtype=dtype)
    if not sequences:
        axes = (0, length, *heads) if layout == "bshd" else (0, heads[0], length, heads[1])
        return torch.zeros(axes, device=device, dtype=dtype)
    rows = torch.stack(sequences)
    return rows if layout == "bshd" else rows.transpose(1, 2).contiguous()
