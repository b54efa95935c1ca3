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

LIMITS: Final = {"bf16": (5e-3, 2e-3), "fp16": (7e-4, 2e-3), "fp32": (1e-5, 1e-4)}
"""Of o, relative, in the norm (bf16 rounds at 2**-9, which leaves 2.4e-3 at most), and of lse."""
ROWS: Final = 64


class Rejected(Exception):
    """A result that is wrong, and so is not timed."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Distances from float64: of o (relative norm, the worst head), of lse (the largest)."""

    o: float
    lse: float
    limits: tuple[float, float]

    @property
    def ok(self) -> bool:
        return self.o <= self.limits[0] and self.lse <= self.limits[1]

    def __str__(self) -> str:
        o, lse = self.limits
        return f"error {self.o:.1e} of o (limit {o:.0e}), {self.lse:.1e} of lse (limit {lse:.0e})"


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor made inside without values is NaN, or the largest integer, until something writes to it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def errors(case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given, o: Tensor, lse: Tensor | None) -> Errors:
    """Of edge rows and random ones in the first and the last head; infinite where a value anywhere is not finite."""
    limits = LIMITS[case.dtype]
    if not all(bool(torch.isfinite(x).all()) for x in (o, lse) if x is not None):
        return Errors(math.inf, math.inf, limits)
    g = torch.Generator().manual_seed(2)
    pairs: list[tuple[float, float]] = []
    for b, h in ((0, 0), (case.b - 1, case.hq - 1)):
        edges = torch.tensor([0, 1, 63, 64, case.sq - 1]).clamp(max=case.sq - 1)
        rows = torch.cat([edges, torch.randint(0, case.sq, (ROWS - len(edges),), generator=g)]).to(o.device)
        want_o, want_lse = exact_rows(case, qkv, given, b, h, rows)
        off = (o[b, h, rows].double() - want_o).norm() / want_o.norm()
        off_lse = 0.0 if lse is None else float((lse[b, h, rows].double() - want_lse).abs().max())
        pairs.append((float(off), off_lse))
    return Errors(max(e for e, _ in pairs), max(e for _, e in pairs), limits)


def exact_rows(
    case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given, b: int, h: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """o [rows, Dv] and lse [rows] of one head in float64."""
    q, k, v = qkv
    score, mask = mods(case, given)
    kv_head = h // (case.hq // case.hk)
    s = q[b, h, rows].double() @ k[b, kv_head].double().T * SCALE
    i, j = rows[:, None] + (case.s - case.sq), torch.arange(case.s, device=q.device)[None]
    s = s if score is None else score(s, b, h, i, j).double()
    s = s if mask is None else s.masked_fill(~mask(b, h, i, j), -math.inf)
    lse = s.logsumexp(-1)
    total = lse if case.variant != "sink" else torch.logaddexp(lse, given["sinks"][h].double())
    return torch.exp(s - total[:, None]) @ v[b, kv_head].double(), lse
