"""Numbers of few bits inside words of two bytes, as `unpack` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attncc.ir.expr import Dtype

FIELDS: Final[Mapping[str, int]] = {"i8": 8, "u8": 8, "u4": 4, "f8e4m3": 8}
"""Bits of a field, by what it is."""
NUMBERS: Final[tuple[Dtype, ...]] = ("bf16", "f16")
"""What they become: both hold them exactly."""
