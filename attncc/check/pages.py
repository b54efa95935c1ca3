"""A cache in pages: which are whose is drawn, and all that no sequence owns is poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SPARE: Final = 2
"""Pages that belong to no sequence."""
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

    def fill(self, sequences: list[Tensor], heads: tuple[int, int]) -> Tensor:
        """The cache [pages, size, heads, D] of sequences [S, heads, D], NaN where no key is."""
        dtype = sequences[0].dtype if sequences else None
        cache = torch.full((self.count * self.size, *heads), torch.nan, dtype=dtype, device=self.table.device)
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
