"""Whether a result is right before anyone times it: sampled rows against float64, on memory that was poisoned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.cases import SCALE, Case
from benchmarks.operands import Given, mods

O_LIMIT: Final = 5e-3
"""Relative, in the norm: bf16 rounds at 2**-9, which leaves 2.4e-3 at most."""
LSE_LIMIT: Final = 2e-3
ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Errors:
    """Distances from float64: of o (relative norm, the worst head), of lse (the largest)."""

    o: float
    lse: float

    @property
    def ok(self) -> bool:
        return self.o <= O_LIMIT and self.lse <= LSE_LIMIT

    def __str__(self) -> str:
        return f"error {self.o:.1e} of o (limit {O_LIMIT:.0e}), {self.lse:.1e} of lse (limit {LSE_LIMIT:.0e})"


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor made inside without values is NaN, or the largest integer, until something writes to it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def errors(case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given, o: Tensor, lse: Tensor) -> Errors:
    """Of edge rows and random ones in the first and the last head; infinite where a value anywhere is not finite."""
    if not (bool(torch.isfinite(o).all()) and bool(torch.isfinite(lse).all())):
        return Errors(math.inf, math.inf)
    g = torch.Generator().manual_seed(2)
    pairs: list[tuple[float, float]] = []
    for b, h in ((0, 0), (case.b - 1, case.hq - 1)):
        edges = torch.tensor([0, 1, 63, 64, case.s - 1]).clamp(max=case.s - 1)
        rows = torch.cat([edges, torch.randint(0, case.s, (ROWS - len(edges),), generator=g)]).to(o.device)
        want_o, want_lse = exact_rows(case, qkv, given, b, h, rows)
        off = (o[b, h, rows].double() - want_o).norm() / want_o.norm()
        pairs.append((float(off), float((lse[b, h, rows].double() - want_lse).abs().max())))
    return Errors(max(e for e, _ in pairs), max(e for _, e in pairs))


def exact_rows(
    case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given, b: int, h: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """o [rows, Dv] and lse [rows] of one head in float64."""
    q, k, v = qkv
    score, mask = mods(case, given)
    kv_head = h // (case.hq // case.hk)
    s = q[b, h, rows].double() @ k[b, kv_head].double().T * SCALE
    i, j = rows[:, None], torch.arange(case.s, device=q.device)[None]
    s = s if score is None else score(s, b, h, i, j).double()
    s = s if mask is None else s.masked_fill(~mask(b, h, i, j), -math.inf)
    return s.softmax(-1) @ v[b, kv_head].double(), s.logsumexp(-1)
