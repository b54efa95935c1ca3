"""Systems that score blocks of the scores' own kind, each against its published definition written out in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attncc import reference, spec
from attncc.ir.attention import Attention
from attncc.reference.forward import Outputs
from attncc.reference.philox import philox

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (("heads: {q: 32, kv: 8}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16"))


def system(name: str, *changes: tuple[str, str]) -> Attention:
    """An example with some of its text replaced, such as its sizes."""
    text = (EXAMPLES / f"{name}.yaml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return spec.loads(text).attention


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


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


# -- SALE -------------------------------------------------------------------------------------------


def n_local(blocks: int) -> int:
    """The local blocks of a query block that sees so many key blocks: 128 keys in segments of 4 blocks of 32."""
    remain = (blocks - 1) - math.ceil((blocks - 1) / 4) * 4
    return 4 * math.ceil((4 - remain) / 4) + remain


def int4(x: Tensor, group: Tensor) -> Tensor:
    """x [N, D] through integers of -7 to 7, rows of a group with one scale."""
    scale = torch.stack([x[group == g].abs().max() / 7 for g in group])
    return (x / scale[:, None]).round().clamp(-7, 7) * scale[:, None]


def sale(q: Tensor, k: Tensor, tau: float, printed: bool = False, fixed: bool = False) -> Tensor:
    """One head's map [ceil(N / 64), ceil(N / 32)]; `printed` takes the paper's equation 4, `fixed` 4 local blocks."""
    N, scale = len(q), q.shape[1] ** -0.5
    row, key = torch.arange(N), torch.arange(N)
    smooth, mean = k - k.mean(0), q.mean(0)
    values = int4(q - mean, row // 16 * 8 + row % 8) @ int4(smooth, key // 32 * 4 + key % 8 // 2).T
    estimate, exact = (values + smooth @ mean) * scale, q @ smooth.T * scale
    keep = torch.zeros(math.ceil(N / 64), math.ceil(N / 32), dtype=torch.bool)
    for block in range(len(keep)):
        members = range(block * 64, min(N, block * 64 + 64))
        blocks = math.ceil(min(N, block * 64 + 64) / 32)
        near = {0, *range(max(0, blocks - (4 if fixed else n_local(blocks))), blocks)}
        for n in members:
            anchor = exact[n, [j for j in range(n + 1) if j // 32 in near]]
            m = anchor.max()
            total = torch.exp(anchor - m).sum()
            limit = torch.log(tau * total + m) if printed else torch.log(tau * total) + m
            for c in range(blocks):
                keep[block, c] |= c in near or bool((estimate[n, c * 32 : min(n + 1, c * 32 + 32)] > limit).any())
    return keep


def test_sale() -> None:
    attn = system("sale", *SMALL)
    N = 64 * 8 + 23
    q, k, v = operands(attn, N, N)
    q, k = q * 1.5 - 0.5, k + 2.0  # with means that smoothing takes off
    tau = torch.tensor([0.3, 0.05, 0.008, 0.1], dtype=torch.float64)
    got = reference.outputs(attn, q, k, v, inputs={"tau": tau})
    maps = torch.stack([sale(q[0, h], k[0, h // 2], float(tau[h])) for h in range(4)])
    assert torch.equal(taken(got)[0], maps)
    agree(got, dense(q, k, v, spread(maps, 64, 32, N, N) & causal(N, N)))
    share = maps.double().sum((1, 2)) / (causal(9, 9).sum() * 2)
    assert bool((share < 0.95).any())  # the map says something
    assert not torch.equal(maps[0], sale(q[0, 0], k[0, 0], 0.3, printed=True))
    assert not torch.equal(maps[0], sale(q[0, 0], k[0, 0], 0.3, fixed=True))


def test_sale_is_dense_at_tau_0_its_window_at_a_great_tau_and_monotone_between() -> None:
    attn = system("sale", *SMALL)
    N = 64 * 9
    q, k, v = operands(attn, N, N)
    run = lambda tau: reference.outputs(attn, q, k, v, inputs={"tau": torch.full((4,), tau, dtype=torch.float64)})
    agree(run(0.0), dense(q, k, v, causal(N, N)))
    maps = [taken(run(tau)) for tau in (0.05, 0.5, 1e6)]
    for more, fewer in pairwise(maps):
        assert not bool((fewer & ~more).any())
        assert bool((more & ~fewer).any())
    for block in range(9):
        local = range(max(0, 2 * block + 2 - n_local(2 * block + 2)), 2 * block + 2)
        assert maps[-1][0, 0, block].nonzero().flatten().tolist() == sorted({0, *local})
    assert [n_local(n) for n in range(5, 10)] == [4, 5, 6, 7, 4]  # the phase of the segments


# -- SpargeAttn -------------------------------------------------------------------------------------


def sparge(q: Tensor, k: Tensor, gate: float, tau: float, masked: bool) -> Tensor:
    """One head's map [ceil(N / 128), ceil(N / 64)]."""
    N, scale = len(q), q.shape[1] ** -0.5
    of_q, of_k = q.split(128), k.split(64)

    def alike(x: Tensor) -> bool:
        unit = x / x.norm(dim=1, keepdim=True)
        return bool((unit @ unit.T).mean() > gate)

    keep = torch.zeros(len(of_q), len(of_k), dtype=torch.bool)
    for a, queries in enumerate(of_q):
        visible = [c for c in range(len(of_k)) if not masked or c * 64 <= min(N, a * 128 + 128) - 1]
        competing = [c for c in visible if alike(of_k[c])]
        keep[a, [c for c in visible if c not in competing or not alike(queries)]] = True
        if alike(queries) and competing:
            s = torch.stack([queries.mean(0) @ of_k[c].mean(0) * scale for c in competing])
            p, order = s.softmax(0).sort(descending=True)
            count = max(1, int((p.cumsum(0) <= tau).sum()))  # the one that crosses stays out
            keep[a, [competing[n] for n in order[:count].tolist()]] = True
    return keep


