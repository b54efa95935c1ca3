"""Plans cover each pair once and balance, and what ranks compute is the unpartitioned result, gradients too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad

from attncc import reference
from attncc.errors import Unsupported
from attncc.ir.attention import Align, Attention, Heads
from attncc.ir.stream import Cut
from attncc.reference import ranks
from attncc.reference.plans import Chunk, Owned, Pair, contiguous, gathered, packed, ring, work, zigzag
from attncc.reference.ranks import Affine, affine, prefixes
from attncc.spec import loads

lengths = st.lists(st.integers(0, 23), min_size=1, max_size=4)
worlds = st.integers(1, 7)
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


# -- plans -------------------------------------------------------------------------------------------


def check_cover(pairs: Sequence[Pair], sizes: Sequence[int], causal: bool) -> None:
    seen = Counter(
        (p.q.sequence, i, j)
        for p in pairs
        for i in range(p.q.start, p.q.stop)
        for j in range(p.k.start, p.k.stop)
        if not causal or j <= i
    )
    want = {(n, i, j) for n, s in enumerate(sizes) for i in range(s) for j in range(i + 1 if causal else s)}
    assert seen == Counter(want)
    assert all(p.q.sequence == p.k.sequence for p in pairs)
    assert all(p.seen(causal) for p in pairs), "a pair without anything to see"
    assert sum(p.seen(causal) for p in pairs) == len(want)


def check_owned(owned: Owned, sizes: Sequence[int]) -> None:
    held = Counter((c.sequence, t) for some in owned for c in some for t in range(c.start, c.stop))
    assert held == Counter({(n, t): 1 for n, size in enumerate(sizes) for t in range(size)})


@settings(max_examples=120, deadline=None)
@given(lengths, worlds, st.booleans(), st.sampled_from([contiguous, zigzag]), st.sampled_from([ring, gathered]))
def test_every_pair_is_computed_once(sizes: list[int], world: int, causal: bool, partition: Any, travel: Any) -> None:
    owned = partition(sizes, world)
    check_owned(owned, sizes)
    check_cover(travel(owned, causal), sizes, causal)


@settings(max_examples=120, deadline=None)
@given(lengths, st.integers(1, 3), st.integers(1, 3), st.integers(0, 10), st.integers(0, 12), st.booleans())
def test_packed_sequences_are_computed_once(
    sizes: list[int], nodes: int, per_node: int, local: int, more: int, causal: bool
) -> None:
    owned = packed(sizes, nodes, per_node, local, local + more)
    check_owned(owned, sizes)
    check_cover(ring(owned, causal), sizes, causal)
    for n, size in enumerate(sizes):
        members = {rank for rank, some in enumerate(owned) for c in some if c.sequence == n}
        assert len(members) <= (1 if size <= local else per_node if size <= local + more else nodes * per_node)
        if size <= local + more:
            assert len({rank // per_node for rank in members}) <= 1


@settings(max_examples=80, deadline=None)
@given(worlds, st.integers(1, 60), st.booleans())
def test_in_a_ring_keys_come_from_one_rank_a_step(world: int, size: int, causal: bool) -> None:
    owned = contiguous([size], world)
    owner = {c: rank for rank, some in enumerate(owned) for c in some}
    members = len(owner)
    for pair in ring(owned, causal):
        assert owner[pair.k] == (pair.rank - pair.step) % members
        assert owner[pair.q] == pair.rank


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_zigzag_is_balanced_under_causal_and_the_plain_ring_is_not(world: int) -> None:
    size = 2 * world * 6
    folded, plain = zigzag([size], world), contiguous([size], world)
    assert folded[0] == (Chunk(0, 0, 6), Chunk(0, size - 6, size))
    assert len(set(work(ring(folded, causal=True), world, causal=True))) == 1
    steps = Counter(p.rank for p in ring(plain, causal=True))
    assert [steps[rank] for rank in range(world)] == list(range(1, world + 1))
    for step in range(world):  # and so in each step
        done = work([p for p in ring(folded, causal=True) if p.step == step], world, causal=True)
        assert len(set(done)) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 3), st.integers(1, 3))
def test_the_longest_first_keeps_ranks_near_the_mean(sizes: list[int], nodes: int, per_node: int) -> None:
    """The greedy bound: a rank has at most the mean, a node's share of one sequence, and one more of its own."""
    owned = packed(sizes, nodes, per_node, 20, 30)
    done = work(ring(owned, causal=False), nodes * per_node, causal=False)
    of_node = max((s**2 for s in sizes if s <= 30), default=0) / per_node
    of_rank = max((s**2 for s in sizes if s <= 20), default=0)
    uneven = sum(2 * s for s in sizes if s > 20)  # chunks of one sequence differ by a row each
    assert max(done) <= sum(done) / len(done) + of_node + of_rank + uneven


