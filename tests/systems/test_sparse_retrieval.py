"""RetrievalAttention and RetroInfer against their definitions: static keys, found ones, and estimates, merged."""

from __future__ import annotations

import pytest
import torch
from selected import SCALE, agree, blocks, ranked
from sparse import SMALL, operands, system
from torch import Tensor

from attncc import reference

# -- RetrievalAttention and RetroInfer ---------------------------------------------------------------


def merged(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Parts (o [D], lse) as one."""
    most = torch.stack([lse for _, lse in pieces]).max()
    shares = [torch.exp(lse - most) for _, lse in pieces]
    total = torch.stack(shares).sum()
    return torch.stack([w * o for w, (o, _) in zip(shares, pieces, strict=True)]).sum(0) / total, most + total.log()


def one(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o and lse of one query over keys, each counting `weights` times."""
    s = k @ q * SCALE if weights is None else k @ q * SCALE + weights.log()
    return s.softmax(0) @ v, s.logsumexp(0)


RETRIEVAL = (*SMALL, ("sink(128)", "sink(4)"), ("window(512)", "window(8)"))


@pytest.mark.parametrize("budget", [5, 200])
def test_retrieval_attention(budget: int) -> None:
    attn, N = system("retrieval_attention", *RETRIEVAL, ("topk(100)", f"topk({budget})")), 150
    q, k, v = operands(attn, 1, N, B=2)
    got = reference.outputs(attn, q, k, v)
    assert got.lse is not None
    static = [*range(4), *range(N - 8, N)]
    for b in range(2):
        for h in range(4):
            keys, values, query = k[b, h // 2], v[b, h // 2], q[b, h, 0]
            found = ranked(keys @ query, range(4, N - 8))[:budget]
            assert set(blocks(got, 1, b)[h, 0].nonzero().flatten().tolist()) == set(found)
            assert not set(found) & set(static)  # a token that counts twice is the usual fault
            o, lse = merged([one(query, keys[x], values[x]) for x in (static, found)])
            torch.testing.assert_close(got.o[b, h, 0], o, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got.lse[b, h, 0], lse, rtol=1e-9, atol=1e-9)
    if budget > N:
        agree(got, q[0], k[0], v[0], torch.ones(4, 1, N, dtype=torch.bool))


def by_product(x: Tensor, centroids: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Clusters whose members have the greatest product with their centroid: labels before the last update."""
    labels = torch.zeros(len(x), dtype=torch.long)
    for _ in range(iters):
        labels = (x @ centroids.T).argmax(1)
        moved = torch.stack(
            [x[labels == c].mean(0) if (labels == c).any() else centroids[c] for c in range(len(centroids))]
        )
        if float((moved - centroids).norm(dim=1).max()) < 1e-4:
            break
        centroids = moved
    return labels, centroids


def retroinfer(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One group of two heads, q [2, D]: o [2, D], lse [2], and the sizes of the exact and the estimated clusters."""
    N, KC = len(k), len(centroids)
    static, rest = [*range(4), *range(N - 64, N)], list(range(4, N - 64))
    labels, centers = by_product(k[rest], centroids, 10)
    members = [[rest[n] for n in (labels == c).nonzero().flatten().tolist()] for c in range(KC)]
    living = [c for c in range(KC) if members[c]]
    votes = torch.stack([(centers[living] @ query * SCALE).softmax(0) for query in q]).sum(0)
    order = ranked(dict(zip(living, votes.tolist(), strict=True)), living)
    exact = max(1, int(0.018 * KC))
    best, middle = order[:exact], order[exact : KC - int(0.75 * KC)]
    found = [n for c in best for n in members[c]]
    size = torch.tensor([len(members[c]) for c in middle], dtype=torch.float64)
    means, sums = (torch.stack([x[members[c]].sum(0) for c in middle]) for x in (k, v))
    out = [
        merged([
            one(query, k[static], v[static]),
            one(query, k[found], v[found]),
            one(query, means / size[:, None], sums / size[:, None], size),
        ])
        for query in q
    ]  # fmt: skip
    return torch.stack([o for o, _ in out]), torch.stack([lse for _, lse in out]), [[len(found)], size.int().tolist()]


def test_retroinfer() -> None:
    attn, N, KC = system("retroinfer", *SMALL), 68 + 60 * 8, 60
    q, k, v = operands(attn, 1, N, B=2)
    centroids = k[:, :, 4 : 4 + KC] + 0.1
    centroids[:, :, 7] = -0.01 * centroids[:, :, 8]  # hardly a key has its greatest product with this one
    got = reference.outputs(attn, q, k, v, inputs={"centroids": centroids})
    assert got.lse is not None
    for b in range(2):
        for g in range(2):
            o, lse, sizes = retroinfer(q[b, 2 * g : 2 * g + 2, 0], k[b, g], v[b, g], centroids[b, g])
            assert sizes[0][0] > 0
            assert len(sizes[1]) == KC - int(0.75 * KC) - 1
            torch.testing.assert_close(got.o[b, 2 * g : 2 * g + 2, 0], o, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got.lse[b, 2 * g : 2 * g + 2, 0], lse, rtol=1e-9, atol=1e-9)


def test_retroinfer_is_dense_where_clusters_are_copies_and_none_is_dropped() -> None:
    attn = system("retroinfer", *SMALL, ("ternary(0.018, 0.75)", "ternary(0.1, 0.0)"))
    N = 68 + 12 * 10
    q, k, v = operands(attn, 1, N)
    k = torch.nn.functional.normalize(k, dim=-1)
    centroids = k[:, :, 4:14].clone()
    k[:, :, 4 : N - 64] = centroids.repeat(1, 1, 12, 1)
    got = reference.outputs(attn, q, k, v, inputs={"centroids": centroids})
    agree(got, q[0], k[0], v[0], torch.ones(4, 1, N, dtype=torch.bool))
