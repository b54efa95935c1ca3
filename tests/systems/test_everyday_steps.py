"""Everyday models with rotary positions, norms of queries and keys, packed layouts, images, and two softmaxes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agree import agree
from smaller import close, example, normal
from torch import Tensor
from torch.nn.functional import rms_norm
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attncc import reference

SMALL = (("heads: {q: 32, kv: 8}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 8"))


def turned(x: Tensor, first: int, base: float) -> Tensor:
    """Rotary positions: columns c and c + D/2 as one complex number, turned by position * base^(-2c/D)."""
    half = x.shape[-1] // 2
    speed = torch.tensor([base ** (-c / half) for c in range(half)], dtype=x.dtype)
    angle = (first + torch.arange(x.shape[2])).double()[:, None] * speed
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal from the lower right corner, two query heads to a key head."""
    seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return sdpa(q, k, v, attn_mask=seen)


def operands(sq: int, sk: int, d: int = 8) -> dict[str, Tensor]:
    return {"q": normal(2, 4, sq, d), "k": normal(2, 2, sk, d, seed=1), "v": normal(2, 2, sk, d, seed=2)}


LENGTHS = [(7, 7), (1, 9), (3, 9)]


@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_llama(sq: int, sk: int) -> None:
    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(turned(q, sk - sq, 500000), turned(k, 0, 500000), v)

    agree(example("llama", *SMALL), define, operands(sq, sk))


@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_qwen3(sq: int, sk: int) -> None:
    """The norm comes before the rotation, with one weight for all heads."""

    def define(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        q, k = rms_norm(q, (8,), q_weight, 1e-6), rms_norm(k, (8,), k_weight, 1e-6)
        return causal(turned(q, sk - sq, 1e6), turned(k, 0, 1e6), v)

    agree(example("qwen3", *SMALL), define, operands(sq, sk) | {"q_weight": normal(8), "k_weight": normal(8, seed=1)})


def test_decoding_a_token_at_a_time_is_the_prefill() -> None:
    attn, x = example("llama", *SMALL), operands(6, 6)
    whole = reference.attention(attn, *x.values())
    for n in range(6):
        q, k, v = x["q"][:, :, n : n + 1], x["k"][:, :, : n + 1], x["v"][:, :, : n + 1]
        close(reference.attention(attn, q, k, v), whole[:, :, n : n + 1])


@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_differential_attention(sq: int, sk: int) -> None:
    """Two softmaxes of halves of the columns, each scaled by its own half; lambda of the second is taken off."""
    attn = example(
        "differential_attention",
        *(("heads: 16", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 8")),
        *(("columns: [0, 64]", "columns: [0, 4]"), ("columns: [64, 128]", "columns: [4, 8]")),
    )

    def define(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        seen = torch.arange(sk) <= torch.arange(sq)[:, None] + sk - sq
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        first, second = (
            torch.softmax(torch.where(seen, a @ b.mT / math.sqrt(4), -math.inf), -1)
            for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        )
        return (first - lam[:, None, None] * second) @ v

    agree(attn, define, operands(sq, sk) | {"lam": normal(4)})


def test_differential_attention_cancels_what_both_halves_see() -> None:
    """Equal halves and a lambda of 1 leave nothing."""
    half = normal(1, 16, 5, 64)
    both = torch.cat([half, half], -1)
    v = normal(1, 16, 5, 128)
    o = reference.attention(example("differential_attention"), both, both, v, inputs={"lam": torch.ones(16).double()})
    close(o, torch.zeros_like(o))


def test_varlen_causal() -> None:
    """Sequences of 5, 0, 1 and 4 queries and as many or more keys, packed."""
    attn = example("varlen_causal", *SMALL)
    queries, keys = (5, 0, 1, 4), (5, 3, 7, 4)
    cuts: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor([0, 5, 5, 6, 10], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 8, 15, 19], dtype=torch.int32),
    }

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        found = [causal(*(x.transpose(0, 1)[None] for x in piece)) for piece in pieces]
        return torch.cat([o[0].transpose(0, 1) for o in found])

    shapes = {"q": (10, 4, 8), "k": (19, 2, 8), "v": (19, 2, 8)}
    agree(attn, define, {n: normal(*shape) for n, shape in shapes.items()}, **cuts)


def test_natten_2d() -> None:
    """Of an image of 8 x 8, the 5 x 5 nearest to each pixel; at the border the window stays inside."""
    attn = example(
        "natten_2d",
        *(("heads: 8", "heads: 2"), ("dims: 64", "dims: 8"), ("((64, 64), 13)", "((8, 8), 5)")),
        ("{Sq: 4096, Sk: 4096}", "{Sq: 64, Sk: 64}"),
    )

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (8, 8)) for x in (q, k, v))
        o = torch.zeros_like(q)
        for y in range(8):
            for x in range(8):
                top, left = min(max(y - 2, 0), 3), min(max(x - 2, 0), 3)
                near = slice(top, top + 5), slice(left, left + 5)
                keys, values = k[:, :, *near].flatten(2, 3), v[:, :, *near].flatten(2, 3)
                o[:, :, y, x] = sdpa(q[:, :, y, x, None], keys, values)[:, :, 0]
        return o.flatten(2, 3)

    agree(attn, define, {n: normal(2, 2, 64, 8, seed=s) for s, n in enumerate("qkv")})
