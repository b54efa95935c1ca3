"""Gradients of the oracle: checked numerically in float64, and free of NaN whatever hides in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import b, h, i, j, plain, qk, row, scale
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention, Call, Dims, Heads, Input, Normalizer, Part
from attncc.ir.expr import const, ew, load, maximum, where


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


INPUTS = (Input("bias", ("B", 1, "Sq", "Sk"), grad=True), Input("slope", ("Hq",), grad=True))
SMALL = {"heads": Heads(2, 1, 1), "dims": Dims(3, 2)}

VARIANTS: dict[str, Attention] = {
    "plain": plain(**SMALL),
    "causal": plain(mask=j <= i, **SMALL),
    "bias": plain(score=qk * scale + load("bias", b, h, row, j), mask=j <= i, inputs=INPUTS, **SMALL),
    "softcap": plain(score=ew("tanh", qk * scale) * 3.0, mask=j <= i, **SMALL),
    "slopes": plain(score=qk * scale - load("slope", h) * ew("abs", i - j), inputs=INPUTS, **SMALL),
    "sink": plain(normalizer=Normalizer(sink=load("slope", h)), mask=j <= i, inputs=INPUTS, **SMALL),
    "sigmoid": plain(normalizer=Normalizer("sigmoid"), mask=j <= i, **SMALL),
    "none": plain(normalizer=Normalizer("none"), mask=j <= i, **SMALL),
    "linear": plain(score=ew("exp", qk), normalizer=Normalizer("linear", eps=0.5), mask=j <= i, **SMALL),
    "column_softmax": plain(normalizer=Normalizer("column_softmax"), mask=j <= i, **SMALL),
    "dropout": plain(dropout=0.3, mask=j <= i, **SMALL),
    "log distance": plain(score=qk * scale + ew("log", (i - j) * 1.0), mask=j < i, **SMALL),
    "two parts": replace(
        plain(**SMALL),
        parts=(Part(qk * scale, j <= i, Normalizer(sink=const(0.5))), Part(qk * 2.0, j > i)),
    ),
    "lerp": replace(
        plain(inputs=INPUTS, **SMALL),
        parts=(Part(qk * scale, j <= i), Part(qk, normalizer=Normalizer("sigmoid"))),
        combine=Call("lerp", (load("slope", h),)),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    attn = VARIANTS[variant]
    inputs = {x.name: normal(*({"bias": (2, 1, 3, 4), "slope": (2,)}[x.name])).requires_grad_() for x in attn.inputs}
    q, k, v = (normal(2, n, s, d).requires_grad_() for n, s, d in ((2, 3, 3), (1, 4, 3), (1, 4, 2)))
    wants_lse = attn.parts[0].normalizer.kind == "softmax" and attn.combine.name == "lse"

    def f(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        given = dict(zip(inputs, rest, strict=True))
        if not wants_lse:
            return reference.attention(attn, q, k, v, inputs=given)
        o, lse = reference.attention(attn, q, k, v, inputs=given, return_lse=True)
        return o, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(f, (q, k, v, *inputs.values()))


def test_second_derivatives() -> None:
    attn = VARIANTS["causal"]
    operands = tuple(normal(1, n, s, d).requires_grad_() for n, s, d in ((2, 2, 3), (1, 3, 3), (1, 3, 2)))
    assert torch.autograd.gradgradcheck(lambda q, k, v: reference.attention(attn, q, k, v), operands)


KINDS = [Normalizer(), Normalizer("sigmoid"), Normalizer("linear", eps=0.1), Normalizer("column_softmax")]


@pytest.mark.parametrize("normalizer", KINDS, ids=lambda n: n.kind)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_hidden_memory_reaches_neither_outputs_nor_gradients(poison: float, normalizer: Normalizer) -> None:
    """Keys that nobody sees, rows that see nothing, and bias entries behind the mask are all poisoned."""
    score = ew("exp", qk * scale) + load("bias", b, h, row, j)
    mask = (j <= i) & (j < 4) & ew("ne", row, 1)
    attn = plain(score=score, mask=mask, normalizer=normalizer, inputs=INPUTS[:1])
    q, k, v = normal(1, 4, 5, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 8)
    bias = normal(1, 1, 5, 6)
    clean = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    q[:, :, 1], k[:, :, 4:], v[:, :, 4:] = poison, poison, poison
    seen = (torch.arange(6) <= torch.arange(1, 6)[:, None]) & (torch.arange(6) < 4) & (torch.arange(5) != 1)[:, None]
    bias[:, :, ~seen] = poison
    dirty = [x.requires_grad_() for x in (q, k, v, bias)]
    outputs = [reference.attention(attn, *x[:3], inputs={"bias": x[3]}) for x in (clean, dirty)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(o.square().sum(), x) for o, x in zip(outputs, (clean, dirty), strict=True)]
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_bad_value_reaches_the_rows_that_see_it_alone() -> None:
    attn = plain(mask=j <= i)
    q, k, v = normal(1, 4, 6, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 8)
    good = reference.attention(attn, q, k, v)
    v[0, 0, 3, 5] = math.nan
    o = reference.attention(attn, q, k, v)
    hit = torch.zeros_like(o, dtype=torch.bool)
    hit[0, :2, 3:, 5] = True
    assert torch.equal(o.isnan(), hit)
    torch.testing.assert_close(o[~hit], good[~hit])


@pytest.mark.parametrize(
    "score",
    [
        qk * scale + ew("log", (i - j) * 1.0),
        qk * scale / ((i - j) * 1.0),
        qk * ew("sqrt", (i - j) * 1.0),
        qk * ew("rsqrt", (i - j) * 1.0),
        ew("log", maximum(qk, 0.1)) * ew("log2", (i - j) * 1.0),
        where(j < i, qk, ew("log", -ew("abs", qk))),
    ],
    ids=range(6),
)
def test_formulas_undefined_behind_the_mask(score: Any) -> None:
    attn = plain(score=score, mask=j < i)
    q, k, v = (normal(1, n, 6, 8).requires_grad_() for n in (4, 2, 2))
    o = reference.attention(attn, q, k, v)
    assert bool(o.isfinite().all())
    assert bool((o[:, :, 0] == 0).all())
    for gradient in torch.autograd.grad(o.sum(), (q, k, v)):
        assert bool(gradient.isfinite().all())
        assert bool(gradient.ne(0).any())


def test_without_gradients_the_values_are_the_same() -> None:
    for attn in (VARIANTS["causal"], VARIANTS["log distance"], VARIANTS["linear"], VARIANTS["two parts"]):
        q, k, v = (normal(2, n, s, d).requires_grad_() for n, s, d in ((2, 3, 3), (1, 4, 3), (1, 4, 2)))
        tracked = reference.attention(attn, q, k, v)
        with torch.no_grad():
            torch.testing.assert_close(reference.attention(attn, q, k, v), tracked.detach(), rtol=0, atol=0)


def test_gradient_of_the_scale() -> None:
    q, k, v = (normal(1, n, 5, 8) for n in (4, 2, 2))
    s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: reference.attention(plain(mask=j <= i), q, k, v, scale=s), (s,))
