"""How a quantised cache lies in memory: the codes of keys and values, and the tensors that a call has beside them.

A code stands for `code * scale + zero`. Codes of int8 are bytes, signed where the format is symmetric and unsigned
where it has zero points; those of fp8 are fp8 numbers. Two of int4 share a byte: that of column c is in the low half of
byte c, that of column c + D / 2 in its high half, and where the format is symmetric a half n stands for n - 8.

Scales and zero points are fp32 and have heads before tokens. Every tensor may have strides of its own, so that a row of
codes, scales and rope columns, one behind the other as FlashMLA has them, is three views of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from attncc.ir.attention import Attention, Quantizer
from attncc.ir.given import Given
from attncc.ir.staircase import tensors

FORMATS: Final[Mapping[tuple[str, bool], str]] = {
    ("int8", True): "int8",
    ("int8", False): "uint8",
    ("int4", True): "uint8",
    ("int4", False): "uint8",
    ("fp8_e4m3", True): "fp8_e4m3",
    ("fp8_e5m2", True): "fp8_e5m2",
}
"""The dtype of the codes of a format, by whether it is symmetric."""
INTEGERS: Final = ("int8", "int4")
NIBBLE_ZERO: Final = 8
"""The half of a byte that stands for 0 where int4 is symmetric."""
BY_TOKEN: Final = ("token", "group")
"""Groups whose scales lie beside the keys; those of others hold all of a sequence."""


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys or values as a cache holds them."""

    operand: Literal["k", "v"]
    dtype: str
    """The format, as the spec names it."""
    per: str
    group: int
    """Columns that share a scale, where `per` is group."""
    has_zeros: bool
    heads: int
    dim: int
    """Columns that are held as codes."""
    rope: int = 0
    """Columns behind them that are held as they come."""

    @property
    def codes(self) -> str:
        """The dtype of the tensor of codes."""
        return FORMATS[self.dtype, not self.has_zeros]

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.dtype == "int4"

    @property
    def width(self) -> int:
        """Entries of a row of the tensor of codes."""
        return self.dim // 2 if self.is_packed else self.dim

    @property
    def offset(self) -> int:
        """What is taken from an entry before it is a number of the format."""
        return NIBBLE_ZERO if self.is_packed and not self.has_zeros else 0

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return -(-self.dim // self.group) if self.per == "group" else 1

    @property
    def scales(self) -> str:
        return f"{self.operand}_scales"

    @property
    def zeros(self) -> str:
        return f"{self.operand}_zeros"


def quantizer(attn: Attention) -> Quantizer | None:
    """The one of the cache, if there is any."""
    return next((z for z in attn.quantize if z.operand == "cache"), None)


def cached(attn: Attention) -> tuple[Cached, ...]:
    """Keys and values as the cache holds them, keys alone where these hold the values; none without a quantizer, nor
    where it is a staircase."""
    z = quantizer(attn)
    if z is None or z.staircase:
        return ()
    per = z.per.name if z.per else "tensor"
    given = z.per.args[0].value if z.per and z.per.args else None
    zeros = z.dtype in INTEGERS and not z.symmetric
    rope = next((p.kv.rope or 0 for p in attn.parts if p.kv.kind == "latent"), 0)
    k = Cached("k", z.dtype, per, int(given or 1), zeros, attn.heads.kv, attn.dims.qk - rope, rope)
    v = Cached("v", z.dtype, per, int(given or 1), zeros, attn.heads.v, attn.dims.v)
    return (k,) if attn.is_latent else (k, v)


def find(attn: Attention, operand: str) -> Cached | None:
    """How the cache holds keys or values; None where it is no cache of few bits."""
    return next((c for c in cached(attn) if c.operand == operand), None)


def scale_axes(attn: Attention, c: Cached) -> tuple[int | str, ...]:
    """Axes of the scales, and of the zero points."""
    if c.per in BY_TOKEN:
        groups = (c.groups,) if c.per == "group" else ()
        if attn.page_size:
            return ("all pages", c.heads, attn.page_size, *groups)
        return (c.heads, "Tk", *groups) if attn.layout == "varlen" else ("B", c.heads, "Sk", *groups)
    return {"tensor": ("B",), "head": ("B", c.heads), "channel": ("B", c.heads, c.dim)}[c.per]


def beside(attn: Attention) -> tuple[Given, ...]:
    """What a call has beside the codes: scales, zero points, rope columns, rings of a staircase."""
    out = [*tensors(attn)]
    for c in cached(attn):
        axes, what = scale_axes(attn, c), {"k": "keys", "v": "values"}[c.operand]
        offset = f"(code - {c.offset})" if c.offset else "code"
        zeros = f" + {c.zeros}" if c.has_zeros else ""
        out.append(Given(c.scales, axes, "fp32", f"of the {what}, which are {offset} * {c.scales}{zeros}"))
        if c.has_zeros:
            out.append(Given(c.zeros, axes, "fp32", f"zero points of the {what}"))
        if c.rope:
            out.append(
                Given(
                    "k_rope", row_axes(attn, c.heads, c.rope), attn.dtype, "the last columns of the keys, as they are"
                )
            )
    return tuple(out)


def row_axes(attn: Attention, heads: int, width: int) -> tuple[int | str, ...]:
    """Axes of rows that lie as those of keys do."""
    if attn.page_size:
        return ("all pages", attn.page_size, heads, width)
    return {
        "bhsd": ("B", heads, "Sk", width),
        "bshd": ("B", "Sk", heads, width),
        "varlen": ("Tk", heads, width),
    }[attn.layout]
