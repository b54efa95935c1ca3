"""Systems that list pages or tokens for decode, each against its published definition in plain float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from selected import SCALE, agree, blocks, decode, over, ranked
from smaller import normal
from sparse import SMALL, causal, operands, system
from torch import Tensor

# -- LServe and Quest --------------------------------------------------------------------------------


def bounds(q: Tensor, k: Tensor, page: int, sub: int) -> list[float]:
    """The most that a key of each page may score for one query [D], by the extremes of its runs of `sub` keys."""
    worth: list[float] = []
    for keys in k.split(page):
        runs = [(x.amax(0), x.amin(0)) for x in keys.split(sub)]
        worth.append(max(float(torch.maximum(q * hi, q * lo).sum()) for hi, lo in runs))
        assert worth[-1] >= float((keys @ q).max()) - 1e-12
    return worth


def best_pages(q: Tensor, k: Tensor, page: int, sub: int, budget: int) -> set[int]:
    """The best but for the last page, and the last."""
    worth = bounds(q, k, page, sub)
    last = len(worth) - 1
    return {last, *ranked(worth, range(last))[: budget - 1]}


def int4(x: Tensor) -> Tensor:
    """x [..., D] through 4 bits by token: 16 levels from the least to the greatest, zero point not rounded."""
    least, scale = x.amin(-1, keepdim=True), (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    return ((x - least) / scale).round() * scale + least


LSERVE = (*SMALL, ("topk(64)", "topk(8)"))


def lserve_keys(q: Tensor, k: Tensor, streaming: list[bool], page_budget: int = 8) -> Tensor:
    """Which keys of one sequence the query of each head sees [4, 1, N]."""
    N = k.shape[1]
    j, last = torch.arange(N), (N - 1) // 64
    keys = torch.zeros(4, 1, N, dtype=torch.bool)
    for h in range(4):
        pages = best_pages(q[h, 0], k[h // 2], 64, 16, page_budget)
        chosen = torch.isin(j // 64, torch.tensor(sorted(pages)))
        keys[h, 0] = (j < 128) | (j // 64 > last - 5) if streaming[h // 2] else chosen
    return keys


def test_lserve() -> None:
    attn, lengths = system("lserve", *LSERVE), [64 * 20 + 10, 64 * 12]
    q, k, v = operands(attn, 1, max(lengths), B=2)
    for streaming in ([True, False], [False, True]):
        got = decode(attn, q, k, v, lengths, inputs={"streaming": torch.tensor(streaming)})
        for b, N in enumerate(lengths):
            keys = lserve_keys(q[b], k[b, :, :N], streaming)
            assert int(keys[streaming.index(False) * 2].sum()) < 64 * 9
            agree(got, q[b], int4(k[b, :, :N]), int4(v[b, :, :N]), keys, b)


def test_lserve_bounds_keys_as_they_were_before_their_bits() -> None:
    """Statistics of pages are those of keys at full precision: rounded ones would list other pages."""
    attn, N = system("lserve", *LSERVE), 64 * 20
    q, k, v = operands(attn, 1, N)
    k[..., 0] *= 30
    got = decode(attn, q, k, v, [N], inputs={"streaming": torch.tensor([False, False])})
    lists = [best_pages(q[0, h, 0], k[0, h // 2], 64, 16, 8) for h in range(4)]
    assert [set(row[0].nonzero().flatten().tolist()) for row in blocks(got)] == lists
    assert lists != [best_pages(q[0, h, 0], int4(k[0, h // 2]), 64, 16, 8) for h in range(4)]


def test_lserve_lists_pages_at_every_fourth_step() -> None:
    attn, N = system("lserve", *LSERVE), 64 * 15 - 2
    streaming = torch.tensor([False, False])
    q, k, v = operands(attn, 1, N + 4)
    steps = [decode(attn, q, k, v, [N], inputs={"streaming": streaming})]
    for n in range(1, 5):
        before = steps[-1].selections
        steps.append(decode(attn, (-1) ** n * q, k, v, [N + n], inputs={"streaming": streaming}, before=before))
    old, page = blocks(steps[0]), torch.ones(4, 1, 1, dtype=torch.bool)
    assert torch.equal(blocks(steps[1]), old)
    assert torch.equal(blocks(steps[2]), old)  # key N + 2 fills the last page
    assert torch.equal(blocks(steps[3]), torch.cat([old, page], 2))  # the next one opens a page, which is forced
    fresh = [best_pages(q[0, h, 0], k[0, h // 2, : N + 4], 64, 16, 8) for h in range(4)]
    assert [set(row[0].nonzero().flatten().tolist()) for row in blocks(steps[4])] == fresh


def test_lserve_with_a_budget_for_all_is_dense_over_what_the_bits_hold() -> None:
    attn, N = system("lserve", *SMALL), 64 * 30 + 7
    q, k, v = operands(attn, 1, N)
    got = decode(attn, q, k, v, [N], inputs={"streaming": torch.tensor([False, False])})
    agree(got, q[0], int4(k[0]), int4(v[0]), torch.ones(4, 1, N, dtype=torch.bool))


@pytest.mark.parametrize("budget", [5, 64])
def test_quest(budget: int) -> None:
    attn, lengths = system("quest", ("heads: 32", "heads: 4"), SMALL[1], ("topk(64)", f"topk({budget})")), [205, 16, 3]
    q, k, v = operands(attn, 1, max(lengths), B=3)
    got = decode(attn, q, k, v, lengths)
    for b, N in enumerate(lengths):
        keys = torch.zeros(4, 1, N, dtype=torch.bool)
        for h in range(4):
            pages = best_pages(q[b, h, 0], k[b, h, :N], 16, 16, budget)
            keys[h, 0] = torch.tensor([j // 16 in pages for j in range(N)])
        agree(got, q[b], k[b, :, :N], v[b, :, :N], keys, b)


# -- TokenSelect -------------------------------------------------------------------------------------

TOKENSELECT = (
    ("heads: {q: 28, kv: 4}", "heads: {q: 4, kv: 2}"),
    ("dims: 128", "dims: 16"),
    ("q: 512", "q: 7"),
    ("sink(128)", "sink(3)"),
    ("local(512)", "local(7)"),
    ("topk(2048)", "topk(9)"),
)


def tokenselect(q: Tensor, k: Tensor, key_head: Any = lambda h: h // 2) -> list[int]:
    """The list for a chunk q [4, c, D] over k [2, N, D]: the first, those with the most votes, the last."""
    N = k.shape[1]
    if N <= 3 + 9 + 7:
        return list(range(N))
    candidates = list(range(3, N - 7))
    votes = sum((k[key_head(h), candidates] @ q[h].mean(0)).softmax(0) for h in range(4))
    best = ranked(dict(zip(candidates, votes.tolist(), strict=True)), candidates)[:9]  # type: ignore[union-attr]
    return [0, 1, 2, *sorted(best), *range(N - 7, N)]


def rope(x: Tensor, at: range) -> Tensor:
    """Row n of x [R, D] turned to position at[n]: pairs half a head apart, base 1e6."""
    turned, half = torch.empty_like(x), x.shape[1] // 2
    for n, position in enumerate(at):
        for t in range(half):
            angle = position * 1e6 ** (-2 * t / x.shape[1])
            a, b = x[n, t], x[n, t + half]
            turned[n, t], turned[n, t + half] = (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            )
    return turned


@pytest.mark.parametrize("chunk", [1, 5, 7])
def test_tokenselect(chunk: int) -> None:
    attn, lengths = system("tokenselect", *TOKENSELECT), [60, 33, 19]
    q, k, v = operands(attn, chunk, max(lengths), B=3)
    got = decode(attn, q, k, v, lengths)
    assert got.lse is not None
    for b, N in enumerate(lengths):
        chosen = tokenselect(q[b], k[b, :, :N])
        L = len(chosen)
        for h in range(4):
            assert blocks(got, 0, b)[h, 0].nonzero().flatten().tolist() == chosen
            queries = rope(q[b, h], range(L - chunk, L))
            o, lse = over(queries, rope(k[b, h // 2, chosen], range(L)), v[b, h // 2, chosen], causal(chunk, L))
            torch.testing.assert_close(got.o[b, h], o, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got.lse[b, h], lse, rtol=1e-9, atol=1e-9)


def test_tokenselect_votes_with_the_head_that_serves() -> None:
    """h // G; the published kernel and paper score with h mod Hkv, which for grouped heads is another's keys."""
    attn = system("tokenselect", *TOKENSELECT)
    q, k, v = operands(attn, 1, 60)
    chosen = blocks(decode(attn, q, k, v, [60]))[0, 0].nonzero().flatten().tolist()
    assert chosen == tokenselect(q[0], k[0]) != tokenselect(q[0], k[0], lambda h: h % 2)


