"""What keeps kernels from a variant that others carry, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attncc.ir.attention import Attention


@dataclass(frozen=True, slots=True)
class Gap:
    """A reason, and the variants for which it holds."""

    why: str
    holds: Callable[[Attention], bool]


def first(gaps: Iterable[Gap], attn: Attention) -> str:
    """The first reason that holds for a variant; empty if none does."""
    return next((g.why for g in gaps if g.holds(attn)), "")
