"""Sequences over ranks and prompts over responses: what each composes is the one attention it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from systems.smaller import close, dense, example, normal
from torch import Tensor
from torch.autograd import grad

from attncc import reference
from attncc.ir.attention import Attention
from attncc.ir.stream import Cut
from attncc.reference import ranks
from attncc.reference.combine import merge
from attncc.reference.plans import Chunk, Owned, Pair, contiguous, gathered, packed, ring, zigzag
from attncc.reference.rows import Partial

SMALL = ("heads: {q: 32, kv: 8}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16")
Travel = Callable[[Owned, bool], tuple[Pair, ...]]
worlds = pytest.mark.parametrize("world", [1, 2, 3, 5])


def operands(B: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = normal(B, 4, n, 16), normal(B, 2, n, 16), normal(B, 2, n, 16, seed=1)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def same_gradients(got: Tensor, want: Tensor, leaves: Sequence[Tensor]) -> None:
    d = normal(*want.shape, seed=7)
    for a, b in zip(grad((got * d).sum(), leaves), grad((want * d).sum(), leaves), strict=True):
        close(a, b)


# -- softmax over ranks ------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize(("name", "travel"), [("ring_attention", ring), ("lasp2h", gathered)])
def test_keys_go_round_or_are_gathered(
    name: str, travel: Callable[[Owned, bool], tuple[Pair, ...]], world: int
) -> None:
    attn = example(name, *SMALL)
    q, k, v = operands(2, 17)
    o, lse = ranks.attend(attn, travel(contiguous([17, 17], world), True), q, k, v)
    want, want_lse, _ = dense(q, k, v, lower(17))
    close(o, want)
    close(lse, want_lse)
    same_gradients(torch.cat([o, lse[..., None]], 3), torch.cat([want, want_lse[..., None]], 3), (q, k, v))


@worlds
def test_zigzag_ring(world: int) -> None:
    """A rank's two chunks lie side by side in a call, and their positions are inputs of it."""
    attn = example("zigzag_ring", *SMALL)
    q, k, v = operands(1, 23)
    at = [torch.cat([torch.arange(c.start, c.stop) for c in some]).int() for some in zigzag([23], world)]
    o, lse = torch.zeros_like(q), torch.zeros(1, 4, 23, dtype=q.dtype)
    for rank in range(world):
        made: list[Partial] = []
        for step in range(world):
            mine, theirs = at[rank].long(), at[rank - step].long()
            inputs = {"q_at": at[rank], "k_at": at[rank - step]}
            got = reference.outputs(attn, q[:, :, mine], k[:, :, theirs], v[:, :, theirs], inputs=inputs)
            new = Partial(got.o, got.max_score, got.lse)
            made = [merge([*made, new])]
        (done,) = made
        assert done.lse is not None
        o, lse = o.index_copy(2, at[rank].long(), done.o), lse.index_copy(2, at[rank].long(), done.lse)
    want, want_lse, _ = dense(q, k, v, lower(23))
    close(o, want)
    close(lse, want_lse)
    same_gradients(o, want, (q, k, v))


def test_zeppelin() -> None:
    """Long sequences over all ranks, others over a node or on one rank; a rank's pairs of a step are one call."""
    attn = example("zeppelin", *SMALL)
    sizes, world = [31, 14, 5, 6, 3, 4], 4
    q, k, v = operands(len(sizes), max(sizes))
    pairs = ring(packed(sizes, nodes=2, per_node=2, local=6, inside=16), causal=True)
    parts: dict[Chunk, list[Partial]] = {}
    for rank in range(world):
        for step in range(world):
            now = [p for p in pairs if (p.rank, p.step) == (rank, step)]
            if now:
                for pair, made in zip(now, packed_call(attn, now, q, k, v), strict=True):
                    parts.setdefault(pair.q, []).append(made)
    assert max(p.step for p in pairs) == 3
    leaves, got, want = (q, k, v), [], []
    for n, size in enumerate(sizes):
        mine = sorted((c for c in parts if c.sequence == n), key=lambda c: c.start)
        merged = [merge(parts[c]) for c in mine]
        right, lse, _ = dense(*(x[n, :, :size] for x in leaves), lower(size))
        close(torch.cat([m.o for m in merged], 1), right)
        close(torch.cat([m.lse for m in merged if m.lse is not None], 1), lse)
        got.append(torch.cat([m.o for m in merged], 1))
        want.append(right)
    same_gradients(torch.cat(got, 1), torch.cat(want, 1), leaves)


