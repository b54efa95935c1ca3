"""The prefill table: what is measured, as attncc specs and as FlexAttention callables that mean the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

SCALE: Final = 0.088

SPECS: Final[dict[str, str]] = {
    "none": "",
    "causal": "mask: causal",
    "softcap": "score: softcap(qk * scale, 30)\nmask: causal",
    "alibi": "inputs: {slopes: {shape: [Hq]}}\nscore: qk * scale + slopes[h] * (j - i)\nmask: causal",
    "relative_bias": "inputs: {bias: {shape: [Hq, N], dtype: bf16}}\n"
    "score: qk * scale + bias[h, i - j + N // 2]\nmask: causal",
    "window": "mask: causal & window(1024)",
    "documents": "inputs: {starts: {shape: [N], dtype: int32, sorted: true}}\nmask: causal & segments(starts)",
    "blocks": "inputs: {blocks: {shape: [M, N], dtype: bool}}\nmask: blocks[i // 128, j // 128]",
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    variant: str
    b: int
    hq: int
    hk: int
    s: int
    dqk: int
    dv: int

    @property
    def name(self) -> str:
        """Such as fwd/B4Hq16Hk16S8192D128c; other variants than none and causal are spelt out."""
        dims = f"D{self.dqk}" if self.dqk == self.dv else f"D{self.dqk}-{self.dv}"
        kind = {"none": "", "causal": "c"}.get(self.variant, f"/{self.variant}")
        return f"fwd/B{self.b}Hq{self.hq}Hk{self.hk}S{self.s}{dims}{kind}"

    @property
    def package(self) -> str:
        return f"{self.variant}_{self.hq}_{self.hk}_{self.dqk}_{self.dv}"

    @property
    def spec(self) -> str:
        head = f"attncc: 1\nname: {self.package}\nheads: {{q: {self.hq}, kv: {self.hk}}}\n"
        return f"{head}dims: {{qk: {self.dqk}, v: {self.dv}}}\nscale: {SCALE}\n{SPECS[self.variant]}\n"

    def flops(self, pairs: int) -> float:
        """Of the unmasked work: two products over the visible pairs of a head."""
        return 2.0 * self.b * self.hq * pairs * (self.dqk + self.dv)


def _rows() -> tuple[Case, ...]:
    both = ("none", "causal")
    dense = ((4, 16, 16, 8192, 128), (4, 32, 32, 8192, 64), (2, 32, 8, 16384, 128), (16, 16, 16, 1024, 128))
    out = [Case(v, *shape, shape[-1]) for shape in (*dense, (2, 16, 16, 8192, 256)) for v in both]
    out += [Case(v, 4, 16, 16, 16384, 128, 128) for v in ("softcap", "alibi", "relative_bias", "window", "documents")]
    out.append(Case("blocks", 1, 16, 16, 65536, 128, 128))
    odd = ((72, 72), (80, 80), (96, 96), (160, 160), (192, 192), (192, 128))
    return (*out, *(Case(v, 4, 16, 16, 8192, *d) for d in odd for v in both))


CASES: Final = _rows()


def operands(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random normal q, k, v in bf16."""
    g = torch.Generator(device="cuda").manual_seed(0)

    def make(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(case.b, heads, case.s, dim, device="cuda", dtype=torch.bfloat16, generator=g)

    return make(case.hq, case.dqk), make(case.hk, case.dqk), make(case.hk, case.dv)


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """The variant's extra tensors."""
    g = torch.Generator(device="cuda").manual_seed(1)
    match case.variant:
        case "alibi":
            heads = torch.arange(1, case.hq + 1, device="cuda")
            return {"slopes": torch.exp2(-8.0 * heads / case.hq).float()}
        case "relative_bias":
            return {"bias": torch.randn(case.hq, 2 * case.s, device="cuda", generator=g).bfloat16()}
        case "documents":
            cuts = torch.randperm(case.s - 1, generator=torch.Generator().manual_seed(3))[:11] + 1
            return {"starts": torch.cat([torch.zeros(1), cuts.sort().values]).int().cuda()}
        case "blocks":
            n = case.s // 128
            blocks = torch.rand(n, n, device="cuda", generator=g) < 0.05
            blocks[:, 0] = True
            return {"blocks": blocks}
        case _:
            return {}


Mod = Callable[..., Any] | None


def mods(case: Case, given: dict[str, torch.Tensor]) -> tuple[Mod, Mod]:
    """FlexAttention's score_mod and mask_mod of the variant."""
    score: Mod = None
    mask: Mod = None if case.variant == "none" else lambda b, h, i, j: i >= j
    match case.variant:
        case "softcap":
            score = lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0)
        case "alibi":
            slopes = given["slopes"]
            score = lambda s, b, h, i, j: s + slopes[h] * (j - i)
        case "relative_bias":
            bias, middle = given["bias"], case.s
            score = lambda s, b, h, i, j: s + bias[h, i - j + middle]
        case "window":
            mask = lambda b, h, i, j: (i >= j) & (i - j < 1024)
        case "documents":
            at = torch.arange(case.s, device="cuda")
            ids = torch.searchsorted(given["starts"].long(), at, right=True).int()
            mask = lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])
        case "blocks":
            blocks = given["blocks"]
            mask = lambda b, h, i, j: blocks[i // 128, j // 128]
        case _:
            pass
    return score, mask


def visible_pairs(case: Case, given: dict[str, torch.Tensor]) -> int:
    """(query, key) pairs that count; causal as half, as everyone counts it."""
    s = case.s
    match case.variant:
        case "none":
            return s * s
        case "window":
            return 1024 * s - 1024 * 1023 // 2
        case "documents":
            ends = torch.cat([given["starts"][1:].cpu(), torch.tensor([s])])
            lengths = (ends - given["starts"].cpu()).double()
            return int((lengths * lengths / 2).sum())
        case "blocks":
            return int(given["blocks"].sum()) * 128 * 128
        case _:
            return s * s // 2


def agreement(
    case: Case, qkv: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor], o: torch.Tensor, lse: torch.Tensor
) -> tuple[float, float]:
    """Errors against fp64 on 64 rows of the first and the last head: of o (relative norm), of lse (largest)."""
    q, k, v = qkv
    score, mask = mods(case, given)
    worst_o = worst_lse = 0.0
    g = torch.Generator().manual_seed(2)
    for b, h in ((0, 0), (case.b - 1, case.hq - 1)):
        rows = torch.cat(
            [torch.tensor([0, 1, 63, 64, case.s - 1]), torch.randint(0, case.s, (59,), generator=g)]
        ).cuda()
        hk = h // (case.hq // case.hk)
        s = q[b, h, rows].double() @ k[b, hk].double().T * SCALE
        i, j = rows[:, None], torch.arange(case.s, device="cuda")[None]
        s = s if score is None else score(s, b, h, i, j).double()
        s = s if mask is None else s.masked_fill(~mask(b, h, i, j), -math.inf)
        exact = s.softmax(-1) @ v[b, hk].double()
        worst_o = max(worst_o, float((o[b, h, rows].double() - exact).norm() / exact.norm()))
        worst_lse = max(worst_lse, float((lse[b, h, rows].double() - s.logsumexp(-1)).abs().max()))
    finite = bool(torch.isfinite(o).all())
    return (worst_o if finite else math.inf), worst_lse
