"""Philox4x32-10: random bits of a counter, so that any tile of any kernel draws the same ones.

The bits of a logical position (b, h, i, j) are word `j % 4` of the block whose counter is
(j // 4, i, h, b), least significant word first, under the key (seed mod 2^32, seed // 2^32). Each counter word
is taken mod 2^32 (`i` can be negative). A position is kept when its word is >= floor(p * 2^32).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_WORD: Final = 0xFFFFFFFF
_ROUNDS: Final = 10

Block = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; halves of x keep each step inside int64."""
    upper = a * (x >> 16)
    lower = a * (x & 0xFFFF)
    middle = (upper & 0xFFFF) + (lower >> 16)
    return (upper >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(counter: Block, seed: int) -> Block:
    """The four words of one block; words are int64 tensors that hold 0 … 2^32 - 1."""
    x0, x1, x2, x3 = (c & _WORD for c in counter)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], x0)
        high1, low1 = _multiply(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def drawn(seed: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The word of each position; the indices broadcast together."""
    words = philox((j // 4, i, h, b), seed)
    shape = torch.broadcast_shapes(*(w.shape for w in words))
    word = words[3]
    for lane in range(3):
        word = torch.where(j % 4 == lane, words[lane], word)
    return word.expand(shape)


def kept(p: float, seed: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Which positions dropout with probability `p` keeps; the indices broadcast together."""
    return drawn(seed, b, h, i, j) >= int(p * 2**32)
