"""Systems that select blocks and clusters, each against its published definition in plain float64."""

from __future__ import annotations

import math

import pytest
import torch
from selected import SCALE, agree, blocks, ranked
from smaller import normal
from sparse import SMALL, causal, operands, spread, system
from torch import Tensor

from attncc import reference

# -- XAttention --------------------------------------------------------------------------------------


def antidiagonal_mass(q: Tensor, k: Tensor, stride: int = 16, block: int = 128) -> Tensor:
    """One head's W [ceil(Sq / 128), ceil(Sk / 128)]: each antidiagonal summed term by term."""
    Sq, Sk, D = len(q), len(k), q.shape[1]
    q, k = (torch.cat([x, torch.zeros(-len(x) % stride, D)]) for x in (q, k))
    rows, columns = len(q) // stride, len(k) // stride
    A = torch.zeros(rows, columns, dtype=torch.float64)
    for t in range(stride):  # one pair of each antidiagonal at a time
        A += q[stride - 1 - t :: stride] @ k[t::stride].T / (math.sqrt(D) * stride)
    a, c = torch.arange(rows)[:, None], torch.arange(columns)
    p = A.masked_fill(c > a + (Sk - Sq) // stride, -math.inf).softmax(1)
    return sums(p, block // stride)


def sums(p: Tensor, n: int) -> Tensor:
    """Over blocks of n rows and n columns."""
    return torch.stack([torch.stack([y.sum() for y in x.split(n, 1)]) for x in p.split(n)])


def xattention(W: Tensor, tau: float, charge: bool = True) -> Tensor:
    """The first column and the diagonal, then the largest until the mass before the next suffices."""
    keep, shift = torch.zeros_like(W, dtype=torch.bool), W.shape[1] - W.shape[0]
    for a, row in enumerate(W):
        must, need = {0, a + shift}, tau * float(row.sum())
        held = sum(float(row[c]) for c in must) if charge else 0.0
        keep[a, list(must)] = True
        for c in ranked(row, [c for c in range(a + shift + 1) if c not in must]):
            if held >= need:
                break
            keep[a, c], held = True, held + float(row[c])
    return keep


@pytest.mark.parametrize(("Sq", "Sk"), [(805, 805), (256, 640), (300, 812)])
def test_xattention(Sq: int, Sk: int) -> None:
    attn = system("xattention", *SMALL)
    q, k, v = operands(attn, Sq, Sk)
    q, k = 2 * q, 2 * k
    tau = torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=torch.float64)
    got = reference.outputs(attn, q, k, v, inputs={"tau": tau})
    W = [antidiagonal_mass(q[0, h], k[0, h // 2]) for h in range(4)]
    maps = torch.stack([xattention(W[h], float(tau[h])) for h in range(4)])
    assert torch.equal(blocks(got), maps)
    agree(got, q[0], k[0], v[0], spread(maps, 128, 128, Sq, Sk) & causal(Sq, Sk))
    assert torch.equal(maps[3], torch.ones_like(maps[3]).tril(maps.shape[2] - maps.shape[1]))  # all of the mass
    assert int(maps[0].sum()) == 2 * maps.shape[1] - (Sq == Sk)  # what is forced, and no more
    if Sq == Sk:
        assert not torch.equal(maps[1], xattention(W[1], 0.5, charge=False))
        torch.testing.assert_close(W[0][:-1].sum(1), torch.full((6,), 8.0, dtype=torch.float64))


# -- Sparse VideoGen2 --------------------------------------------------------------------------------


def kmeans(x: Tensor, centroids: Tensor, iters: int) -> tuple[list[int], Tensor]:
    """Labels by the centroids before the last update, and the centroids behind it; an empty cluster keeps its own."""
    labels: list[int] = []
    for _ in range(iters):
        labels = [min(range(len(centroids)), key=lambda c: float((row - centroids[c]).norm())) for row in x]
        members = [[n for n, label in enumerate(labels) if label == c] for c in range(len(centroids))]
        moved = torch.stack([x[m].mean(0) if m else centroids[c] for c, m in enumerate(members)])
        if float((moved - centroids).norm(dim=1).max()) < 1e-4:
            break
        centroids = moved
    return labels, centroids


def svg2(qc: Tensor, kc: Tensor, sizes: list[int], top: float = 0.9, least: float = 0.1) -> list[set[int]]:
    """The key clusters of each query cluster, the one that crosses `top` among them."""
    kept: list[set[int]] = []
    for a in range(len(qc)):
        weights = [n * math.exp(float(qc[a] @ kc[c]) * SCALE) for c, n in enumerate(sizes)]
        held, mine = 0.0, set[int]()
        for rank, c in enumerate(ranked(weights, range(len(kc)))):
            if held <= top * sum(weights) or rank < max(1, int(least * len(kc))):
                mine.add(c)
            held += weights[c]
        kept.append(mine)
    return kept


SVG2 = (("heads: 40", "heads: 2"), ("dims: 128", "dims: 16"))


@pytest.mark.parametrize("top", ["0.9", "0.05"])
def test_sparse_videogen2(top: str) -> None:
    attn = system("sparse_videogen2", *SVG2, ("mass(0.9", f"mass({top}"))
    N, QC, KC = 90, 6, 24
    q, k, v = operands(attn, N, N, B=2)
    qc, kc = q[:, :, :QC] * 0.9, k[:, :, -KC:] * 0.9
    kc[:, :, 3] = 50.0  # a cluster without members
    q, k = 3 * q, 2 * k
    got = reference.outputs(attn, q, k, v, inputs={"qc": qc, "kc": kc})
    for b in range(2):
        keys = torch.zeros(2, N, N, dtype=torch.bool)
        for h in range(2):
            q_labels, q_centers = kmeans(q[b, h], qc[b, h], 2)
            k_labels, k_centers = kmeans(k[b, h], kc[b, h], 2)
            sizes = [k_labels.count(c) for c in range(KC)]
            assert sizes[3] == 0
            assert sum(sizes) == N
            kept = svg2(q_centers, k_centers, sizes, float(top))
            keys[h] = torch.tensor([[k_labels[j] in kept[q_labels[i]] for j in range(N)] for i in range(N)])
            least = [len(x) for x in kept]
            assert min(least) == 2 if top == "0.05" else min(least) > 2
        agree(got, q[b], k[b], v[b], keys, b)
        assert 0 < float(keys.double().mean()) < 0.95


def test_sparse_videogen2_with_all_of_the_mass_is_dense() -> None:
    attn = system("sparse_videogen2", *SVG2, ("mass(0.9", "mass(1.0"))
    q, k, v = operands(attn, 70, 70)
    got = reference.outputs(attn, q, k, v, inputs={"qc": normal(1, 2, 5, 16), "kc": normal(1, 2, 9, 16)})
    agree(got, q[0], k[0], v[0], torch.ones(2, 70, 70, dtype=torch.bool))


# -- AdaSpa ------------------------------------------------------------------------------------------

ADASPA = (("heads: 24", "heads: 3"), ("dims: 128", "dims: 16"), ("{q: 64, k: 64}", "{q: 8, k: 8}"), ("256", "11"))


def adaspa(q: Tensor, k: Tensor, lse: Tensor, share: float, text: int) -> Tensor:
    """One head's blocks of 8: the same number in each row, those of the text among them, all in rows of the text."""
    N, n = len(q), math.ceil(len(q) / 8)
    p = torch.exp(q @ k.T * SCALE - lse[:, None])
    W = sums(p, 8)
    words = [c for c in range(n) if min(N, c * 8 + 8) > N - text]
    keep = torch.zeros(n, n, dtype=torch.bool)
    for a in range(n):
        first = words + ranked(W[a], [c for c in range(n) if c not in words])
        keep[a, first if a in words else first[: max(1, len(words), math.floor(share * n + 0.5))]] = True
    return keep


@pytest.mark.parametrize("stale", [0.0, 2.0])
def test_adaspa(stale: float) -> None:
    attn = system("adaspa", *ADASPA)
    N = 8 * 13 + 3
    q, k, v = operands(attn, N, N)
    q = 2 * q
    own = (q @ k.transpose(2, 3) * SCALE).logsumexp(3)
    lse, keep = own + stale * normal(1, 3, N), torch.tensor([0.4, 0.3, 0.5], dtype=torch.float64)
    got = reference.outputs(attn, q, k, v, inputs={"cached": lse, "keep": keep})
    maps = torch.stack([adaspa(q[0, h], k[0, h], lse[0, h], float(keep[h]), 11) for h in range(3)])
    assert torch.equal(blocks(got), maps)
    agree(got, q[0], k[0], v[0], spread(maps, 8, 8, N, N))
    counts = [set(maps[h, :12].sum(1).tolist()) for h in range(3)]
    assert counts == [{6}, {4}, {7}]
    fresh = torch.stack([adaspa(q[0, h], k[0, h], own[0, h], float(keep[h]), 11) for h in range(3)])
    assert torch.equal(maps, fresh) == (stale == 0)


def test_adaspa_searches_anew_after_twenty_steps() -> None:
    attn = system("adaspa", *ADASPA)
    q, k, v = operands(attn, 60, 60)
    inputs = {"cached": torch.zeros(1, 3, 60), "keep": torch.full((3,), 0.6)}
    first = reference.outputs(attn, q, k, v, inputs=inputs)
    fresh = reference.outputs(attn, -q, k, v, inputs=inputs)
    assert not torch.equal(blocks(first), blocks(fresh))
    step = first
    for _ in range(19):
        step = reference.outputs(attn, -q, k, v, inputs=inputs, before=step.selections)
        assert torch.equal(blocks(step), blocks(first))
    step = reference.outputs(attn, -q, k, v, inputs=inputs, before=step.selections)
    assert torch.equal(blocks(step), blocks(fresh))


def test_adaspa_that_keeps_all_is_dense() -> None:
    attn = system("adaspa", *ADASPA)
    q, k, v = operands(attn, 50, 50)
    got = reference.outputs(attn, q, k, v, inputs={"cached": torch.zeros(1, 3, 50), "keep": torch.ones(3)})
    agree(got, q[0], k[0], v[0], torch.ones(3, 50, 50, dtype=torch.bool))
