"""Methods that read the weights: retrieval, pruning, eviction and pair values, each by its own definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from systems.smaller import close, dense, example, normal
from torch import Tensor
from torch.autograd import grad

from attncc import reference

# -- InfiniRetri -------------------------------------------------------------------------------------

CHUNK, QUESTION, WIDTH = 30, 6, 8


def box(x: Tensor) -> Tensor:
    """Sums of WIDTH neighbours with zeros outside, as scipy centres an even width: c - 4 to c + 3."""
    n = x.shape[-1]
    return torch.stack([x[..., max(c - 4, 0) : min(c + 4, n)].sum(-1) for c in range(n)], -1)


def test_the_box_is_centred_as_convolution_centres_it() -> None:
    x = normal(19)
    np.testing.assert_allclose(box(x).numpy(), np.convolve(x.numpy(), np.ones(WIDTH), mode="same"), atol=1e-12)


def test_infiniretri() -> None:
    """Two chunks of the text before the question; the row weights come from the first, and count twice."""
    attn = example("infiniretri", ("heads: {q: 14, kv: 2}", "heads: {q: 6, kv: 2}"), ("dims: 64", "dims: 16"))
    n = CHUNK + QUESTION
    question = torch.arange(n)[None] >= CHUNK
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    row_weight = None
    for chunk in range(2):
        q, k, v = (normal(1, h, n, 16, seed=10 * chunk + s) for s, h in enumerate((6, 2, 2)))
        first = reference.outputs(attn, q, k, v, inputs={"w2": torch.zeros(1, n), "question": question})
        if row_weight is None:
            row_weight = first.taps["row_mass"].sum(1)[0, CHUNK:]
        w2 = torch.zeros(1, n, dtype=q.dtype)
        w2[0, CHUNK:] = row_weight**2
        got = reference.outputs(attn, q, k, v, inputs={"w2": w2, "question": question})
        found = box(got.taps["column_mass"].sum(1)[0, :CHUNK])

        p = dense(q, k, v, causal)[2][0]
        if chunk == 0:
            weight = [sum(p[h, r, c].item() for h in range(6) for c in range(CHUNK, n)) for r in range(CHUNK, n)]
        a = p.sum(0)[CHUNK:, :CHUNK]
        want = sum(weight[r] * weight[r] * box(a[r]) for r in range(QUESTION))
        assert isinstance(want, Tensor)
        close(found, want)
        assert found.topk(5).indices.tolist() == want.topk(5).indices.tolist()


# -- vision ------------------------------------------------------------------------------------------


def test_eet() -> None:
    """Tokens by the class row of each head, weighted by that head's share of the output's norm."""
    attn = example("eet")
    q, k, v = (normal(2, 6, 17, 64, seed=s).requires_grad_() for s in range(3))
    got = reference.outputs(attn, q, k, v)
    norm = got.o[:, :, 0].norm(dim=-1)
    found = ((norm / norm.sum(1, keepdim=True))[..., None] * got.taps["column_mass"]).sum(1)

    want = torch.zeros(2, 17, dtype=q.dtype)
    o, _, p = dense(q, k, v)
    for b in range(2):
        norms = [o[b, h, 0].square().sum().sqrt() for h in range(6)]
        want[b] = sum(norms[h] / sum(norms) * p[b, h, 0] for h in range(6))
    close(found, want)
    close(found.sum(1), torch.ones(2, dtype=q.dtype))
    d = normal(2, 17, seed=9)
    for a, b in zip(grad((found * d).sum(), (q, k, v)), grad((want * d).sum(), (q, k, v)), strict=True):
        close(a, b)


def test_evitpose() -> None:
    """Patches by what 17 joint tokens pay them; the kept ones alone attend like the dense rest masked."""
    attn = example("evitpose")
    q, k, v = (normal(1, 12, 17 + 24, 64, seed=s) for s in range(3))
    got = reference.outputs(attn, q, k, v)
    o, _, p = dense(q, k, v)
    close(got.o, o)
    want = torch.stack([p[0, h, :17].sum(0) for h in range(12)])
    close(got.taps["column_mass"][0], want)
    kept = got.taps["column_mass"][0, :, 17:].sum(0).topk(10).indices + 17
    assert set(kept.tolist()) == set((want[:, 17:].sum(0).topk(10).indices + 17).tolist())
    tokens = torch.cat([torch.arange(17), kept])
    seen = torch.isin(torch.arange(41), tokens)[None, :]
    pruned = reference.attention(attn, *(x[:, :, tokens] for x in (q, k, v)))
    close(pruned, dense(q, k, v, seen)[0][:, :, tokens])


def test_unitranspose() -> None:
    attn = example("unitranspose", ("heads: 3", "heads: 2"))
    joints, side = 17, 6
    cell = torch.arange(side * side)
    of_patch = (cell // side // 3) * 2 + cell % side // 3  # windows of 3 x 3
    window_of = torch.cat([torch.full((joints,), -1), of_patch]).int()
    n = joints + side * side
    q, k, v = (normal(1, 2, n, 32, seed=s).requires_grad_() for s in range(3))
    got = reference.attention(attn, q, k, v, inputs={"window_of": window_of})
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            y, x = divmod(i - joints, side)
            y2, x2 = divmod(j - joints, side)
            seen[i, j] = i < joints or j < joints or (y // 3, x // 3) == (y2 // 3, x2 // 3)
    want = dense(q, k, v, seen)[0]
    close(got, want)
    d = normal(*want.shape, seed=9)
    for a, b in zip(grad((got * d).sum(), (q, k, v)), grad((want * d).sum(), (q, k, v)), strict=True):
        close(a, b)


# -- invariant point attention -----------------------------------------------------------------------


def points(attn_q: Tensor, attn_k: Tensor, q: Tensor, k: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of 29 columns: what their product is, is IPA's logit but for |q|^2, one number a row."""
    content, distance = math.sqrt(1 / 3 / 16), gamma * math.sqrt(2 / 27 / 4)
    ones = torch.ones_like(q[..., 0, :1])
    query = [content * attn_q, distance[:, None, None] * q.flatten(-2), distance[:, None, None] * ones]
    key = [attn_k, k.flatten(-2), -0.5 * k.square().sum((-2, -1))[..., None]]
    return torch.cat(query, -1), torch.cat(key, -1)