def test_long_sequences_use_all_ranks_and_short_ones_fill_up() -> None:
    owned = packed([64, 20, 8, 8, 8, 8], nodes=2, per_node=2, local=8, inside=32)
    rings = [{rank for rank, some in enumerate(owned) for c in some if c.sequence == n} for n in range(6)]
    assert rings == [{0, 1, 2, 3}, {0, 1}, {2}, {3}, {2}, {3}]


# -- softmax -----------------------------------------------------------------------------------------

PAIRED = """attncc: 1
name: pairs
heads: {q: 4, kv: 2}
dims: {qk: 8, v: 6}
inputs:
  offset: {shape: [B], dtype: int32}
  bias: {shape: [B, Sq, Sk], grad: true}
score: qk * scale - 0.1 * (i - j) + bias[b, row, j]
align: offset
"""


def paired(causal: bool) -> tuple[Attention, Attention]:
    """The variant of one pair, and of the whole."""
    one = loads(PAIRED + ("mask: causal & window(9)\n" if causal else "")).attention
    return one, replace(one, align=Align("top_left"))


def batch(sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = max(sizes)
    return tuple(
        x.requires_grad_()
        for x in (normal(len(sizes), 4, n, 8), normal(len(sizes), 2, n, 8), normal(len(sizes), 2, n, 6),
                  normal(len(sizes), n, n))
    )  # fmt: skip


PLANS = {
    "ring of 3": lambda sizes, causal: ring(contiguous(sizes, 3), causal),
    "zigzag of 3": lambda sizes, causal: ring(zigzag(sizes, 3), causal),
    "zigzag of 5": lambda sizes, causal: ring(zigzag(sizes, 5), causal),
    "gathered by 3": lambda sizes, causal: gathered(contiguous(sizes, 3), causal),
    "packed on 2 x 3": lambda sizes, causal: ring(packed(sizes, 2, 3, 6, 12), causal),
}


@causal_or_not
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_computes_the_whole(plan: str, causal: bool) -> None:
    sizes = [17, 5, 0, 11]
    one, whole = paired(causal)
    q, k, v, bias = batch(sizes)
    o, lse = ranks.attend(one, PLANS[plan](sizes, causal), q, k, v, {"bias": bias})
    leaves, d = (q, k, v, bias), normal(*o.shape, seed=1)
    outs, targets = [], []
    for n, size in enumerate(sizes):
        operands = [x[n : n + 1, :, :size] for x in (q, k, v)]
        offset = torch.zeros(1, dtype=torch.int32)
        want = reference.outputs(whole, *operands, inputs={"bias": bias[n : n + 1, :size, :size], "offset": offset})
        assert want.lse is not None
        close(o[n : n + 1, :, :size], want.o)
        close(lse[n : n + 1, :, :size], want.lse)
        assert bool((o[n, :, size:] == 0).all())
        assert bool((lse[n, :, size:] == -math.inf).all())
        outs += [want.o, want.lse]
        targets += [d[n : n + 1, :, :size], d[n : n + 1, :, :size, 0]]
    right = grad(sum((x * y).sum() for x, y in zip(outs, targets, strict=True)), leaves)
    finite = torch.where(lse == -math.inf, 0.0, lse)
    for a, b in zip(grad((o * d).sum() + (finite * d[..., 0]).sum(), leaves), right, strict=True):
        close(a, b)


def test_what_pairs_cannot_say_is_refused() -> None:
    _, whole = paired(causal=True)
    q, k, v, bias = batch([4])
    pairs = ring(contiguous([4], 2), causal=True)
    with pytest.raises(Unsupported, match="align"):
        ranks.attend(whole, pairs, q, k, v, {"bias": bias})
    for body, match in (("normalizer: softmax(sink=0.5)\n", "sink"), ("normalizer: sigmoid\n", "log-sum-exp")):
        with pytest.raises(Unsupported, match=match):
            ranks.attend(loads(PAIRED + body).attention, pairs, q, k, v, {"bias": bias})


def test_heads_over_ranks_need_no_merge() -> None:
    attn = loads("attncc: 1\nname: t\nheads: {q: 6, kv: 3}\ndims: 8\nmask: causal\n").attention
    q, k, v = normal(2, 6, 9, 8), normal(2, 3, 9, 8), normal(2, 3, 9, 8)
    want = reference.attention(attn, q, k, v)
    mine = replace(attn, heads=Heads(2, 1, 1))
    parts = [reference.attention(mine, q[:, 2 * r : 2 * r + 2], k[:, r : r + 1], v[:, r : r + 1]) for r in range(3)]
    close(torch.cat(parts, 1), want)


# -- recurrences -------------------------------------------------------------------------------------

RECURRENT = """attncc: 1
name: states
heads: {q: 4, kv: 2}
dims: {qk: 5, v: 3}
inputs:
  s0: {shape: [B, Hq, Dqk, Dv], grad: true}
  g: {shape: [B, Hq, Sk], grad: true}
  gk: {shape: [B, Hk, Sk, Dqk], grad: true}
  beta: {shape: [B, Hk, Sk], grad: true}
normalizer: none
outputs: [o, final_state]
"""
STATES = {
    "sums": "initial: s0",
    "totals": "initial: s0, causal: false",
    "constant decay": "initial: s0, decay: const(-0.1 * (h + 1))",
    "scalar decay": "initial: s0, decay: scalar(g)",
    "vector decay": "initial: s0, decay: vector(gk)",
    "delta": "initial: s0, update: delta(beta)",
    "gated delta": "initial: s0, decay: scalar(g), update: delta(beta)",
}


def recurrent(state: str, tokens: int) -> tuple[Attention, tuple[Tensor, ...], dict[str, Tensor]]:
    attn = loads(f"{RECURRENT}state: {{{STATES[state]}}}\n").attention
    qkv = normal(2, 4, tokens, 5), normal(2, 2, tokens, 5), normal(2, 2, tokens, 3)
    inputs = {"s0": normal(2, 4, 5, 3), "g": -normal(2, 4, tokens).abs(), "gk": -normal(2, 2, tokens, 5).abs()}
    inputs["beta"] = torch.sigmoid(normal(2, 2, tokens))
    return attn, tuple(x.requires_grad_() for x in qkv), {name: x.requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("world", [1, 3, 5])
@pytest.mark.parametrize("state", STATES)
def test_ranks_carry_a_recurrence_on(state: str, world: int) -> None:
    attn, qkv, inputs = recurrent(state, tokens=13)
    want = reference.outputs(attn, *qkv, inputs=inputs)
    o, final = ranks.recur(attn, Cut(13, world).bounds(), *qkv, inputs)
    close(o, want.o)
    close(final, want.taps["final_state"])
    leaves, d, e = [*qkv, *inputs.values()], normal(*o.shape, seed=1), normal(*final.shape, seed=2)
    right = grad((want.o * d).sum() + (want.taps["final_state"] * e).sum(), leaves, allow_unused=True)
    got = grad((o * d).sum() + (final * e).sum(), leaves, allow_unused=True)
    for leaf, a, b in zip(leaves, got, right, strict=True):
        close(torch.zeros_like(leaf) if a is None else a, torch.zeros_like(leaf) if b is None else b)


@pytest.mark.parametrize("state", ["constant decay", "vector decay", "gated delta"])
def test_maps_of_chunks_are_those_of_their_tokens(state: str) -> None:
    """A map is its tokens' maps one after the other, whatever the brackets."""
    attn, (q, k, v), inputs = recurrent(state, tokens=6)
    own = {"s0": inputs["s0"]}

    def over(lo: int, hi: int) -> Affine:
        cut = {name: x[:, :, lo:hi] for name, x in inputs.items() if name not in own}
        return affine(attn, q[:, :, lo:hi], k[:, :, lo:hi], v[:, :, lo:hi], {**own, **cut})

    whole, tokens = over(0, 6), [over(t, t + 1) for t in range(6)]
    by_token = prefixes([*tokens, whole])[-1]
    by_thirds = over(4, 6).after(over(2, 4).after(over(0, 2)))
    other_way = over(4, 6).after(over(2, 4)).after(over(0, 2))
    for one in (by_token, by_thirds, other_way):
        close(one.a, whole.a)
        close(one.s, whole.s)
    if state == "gated delta":  # exp(g) (I - beta k k^T), then beta k v^T
        key, fade, b = k[:, :, :1].repeat_interleave(2, 1), inputs["g"][:, :, 0].exp(), inputs["beta"][:, :, 0]
        b = b.repeat_interleave(2, 1)[..., None, None]
        close(tokens[0].a, fade[..., None, None] * (torch.eye(5, dtype=q.dtype) - b * key.mT @ key))
        close(tokens[0].s, b * key.mT @ v[:, :, :1].repeat_interleave(2, 1))


def test_maps_need_both_ends_of_a_state() -> None:
    attn, qkv, inputs = recurrent("sums", tokens=4)
    with pytest.raises(Unsupported, match="initial"):
        affine(replace(attn, outputs=attn.outputs[:1]), *qkv, inputs)
