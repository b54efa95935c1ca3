"""Decode and its schedules: fragments of keys computed alone and merged are the whole, for ragged batches and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from systems.smaller import close, dense, example, normal
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention, Heads
from attncc.ir.stream import Fragment, fixups, lines, programs, split_kv, stream_k
from attncc.reference.combine import merge
from attncc.reference.rows import Partial

LENGTHS = [40, 13, 0, 97]
TILE = 8
SMALL = ("heads: {q: 32, kv: 8}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16")


def ragged(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q of one row, k and v padded with NaN, and their lengths."""
    n = max(lengths)
    q, k, v = normal(len(lengths), 4, 1, 16), normal(len(lengths), 2, n, 16), normal(len(lengths), 2, n, 16)
    for x in (k, v):
        for b, length in enumerate(lengths):
            x[b, :, length:] = math.nan
    return q, k, v, torch.tensor(lengths)


def by_fragments(
    attn: Attention, fragments: Sequence[Fragment], q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Each fragment alone, as one program has it; whole lines are stored, others merged from their slots."""
    one = replace(attn, heads=Heads(1, 1, 1))
    o, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)

    def store(line: int, made: Partial) -> None:
        head, b = divmod(line, len(lengths))
        assert made.lse is not None
        o[b, head], lse[b, head] = made.o[0, 0], made.lse[0, 0]

    slots: dict[int, Partial] = {}
    for f in fragments:
        head, b = divmod(f.line, len(lengths))
        keys = slice(f.lo * TILE, min(f.hi * TILE, lengths[b]))
        k1, v1 = (x[b : b + 1, head // 2, None, keys] for x in (k, v))
        out = reference.outputs(one, q[b : b + 1, head, None], k1, v1)
        made = Partial(out.o, out.max_score, out.lse)
        if f.whole:
            store(f.line, made)
        else:
            slots[f.slot] = made
    for line, used in fixups(fragments).items():
        store(line, merge([slots[s] for s in used]))
    return o, lse


def check(attn: Attention, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Against the oracle's whole, and against softmax a sequence at a time."""
    whole = reference.outputs(attn, q, k, v, seqused_k=lengths)
    assert whole.lse is not None
    close(o, whole.o)
    close(lse, whole.lse)
    for b, n in enumerate(lengths.tolist()):
        if n:
            want, want_lse, _ = dense(q[b], k[b, :, :n], v[b, :, :n])
            close(o[b], want)
            close(lse[b], want_lse)
        else:
            assert bool((o[b] == 0).all())
            assert bool((lse[b] == -math.inf).all())


@pytest.mark.parametrize("grid", [1, 2, 5, 7, 26, 79])
def test_lean_attention(grid: int) -> None:
    attn = example("lean_attention", *SMALL)
    assert attn.schedule.name == "stream_k"
    q, k, v, lengths = ragged(LENGTHS)
    fragments = stream_k(lines(LENGTHS, heads=4, tile=TILE), grid)
    check(attn, *by_fragments(attn, fragments, q, k, v, LENGTHS), q, k, v, lengths)


def test_lean_attention_at_its_own_size() -> None:
    attn = example("lean_attention")
    q, k, v = normal(1, 32, 1, 128), normal(1, 8, 300, 128), normal(1, 8, 300, 128)
    close(reference.attention(attn, q, k, v), dense(q, k, v)[0])
    tiles = lines([300], heads=32, tile=64)
    assert len({f.range for f in stream_k(tiles, programs(sum(tiles), 132, 5))}) == 132


def test_split_kv_decode() -> None:
    attn = example("split_kv_decode", *SMALL)
    splits = int(attn.schedule.args[0].value or 0)
    assert (attn.schedule.name, splits) == ("split_kv", 8)
    q, k, v, lengths = ragged(LENGTHS)
    fragments = split_kv(lines(LENGTHS, heads=4, tile=TILE), splits)
    o, lse = by_fragments(attn, fragments, q, k, v, LENGTHS)
    check(attn, o, lse, q, k, v, lengths)
    # a sequence's bits do not depend on its neighbours
    alone = by_fragments(attn, split_kv(lines([97], heads=4, tile=TILE), splits), q[3:], k[3:], v[3:], [97])
    assert torch.equal(alone[0][0], o[3])
    assert torch.equal(alone[1][0], lse[3])


def test_paged_decode() -> None:
    attn = example("paged_decode", *SMALL)
    lengths, pages = [100, 0, 64, 1], [[5, 2], [0, 0], [7, 0], [3, 0]]
    q = normal(4, 4, 1, 16)
    cache_k, cache_v = normal(8, 64, 2, 16), normal(8, 64, 2, 16, seed=1)
    for page, used in ((2, 36), (3, 1), (0, 0), (1, 0), (4, 0), (6, 0)):
        cache_k[page, used:] = math.nan
        cache_v[page, used:] = math.nan
    got = reference.outputs(attn, q, cache_k, cache_v, block_table=torch.tensor(pages), seqused_k=torch.tensor(lengths))
    assert got.lse is not None
    for b, n in enumerate(lengths):
        if not n:
            assert bool((got.o[b] == 0).all())
            continue
        k, v = ([x[pages[b][t // 64], t % 64] for t in range(n)] for x in (cache_k, cache_v))
        want, lse, _ = dense(q[b], torch.stack(k, 1), torch.stack(v, 1))
        close(got.o[b], want)
        close(got.lse[b], lse)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("prefix", [11, 0])
def test_cascade(prefix: int, rows: int) -> None:
    attn = example("cascade", *SMALL)
    q, k, v = normal(3, 4, rows, 16), normal(3, 2, 9, 16), normal(3, 2, 9, 16, seed=1)
    shared = {"prefix_k": normal(1, 2, prefix, 16), "prefix_v": normal(1, 2, prefix, 16, seed=1)}
    got = reference.outputs(attn, q, k, v, inputs=shared)
    all_k, all_v = (torch.cat([s.expand(3, -1, -1, -1), x], 2) for s, x in zip(shared.values(), (k, v), strict=True))
    i, j = torch.arange(rows)[:, None] + 9 - rows + prefix, torch.arange(9 + prefix)[None, :]
    want, lse, _ = dense(q, all_k, all_v, j <= i)
    close(got.o, want)
    assert got.lse is not None
    close(got.lse, lse)
