"""Quantised systems, each example against a definition of its own, at its own heads and dims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attncc import reference, spec
from attncc.ir.attention import Attention, Storage

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Attention:
    return spec.load(EXAMPLES / f"{name}.yaml").attention


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def operands(attn: Attention, Sq: int, Sk: int, bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence; a channel of the keys stands off by `bias`."""
    k = normal(1, attn.heads.kv, Sk, 128, seed=1)
    k[..., 5] += bias
    return normal(1, attn.heads.q, Sq, 128), k, normal(1, attn.heads.kv, Sk, 128, seed=2)


def close(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def causal(s: Tensor) -> Tensor:
    rows, keys = s.shape[-2:]
    return s.masked_fill(torch.arange(keys) > torch.arange(rows)[:, None] + keys - rows, -math.inf)


def repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = causal(q @ repeated(k, q.shape[1]).mT / math.sqrt(128))
    return s.softmax(-1) @ repeated(v, q.shape[1])


def int8(x: Tensor, groups: Iterable[Tensor]) -> Tensor:
    """Whole numbers and a scale for the tokens of each group and head, multiplied again: x [B, H, S, D]."""
    out = torch.full_like(x, math.nan)
    for tokens in groups:
        for h in range(x.shape[1]):
            scale = x[:, h, tokens].abs().max() / 127
            out[:, h, tokens] = (x[:, h, tokens] / scale).round().clamp(-127, 127) * scale
    return out


def fp8(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """E4m3 with a scale that takes the greatest magnitude over some axes to 448."""
    scale = x.abs().amax(over, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def blocks(tokens: int, n: int) -> list[Tensor]:
    return list(torch.arange(tokens).split(n))


def threads(tokens: int, warp: int, group_of: Callable[[int], int]) -> list[Tensor]:
    """Tokens of a warp that one thread holds the scale of."""
    found: dict[tuple[int, int], list[int]] = {}
    for t in range(tokens):
        found.setdefault((t // warp, group_of(t % warp)), []).append(t)
    return [torch.tensor(some) for some in found.values()]


# -- SageAttention -------------------------------------------------------------------------------


def sage(q: Tensor, k: Tensor, v: Tensor, per: str, low_values: bool) -> tuple[Tensor, Tensor]:
    """The kernel's own order: scores of smoothed keys, and the lse put right at the end."""
    tokens, keys, heads = q.shape[2], k.shape[2], q.shape[1]
    mean = k.mean(2, keepdim=True)
    q_groups = blocks(tokens, 128) if per == "block" else threads(tokens, 32, lambda r: r % 8)
    k_groups = blocks(keys, 64) if per == "block" else threads(keys, 64, lambda j: j % 8 // 2)
    stored_q, stored_k = int8(q, q_groups), int8(k - mean, k_groups)
    s = causal(stored_q @ repeated(stored_k, heads).mT / math.sqrt(128))
    top = s.amax(-1, keepdim=True)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    if low_values:
        p, v = (p * 448).to(torch.float8_e4m3fn).to(p.dtype) / 448, fp8(v, (2,))
    o = p @ repeated(v, heads) / total
    lse = (top + total.log())[..., 0] + (q @ repeated(mean, heads).mT)[..., 0] / math.sqrt(128)
    return o, lse


@pytest.mark.parametrize(
    ("name", "per", "low_values"),
    [("sageattention", "block", False), ("sageattention_fp8", "block", True), ("sageattention2", "thread", True)],
)
@pytest.mark.parametrize(("tokens", "keys"), [(150, 150), (20, 70)])
def test_sageattention(name: str, per: str, low_values: bool, tokens: int, keys: int) -> None:
    attn = example(name)
    q, k, v = operands(attn, tokens, keys, bias=30.0)
    o, lse = sage(q, k, v, per, low_values)
    got = reference.outputs(attn, q, k, v)
    close(got.lse, lse)
    close(got.o, o)


@pytest.mark.parametrize("name", ["sageattention", "sageattention_fp8", "sageattention2"])
def test_sageattention_is_near_attention_whatever_the_bias_of_a_channel(name: str) -> None:
    attn = example(name)
    q, k, v = operands(attn, 150, 150, bias=100.0)
    got, exact = reference.outputs(attn, q, k, v).o, dense(q, k, v)
    assert float(torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0)) > 0.999
    unsmoothed = spec.loads((EXAMPLES / f"{name}.yaml").read_text().replace(", smooth=mean", "")).attention
    rough = reference.outputs(unsmoothed, q, k, v).o
    assert float((got - exact).abs().max()) < 0.2 * float((rough - exact).abs().max())


def test_fp8_attention() -> None:
    """A Hadamard transform of queries and keys, and one scale a head."""
    attn = example("fp8_attention")
    q, k, v = operands(attn, 40, 70, bias=30.0)
    walsh = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(7):
        walsh = torch.cat([torch.cat([walsh, walsh], 1), torch.cat([walsh, -walsh], 1)])
    walsh = walsh / math.sqrt(128)
    s = causal(fp8(q @ walsh, (2, 3)) @ repeated(fp8(k @ walsh, (2, 3)), 32).mT / math.sqrt(128))
    p = (s - s.amax(-1, keepdim=True)).exp()
    stored = (p * 448).to(torch.float8_e4m3fn).to(p.dtype) / 448
    got = reference.outputs(attn, q, k, v)
    close(got.o, stored @ repeated(fp8(v, (2, 3)), 32) / p.sum(-1, keepdim=True))
    close(got.lse, s.logsumexp(-1))


# -- caches --------------------------------------------------------------------------------------


def with_zero_point(x: Tensor, bits: int) -> Tensor:
    """Along the last axis: 2^b levels from the least entry to the greatest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


@pytest.mark.parametrize(("name", "bits"), [("kv_int8", 8), ("kv_int4", 4)])
def test_paged_caches(name: str, bits: int) -> None:
    """A scale and a zero point a token and head, whatever page the token lies in."""
    attn = example(name)
    q, k, v = operands(attn, 1, 150)
    table = torch.tensor([[4, 1, 3]])
    pages = [torch.full((5, 64, 8, 128), math.nan, dtype=torch.float64) for _ in range(2)]
    for pool, x in zip(pages, (k, v), strict=True):
        for t in range(150):
            pool[table[0, t // 64], t % 64] = x[0, :, t]
    used = torch.tensor([150])
    got = reference.outputs(attn, q, *pages, block_table=table, seqused_k=used).o
    close(got, dense(q, with_zero_point(k, bits), with_zero_point(v, bits)))
    close(with_zero_point(with_zero_point(k, bits), bits), with_zero_point(k, bits))


def test_fp8_cache_of_latents() -> None:
    """FlashMLA's 656 bytes a token: 512 e4m3 numbers, a scale for each 128 of them, 64 rope columns as they are."""
    attn = example("mla_fp8_cache")
    q, cache = normal(1, 128, 2, 192), normal(1, 1, 9, 576, seed=1)
    up, down = normal(128, 128, 512, seed=2) / 20, normal(128, 512, 128, seed=3) / 20
    latent = fp8(cache[0, 0, :, :512].unflatten(-1, (4, 128)), (2,)).flatten(-2)
    keys = torch.cat([torch.einsum("hnr,sr->hsn", up, latent), cache[0, :, :, 512:].expand(128, -1, -1)], -1)
    s = causal(q[0] @ keys.mT / math.sqrt(192))
    o = s.softmax(-1) @ torch.einsum("hrd,sr->hsd", down, latent)
    got = reference.outputs(attn, q, cache, inputs={"w_uk": up, "w_uv": down})
    close(got.o[0], o)
    close(got.lse, s.logsumexp(-1)[None])


def without_pages(attn: Attention) -> Attention:
    return replace(attn, parts=tuple(replace(part, kv=Storage("dense")) for part in attn.parts))


def test_staircase() -> None:
    """Token by token as a decode would fill it: a residual of 128 tokens, then every segment one step down."""
    attn = without_pages(example("saq_staircase"))
    q, k, v = operands(attn, 1, 5 * 128 + 17)
    k, v = k.bfloat16().double(), v.bfloat16().double()
    bits = [8, 4, 2]

    def lower(x: Tensor, b: int, keys: bool) -> Tensor:
        """A segment [H, 128, D]: groups of 32 tokens of a channel, or of 32 channels of a token."""
        x = x.mT if keys else x
        x = with_zero_point(x.unflatten(-1, (-1, 32)), b).flatten(-2)
        return x.mT if keys else x

    stored: list[Tensor] = []
    for x, keys in ((k[0], True), (v[0], False)):
        segments: list[Tensor] = []
        residual: list[Tensor] = []
        for t in range(x.shape[1]):
            residual.append(x[:, t])
            if len(residual) == 128:
                segments = [lower(old, bits[min(len(segments) - n, 2)], keys) if len(segments) - n <= 2 else old
                            for n, old in enumerate(segments)]  # fmt: skip
                segments.append(lower(torch.stack(residual, 1), bits[0], keys))
                residual = []
        stored.append(torch.cat([*segments, torch.stack(residual, 1)], 1)[None])
    close(reference.outputs(attn, q, k, v).o, dense(q, stored[0], stored[1]))
    levels = [len(stored[1][0, 0, 128 * n, :32].unique()) for n in range(6)]
    assert max(levels[:3]) <= 4 < levels[3] <= 16 < levels[4]  # oldest first: int2 int2 int2 int4 int8, then bf16