def test_ipa_pair_bias() -> None:
    """sqrt(1/3c) q k + sqrt(1/3) b - gamma/2 sqrt(2/27P) sum_p |q_p - k_p|^2; values, value points, pair values."""
    attn = example("ipa_pair_bias")
    n, heads, C = 9, 12, 5
    leaves = (
        *(normal(1, heads, n, 16, seed=s).requires_grad_() for s in (0, 1)),
        *(normal(1, heads, n, 4, 3, seed=s).requires_grad_() for s in (2, 3)),
        normal(1, heads, n, 16, seed=4).requires_grad_(),
        normal(1, heads, n, 8, 3, seed=5).requires_grad_(),
        normal(1, heads, n, n).requires_grad_(),
        normal(1, n, n, C).requires_grad_(),
        normal(heads).abs().requires_grad_(),
    )
    cq, ck, pq, pk, cv, pv, bias, z, gamma = leaves
    present = torch.arange(n)[None] < 7
    query, key = points(cq, ck, pq, pk, gamma)
    value = torch.cat([cv, pv.flatten(-2)], -1)
    inputs = {"bias": bias * math.sqrt(1 / 3), "z": z, "present": present}
    got = reference.outputs(attn, query, key, value, inputs=inputs)

    logits = torch.zeros(1, heads, n, n, dtype=query.dtype)
    for i in range(n):
        for j in range(n):
            far = (pq[:, :, i] - pk[:, :, j]).square().sum((-2, -1))
            s = math.sqrt(1 / 48) * (cq[:, :, i] * ck[:, :, j]).sum(-1) + math.sqrt(1 / 3) * bias[:, :, i, j]
            logits[:, :, i, j] = s - 0.5 * gamma * math.sqrt(2 / 108) * far
    p = torch.softmax(torch.where(present[0], logits, -math.inf), -1)
    content = torch.einsum("bhij,bhjc->bhic", p, cv)
    at = torch.einsum("bhij,bhjpx->bhipx", p, pv)
    pair = torch.einsum("bhij,bijc->bhic", p, z)
    close(got.o, torch.cat([content, at.flatten(-2)], -1))
    close(got.taps["pair_value"], pair)
    d, e = normal(*got.o.shape, seed=7), normal(*pair.shape, seed=8)
    right = grad((torch.cat([content, at.flatten(-2)], -1) * d).sum() + (pair * e).sum(), leaves)
    for a, b in zip(grad((got.o * d).sum() + (got.taps["pair_value"] * e).sum(), leaves), right, strict=True):
        close(a, b)


# -- eviction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [5, 11])
def test_h2o(prompt: int) -> None:
    """What keys draw in a prompt and then token by token is what they draw in the whole."""
    attn = example("h2o", ("heads: {q: 32, kv: 8}", "heads: {q: 4, kv: 2}"), ("dims: 128", "dims: 16"))
    n = 12
    q, k, v = normal(1, 4, n, 16), normal(1, 2, n, 16), normal(1, 2, n, 16, seed=1)

    def mass(start: int, stop: int) -> Tensor:
        """What the rows [start, stop) pay the keys before `stop`."""
        got = reference.outputs(attn, q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]).taps["column_mass"]
        return torch.nn.functional.pad(got[0], (0, n - stop))

    drawn = mass(0, prompt)
    for t in range(prompt, n):
        drawn = drawn + mass(t, t + 1)
    p = dense(q, k, v, torch.ones(n, n, dtype=torch.bool).tril())[2][0]
    close(drawn, p.sum(1))
