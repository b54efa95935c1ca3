"""The score functions of selections, each against its definition written out in loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import i, j, plain, qk, scale
from torch import Tensor

from attncc.ir.attention import Attention, Call, Input, Select
from attncc.ir.expr import TRUE, Expr, const
from attncc.reference.operands import Sequence
from attncc.reference.pairs import seen_keys
from attncc.reference.philox import philox
from attncc.reference.rows import Numbers, Rows, rows_of, scope_of
from attncc.reference.select.blocks import Blocks, cut
from attncc.reference.select.clusters import clustered, lloyd
from attncc.reference.select.lines import lines, windows
from attncc.reference.select.lowbit import GROUPS, anchored, estimate, integers
from attncc.reference.select.scores import SCORES, over_heads

CAUSAL = j <= i
SIZES = [(11, 11, 4, 3), (5, 13, 2, 4), (16, 16, 4, 4), (1, 9, 1, 5)]
"""Queries, keys, and their blocks; most are ragged."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def call(name: str, *words: str, **options: Any) -> Call:
    kwargs = {k: v if isinstance(v, str) else const(v) for k, v in options.items()}
    return Call(name, (), tuple(sorted(kwargs.items())), words)


def selecting(score: Call, block: Any, mask: Expr = CAUSAL, inputs: Any = (), **more: Any) -> Attention:
    fields = {"normalize": "softmax", "heads": "none", "rule": Call("topk", (const(2),)), "force": (), **more}
    select = Select(block=block, score=score, reuse=Call("every_call"), **fields)
    return plain(mask=mask, select=select, inputs=tuple(inputs))


def rows_for(attn: Attention, Sq: int, Sk: int, number: int = 0, seed: int = 0, **inputs: Tensor) -> Rows:
    """The rows of sequence `number` with drawn operands."""
    q, k = normal(attn.heads.q, Sq, 8, seed=seed + number), normal(attn.heads.kv, Sk, 8, seed=seed + number + 1)
    sequence = Sequence(number, q, k, normal(attn.heads.kv, Sk, 8, seed=seed + number + 2))
    sizes = {"B": 2, "Hq": 4, "Hk": 2, "Hv": 2, "Dqk": 8, "Dv": 8}
    numbers = Numbers(torch.float64, torch.float64, None, 7, sizes, inputs)
    return rows_of(attn, sequence, scope_of(attn, sequence, numbers), numbers)


def scored(attn: Attention, Sq: int, Sk: int, bq: int, bk: int, **more: Any) -> tuple[Tensor, Rows, Blocks]:
    rows = rows_for(attn, Sq, Sk, **more)
    blocks = cut(attn.part, rows, bq, bk)
    assert attn.part.select is not None
    score = attn.part.select.score
    return SCORES[score.name](score, attn.part, rows, blocks), rows, blocks