def packed_call(attn: Attention, pairs: Sequence[Pair], q: Tensor, k: Tensor, v: Tensor) -> list[Partial]:
    """One varlen call for several pairs."""

    def rows(x: Tensor, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        pieces = [x[c.sequence, :, c.start : c.stop].transpose(0, 1) for c in chunks]
        return torch.cat(pieces), torch.tensor([0, *(len(p) for p in pieces)]).cumsum(0)

    queries, cu_q = rows(q, [p.q for p in pairs])
    keys, cu_k = rows(k, [p.k for p in pairs])
    values, _ = rows(v, [p.k for p in pairs])
    inputs = {"offset": torch.tensor([p.offset for p in pairs], dtype=torch.int32)}
    got = reference.outputs(attn, queries, keys, values, inputs=inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert got.lse is not None
    cuts = [slice(a, b) for a, b in pairwise(cu_q.tolist())]
    return [Partial(got.o[c].transpose(0, 1), got.max_score[:, c], got.lse[:, c]) for c in cuts]


# -- LASP-2 ------------------------------------------------------------------------------------------


def lasp2(world: int) -> tuple[Attention, tuple[Tensor, Tensor, Tensor], Tensor, list[tuple[int, int]]]:
    """The example with Dqk 6 and Dv 5, its operands, no state before it, and the cut of 21 tokens."""
    attn = example("lasp2", ("heads: 16", "heads: 3"), ("dims: 128", "dims: {qk: 6, v: 5}"))
    qkv = normal(2, 3, 21, 6), normal(2, 3, 21, 6, seed=1), normal(2, 3, 21, 5)
    zeros = torch.zeros(2, 3, 6, 5, dtype=torch.float64)
    return attn, tuple(x.requires_grad_() for x in qkv), zeros, list(Cut(21, world).bounds())


def linear(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    a = q @ k.mT
    return (a.tril() if causal else a) @ v


@worlds
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lasp2(world: int, causal: bool) -> None:
    attn, qkv, zeros, cuts = lasp2(world)
    state = attn.part.state
    assert state is not None
    if not causal:
        attn = replace(attn, parts=(replace(attn.part, state=replace(state, causal=False)),))
    want = linear(*qkv, causal)
    close(reference.attention(attn, *qkv, inputs={"s0": zeros}), want)
    o, final = ranks.recur(attn, cuts, *qkv, {"s0": zeros})
    close(o, want)
    close(final, qkv[1].mT @ qkv[2])
    same_gradients(o, want, qkv)


@worlds
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lasp2_gathers_one_state_a_rank_in_the_backward_too(world: int, causal: bool) -> None:
    """dM = Q^T dO is gathered; a rank's dK and dV need the sum behind it (without a mask, all of them)."""
    _, qkv, _, cuts = lasp2(world)
    d = normal(2, 3, 21, 5, seed=3)
    local = [tuple(x[:, :, lo:hi].detach() for x in (*qkv, d)) for lo, hi in cuts]
    states = ranks.all_gather([k.mT @ v for _, k, v, _ in local])
    slopes = ranks.all_gather([q.mT @ g for q, _, _, g in local])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    nothing = torch.zeros_like(states[0][0])
    for rank, (q, k, v, g) in enumerate(local):
        before = sum(states[rank][:rank] if causal else states[rank], nothing)
        behind = sum(slopes[rank][rank + 1 :] if causal else slopes[rank], nothing)
        inside = float(causal)  # without a mask the sums have the rank's own part already
        a, da = inside * (q @ k.mT).tril(), inside * (g @ v.mT).tril()
        found.append((da @ k + g @ before.mT, da.mT @ q + v @ behind.mT, a.mT @ g + k @ behind))
    for got, want in zip(zip(*found, strict=True), grad((linear(*qkv, causal) * d).sum(), qkv), strict=True):
        close(torch.cat(got, 2), want)


# -- Prefix Grouper ----------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [[3, 5, 1], [4], [1, 1]])
def test_prefix_grouper(responses: list[int]) -> None:
    """Outputs, a loss averaged over responses, and its gradients, by one full sequence a response."""
    attn = example("prefix_grouper", ("heads: {q: 28, kv: 4}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16"))
    prompt, n = 7, 7 + sum(responses)
    q, k, v = operands(1, n)
    seg = torch.cat([torch.full((m,), g) for g, m in enumerate([prompt, *responses])])
    pos = torch.cat([torch.arange(prompt), *(prompt + torch.arange(m) for m in responses)])
    got = reference.outputs(attn, q, k, v, inputs={"seg": seg[None].int(), "pos": pos[None].int()})
    assert got.lse is not None
    loss, right = torch.zeros((), dtype=q.dtype), torch.zeros((), dtype=q.dtype)
    d, start = normal(1, 4, n, 16, seed=5), prompt
    for m in responses:
        tokens = torch.cat([torch.arange(prompt), torch.arange(start, start + m)])
        o, lse, _ = dense(*(x[:, :, tokens] for x in (q, k, v)), lower(prompt + m))
        mine = slice(start, start + m)
        close(got.o[:, :, :prompt], o[:, :, :prompt])
        close(got.o[:, :, mine], o[:, :, prompt:])
        close(got.lse[:, :, mine], lse[:, :, prompt:])
        scored = slice(prompt - 1, None)  # the prompt's last token predicts each response's first
        right = right + (o[:, :, scored] * d[:, :, tokens][:, :, scored]).sum() / len(responses)
        loss = loss + (got.o[:, :, tokens][:, :, scored] * d[:, :, tokens][:, :, scored]).sum() / len(responses)
        start += m
    for a, b in zip(grad(loss, (q, k, v)), grad(right, (q, k, v)), strict=True):
        close(a, b)


def test_prefix_grouper_is_a_prefix_merged_with_its_responses() -> None:
    """The same rows as `cascade` makes them: no response's copy of the prompt's keys is needed."""
    prompt, responses = 7, [3, 5, 1]
    attn = example("prefix_grouper", ("heads: {q: 28, kv: 4}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16"))
    q, k, v = operands(1, prompt + sum(responses))
    seg = torch.cat([torch.full((m,), g) for g, m in enumerate([prompt, *responses])])
    pos = torch.cat([torch.arange(prompt), *(prompt + torch.arange(m) for m in responses)])
    whole = reference.attention(attn, q, k, v, inputs={"seg": seg[None].int(), "pos": pos[None].int()})
    cascade = example("cascade", *SMALL)
    shared = {"prefix_k": k[:, :, :prompt], "prefix_v": v[:, :, :prompt]}
    for g, m in enumerate(responses, 1):
        mine = seg == g
        one = reference.attention(cascade, q[:, :, mine], k[:, :, mine], v[:, :, mine], inputs=shared)
        assert one.shape[2] == m
        close(one, whole[:, :, mine])
