"""Codes read as words of two bytes, so that few instructions make numbers of many, and no byte is moved alone.

What a tensor core multiplies lies in pairs along the axis that is summed over: of values, neighbouring keys. Loads from
shared memory turn 16-bit entries so, not bytes. Each field of all words is therefore a tile of its own, of every second
column: its numbers come about in the registers in which they are multiplied, two at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from attncc.ir.attention import Attention
from attncc.ir.build import unpack
from attncc.ir.cache import NIBBLE_ZERO, Cached, cached
from attncc.ir.expr import Dtype, Expr
from attncc.passes.lower.pieces import Piece, pieces

STEP: Final = 2
"""Columns of neighbouring words."""
WHOLE: Final = ("tensor", "head")
BYTE_ZERO: Final = 128
"""The middle of unsigned bytes."""
MIDDLE: Final[Mapping[str, int]] = {"i8": 0, "u8": BYTE_ZERO, "u4": NIBBLE_ZERO, "f8e4m3": 0}
"""What is taken from codes, so that they are as small as can be: `unpack` does so."""
KINDS: Final[Mapping[str, str]] = {"int8": "i8", "uint8": "u8", "fp8_e4m3": "f8e4m3"}


class Field(NamedTuple):
    """A code of each word of a piece."""

    bit: int
    word: Piece


def kind(c: Cached) -> str:
    """What codes are; empty for those that are no numbers before more is done."""
    return "u4" if c.is_packed else KINDS.get(c.codes, "")


def joins(attn: Attention, c: Cached) -> bool:
    """Whether scales multiply scores, or weights, and no tile: they are one a key, and no number is both key and value.

    Codes must be finite then, whatever memory holds behind the last key.
    """
    return c.per in (*WHOLE, "token") and not attn.is_latent and (c.operand == "k" or bool(kind(c)))


def has_words(attn: Attention) -> bool:
    """Whether kernels read codes so: where fields fill tiles, and no column of a tile has a scale of its own."""
    both = cached(attn)
    return bool(both) and attn.dtype != "fp32" and all(joins(attn, c) and kind(c) and _fills(c) for c in both)


def _fills(c: Cached) -> bool:
    return c.width % STEP == 0 and sum(p.width for p in pieces(count(c))) == count(c)


def count(c: Cached) -> int:
    """Words of a row."""
    return c.width // STEP


def fields(c: Cached) -> dict[Piece, Field]:
    """Where the codes of a piece of columns are, by the piece: those of a word one behind the other, those of a byte
    half of the columns apart."""
    halves = (0, c.width) if c.is_packed else (0,)
    return {
        Piece(half + byte + STEP * word.column, word.width, STEP): Field(8 * byte + 4 * (half > 0), word)
        for half in halves
        for byte in range(STEP)
        for word in pieces(count(c))
    }


def numbers(c: Cached, words: Expr, bit: int, dtype: Dtype) -> Expr:
    """The numbers of a field, in the dtype that is multiplied: codes less their `MIDDLE`."""
    return unpack(words, kind(c), bit, dtype)