def test_tokenselect_selects_anew_when_queries_turn() -> None:
    attn = system("tokenselect", *TOKENSELECT)
    q, k, v = operands(attn, 1, 60)
    first = decode(attn, q, k, v, [59])
    near, far = q + 0.2 * normal(*q.shape, seed=5), q + 0.9 * normal(*q.shape, seed=5)
    cosine = lambda x: float(torch.cosine_similarity(x.flatten(), q.flatten(), 0))
    assert cosine(near) > 0.9 > cosine(far)
    kept = set(tokenselect(q[0], k[0, :, :59])[3:-7])
    again = decode(attn, near, k, v, [60], before=first.selections)
    chosen = blocks(again)[0, 0].nonzero().flatten().tolist()
    assert chosen == sorted({0, 1, 2, *kept, *range(53, 60)})  # the window moves, the list stays
    anew = decode(attn, far, k, v, [60], before=first.selections)
    assert blocks(anew)[0, 0].nonzero().flatten().tolist() == tokenselect(far[0], k[0])


# -- DELTA -------------------------------------------------------------------------------------------


def delta(q: Tensor, k: Tensor, budget: int, last: int) -> set[int]:
    """The pages of 16 of one sequence: token by token the greatest weight of any head, summed over a page."""
    N = k.shape[1]
    p = torch.stack([(k[h // 2] @ q[h, 0] * SCALE).softmax(0) for h in range(4)])
    worth = [float(x.sum()) for x in p.amax(0).split(16)]
    count = math.ceil(N / 16)
    must = range(max(0, count - last), count)
    return {*must, *ranked(worth, [c for c in range(count) if c not in must])[: max(0, budget - len(must))]}


def test_delta_and_the_layers_behind_it() -> None:
    attn = system("delta", *SMALL, ("topk(64)", "topk(6)"), ("last_pages(8)", "last_pages(2)"))
    lengths = [16 * 14 + 3, 16 * 9, 40]
    q, k, v = operands(attn, 1, max(lengths), B=3)
    q = 2 * q
    got = decode(attn, q, k, v, lengths)
    later_q, later_k, later_v = operands(attn, 1, max(lengths), B=3, seed=8)
    later = decode(attn, later_q, later_k, later_v, lengths, before=got.selections)
    for b, N in enumerate(lengths):
        pages = delta(q[b], k[b, :, :N], 6, 2)
        keys = torch.tensor([j // 16 in pages for j in range(N)]).expand(4, 1, N)
        agree(got, q[b], k[b, :, :N], v[b, :, :N], keys, b)
        agree(later, later_q[b], later_k[b, :, :N], later_v[b, :, :N], keys, b)
    assert delta(later_q[0], later_k[0], 6, 2) != delta(q[0], k[0], 6, 2)


def test_delta_with_pages_enough_is_dense() -> None:
    attn = system("delta", *SMALL)
    q, k, v = operands(attn, 1, 16 * 60 + 5)
    agree(decode(attn, q, k, v, [965]), q[0], k[0], v[0], torch.ones(4, 1, 965, dtype=torch.bool))


def test_delta_takes_the_first_of_equal_pages() -> None:
    attn = system("delta", *SMALL, ("topk(64)", "topk(3)"), ("last_pages(8)", "last_pages(1)"))
    q, k, v = operands(attn, 1, 16 * 8)
    k = k[:, :, :16].repeat(1, 1, 8, 1)
    assert blocks(decode(attn, q, k, v, [128]))[0, 0].nonzero().flatten().tolist() == [0, 1, 7]
