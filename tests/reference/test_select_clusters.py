"""Clusters by Lloyd's iterations, and lines as the windows that a kernel computes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from naive import j
from selecting import SCALE, call, close, normal, rows_for, selecting, weights
from torch import Tensor

from attncc.ir.attention import Call, Input
from attncc.ir.expr import TRUE, const
from attncc.reference.pairs import seen_keys
from attncc.reference.select.blocks import cut
from attncc.reference.select.clusters import clustered, lloyd
from attncc.reference.select.lines import lines, windows
from attncc.reference.select.scores import SCORES


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


def test_centroids_of_another_width_are_refused() -> None:
    attn = selecting(call("centroid_dot", "kc"), (4, "cluster"), TRUE, [Input("kc", (1, 1, 4, "C"))])
    rows = rows_for(attn, 6, 12, kc=normal(1, 1, 4, 6))
    with pytest.raises(ValueError, match=r"kc: expected centroids of 8 columns, got shape \[1, 1, 4, 6\]"):
        clustered(attn.part.select.score, attn.part, rows, seen_keys(attn.part, rows))  # type: ignore[union-attr]
