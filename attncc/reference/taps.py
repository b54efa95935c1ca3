"""Outputs beside o: sums of the weights over rows, keys or blocks, without keeping the matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call
from attncc.reference.rows import Partial, Rows

Tap = Callable[[Call, Tensor, Rows], Tensor]
"""The weights [H, R, K] of some rows in; a sum over them out."""

TAPS: Final[dict[str, Tap]] = {}
JOIN: Final[dict[str, Callable[[Sequence[Tensor]], Tensor]]] = {}
"""How what chunks of rows gave becomes one: a sum, or one behind the other."""
PLAIN: Final = ("o", "lse", "max_score", "final_state", "indices")


def tapped(attn: Attention) -> tuple[Call, ...]:
    """The outputs that are taps."""
    return tuple(o for o in attn.outputs if o.name not in PLAIN)


def tap(attn: Attention, parts: Sequence[Partial], rows: Rows) -> list[Tensor]:
    """Every tap of some rows; the weights of several parts are those after their merge."""
    wanted = tapped(attn)
    if wanted:
        raise Unsupported(f"the oracle does not evaluate '{wanted[0].name}'", key="outputs")
    return []


def join(attn: Attention, chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The taps of a sequence from those of its chunks."""
    pieces = zip(*chunks, strict=True)
    return [JOIN.get(call.name, torch.cat)(list(some)) for call, some in zip(tapped(attn), pieces, strict=True)]
