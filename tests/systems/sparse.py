"""What tests of systems that select share: examples at small sizes, and dense attention under a map."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from smaller import normal
from torch import Tensor

from attncc import spec
from attncc.ir.attention import Attention
from attncc.reference.forward import Outputs

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (("heads: {q: 32, kv: 8}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16"))


def system(name: str, *changes: tuple[str, str]) -> Attention:
    """An example with some of its text replaced, such as its sizes."""
    text = (EXAMPLES / f"{name}.yaml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return spec.loads(text).attention


def operands(attn: Attention, Sq: int, Sk: int, B: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    heads, dims = attn.heads, attn.dims
    q, k = normal(B, heads.q, Sq, dims.qk, seed=seed), normal(B, heads.kv, Sk, dims.qk, seed=seed + 1)
    return q, k, normal(B, heads.kv, Sk, dims.v, seed=seed + 2)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Masked softmax attention of [B, H, S, D]; o and lse."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s.masked_fill(~mask, -math.inf)
    lse = s.logsumexp(-1)
    return torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None]) @ v, lse


def causal(Sq: int, Sk: int) -> Tensor:
    return torch.arange(Sk)[None] <= torch.arange(Sq)[:, None] + Sk - Sq


def spread(blocks: Tensor, bq: int, bk: int, Sq: int, Sk: int) -> Tensor:
    """A map of blocks as one of pairs."""
    return blocks.repeat_interleave(bq, -2)[..., :Sq, :].repeat_interleave(bk, -1)[..., :Sk]


def agree(got: Outputs, expected: tuple[Tensor, Tensor]) -> None:
    assert got.lse is not None
    torch.testing.assert_close(got.o, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.lse, expected[1], rtol=1e-9, atol=1e-9)


def taken(got: Outputs, part: int = 0) -> Tensor:
    """The blocks that a part attends to [B, H, nq, nk]."""
    found = [sequence[part] for sequence in got.selections]
    return torch.stack([s.classes == 1 for s in found if s is not None])


def int8(x: Tensor, size: int) -> Tensor:
    """x [B, H, N, D] through integers of -127 to 127, one scale for each run of so many tokens."""
    steps = [y.abs().amax((2, 3), keepdim=True) / 127 for y in x.split(size, 2)]
    return torch.cat([(y / s).round() * s for y, s in zip(x.split(size, 2), steps, strict=True)], 2)


def sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """SageAttention's values: int8 queries, int8 keys less their mean; the lse is that of the keys themselves."""
    mean = k.mean(2, keepdim=True)
    o, lse = dense(int8(q, 128), int8(k - mean, 64), v, mask)
    return o, lse + (q @ mean.transpose(2, 3))[..., 0] * q.shape[-1] ** -0.5
