"""Kernels of bf16 that multiply codes as f16, by Triton's interpreter: against the oracle, and where f16 would end.

bf16 is fp32 in the interpreter, but what is multiplied here is f16, as on a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from codegen.emitted import Package, package, passes
from torch import Tensor

from attncc.check.cases import Case

HEAD = "heads: {q: 4, kv: 2}\ndims: 64\ndtype: bf16\nmask: causal\n"
FORMS = ["int8(per=token)", "int8(per=token, symmetric=false)", "int4(per=token)", "int4(per=head, symmetric=false)"]
SCORES = {
    "plain": "",
    "softcap": "score: softcap(qk * scale, 3)\n",
    "keys that heads see": "mask: (j <= i) & (h != j)\n",
}
KEYS = 70


def cache(form: str, more: str = "") -> Package:
    head = HEAD.replace("mask: causal\n", "") if "mask" in more else HEAD
    return package(f"{head}{more}quantize: {{cache: '{form}'}}").tiles(8, 16, split=1, fill=12)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("form", FORMS)
def test_caches_of_bf16(form: str, score: str) -> None:
    p = cache(form, SCORES[score])
    text = (p.path / "kernels.py").read_text()
    assert "tl.float16" in text
    assert ("q_unit[:, None]" in text) == (score == "softcap")
    passes(p, Case(3, 2, KEYS), Case(2, 2, KEYS, "large_logits"))


def given(factors: Tensor) -> dict[str, Tensor]:
    """A call of two queries over int8; the scale of each value times a factor [KEYS]."""
    g = torch.Generator().manual_seed(0)
    codes = {x: torch.randint(-127, 128, (2, 2, KEYS, 64), generator=g, dtype=torch.int8) for x in "kv"}
    scales = {f"{x}_scales": (0.8 + 0.4 * torch.rand(2, 2, KEYS, generator=g)) / 73 for x in "kv"}
    scales["v_scales"] = scales["v_scales"] * factors
    return {"q": torch.randn(2, 4, 2, 64, generator=g).bfloat16(), **codes, **scales}


def wanted(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    k, v = ((x[t].double() * x[f"{t}_scales"].double()[..., None]).repeat_interleave(2, 1) for t in "kv")
    seen = torch.ones(2, KEYS, dtype=torch.bool).tril(KEYS - 2)
    s = (x["q"].double() @ k.mT / 8).masked_fill(~seen, -math.inf)
    shares = s.softmax(-1)
    return torch.where(seen[..., None], shares[..., None] * v[:, :, None], 0.0).sum(-2), s.logsumexp(-1)


def close(x: dict[str, Tensor], rows: slice = slice(None)) -> None:
    """Within what rounding the output to bf16 costs."""
    o, lse = cache("int8(per=token)").module.attention(**x, return_lse=True)
    want, want_lse = (t[:, :, rows] for t in wanted(x))
    off = (o[:, :, rows].double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.max() < 4e-3
    assert ((lse[:, :, rows].double() - want_lse).abs() < 1e-4 + 1e-6 * want_lse.abs()).all()


@pytest.mark.parametrize("power", [-90, -30, 0, 30, 90])
def test_scales_of_any_size(power: int) -> None:
    close(given(torch.full((KEYS,), 2.0**power)))


def test_scales_of_all_sizes() -> None:
    """The greatest come first, in the midst and last: what is added before and behind them keeps its digits."""
    near = torch.randint(-12, 13, (KEYS,), generator=torch.Generator().manual_seed(1))
    close(given(2.0**near))
    for at in (0, 35, KEYS - 1):
        far = torch.ones(KEYS)
        far[at] = 2.0**60
        close(given(far))


@pytest.mark.parametrize("scale", [math.nan, math.inf, 2.0**100])
def test_scales_that_a_row_does_not_see(scale: float) -> None:
    """The last key is seen by the second query alone."""
    factors = torch.ones(KEYS)
    factors[-1] = scale
    close(given(factors), slice(0, 1))


@pytest.mark.parametrize("power", [-120, -40, 0, 40])
def test_queries_of_any_size(power: int) -> None:
    """Beside a row of zeros, and one whose columns differ."""
    x = given(torch.ones(KEYS))
    x["q"][:, 0] *= 2.0**power
    x["q"][:, 1] = 0
    x["q"][:, 2, :, ::2] *= 2.0**-20
    close(x)
