"""Steps behind attention against dense definitions, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attncc import reference, spec

HEAD = """\
attncc: 1
name: small
heads: {q: 4, kv: 2}
dims: {qk: 8, v: 6}
inputs:
  lam: {shape: [B, Hq], grad: true}
  g: {shape: [B, Hq, Sq], grad: true}
  w: {shape: [Hq, 6, 3], grad: true}
modes: [prefill, backward]
"""


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).softmax(-1) @ v.repeat_interleave(2, 1)


def own(q: Tensor, v: Tensor) -> Tensor:
    """The value of each row's own token: the last rows of the keys, 0 before the first."""
    rows = []
    for r in range(q.shape[2]):
        at = r + v.shape[2] - q.shape[2]
        rows.append(v[:, :, at] if at >= 0 else torch.zeros_like(v[:, :, 0]))
    return torch.stack(rows, 2).repeat_interleave(2, 1)


Definition = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""o, own values, lam [B, H, 1, 1], g [B, H, S, 1] and w in."""
STEPS: dict[str, Definition] = {
    "lerp_v(lam[b, h])": lambda o, v, lam, g, w: (1 - lam) * o + lam * v,
    "lerp_v(0.0)": lambda o, v, lam, g, w: o,
    "lerp_v(1.0)": lambda o, v, lam, g, w: v,
    "gate(sigmoid(g[b, h, row]))": lambda o, v, lam, g, w: o / (1 + torch.exp(-g)),
    "skip(g[b, h, row])": lambda o, v, lam, g, w: o + g * v,
    "absorb(w)": lambda o, v, lam, g, w: torch.einsum("bhsr,hrd->bhsd", o, w),
    "gate(2.0); skip(1.0); absorb(w)": lambda o, v, lam, g, w: (2 * o + v) @ w,
    "skip(1.0); gate(2.0)": lambda o, v, lam, g, w: 2 * (o + v),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("Sq", "Sk"), [(7, 7), (3, 7), (7, 4)])
def test_a_step_and_its_gradients(steps: str, Sq: int, Sk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attn = spec.loads(HEAD + "epilogue:\n" + "".join(f"- {s}\n" for s in steps.split("; "))).attention
    q, k, v = normal(2, 4, Sq, 8), normal(2, 2, Sk, 8, seed=1), normal(2, 2, Sk, 6, seed=2)
    inputs = {"lam": normal(2, 4), "g": normal(2, 4, Sq), "w": normal(4, 6, 3)}
    lam, g, w = inputs["lam"][..., None, None], inputs["g"][..., None], inputs["w"]
    expected = STEPS[steps](dense(q, k, v), own(q, v), lam, g, w)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    leaves = [q, k, v, *inputs.values()]
    right = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    for chunk in (2**23, 50):  # all rows at once, and few at a time
        monkeypatch.setattr("attncc.reference.sequence.CHUNK_ELEMENTS", chunk)
        o = reference.outputs(attn, q, k, v, inputs=inputs).o
        torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
        found = torch.autograd.grad((o * weight).sum(), leaves, allow_unused=True)
        for x, got, grad in zip(leaves, found, right, strict=True):
            torch.testing.assert_close(torch.zeros_like(x) if got is None else got,
                                       torch.zeros_like(x) if grad is None else grad, rtol=1e-9, atol=1e-9)  # fmt: skip


def test_a_weight_of_0_leaves_every_bit() -> None:
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 6)
    inputs = {"lam": torch.zeros(2, 4), "g": normal(2, 4, 5), "w": normal(4, 6, 3)}
    plain = reference.outputs(spec.loads(HEAD).attention, q, k, v, inputs=inputs)
    drawn = reference.outputs(spec.loads(HEAD + 'epilogue: ["lerp_v(lam[b, h])"]\n').attention, q, k, v, inputs=inputs)
    assert torch.equal(plain.o, drawn.o)
    torch.testing.assert_close(plain.lse, drawn.lse, rtol=0, atol=0)


def test_packed_rows_behind_the_last_sequence_are_as_wide_as_the_output() -> None:
    attn = spec.loads(HEAD + "layout: varlen\nepilogue: [absorb(w)]\n").attention
    q, k, v = normal(9, 4, 8), normal(6, 2, 8), normal(6, 2, 6)
    inputs = {"lam": normal(2, 4), "g": normal(2, 4, 9), "w": normal(4, 6, 3)}
    cu_q, cu_k = torch.tensor([0, 3, 7]), torch.tensor([0, 2, 6])
    o = reference.outputs(attn, q, k, v, inputs=inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k).o
    assert o.shape == (9, 4, 3)
    assert bool((o[7:] == 0).all())
    one = dense(*(x.transpose(0, 1)[None] for x in (q[3:7], k[2:6], v[2:6]))) @ inputs["w"]
    torch.testing.assert_close(o[3:7], one[0].transpose(0, 1), rtol=1e-9, atol=1e-9)
