"""How well one list of numbers orders another: Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """From -1 (reversed) to 1 (the same order); NaN where a list has fewer than two different numbers."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} numbers against {len(y)}")
    if len(set(x)) < 2 or len(set(y)) < 2:
        return nan
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: Sequence[float]) -> np.ndarray:
    """Places in ascending order, from 0; equal numbers share the mean of theirs."""
    _, at, counts = np.unique(np.asarray(x, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[at]
