"""Numbers of few bits inside words of two bytes, as `unpack` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attncc.ir.expr import Dtype

FIELDS: Final[Mapping[str, int]] = {"i8": 8, "u8": 8, "u4": 4, "u4 above 0": 4, "f8e4m3": 8}
"""Bits of a field, by what it is."""
RAISED: Final[Mapping[Dtype, float]] = {"bf16": 128.0, "f16": 1024.0}
"""What a number is more by that is made the lowest bits of a mantissa, by the dtype."""
