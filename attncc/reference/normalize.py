"""From scores to weights: softmax over the last axis, and the normalizers that have no partial state.

Every function is NaN-free in its gradient too: where a row has nothing to sum, it is taken out before the
logarithm or the division, not after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Normalizer


def softmax(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their log-sum-exp and the greatest score, over the last axis; -inf is no score at all."""
    least = s.new_full(s.shape[:-1], -math.inf)
    top = s.detach().amax(-1) if s.shape[-1] else least
    base = torch.where(top == -math.inf, 0.0, top)
    e = torch.exp(s - base[..., None])
    total = e.sum(-1)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    return e / safe[..., None], torch.where(empty, least, base + torch.log(safe)), top


def logaddexp(*terms: Tensor) -> Tensor:
    """log(exp(a) + exp(b) + …), also where all of them are -inf."""
    return softmax(torch.stack(terms, -1))[1]


def _linear(s: Tensor, seen: Tensor, eps: float) -> Tensor:
    w = torch.where(seen, s, 0.0)
    total = w.sum(-1, keepdim=True) + eps
    return torch.where(total == 0, 0.0, w / torch.where(total == 0, 1.0, total))


WEIGHTS: Final[dict[str, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "sigmoid": lambda s, seen, eps: torch.where(seen, torch.sigmoid(s), 0.0),
    "relu": lambda s, seen, eps: torch.where(seen, torch.relu(s), 0.0),
    "none": lambda s, seen, eps: torch.where(seen, s, 0.0),
    "linear": _linear,
}


def weights(normalizer: Normalizer, s: Tensor, seen: Tensor) -> Tensor:
    """The weights of a normalizer that looks at each row alone; `s` is any finite number where not seen."""
    return WEIGHTS[normalizer.kind](s, seen, normalizer.eps)


def column_weights(s: Tensor, column_lse: Tensor) -> Tensor:
    """exp(s - column's log-sum-exp); 0 in a column that no row sees."""
    return torch.exp(s - torch.where(column_lse == -math.inf, 0.0, column_lse))
