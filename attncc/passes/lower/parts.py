"""Which variants the Hopper engine multiplies in parts: by instructions as wide as heads and key tiles are."""

from __future__ import annotations

from typing import Final

from attncc.ir.attention import Attention
from attncc.passes.lower.conditions import is_light, is_listed, is_quantised, reads_tiles

NARROW: Final = (64, 96)
WIDE: Final = (160, 256)
"""Head dims, above and up to, for which it was measured to be faster than powers of two; 64 and 128 take as long either
way, and of 160 the zeros cost more than they save (`benchmarks/results/parts-nvidia_h200.json`)."""


def has_parts(attn: Attention) -> bool:
    """Narrow heads are faster by a third consumer, whose registers hold no more than the products."""
    if is_quantised(attn) or is_listed(attn) or reads_tiles(attn):
        return False
    return _within(attn, WIDE) or (_within(attn, NARROW) and is_light(attn))


def _within(attn: Attention, dims: tuple[int, int]) -> bool:
    """Outputs leave by way of the queries' place, which is as wide as keys are."""
    above, most = dims
    return above < attn.dims.v <= attn.dims.qk <= most
