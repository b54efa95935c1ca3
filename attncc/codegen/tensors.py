"""How the tensors and sizes of a call stand in an emitted package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from attncc.codegen.call import tuple_text
from attncc.ir.attention import Layout, Size

TORCH_DTYPE: Final[Mapping[str, str]] = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int32": "int32", "int64": "int64", "int8": "int8",
    "uint8": "uint8", "bool": "bool", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2",
}  # fmt: skip
STRIDED: Final[Mapping[Layout, str]] = {"bhsd": "bhsd", "bshd": "bshd", "varlen": "shd"}


def strided(layout: Layout) -> str:
    """Where the b, h, s, d axes of an operand are."""
    return STRIDED[layout]


def axes_of(axes: Iterable[int | str]) -> str:
    """Names and numbers of axes as text of a tuple."""
    return tuple_text(f'"{a}"' if isinstance(a, str) else str(a) for a in axes)


def size_bounds(size: Size) -> str:
    """What a call's size may be, as text."""
    fixed = "" if size.fixed is None else f", fixed={size.fixed}"
    return f"Size({size.most}{fixed}{f', multiple={size.multiple}' if size.multiple > 1 else ''})"
