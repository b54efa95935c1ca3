"""SALE, SpargeAttn and MInference, each against its published definition written out in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from sparse import SMALL, agree, causal, dense, operands, sage, spread, system, taken
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention

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
    agree(got, sage(q, k, v, spread(maps, 128, 64, N, N) & mask))
    assert 0.2 < float(maps.double().mean()) < 0.9


def test_spargeattn_computes_unlike_blocks_whole() -> None:
    sizes = ("heads: 32", "heads: 4"), ("dims: 128", "dims: 16")
    q, k, v = operands(system("spargeattn", *sizes), 500, 500)
    agree(reference.outputs(system("spargeattn", *sizes), q, k, v), sage(q, k, v, causal(500, 500)))
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
