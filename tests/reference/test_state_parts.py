"""States over selected keys, and beside other parts: merged by their mass, added through a projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from states import BODIES, DV, HEAD, B, D, H, close, draw, pairs, spec
from torch import Tensor
from torch.nn.functional import elu

from attncc import reference
from attncc.errors import Unsupported
from attncc.ir.attention import Attention
from attncc.reference import sequence as stages
from attncc.reference.operands import Sequence
from attncc.reference.rows import Numbers, Rows, rows_of, scope_of
from attncc.reference.state import attend_state
from attncc.spec import loads


def rows(attn: Attention, q: Tensor, k: Tensor, v: Tensor, x: Mapping[str, Tensor], b: int) -> Rows:
    sizes = {"B": B, "Hq": H, "Hk": 2, "Hv": 1, "Dqk": D, "Dv": DV}
    numbers = Numbers(torch.float64, torch.float64, None, 0, sizes, x)
    sequence = Sequence(b, q[b], k[b], v[b])
    return rows_of(attn, sequence, scope_of(attn, sequence, numbers), numbers)


@pytest.mark.parametrize("body", [BODIES["totals"], "state: {causal: false}\n"], ids=["normalised", "plain"])
def test_a_state_of_chosen_keys(body: str) -> None:
    attn = spec(body)
    q, k, v, x = draw(attn, 4, 6)
    leaves = [t.requires_grad_() for t in (q, k, v, *x.values())]
    chosen = torch.rand(H, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    chosen[1, 2] = False
    expected = pairs(attn, q, k, v, x, 0, chosen)[0]
    for b in range(B):
        got = attend_state(attn, attn.part, replace(rows(attn, q, k, v, x, b), chosen=chosen)).partial
        close(got.o, expected[b])
        w = torch.randn(got.o.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        ours = torch.autograd.grad((got.o * w).sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad((expected[b] * w).sum(), leaves, retain_graph=True)
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other)


def test_nobody_sees_a_key_that_is_not_chosen() -> None:
    attn = spec("state: {feature: relu, causal: false}\nnormalizer: linear(0)\n")
    q, k, v, x = draw(attn, 4, 6)
    chosen = torch.ones(H, 4, 6, dtype=torch.bool)
    chosen[..., 2] = False
    chosen[:2, :, 4] = False  # by some heads alone
    chosen[2, 1] = False
    wild, odd = k.clone(), v.clone()
    wild[:, :, 2], odd[:, :, 2] = math.nan, math.inf
    wild[:, 0, 4] = math.nan
    wild.requires_grad_()
    expected = attend_state(attn, attn.part, replace(rows(attn, q, k, v, x, 0), chosen=chosen)).partial.o
    got = attend_state(attn, attn.part, replace(rows(attn, q, wild, odd, x, 0), chosen=chosen)).partial.o
    close(got, expected)
    assert not bool(got[2, 1].any())
    (gradient,) = torch.autograd.grad(got.sum(), wild)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[0, :, 2].any())


# -- beside other parts ------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "in chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in chunks":
        monkeypatch.setattr(stages, "CHUNK_ELEMENTS", H * 5 * 2)


MERGED = """parts:
  - mask: causal
  - state: {feature: elu1, update: none, initial: s0, initial_mass: z0, scale: 1}
    normalizer: linear(0)
"""


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("massless", [False, True])
def test_a_state_merges_with_softmax_by_its_mass(massless: bool) -> None:
    """Also where there is no mass: then all its share is in the gradient."""
    attn = spec(MERGED)
    q, k, v, x = draw(attn, 5, 5)
    if massless:
        x = {n: torch.zeros_like(t) for n, t in x.items()}
    leaves = [t.requires_grad_() for t in (q, k, v, *x.values())]
    got = reference.outputs(attn, q, k, v, inputs=x)
    mask = torch.ones(5, 5, dtype=torch.float64).tril()
    a = torch.exp(q @ k.repeat_interleave(2, 1).mT / math.sqrt(D)) * mask
    f = elu(q) + 1
    total = a.sum(-1) + (f * x["z0"][:, :, None]).sum(-1)
    expected = (a @ v + f @ x["s0"].repeat_interleave(2, 1)) / total[..., None]
    close(got.o, expected)
    assert got.lse is not None
    close(got.lse, torch.log(total))
    w = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((got.o * w).sum() + got.lse.sum(), leaves)
    theirs = torch.autograd.grad((expected * w).sum() + torch.log(total).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)
    assert bool(ours[3].any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_massless_state_beside_tiny_or_no_weights(dtype: torch.dtype) -> None:
    attn = spec(MERGED.replace("causal", "causal & (i > 1)"))
    q, k, v, x = draw(attn, 5, 5)
    none = {n: torch.zeros_like(t) for n, t in x.items()}
    o = reference.attention(attn, q * 0 + 40, k * 0 - 40, v, inputs=none, dtype=dtype)
    causal = torch.ones(5, 5, dtype=torch.float64).tril()
    causal[:2] = 0
    expected = (causal / causal.sum(-1, keepdim=True).clamp(min=1)) @ v.expand(B, H, -1, -1)
    torch.testing.assert_close(o, expected.to(dtype))


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("shape", [(DV, DV), (H, DV, DV)])
def test_all_parts_but_the_first_are_projected(shape: tuple[int, ...]) -> None:
    axes = "Dv, Dv" if len(shape) == 2 else "Hq, Dv, Dv"
    parts = ["mask: causal", "state: {feature: relu}", "mask: j <= i - 2"]
    text = f"inputs:\n  proj: {{shape: [{axes}]}}\ncombine: add(proj)\nparts:\n" + "".join(
        f"  - {{{p}}}\n" for p in parts
    )
    attn = loads(HEAD + text).attention
    q, k, v, _ = draw(replace(attn, inputs=()), 5, 5)
    proj = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    got = reference.attention(attn, q, k, v, inputs={"proj": proj})
    one, two, three = (reference.attention(loads(f"{HEAD}{p}\n").attention, q, k, v) for p in parts)
    expected = one + torch.einsum("bhrv,hwv->bhrw", two + three, proj.expand(H, DV, DV))
    close(got, expected)
    close(*(torch.autograd.grad(x.square().sum(), proj)[0] for x in (got, expected)))


def test_smoothed_operands_are_refused() -> None:
    attn = spec("state: {feature: relu}\n")
    q, k, v, x = draw(attn, 3, 3)
    smoothed = replace(rows(attn, q, k, v, x, 0), row_term=torch.zeros(H, 3))
    with pytest.raises(Unsupported, match="mean"):
        attend_state(attn, attn.part, smoothed)
