"""The acceptance rule: it accepts eager torch and better, and catches what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from naive import i, j, plain, qk, scale
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Dims, Heads, Normalizer, Quantizer
from attncc.reference.acceptance import distance, judge

ATTN = plain(mask=j <= i, heads=Heads(4, 2, 2), dims=Dims(32, 32))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def operands(dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, n, 48, 32, generator=generator).to(dtype) for n in (4, 2, 2))
    return q * gain, k, v


@pytest.mark.parametrize("gain", [1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_and_float32_are_accepted(dtype: torch.dtype, gain: float) -> None:
    q, k, v = operands(dtype, gain)
    for computing in (None, torch.float32, torch.float64):
        o, lse = reference.attention(ATTN, q, k, v, dtype=computing, return_lse=True)
        agreement = reference.acceptance((o.to(dtype), lse.float()), ATTN, q, k, v)
        assert agreement.ok, str(agreement)
        assert [d.output for d in agreement.deviations] == ["o", "lse"]


FAULTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "scaled": lambda o, lse: (o * 1.1, lse),
    "one element": lambda o, lse: (_with(o, (0, 0, 3, 5), 9.0), lse),
    "NaN": lambda o, lse: (_with(o, (1, 1, 0, 0), math.nan), lse),
    "infinity": lambda o, lse: (_with(o, (1, 1, 0, 0), math.inf), lse),
    "lse in units of log 2": lambda o, lse: (o, lse / math.log(2)),
    "lse of an empty row": lambda o, lse: (o, _with(lse, (0, 0, 4), -math.inf)),
    "lse NaN": lambda o, lse: (o, _with(lse, (0, 0, 4), math.nan)),
    "heads swapped": lambda o, lse: (o.flip(1), lse.flip(1)),
    "last key dropped": lambda o, lse: (_shift(o), lse),
    "zeros": lambda o, lse: (torch.zeros_like(o), lse),
}


def _with(x: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


def _shift(o: Tensor) -> Tensor:
    return torch.cat([o[:, :, :1], o[:, :, :-1]], 2)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_are_caught(dtype: torch.dtype, fault: str) -> None:
    q, k, v = operands(dtype)
    o, lse = reference.attention(ATTN, q, k, v, dtype=torch.float32, return_lse=True)
    agreement = reference.acceptance(FAULTS[fault](o.to(dtype), lse), ATTN, q, k, v)
    assert not agreement.ok
    assert "WRONG" in str(agreement)


def test_a_missing_mask_is_caught() -> None:
    q, k, v = operands(torch.bfloat16)
    o = reference.attention(plain(heads=ATTN.heads, dims=ATTN.dims), q, k, v, dtype=torch.float32)
    assert not reference.acceptance(o, ATTN, q, k, v).ok


def test_empty_rows_must_be_zero() -> None:
    attn = plain(mask=(j <= i) & (i > 5), heads=ATTN.heads, dims=ATTN.dims)
    q, k, v = operands(torch.bfloat16)
    o, lse = reference.attention(attn, q, k, v, dtype=torch.float32, return_lse=True)
    assert reference.acceptance((o, lse), attn, q, k, v).ok
    assert not reference.acceptance((_with(o, (0, 0, 0, 0), 1.0), lse), attn, q, k, v).ok
    assert not reference.acceptance((o, _with(lse, (0, 0, 0), -1e30)), attn, q, k, v).ok


def test_the_rule_keeps_its_teeth_where_eager_overflows() -> None:
    """float16 products beyond 65504 are infinite in eager torch: that must not excuse everything."""
    attn = plain(score=qk * scale * 1e-4, heads=ATTN.heads, dims=ATTN.dims)
    q, k, v = operands(torch.float16)
    q, k = q * 300, k * 300
    assert not bool(reference.attention(attn, q, k, v, dtype=None).isfinite().all())
    o = reference.attention(attn, q, k, v, dtype=torch.float32)
    assert reference.acceptance(o.half(), attn, q, k, v).ok
    assert not reference.acceptance(o * 1.05, attn, q, k, v).ok


def test_other_normalizers_have_one_output() -> None:
    attn = plain(normalizer=Normalizer("sigmoid"), heads=ATTN.heads, dims=ATTN.dims)
    q, k, v = operands(torch.bfloat16)
    agreement = reference.acceptance(reference.attention(attn, q, k, v, dtype=torch.float32), attn, q, k, v)
    assert agreement.ok
    assert len(agreement.deviations) == 1


WEIGHTS = replace(ATTN, quantize=(Quantizer("p", "fp8_e4m3"),))


def test_weights_may_be_rounded_as_eagerly_as_their_format() -> None:
    """Relative to another weight of the row, or not at all: both are as near to what is not rounded."""
    q, k, v = operands(torch.float32)
    for attn in (ATTN, WEIGHTS):
        for computing in (None, torch.float64):
            o = reference.attention(attn, q, k, v, dtype=computing).float()
            assert reference.acceptance(o, WEIGHTS, q, k, v).ok


@pytest.mark.parametrize("form", ["int4", "nvfp4"])
def test_weights_of_fewer_bits_are_caught(form: str) -> None:
    q, k, v = operands(torch.float32)
    coarse = replace(ATTN, quantize=(Quantizer("p", form),))
    assert not reference.acceptance(reference.attention(coarse, q, k, v).float(), WEIGHTS, q, k, v).ok
    assert not reference.acceptance(reference.attention(WEIGHTS, q, k, v).float(), ATTN, q, k, v).ok


@pytest.mark.parametrize("fault", FAULTS)
def test_rounded_weights_excuse_no_fault(fault: str) -> None:
    q, k, v = operands(torch.float32)
    o, lse = reference.attention(WEIGHTS, q, k, v, dtype=torch.float32, return_lse=True)
    assert not reference.acceptance(FAULTS[fault](o, lse), WEIGHTS, q, k, v).ok


def test_wrong_shapes_are_an_error_not_a_deviation() -> None:
    q, k, v = operands(torch.bfloat16)
    with pytest.raises(ValueError, match="o: expected shape"):
        reference.acceptance(torch.zeros(2, 4, 48, 1), ATTN, q, k, v)


def test_atol_is_the_callers_where_given() -> None:
    exact, got = torch.zeros(3), torch.tensor([0.0, 1e-2, 0.0])
    assert judge("x", got, exact, exact, torch.float32, atol=1e-2 + 1e-6).ok
    assert not judge("x", got, exact, exact, torch.float32, atol=1e-3).ok
    assert not judge("x", got, exact, exact, torch.float32).ok


@pytest.mark.parametrize(
    ("got", "exact", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.inf], [math.inf], 0.0),
        ([-math.inf], [math.inf], math.inf),
        ([math.nan], [math.nan], 0.0),
        ([math.nan], [0.0], math.inf),
        ([0.0], [math.nan], math.inf),
        ([1e30], [-math.inf], math.inf),
        ([], [], 0.0),
    ],
)
def test_distance(got: list[float], exact: list[float], apart: float) -> None:
    assert distance(torch.tensor(got), torch.tensor(exact)) == apart
