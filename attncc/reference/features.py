"""Feature maps of linear attention: x [..., D] in, phi(x) [..., F] out; products of features stand for exp(q·k)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Feature = Callable[[Tensor], Tensor]

FEATURES: Final[dict[str, Feature]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "elu1": lambda x: torch.nn.functional.elu(x) + 1,
    "softmax": lambda x: torch.softmax(x, -1),
    "exp": torch.exp,
    "taylor2": lambda x: _taylor2(x),
}

POSITIVE: Final = frozenset({"relu", "elu1", "softmax", "exp"})
"""Features that are never negative: sums of their products have a logarithm."""


def _taylor2(x: Tensor) -> Tensor:
    """[1, x, x x^T / sqrt(2)]: phi(x)·phi(y) = 1 + x·y + (x·y)^2 / 2."""
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)
