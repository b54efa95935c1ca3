"""The score functions of selections, each against its definition written out in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from naive import i, j, plain, qk, scale
from selecting import CAUSAL, SCALE, call, cells, close, normal, rows_for, scored, selecting, weights
from torch import Tensor

from attncc.ir.attention import Input
from attncc.ir.expr import TRUE
from attncc.reference.philox import philox
from attncc.reference.select.blocks import cut
from attncc.reference.select.scores import SCORES, over_heads

SIZES = [(11, 11, 4, 3), (5, 13, 2, 4), (16, 16, 4, 4), (1, 9, 1, 5)]
"""Queries, keys, and their blocks; most are ragged."""


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pooled_dot(how: str, size: tuple[int, int, int, int]) -> None:
    s, rows, _ = scored(selecting(call("pooled_dot", pool=how), size[2:]), *size)
    shift = size[1] - size[0]
    for h in range(4):
        for a, c, of_q, of_k in cells(*size):
            if min(of_k) > max(of_q) + shift:
                assert s[h, a, c] == -math.inf
                continue
            members = rows.q[h, list(of_q)], rows.k[h, list(of_k)]
            q, k = (x.sum(0) / len(x) if how == "mean" else x.max(0).values for x in members)
            close(s[h, a, c], float(q @ k) * SCALE)


def test_blocks_compete_for_one_query_only_where_all_their_keys_are_visible() -> None:
    """NSA: a compressed block is visible when it lies wholly in the past, `(t + 1) // n > c`."""
    s, _, _ = scored(selecting(call("pooled_dot"), ("token", 4)), 12, 12, 1, 4)
    for t in range(12):
        for c in range(3):
            assert bool(s[0, t, c] > -math.inf) == ((t + 1) // 4 > c)
    free, _, _ = scored(selecting(call("pooled_dot"), ("token", 4), normalize="none"), 12, 12, 1, 4)
    assert bool(free[0, 5, 1].isfinite())  # unnormalised scores compete wherever a key is visible


def test_a_gate_takes_blocks_whose_members_differ_whole() -> None:
    attn = selecting(call("pooled_dot", gate=0.3), (4, 4), TRUE)
    rows = rows_for(attn, 12, 12)
    alike = rows.q.clone()
    alike[:, :4] = alike[:, :1] + 0.1 * alike[:, :4]
    rows = replace(rows, q=alike, k=torch.cat([rows.k[:, :8], alike[:, :4]], 1))
    blocks = cut(attn.part, rows, 4, 4)
    s = SCORES["pooled_dot"](attn.part.select.score, attn.part, rows, blocks)  # type: ignore[union-attr]

    def cosine(x: Tensor) -> float:
        pairs = [float(a @ b / (a.norm() * b.norm())) for a in x for b in x]
        return sum(pairs) / len(pairs)

    for h in range(4):
        for a, c, of_q, of_k in cells(12, 12, 4, 4):
            competes = cosine(rows.q[h, list(of_q)]) > 0.3 and cosine(rows.k[h, list(of_k)]) > 0.3
            assert bool(s[h, a, c].isfinite()) == competes
            assert competes or s[h, a, c] == math.inf
    assert bool(s.isfinite().any())
    assert bool(s.isinf().any())


@pytest.mark.parametrize("size", [(16, 16, 8, 8), (11, 11, 4, 8), (6, 14, 4, 4), (13, 13, 4, 4)], ids=str)
def test_antidiagonal(size: tuple[int, int, int, int]) -> None:
    """XAttention: cell (a, b) sums q[aS + S-1 - t] · k[bS + t]; a cell is hidden where all its pairs are."""
    Sq, Sk, bq, bk = size
    stride = 4
    s, rows, _ = scored(selecting(call("antidiagonal", stride=stride), (bq, bk)), *size)
    raw, _, _ = scored(selecting(call("antidiagonal", stride=stride), (bq, bk), normalize="none"), *size)
    for h in range(4):
        expected = torch.zeros(-(-Sq // bq), -(-Sk // bk), dtype=torch.float64)
        unnormalised = torch.zeros_like(expected)
        for a in range(-(-Sq // stride)):
            logits = {}
            for c in range(-(-Sk // stride)):
                if c * stride > min(Sq, a * stride + stride) - 1 + Sk - Sq:
                    continue
                total = 0.0
                for t in range(stride):
                    row, key = a * stride + stride - 1 - t, c * stride + t
                    if row < Sq and key < Sk:
                        total += float(rows.q[h, row] @ rows.k[h, key])
                logits[c] = total * SCALE / stride
            mass = sum(math.exp(x) for x in logits.values())
            for c, x in logits.items():
                expected[a * stride // bq, c * stride // bk] += math.exp(x) / mass
                unnormalised[a * stride // bq, c * stride // bk] += x
        close(s[h], expected)
        close(raw[h], unnormalised)
    if Sq % stride == 0:  # every row of cells has mass 1
        close(s.sum(-1), torch.full(s.shape[:2], bq / stride))


def test_token_dot_has_no_scale() -> None:
    s, rows, _ = scored(selecting(call("token_dot"), (4, "token")), 6, 9, 4, 1)
    for h in range(4):
        close(s[h, 0], [float(rows.q[h, :4].mean(0) @ rows.k[h, n]) for n in range(9)])
        close(s[h, 1], [float(rows.q[h, 4:].mean(0) @ rows.k[h, n]) for n in range(9)])


@pytest.mark.parametrize("sub", [None, 2, 4, 3])
@pytest.mark.parametrize("size", [(1, 19, 1, 8), (4, 16, 2, 4), (3, 5, 1, 8)], ids=str)
def test_minmax_bound(sub: int | None, size: tuple[int, int, int, int]) -> None:
    options = {} if sub is None else {"sub": sub}
    s, rows, _ = scored(selecting(call("minmax_bound", **options), size[2:]), *size)
    for h in range(4):
        for a, c, of_q, of_k in cells(*size):
            q = rows.q[h, list(of_q)].sum(0) / len(of_q)
            best = -math.inf
            for first in range(0, len(of_k), sub or size[3]):
                page = rows.k[h, list(of_k)[first : first + (sub or size[3])]]
                bound = sum(max(float(q[d] * x) for x in page[:, d]) for d in range(8))
                best = max(best, bound)
                assert bound >= max(float(q @ x) for x in page) - 1e-12
            close(s[h, a, c], best * SCALE)


@pytest.mark.parametrize("heads", ["none", "max", "group_sum", "soft_vote"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_mass(heads: str, size: tuple[int, int, int, int]) -> None:
    s, rows, _ = scored(selecting(call("exact_mass"), size[2:], heads=heads), *size)
    p = weights(rows)
    combined = {
        "none": p,
        "max": p.max(0, keepdim=True).values.expand(4, -1, -1),
        "soft_vote": p.sum(0, keepdim=True).expand(4, -1, -1),
        "group_sum": torch.stack([p[0] + p[1], p[0] + p[1], p[2] + p[3], p[2] + p[3]]),
    }[heads]
    for h in range(4):
        for a, c, of_q, of_k in cells(*size):
            close(s[h, a, c], sum(float(combined[h, x, y]) for x in of_q for y in of_k))


def test_exact_mass_of_a_cached_lse_and_of_the_last_queries() -> None:
    lse = normal(2, 4, 11)
    attn = selecting(call("exact_mass", lse="cached"), (4, 3), inputs=[Input("cached", ("B", "Hq", "Sq"))])
    s, rows, _ = scored(attn, 11, 11, 4, 3, number=1, cached=lse)
    for h in range(4):
        for a, c, of_q, of_k in cells(11, 11, 4, 3):
            logit = lambda x, y, h=h: float(rows.q[h, x] @ rows.k[h, y]) * SCALE
            terms = [math.exp(logit(x, y) - float(lse[1, h, x])) for x in of_q for y in of_k if y <= x]
            close(s[h, a, c], sum(terms))
    s, rows, _ = scored(selecting(call("exact_mass", last=2), (4, 3)), 11, 11, 4, 3)
    for a, c, _, of_k in cells(11, 11, 4, 3):
        close(s[:, a, c], weights(rows)[:, 9:, list(of_k)].sum((1, 2)))
    every, _, _ = scored(selecting(call("exact_mass", last=99), (4, 3)), 11, 11, 4, 3)
    close(every[:, 0], scored(selecting(call("exact_mass"), (4, 3)), 11, 11, 4, 3)[0].sum(1))


def test_relu_indexer() -> None:
    inputs = [
        Input("qi", ("B", 3, "Sq", 5)),
        Input("ki", ("B", "Sk", 5)),
        Input("w", ("B", "Sq", 3)),
    ]
    q, k, w = normal(2, 3, 6, 5), normal(2, 7, 5), normal(2, 6, 3)
    attn = selecting(call("relu_indexer", q="qi", k="ki", w="w"), ("token", "token"), inputs=inputs)
    s, _, _ = scored(attn, 6, 7, 1, 1, number=1, qi=q, ki=k, w=w)
    for t in range(6):
        for n in range(7):
            total = sum(float(w[1, t, x]) * max(0.0, float(q[1, x, t] @ k[1, n])) for x in range(3))
            close(s[:, t, n], [total] * 4)
    own, rows, _ = scored(selecting(call("relu_indexer"), ("token", "token")), 6, 7, 1, 1)
    close(own[2], (rows.q @ rows.k.transpose(1, 2)).clamp_min(0).sum(0))


def test_an_indexer_of_other_keys_is_refused() -> None:
    inputs = [Input("qi", ("B", 3, "Sq", 5)), Input("ki", ("B", "N", 5))]
    attn = selecting(call("relu_indexer", q="qi", k="ki"), ("token", "token"), inputs=inputs)
    with pytest.raises(ValueError, match=r"ki, qi: expected \[6, 7\] queries and keys, got \[6, 4\]"):
        scored(attn, 6, 7, 1, 1, qi=normal(2, 3, 6, 5), ki=normal(2, 4, 5))


def test_random_scores_are_drawn_by_their_place() -> None:
    s, rows, _ = scored(selecting(call("random", seed=5), (2, 2)), 40, 40, 2, 2, number=1)
    at = lambda h, a, c: tuple(torch.tensor(x) for x in (c // 4, a, h, 1))
    for h, a, c in [(0, 0, 0), (3, 7, 13), (1, 19, 18)]:
        assert float(s[h, a, c]) == (int(philox(at(h, a, c), 5)[c % 4]) >> 8) / 2**24  # type: ignore[arg-type]
    assert bool(((s >= 0) & (s < 1)).all())
    assert abs(float(s.mean()) - 0.5) < 4 / math.sqrt(12 * s.numel())
    unseeded, _, _ = scored(selecting(call("random"), (2, 2)), 40, 40, 2, 2, number=1)
    seeded, _, _ = scored(selecting(call("random", seed=7), (2, 2)), 40, 40, 2, 2, number=1)
    assert torch.equal(unseeded, seeded)  # the run-time seed, which is 7 here
    assert not torch.equal(s, seeded)
    other, _, _ = scored(selecting(call("random", seed=5), (2, 2)), 40, 40, 2, 2, number=0)
    assert not torch.equal(s, other)
    wider, _, _ = scored(selecting(call("random", seed=5), (2, 2)), 44, 48, 2, 2, number=1)
    assert torch.equal(wider[:, :20, :20], s)
    assert rows.shape == (4, 40, 40)


@pytest.mark.parametrize(
    "shape", [("B", "Hq", 2, 3), ("B", "Hk", 2, 3), (1, 1, 2, 3), ("Hq", 2, 3), ("Hk", 2, 3), ("B", 2, 3), (2, 3)]
)
def test_given_scores(shape: tuple[int | str, ...]) -> None:
    at = {"B": 2, "Hq": 4, "Hk": 2}
    x = normal(*(at.get(n, n) for n in shape))  # type: ignore[arg-type, misc]
    s, _, _ = scored(selecting(call("given", "x"), (4, 4), inputs=[Input("x", shape)]), 8, 12, 4, 4, number=1, x=x)
    for h in range(4):
        mine = x[1 if shape[0] == "B" else 0] if shape[0] == "B" or len(shape) == 4 else x
        if mine.ndim == 3:
            mine = mine[{4: h, 2: h // 2, 1: 0}[len(mine)]]
        assert torch.equal(s[h], mine)


def test_given_scores_must_fit_the_blocks() -> None:
    attn = selecting(call("given", "x"), (4, 4), inputs=[Input("x", (2, 2))])
    with pytest.raises(ValueError, match=r"x: expected scores of \[2, 3\] blocks, got \[2, 2\]"):
        scored(attn, 8, 12, 4, 4, x=normal(2, 2))


def test_over_heads_sums_the_group_that_shares_a_key_head() -> None:
    attn = selecting(call("exact_mass"), (4, 4))
    tiled = replace(attn, heads=replace(attn.heads, map="tile"))
    x = torch.arange(4.0)[:, None, None]
    assert over_heads(x, "group_sum", rows_for(attn, 3, 3)).flatten().tolist() == [1, 1, 5, 5]
    assert over_heads(x, "group_sum", rows_for(tiled, 3, 3)).flatten().tolist() == [2, 4, 2, 4]


def test_scores_follow_the_parts_own_formula() -> None:
    """A score of the part that is not the plain product enters exact masses and estimates."""
    select = selecting(call("exact_mass"), (2, 2)).part.select
    attn = plain(score=qk * scale - 0.5 * (i - j), mask=CAUSAL, select=select)
    s, rows, _ = scored(attn, 5, 5, 2, 2)
    logits = rows.q @ rows.k.transpose(1, 2) * SCALE - 0.5 * (torch.arange(5)[:, None] - torch.arange(5)).double()
    p = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
    close(s[3, 2, 0], p[3, 4:, :2].sum())