def cells(Sq: int, Sk: int, bq: int, bk: int) -> list[tuple[int, int, range, range]]:
    """Every pair of blocks with its members."""
    return [
        (a, c, range(a * bq, min(Sq, a * bq + bq)), range(c * bk, min(Sk, c * bk + bk)))
        for a in range(-(-Sq // bq))
        for c in range(-(-Sk // bk))
    ]


def close(got: Tensor, expected: Any, where: Any = None) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got if where is None else got[where], expected, rtol=1e-11, atol=1e-11)


SCALE = 1 / math.sqrt(8)


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


def weights(rows: Rows) -> Tensor:
    """Causal softmax [H, Sq, Sk]."""
    heads, Sq, Sk = rows.shape
    p = torch.zeros(rows.shape, dtype=torch.float64)
    for h in range(heads):
        for row in range(Sq):
            seen = range(min(Sk, row + Sk - Sq + 1))
            e = [math.exp(float(rows.q[h, row] @ rows.k[h, key]) * SCALE) for key in seen]
            for key in seen:
                p[h, row, key] = e[key] / sum(e)
    return p


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


# -- few bits ---------------------------------------------------------------------------------------


def quantised(x: Tensor, group: list[int]) -> Tensor:
    """x [N, D] as int4 with one scale a group reads back."""
    result = torch.zeros_like(x)
    for n in range(len(x)):
        most = max(float(x[m].abs().max()) for m in range(len(x)) if group[m] == group[n])
        for d in range(x.shape[1]):
            result[n, d] = max(-7, min(7, round(float(x[n, d]) / (most / 7)))) * (most / 7)
    return result


def thread_groups(Sq: int, Sk: int) -> tuple[list[int], list[int]]:
    """Card 1: rows r and r + 8 of each 16; inside each 32 keys those with (j mod 8) // 2 alike."""
    return [r // 16 * 100 + r % 16 % 8 for r in range(Sq)], [c // 32 * 100 + c % 8 // 2 for c in range(Sk)]


GROUPINGS = {
    "thread": thread_groups,
    "token": lambda Sq, Sk: (list(range(Sq)), list(range(Sk))),
    "tensor": lambda Sq, Sk: ([0] * Sq, [0] * Sk),
    "block": lambda Sq, Sk: ([r // 16 for r in range(Sq)], [c // 8 for c in range(Sk)]),
}


@pytest.mark.parametrize("per", GROUPINGS)
@pytest.mark.parametrize("smooth", [True, False])
def test_lowbit_qk(per: str, smooth: bool) -> None:
    Sq, Sk = 21, 37
    options = {"smooth": "mean"} if smooth else {}
    s, rows, _ = scored(selecting(call("lowbit_qk", per=per, **options), (16, 8)), Sq, Sk, 16, 8)
    q_group, k_group = GROUPINGS[per](Sq, Sk)
    for h in range(4):
        q, k = rows.q[h], rows.k[h]
        qm, km = (q.mean(0), k.mean(0)) if smooth else (torch.zeros(8).double(),) * 2
        product = quantised(q - qm, q_group) @ quantised(k - km, k_group).T
        product = product + ((k - km) @ qm)[None] + (q @ km)[:, None]
        for a, c, of_q, of_k in cells(Sq, Sk, 16, 8):
            seen = [float(product[x, y]) * SCALE for x in of_q for y in of_k if y <= x + Sk - Sq]
            close(s[h, a, c], max(seen, default=-math.inf))


def test_the_integers_are_those_of_the_kernel() -> None:
    x = torch.tensor([[7.0, 2.5, -3.5], [1.0, -7.0, 0.5], [0.0, 0.0, 0.0]])[None]
    ints, size = integers(x, torch.tensor([[0, 0, 1]]), 7)
    assert ints[0].tolist() == [[7, 2, -4], [1, -7, 0], [0, 0, 0]]  # half to even
    assert size[0].tolist() == [1, 1, 1]
    block = torch.zeros(1, 40, dtype=torch.int64)
    q, k = GROUPS["thread"](block, "q")[0].tolist(), GROUPS["thread"](block, "k")[0].tolist()
    assert q[3] == q[11] != q[4]
    assert q[19] == q[27] != q[3]
    assert k[2] == k[3] == k[10] == k[27] != k[4]
    assert k[34] == k[35] != k[2]


def test_smoothing_is_exact_but_for_the_integers() -> None:
    """With as many bits as it takes, the estimate is the score: the means come back whole."""
    attn = selecting(call("lowbit_qk", bits=30, smooth="mean"), (4, 4))
    rows = rows_for(attn, 9, 9)
    rows = replace(rows, k=rows.k + 5.0, q=rows.q - 3.0)
    blocks = cut(attn.part, rows, 4, 4)
    made = estimate(attn.part.select.score, attn.part, rows, blocks)  # type: ignore[union-attr]
    exact = torch.where(blocks.seen, rows.q @ rows.k.transpose(1, 2) * SCALE, -math.inf)
    torch.testing.assert_close(made, exact, rtol=0, atol=1e-6)


def test_the_anchor_is_each_rows_own() -> None:
    """SALE: S > ln(tau * l) + m; the paper's ln(tau * l + m) decides otherwise."""
    attn = selecting(call("lowbit_qk"), (4, 4))
    rows = rows_for(attn, 14, 14)
    blocks = cut(attn.part, rows, 4, 4)
    forced = torch.zeros(4, 4, 4, dtype=torch.bool)
    forced[:, :, 0] = True
    forced[:, range(4), range(4)] = True
    score = attn.part.select.score  # type: ignore[union-attr]
    made, element = anchored(score, attn.part, rows, blocks, forced), estimate(score, attn.part, rows, blocks)
    printed = 0
    tau = 0.02
    for h in range(4):
        for a, c, of_q, of_k in cells(14, 14, 4, 4):
            kept = as_printed = False
            for x in of_q:
                near = [y for y in range(x + 1) if y // 4 in (0, x // 4)]
                exact = [float(rows.q[h, x] @ rows.k[h, y]) * SCALE for y in near]
                m = max(exact)
                total = sum(math.exp(value - m) for value in exact)
                for y in of_k:
                    if y <= x:
                        kept |= float(element[h, x, y]) > math.log(tau * total) + m
                        as_printed |= tau * total + m > 0 and float(element[h, x, y]) > math.log(tau * total + m)
            assert bool(made[h, a, c] > math.log(tau)) == kept
            printed += kept != as_printed
    assert printed


# -- clusters ---------------------------------------------------------------------------------------


def kmeans(x: Tensor, c: Tensor, steps: int, dot: bool = False) -> tuple[list[int], Tensor]:
    """One head: labels of the centroids before the last update."""
    labels: list[int] = []
    for step in range(max(1, steps)):
        far = [[-float(p @ m) if dot else float((p - m).square().sum()) for m in c] for p in x]
        labels = [row.index(min(row)) for row in far]
        new = [x[[n for n in range(len(x)) if labels[n] == m]] for m in range(len(c))]
        moved = torch.stack([p.mean(0) if len(p) else c[m] for m, p in enumerate(new)])
        if step >= steps or float((moved - c).norm(dim=1).max()) < 1e-4:
            break
        c = moved
    return labels, c


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_clusters_and_their_scores(metric: str, steps: int) -> None:
    inputs = [Input("kc", ("B", "Hk", 5, "Dqk")), Input("qc", ("B", "Hq", 3, "Dqk"))]
    kc, qc = normal(2, 2, 5, 8), normal(2, 4, 3, 8)
    score = call("centroid_dot", "kc", q="qc", iters=steps, metric=metric)
    attn = selecting(score, ("cluster", "cluster"), TRUE, inputs)
    rows = rows_for(attn, 17, 23, number=1, kc=kc, qc=qc)
    blocks = clustered(score, attn.part, rows, seen_keys(attn.part, rows))
    s = SCORES["centroid_dot"](score, attn.part, rows, blocks)
    for h in range(4):
        q_labels, q = kmeans(rows.q[h], qc[1, h], steps, metric == "dot")
        k_labels, k = kmeans(rows.k[h], kc[1, h // 2], steps, metric == "dot")
        assert blocks.q_block[h].tolist() == q_labels
        assert blocks.k_block[h].tolist() == k_labels
        assert blocks.k_sizes[h].tolist() == [k_labels.count(m) for m in range(5)]
        close(s[h], q @ k.T * SCALE)


def test_hidden_keys_lie_in_no_cluster() -> None:
    attn = selecting(call("centroid_dot", "kc"), (4, "cluster"), (j >= 3) & (j < 10), [Input("kc", (1, 1, 4, "Dqk"))])
    rows = rows_for(attn, 6, 12, kc=normal(1, 1, 4, 8))
    blocks = clustered(attn.part.select.score, attn.part, rows, seen_keys(attn.part, rows))  # type: ignore[union-attr]
    assert bool((blocks.k_block[:, [0, 1, 2, 10, 11]] == -1).all())
    assert bool((blocks.k_block[:, 3:10] >= 0).all())
    assert blocks.q_block[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert blocks.q_centers is not None
    close(blocks.q_centers[1, 1], rows.q[1, 4:].mean(0))


def test_a_cluster_without_members_keeps_its_centroid() -> None:
    x = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    labels, centroids = lloyd(x, torch.tensor([[[0.4], [9.0]]]).double(), torch.ones(1, 2).bool(), 3, "euclidean")
    assert labels.tolist() == [[0, 0]]
    assert centroids.tolist() == [[[0.5], [9.0]]]


# -- lines ------------------------------------------------------------------------------------------


def converted(columns: list[int], slashes: list[int], m0: int, keys: int, size: int) -> set[int]:
    """One query block as the published CUDA conversion walks its two sorted lists, with cursors."""
    ends = [max(m0 + size - s, size) for s in sorted(slashes, reverse=True) if s < m0 + size]
    found: set[int] = set()
    cursor, column = 1, 0
    start, end = ends[0] - size, ends[0]
    listed = [*sorted(columns), 10**9]
    while True:
        if listed[column] < end:
            if listed[column] < start:
                found.add(listed[column])
            column += 1
            continue
        if cursor == len(ends):
            break
        following = ends[cursor]
        cursor += 1
        if following > end + size:
            found.update(range(start, end))
            start, end = following - size, following
        elif following > end:
            end += size
    found.update(range(start, end))
    return {key for key in found if key < keys}


@pytest.mark.parametrize("seed", range(8))
def test_windows_are_those_of_the_published_conversion(seed: int) -> None:
    keys, size = 90, 8
    draw = torch.Generator().manual_seed(seed)
    columns, diagonals = (torch.rand(keys, generator=draw) < share for share in (0.15, 0.08))
    diagonals[0] = True
    made = windows(columns, diagonals, list(range(0, keys, size)), size)
    for block in range(len(made)):
        lists = (x.nonzero().flatten().tolist() for x in (columns, diagonals))
        expected = converted(*lists, block * size, keys, size)  # type: ignore[misc]
        assert set(made[block].nonzero().flatten().tolist()) == expected
        for row in range(block * size, min(keys, block * size + size)):  # all that the lines themselves hold
            on_diagonals = {row - s for s in diagonals.nonzero().flatten().tolist() if s <= row}
            assert on_diagonals <= expected


def test_an_overlapping_window_lengthens_the_last_one_by_its_size() -> None:
    diagonals = torch.zeros(64, dtype=torch.bool)
    diagonals[[0, 3]] = True
    made = windows(torch.zeros(64, dtype=torch.bool), diagonals, [32], 8)
    assert made[0].nonzero().flatten().tolist() == list(range(29, 45))  # [29, 37) and [32, 40), not [29, 40)


def greatest(mass: list[float], count: int) -> list[int]:
    return sorted(range(len(mass)), key=lambda n: (-mass[n], n))[:count]


def test_lines_of_the_last_queries() -> None:
    force = (Call("sink", (const(2),)), Call("local", (const(3),)))
    rule = Call("lines", (const(5), const(6)))
    attn = selecting(call("exact_mass", last=4), (4, "token"), rule=rule, force=force)
    rows = rows_for(attn, 30, 30)
    made = lines(rule, attn.part, rows, cut(attn.part, rows, 4, 1))
    p = weights(rows)
    for h in range(4):
        column = [math.inf if n < 2 else float(p[h, 26:, n].sum()) for n in range(30)]
        diagonal = [math.inf if d < 3 else float(p[h].diagonal(-d)[max(0, 26 - d) :].sum()) for d in range(30)]
        for row in range(30):
            expected = converted(greatest(column, 5), greatest(diagonal, 6), row // 4 * 4, 30, 4)
            assert set(made[h, row].nonzero().flatten().tolist()) == expected
    free = replace(attn.part, select=replace(attn.part.select, charge=False))  # type: ignore[type-var]
    assert bool((lines(rule, free, rows, cut(attn.part, rows, 4, 1)) & ~made).any())  # forced lines beside the best


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
