"""Tensors of a case, and its score and mask as FlexAttention's callables, which mean the same as the spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.cases import Case

Mod = Callable[..., Any] | None
Given = Mapping[str, Tensor]
DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def operands(case: Case, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Random normal q, k, v."""
    g = torch.Generator(device).manual_seed(0)

    def make(heads: int, rows: int, dim: int) -> Tensor:
        return torch.randn(case.b, heads, rows, dim, device=device, dtype=DTYPES[case.dtype], generator=g)

    return make(case.hq, case.sq, case.dqk), make(case.hk, case.s, case.dqk), make(case.hk, case.s, case.dv)


def inputs(case: Case, device: str = "cuda") -> dict[str, Tensor]:
    """The variant's extra tensors."""
    g = torch.Generator(device).manual_seed(1)
    match case.variant:
        case "alibi":
            heads = torch.arange(1, case.hq + 1, device=device)
            return {"slopes": torch.exp2(-8.0 * heads / case.hq).float()}
        case "sink":
            return {"sinks": torch.randn(case.hq, device=device, generator=g)}
        case "relative_bias":
            return {"bias": torch.randn(case.hq, 2 * case.s, device=device, generator=g).bfloat16()}
        case "bias":
            return {"bias": torch.randn(case.hq, case.sq, case.s, device=device, generator=g)}
        case "mask_tensor":
            keep = torch.rand(case.sq, case.s, device=device, generator=g) < 0.5
            keep[:, 0] = True
            return {"keep": keep}
        case "documents":
            cuts = torch.randperm(case.s - 1, generator=torch.Generator().manual_seed(3))[:11] + 1
            return {"starts": torch.cat([torch.zeros(1), cuts.sort().values]).int().to(device)}
        case "blocks":
            n = case.s // case.pattern.block
            blocks = torch.rand(n, n, device=device, generator=g) < case.pattern.density
            blocks[:, 0] = True
            return {"blocks": blocks}
        case _:
            return {}


def mods(case: Case, given: Given) -> tuple[Mod, Mod]:
    """FlexAttention's score_mod and mask_mod."""
    return score_mod(case, given), mask_mod(case, given)


def score_mod(case: Case, given: Given) -> Mod:
    match case.variant:
        case "softcap":
            return lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0)
        case "alibi":
            slopes = given["slopes"]
            return lambda s, b, h, i, j: s + slopes[h] * (j - i)
        case "relative_bias":
            bias, middle = given["bias"], case.s
            return lambda s, b, h, i, j: s + bias[h, i - j + middle]
        case "bias":
            bias = given["bias"]
            return lambda s, b, h, i, j: s + bias[h, i, j]
        case _:
            return None


def mask_mod(case: Case, given: Given) -> Mod:
    match case.variant:
        case "none" | "bias":
            return None
        case "mask_tensor":
            keep = given["keep"]
            return lambda b, h, i, j: keep[i, j]
        case "window":
            width = case.pattern.window
            return lambda b, h, i, j: (i >= j) & (i - j < width)
        case "documents":
            starts = given["starts"]
            at = torch.arange(case.s, device=starts.device)
            ids = torch.searchsorted(starts.long(), at, right=True).int()
            return lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])
        case "blocks":
            blocks, size = given["blocks"], case.pattern.block
            return lambda b, h, i, j: blocks[i // size, j // size]
        case _:
            return lambda b, h, i, j: i >= j


def visible_pairs(case: Case, given: Given) -> int:
    """(query, key) pairs that count in a head; a causal triangle as half of its square, as everyone counts it."""
    s = case.s
    match case.variant:
        case "none" | "bias":
            return case.sq * s
        case "mask_tensor":
            return int(given["keep"].sum())
        case "window":
            width = min(case.pattern.window, s)
            return width * s - width * (width - 1) // 2
        case "documents":
            ends = torch.cat([given["starts"][1:].cpu(), torch.tensor([s])])
            lengths = (ends - given["starts"].cpu()).double()
            return int((lengths * lengths / 2).sum())
        case "blocks":
            return int(given["blocks"].sum()) * case.pattern.block**2
        case _:
            return s * s // 2
