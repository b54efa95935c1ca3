"""How a cache that loses bits as it ages lies in memory: its oldest tokens in pages, those of each step in a ring.

Tokens go down the staircase a segment at a time, and how old a segment is says on which step it stands. All but the
last step hold a known number of tokens, in a ring of that length, token t at row t modulo the length; the last holds
all older ones, in the pages of the block table. Rings and pages hold as many bytes as their format needs.
Rings, scales and zero points are contiguous: there are too many of them for strides of their own.

Codes of int8 are bytes, signed where the format is symmetric; of int4 and int2 two and four share a byte, that of
column c being in byte c mod (D / 2) or (D / 4), the first columns in its lowest bits. A code of few bits that is
symmetric is stored with half of its range added. Scales and zero points are fp32: one a token, or one for a group: of
keys so many tokens of a column, of values so many columns of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal

from attncc.ir.attention import Attention, Quantizer
from attncc.ir.given import Given

BITS: Final = {"int8": 8, "int4": 4, "int2": 2}
OPERANDS: Final[tuple[Literal["k", "v"], ...]] = ("k", "v")


@dataclass(frozen=True, slots=True)
class Level:
    """Keys or values on one step."""

    operand: Literal["k", "v"]
    dtype: str
    """Of the spec's own for the first step, which holds numbers as they come; else one of BITS."""
    begin: int
    """The age, in segments, from which on a segment stands here; the newest tokens, too few for one, have age 0."""
    segment: int
    """Tokens of a segment."""
    room: int
    """Tokens of the ring; 0 where all older ones lie in pages."""
    page: int
    group: int
    """Entries that share a scale; 0: all of a token."""
    has_zeros: bool
    heads: int
    dim: int

    @property
    def is_plain(self) -> bool:
        """Whether numbers are held as they come."""
        return self.dtype not in BITS

    @property
    def shared(self) -> int:
        """Codes that share a byte."""
        return 1 if self.is_plain else 8 // BITS[self.dtype]

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.dim // self.shared

    @property
    def codes(self) -> str:
        """The dtype of the tensor."""
        if self.is_plain:
            return self.dtype
        return "int8" if self.dtype == "int8" and not self.has_zeros else "uint8"

    @property
    def offset(self) -> int:
        """What is taken from an entry before it is a number of the format."""
        return 0 if self.shared == 1 or self.has_zeros else 1 << (BITS[self.dtype] - 1)

    @property
    def name(self) -> str:
        """Of the tensor: that in pages is the call's own."""
        return f"{self.operand}_{self.dtype}" if self.room else self.operand

    @property
    def scales(self) -> str:
        return f"{self.name}_scales"

    @property
    def zeros(self) -> str:
        return f"{self.name}_zeros"

    @property
    def over_tokens(self) -> bool:
        """Whether groups are of tokens of a column, as KIVI has keys (arXiv 2402.02750)."""
        return self.operand == "k" and self.group > 0

    @property
    def axes(self) -> tuple[int | str, ...]:
        """Of the tensor."""
        if self.room:
            return ("B", self.heads, self.room, self.width)
        return ("all pages", self.page, self.heads, self.width)

    @property
    def scale_axes(self) -> tuple[int | str, ...]:
        """Of scales and zero points, heads before tokens."""
        tokens = self.room or self.page
        lead = ("B" if self.room else "all pages", self.heads)
        if self.over_tokens:
            return (*lead, tokens // self.group, self.dim)
        return (*lead, tokens, self.dim // self.group) if self.group else (*lead, tokens)


def staircase(attn: Attention) -> Quantizer | None:
    """The one of the cache, where it is a staircase."""
    return next((z for z in attn.quantize if z.operand == "cache" and z.staircase), None)


def levels(attn: Attention, operand: str) -> tuple[Level, ...]:
    """The steps of keys or values, the youngest first; none without a staircase. Formats that follow themselves are
    one."""
    z = staircase(attn)
    if z is None:
        return ()
    length = z.staircase[0][0] or 1
    group = int(z.per.args[0].value or 0) if z.per and z.per.args else 0
    heads, dim = (attn.heads.kv, attn.dims.qk) if operand == "k" else (attn.heads.v, attn.dims.v)
    found: list[Level] = []
    begin = 0
    for dtype, steps in groupby(z.staircase, key=lambda step: step[1]):
        *_, (limit, _) = steps
        end = 0 if limit is None else limit // length
        room = (end - begin) * length if limit is not None else 0
        which = "k" if operand == "k" else "v"
        zeros = not z.symmetric and dtype in BITS
        found.append(Level(which, dtype, begin, length, room, attn.page_size, group, zeros, heads, dim))
        begin = end
    return tuple(found)


def tensors(attn: Attention) -> tuple[Given, ...]:
    """What a call has beside the codes of the oldest tokens."""
    out: list[Given] = []
    for level in (x for operand in OPERANDS for x in levels(attn, operand)):
        what = {"k": "keys", "v": "values"}[level.operand]
        if level.room:
            doc = f"{what} of the step of {level.dtype}, token t in row t % {level.room}"
            out.append(Given(level.name, level.axes, level.codes, doc, contiguous=True))
        if level.is_plain:
            continue
        code = f"(code - {level.offset})" if level.offset else "code"
        zeros = f" + {level.zeros}" if level.has_zeros else ""
        doc = f"of the codes of {level.name}, which stand for {code} * {level.scales}{zeros}"
        out.append(Given(level.scales, level.scale_axes, "fp32", doc, contiguous=True))
        if level.has_zeros:
            out.append(Given(level.zeros, level.scale_axes, "fp32", f"zero points of {level.name}", contiguous=True))
    return tuple(out)
