"""Systems that select blocks, pages, clusters or tokens, each against its published definition in plain float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attncc import reference, spec
from attncc.ir.attention import Attention
from attncc.reference import Outputs

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (("heads: {q: 32, kv: 8}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16"))
SCALE = 16**-0.5


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


def over(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse of one head, q [R, D], over the pairs of a bool [R, Sk]."""
    s = (q @ k.T * SCALE).masked_fill(~keys, -math.inf)
    lse = s.logsumexp(1)
    return torch.exp(s - lse[:, None]) @ v, lse


def agree(got: Outputs, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, b: int = 0) -> None:
    """Sequence b is attention over the pairs keys [H, R, Sk]; k and v are [Hk, Sk, D]."""
    group = len(q) // len(k)
    assert got.lse is not None
    for h in range(len(q)):
        o, lse = over(q[h], k[h // group], v[h // group], keys[h])
        torch.testing.assert_close(got.o[b, h], o, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.lse[b, h], lse, rtol=1e-9, atol=1e-9)


def causal(Sq: int, Sk: int) -> Tensor:
    return torch.arange(Sk)[None] <= torch.arange(Sq)[:, None] + Sk - Sq


def spread(blocks: Tensor, bq: int, bk: int, Sq: int, Sk: int) -> Tensor:
    """A map of blocks as one of pairs."""
    return blocks.repeat_interleave(bq, -2)[..., :Sq, :].repeat_interleave(bk, -1)[..., :Sk]


def blocks(got: Outputs, part: int = 0, b: int = 0) -> Tensor:
    """The blocks that a part selects, bool [H, nq, nk]."""
    found = got.selections[b][part]
    assert found is not None
    return found.classes == 1


def ranked(worth: Any, among: Any) -> list[int]:
    """The best first, the lower number at a tie."""
    return sorted(among, key=lambda c: (-float(worth[c]), c))


def paged(x: Tensor, size: int, lengths: list[int]) -> Tensor:
    """[B, H, S, D] as pages [B * n, size, H, D] in the order of the sequences; NaN behind the end of each."""
    pages: list[Tensor] = []
    for rows, length in zip(x.transpose(1, 2), lengths, strict=True):
        padded = torch.full((-(-x.shape[2] // size) * size, *rows.shape[1:]), math.nan, dtype=x.dtype)
        padded[:length] = rows[:length]
        pages += list(padded.unflatten(0, (-1, size)))
    return torch.stack(pages)


def decode(attn: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], **more: Any) -> Outputs:
    """A call over pages, the first `lengths` keys of each sequence."""
    size = attn.part.kv.page_size or 1
    count = -(-k.shape[2] // size)
    table = torch.arange(len(q) * count, dtype=torch.int32).view(len(q), count)
    pools = [paged(x, size, lengths) for x in (k, v)]
    return reference.outputs(attn, q, *pools, block_table=table, seqused_k=torch.tensor(lengths), **more)


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