def flowing(attn: Attention, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operands in which some runs of tokens are alike."""
    q, k, v = operands(attn, N, N)
    noise = torch.where(torch.arange(N) // 64 % 5 == 3, 3.0, 0.5)[:, None]
    base = lambda x: x[:, :, ::64].repeat_interleave(64, 2)[:, :, :N]
    wide = lambda x: x[:, :, ::128].repeat_interleave(128, 2)[:, :, :N]
    return wide(q) * 2 + noise * q, base(k) * 2 + noise * k, v


@pytest.mark.parametrize("masked", [True, False])
def test_spargeattn(masked: bool) -> None:
    sizes = ("heads: 32", "heads: 4"), ("dims: 128", "dims: 16")
    attn = system("spargeattn", *sizes, *(() if masked else [("mask: causal\n", "")]))
    N = 128 * 4 + 77
    q, k, v = flowing(attn, N)
    got = reference.outputs(attn, q, k, v)
    maps = torch.stack([sparge(q[0, h], k[0, h], 0.6, 0.98, masked) for h in range(4)])
    assert torch.equal(taken(got)[0], maps)
    mask = causal(N, N) if masked else torch.ones(N, N, dtype=torch.bool)
    agree(got, dense(q, k, v, spread(maps, 128, 64, N, N) & mask))
    assert 0.2 < float(maps.double().mean()) < 0.9


def test_spargeattn_computes_unlike_blocks_whole() -> None:
    sizes = ("heads: 32", "heads: 4"), ("dims: 128", "dims: 16")
    q, k, v = operands(system("spargeattn", *sizes), 500, 500)
    agree(reference.outputs(system("spargeattn", *sizes), q, k, v), dense(q, k, v, causal(500, 500)))
    ungated = taken(reference.outputs(system("spargeattn", *sizes, ("gate=0.6", "gate=-1.0")), q, k, v))
    assert not bool(ungated[0, :, -1].all())


# -- MInference -------------------------------------------------------------------------------------


def vertical_slash(q: Tensor, k: Tensor, columns: int, slashes: int) -> Tensor:
    """One head's pairs [N, N] as the kernel computes them, before its causal test."""
    N = len(q)
    s = (q[-64:] @ k.T * q.shape[1] ** -0.5).masked_fill(~causal(64, N), -math.inf)
    p = s.softmax(1)
    by_column = [math.inf if c < 30 else float(p[:, c].sum()) for c in range(N)]
    by_slash = [math.inf] * 100 + [float(sum(p[r, N - 64 + r - o] for r in range(64) if N - 64 + r >= o))
                                   for o in range(100, N)]  # fmt: skip
    first = lambda mass, n: sorted(range(N), key=lambda x: (-mass[x], x))[:n]
    vertical, slash = first(by_column, columns), sorted(first(by_slash, slashes), reverse=True)
    pairs = torch.zeros(N, N, dtype=torch.bool)
    for m0 in range(0, N, 64):
        windows: list[list[int]] = []
        for end in [max(m0 + 64 - o, 64) for o in slash if o < m0 + 64]:
            if not windows or end > windows[-1][1] + 64:
                windows.append([end - 64, end])
            elif end > windows[-1][1]:
                windows[-1][1] += 64  # in steps of 64, not to `end`
        rows = pairs[m0 : m0 + 64]
        rows[:, [c for c in vertical if c < windows[-1][0]]] = True
        for lo, hi in windows:
            rows[:, lo:hi] = True
    return pairs


def test_minference_vertical_slash() -> None:
    attn = system("minference_vertical_slash", *SMALL, ("lines(1000, 6096)", "lines(36, 103)"))
    N = 64 * 9 + 21
    q, k, v = operands(attn, N, N)
    q, k = 2 * q, 2 * k
    got = reference.outputs(attn, q, k, v)
    pairs = torch.stack([vertical_slash(q[0, h], k[0, h // 2], 36, 103) for h in range(4)])
    seen = pairs & causal(N, N)
    selection = got.selections[0][0]
    assert selection is not None
    assert selection.pairs is not None
    assert torch.equal(selection.pairs, seen)
    agree(got, dense(q, k, v, seen))
    assert float(seen.double().mean()) < 0.42


def test_minference_vertical_slash_as_published_is_dense_below_its_counts() -> None:
    attn = system("minference_vertical_slash", *SMALL)
    q, k, v = operands(attn, 200, 200, B=2)
    agree(reference.outputs(attn, q, k, v), dense(q, k, v, causal(200, 200)))


def test_minference_a_shape() -> None:
    attn = system("minference_a_shape", *SMALL, ("1024", "10"), ("4096", "40"))
    q, k, v = operands(attn, 200, 200)
    i, j = torch.arange(200)[:, None], torch.arange(200)
    agree(reference.outputs(attn, q, k, v), dense(q, k, v, (j <= i) & ((j < 10) | (j > i - 40))))


def test_minference_block_sparse() -> None:
    attn = system("minference_block_sparse", *SMALL, ("topk(100)", "topk(3)"))
    N = 64 * 7 + 9
    q, k, v = operands(attn, N, N)
    maps = torch.zeros(4, 8, 8, dtype=torch.bool)
    for h in range(4):
        for a, queries in enumerate(q[0, h].split(64)):
            s = torch.stack([queries.mean(0) @ keys.mean(0) for keys in k[0, h // 2].split(64)[: a + 1]])
            maps[h, a, s.topk(min(3, a + 1)).indices] = True
    got = reference.outputs(attn, q, k, v)
    assert torch.equal(taken(got)[0], maps)
    agree(got, dense(q, k, v, spread(maps, 64, 64, N, N) & causal(N, N)))


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
    scale = None
    if name == "nsa":
        inputs["g_swa"] += 1
    if name == "deepseek_sparse_attention":
        v, scale = None, 192**-0.5
    got = reference.outputs(attn, q, k, v, inputs=inputs)
    expected = dense(q, k, k[..., :512] if v is None else v, causal(Sq, Sk), scale)
    assert attn.heads.q == ALL[name]["heads"]
    torch.testing.assert_close(got.o, expected[0], rtol=1e-9, atol=1e-9)


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
