"""NSA, DeepSeek's sparse attention and PrFlashAttention against their definitions; all examples as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from smaller import normal
from sparse import SMALL, agree, causal, dense, operands, sage, spread, system, taken
from torch import Tensor

from attncc import reference
from attncc.reference.philox import philox

# -- NSA --------------------------------------------------------------------------------------------

NSA = (
    ("heads: {q: 64, kv: 4}", "heads: {q: 4, kv: 2}"),
    ("dims: {qk: 192, v: 128}", "dims: {qk: 12, v: 10}"),
    ("pooled(64)", "pooled(8)"),
    ("// 64", "// 8"),
    ("k: 64", "k: 8"),
    ("topk(16)", "topk(3)"),
    ("window(512)", "window(20)"),
)


def nsa_blocks(q: Tensor, k: Tensor, size: int, count: int) -> Tensor:
    """One group's blocks [T, C]: q [G, T, D], k [T, D]."""
    T, scale = q.shape[1], q.shape[2] ** -0.5
    means = torch.stack([x.mean(0) for x in k.split(size)])
    C = len(means)
    keep = torch.zeros(T, C, dtype=torch.bool)
    for t in range(T):
        whole = [c for c in range(C) if min(T, c * size + size) - 1 <= t]
        p = (q[:, t] @ means[whole].T * scale).softmax(1).sum(0) if whole else torch.zeros(0)
        worth = {c: float(x) for c, x in zip(whole, p, strict=True)}
        worth[t // size] = math.inf
        keep[t, sorted(worth, key=lambda c: (-worth[c], c))[:count]] = True
    return keep


def nsa(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], keep: Tensor, size: int, window: int) -> Tensor:
    """The three branches behind their gates; keep [B, H, T, C]."""
    T = q.shape[2]
    t = torch.arange(T)
    pooled = lambda x: torch.stack([y.mean(2) for y in x.split(size, 2)], 2)
    past = (t[:, None] + 1) // size > torch.arange(math.ceil(T / size))
    compressed, _ = dense(q, pooled(k), pooled(v), past)
    chosen, _ = dense(q, k, v, spread(keep, 1, size, T, T) & causal(T, T))
    near, _ = dense(q, k, v, causal(T, T) & (t > t[:, None] - window))
    return sum(g[..., None] * o for g, o in zip(gates, (compressed, chosen, near), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("T", [64, 77])
def test_nsa_and_its_gradients(T: int) -> None:
    attn = system("nsa", *NSA)
    q, k, v = operands(attn, T, T, B=2)
    gates = [normal(2, 4, T, seed=n).sigmoid() for n in range(3)]
    leaves = [x.requires_grad_() for x in (q, k, v, *gates)]
    got = reference.outputs(attn, q, k, v, inputs=dict(zip(("g_cmp", "g_slc", "g_swa"), gates, strict=True)))
    with torch.no_grad():
        keep = [[nsa_blocks(q[b, 2 * g : 2 * g + 2], k[b, g], 8, 3) for g in range(2)] for b in range(2)]
        maps = torch.stack([torch.stack(x).repeat_interleave(2, 0) for x in keep])
    assert torch.equal(taken(got, 1), maps)
    expected = nsa(q, k, v, gates, maps, 8, 20)
    torch.testing.assert_close(got.o, expected, rtol=1e-9, atol=1e-9)
    assert got.lse is None  # a sum of outputs has none
    weight = normal(*expected.shape, seed=9)
    mine, theirs = (torch.autograd.grad((x * weight).sum(), leaves) for x in (expected, got.o))
    for a, b in zip(theirs, mine, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nsa_with_blocks_enough_is_dense_in_its_second_branch() -> None:
    attn = system("nsa", *NSA, ("topk(3)", "topk(16)"))
    q, k, v = operands(attn, 120, 120)
    one, none = torch.ones(1, 4, 120), torch.zeros(1, 4, 120)
    got = reference.outputs(attn, q, k, v, inputs={"g_cmp": none, "g_slc": one, "g_swa": none})
    torch.testing.assert_close(got.o, dense(q, k, v, causal(120, 120))[0], rtol=1e-9, atol=1e-9)


# -- DeepSeek's sparse attention --------------------------------------------------------------------

DSA = (
    ("heads: {q: 128, kv: 1}", "heads: {q: 4, kv: 1}"),
    ("dims: {qk: 576, v: 512}", "dims: {qk: 20, v: 16}"),
    ("[B, 64, Sq, 128]", "[B, 3, Sq, 8]"),
    ("[B, Sk, 128]", "[B, Sk, 8]"),
    ("[B, Sq, 64]", "[B, Sq, 3]"),
    ("rsqrt(192)", "rsqrt(6)"),
    ("rope=64", "rope=4"),
)


@pytest.mark.parametrize(("Sq", "Sk"), [(33, 33), (5, 40), (1, 29)])
def test_deepseek_sparse_attention(Sq: int, Sk: int) -> None:
    attn = system("deepseek_sparse_attention", *DSA, ("topk(2048)", "topk(7)"))
    q, latents, _ = operands(attn, Sq, Sk, B=2)
    qi, ki, w = normal(2, 3, Sq, 8), normal(2, Sk, 8), normal(2, Sq, 3)
    got = reference.outputs(attn, q, latents, inputs={"qi": qi, "ki": ki, "w": w})
    keep = torch.zeros(2, 1, Sq, Sk, dtype=torch.bool)
    for b in range(2):
        for t in range(Sq):
            index = [
                sum(float(w[b, t, h]) * max(0.0, float(qi[b, h, t] @ ki[b, s])) for h in range(3))
                for s in range(t + Sk - Sq + 1)
            ]
            keep[b, 0, t, sorted(range(len(index)), key=lambda s: (-index[s], s))[:7]] = True
    assert torch.equal(taken(got), keep.expand(-1, 4, -1, -1))
    agree(got, dense(q, latents, latents[..., :16], keep, scale=6**-0.5))


def test_deepseek_sparse_attention_is_dense_below_its_budget() -> None:
    attn = system("deepseek_sparse_attention", *DSA)
    q, latents, _ = operands(attn, 30, 45)
    inputs = {"qi": normal(1, 3, 30, 8), "ki": normal(1, 45, 8), "w": normal(1, 30, 3)}
    got = reference.outputs(attn, q, latents, inputs=inputs)
    agree(got, dense(q, latents, latents[..., :16], causal(30, 45), scale=6**-0.5))


# -- PrFlashAttention -------------------------------------------------------------------------------


def drawn(seed: int, B: int, H: int, n: int) -> Tensor:
    """The number of each pair of blocks [B, H, n, n]: the top 24 bits of its counter's word."""
    b, h, a, c = torch.meshgrid(*(torch.arange(x) for x in (B, H, n, n)), indexing="ij")
    words = torch.stack(philox((c // 4, a, h, b), seed), -1)
    return (words.gather(-1, c[..., None] % 4)[..., 0] >> 8).double() / 2**24


@pytest.mark.parametrize("seed", [0, 11])
def test_prflash_attention(seed: int) -> None:
    attn = system("prflash_attention", *SMALL)
    N = 128 * 3 + 50
    q, k, v = operands(attn, N, N, B=2)
    got = reference.outputs(attn, q, k, v, seed=seed)
    number, maps = drawn(seed, 2, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    for a in range(4):
        maps[:, :, a, a] = True
        for c in range(a):
            maps[:, :, a, c] = number[:, :, a, c] < 1 / (1 + a - c)
    assert torch.equal(taken(got), maps)
    agree(got, dense(q, k, v, spread(maps, 128, 128, N, N) & causal(N, N)))
    again = reference.outputs(attn, q, k, v, seed=seed)
    assert torch.equal(got.o, again.o)


def test_prflash_attention_keeps_blocks_as_often_as_it_says() -> None:
    attn = system("prflash_attention", *SMALL, ("{q: 128, k: 128}", "{q: 4, k: 4}"))
    q, k, v = operands(attn, 240, 240)
    maps = taken(reference.outputs(attn, q, k, v, seed=3))[0].double()
    for distance in (1, 2, 5, 20):
        kept = maps.diagonal(-distance, 1, 2)
        p = 1 / (1 + distance)
        assert abs(float(kept.mean()) - p) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    sure = system("prflash_attention", *SMALL, ("1 / (1 + i - j)", "1"))
    agree(reference.outputs(sure, q, k, v), dense(q, k, v, causal(240, 240)))


# -- all --------------------------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "sale": {"heads": 32, "sizes": (70, 70)},
    "spargeattn": {"heads": 32, "sizes": (140, 140)},
    "minference_vertical_slash": {"heads": 32, "sizes": (70, 70)},
    "minference_a_shape": {"heads": 32, "sizes": (20, 20)},
    "minference_block_sparse": {"heads": 32, "sizes": (70, 70)},
    "nsa": {"heads": 64, "sizes": (70, 70)},
    "deepseek_sparse_attention": {"heads": 128, "sizes": (3, 9)},
    "prflash_attention": {"heads": 32, "sizes": (40, 40)},
}


@pytest.mark.parametrize("name", ALL)
def test_examples_evaluate_as_they_are(name: str) -> None:
    """At lengths that select everything all of them are dense, NSA but for its compressed branch."""
    attn = system(name)
    Sq, Sk = ALL[name]["sizes"]
    q, k, v = operands(attn, Sq, Sk)
    sizes = {"B": 1, "Hq": attn.heads.q, "Sq": Sq, "Sk": Sk}
    inputs = {
        x.name: torch.zeros([sizes.get(n, n) for n in x.shape], dtype=torch.float64)  # type: ignore[misc]
        for x in attn.inputs
    }
    if name == "nsa":
        inputs["g_swa"] += 1
    latent = name == "deepseek_sparse_attention"
    got = reference.outputs(attn, q, k, None if latent else v, inputs=inputs)
    if latent:
        expected = dense(q, k, k[..., :512], causal(Sq, Sk), 192**-0.5)
    else:
        expected = (sage if name == "spargeattn" else dense)(q, k, v, causal(Sq, Sk))
    assert attn.heads.q == ALL[name]["heads"]
    torch.testing.assert_close(got.o, expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sale", "minference_vertical_slash", "nsa", "prflash_attention"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (1, 1), (9, 3), (3, 150)], ids=str)
def test_lengths_at_the_edge(name: str, size: tuple[int, int]) -> None:
    """No queries, no keys, queries before the first key, few queries behind many keys."""
    attn = system(name, *(NSA if name == "nsa" else SMALL))
    q, k, v = operands(attn, *size)
    inputs = {x.name: normal(*({"B": 1, "Hq": 4, "Sq": size[0]}[str(n)] for n in x.shape)).abs() for x in attn.inputs}
    got = reference.outputs(attn, q, k, v, inputs=inputs)
    assert bool(got.o.isfinite().all())
    hidden = ~causal(*size).any(1)
    assert bool((got.o[:, :, hidden] == 0).all())


@pytest.mark.parametrize("name", ["nsa", "sale", "minference_block_sparse"])
def test_narrow_operands_are_scored_and_pooled_in_float64(name: str) -> None:
    attn = system(name, *(NSA if name == "nsa" else SMALL))
    q, k, v = (x.bfloat16() for x in operands(attn, 150, 150))
    inputs = {
        x.name: normal(*({"B": 1, "Hq": 4, "Sq": 150}[str(n)] for n in x.shape)).sigmoid() / 4 for x in attn.inputs
    }
    narrow = reference.outputs(attn, q, k, v, inputs=inputs)
    wide = reference.outputs(attn, q.double(), k.double(), v.double(), inputs=inputs)
    assert torch.equal(narrow.o, wide.o)
