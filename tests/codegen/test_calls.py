"""Bad calls of an emitted package get an error that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codegen.emitted import normal, package

DENSE = """heads: {q: 4, kv: 2}
dims: {qk: 16, v: 24}
dtype: fp32
inputs: {bias: {shape: [Hq, Sk]}, ids: {shape: [B, Sk], dtype: int32}, table: {shape: [n, 1], dtype: bool}}
score: qk * scale + bias[h, j] + where(table[j, 0], 1.0, 0.0)
mask: causal & document(ids)
sizes: {Sq: {max: 64}, n: {multiple: 2, max: 8}}"""
PACKED = """heads: 2
dims: 16
dtype: fp32
layout: varlen
inputs: {lens: {shape: [B], dtype: int32}}
mask: causal & (j < lens[b])"""


def call(**changes: Any) -> Any:
    """A right call, but for `changes`; a callable change is applied to the right argument, `...` leaves it out."""
    arguments: dict[str, Any] = {
        "q": normal(2, 4, 20, 16),
        "k": normal(2, 2, 30, 16),
        "v": normal(2, 2, 30, 24),
        "bias": normal(4, 30),
        "ids": torch.zeros(2, 30, dtype=torch.int32),
        "table": torch.ones(6, 1, dtype=torch.bool),
    }
    return _call(DENSE, arguments, changes)


def call_packed(**changes: Any) -> Any:
    cuts = torch.tensor([0, 7, 20], dtype=torch.int32)
    q = normal(20, 2, 16)
    lens = torch.full((2,), 9, dtype=torch.int32)
    return _call(PACKED, {"q": q, "k": q, "v": q, "cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "lens": lens}, changes)


def _call(body: str, arguments: dict[str, Any], changes: dict[str, Any]) -> Any:
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    p = package(body).tiles(16, 16)
    return p(**{name: value for name, value in arguments.items() if value is not ...})


Change = Callable[[torch.Tensor], Any]
double: Change = lambda t: t.double()
half: Change = lambda t: t.half()
meta: Change = lambda t: t.to("meta")
flat: Change = lambda t: t[0]
deeper: Change = lambda t: t[None]
strided: Change = lambda t: t.mT.contiguous().mT

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q dtype": ({"q": double}, TypeError, "q must be torch.float32, got torch.float64"),
    "k dtype": ({"k": half}, TypeError, "k must be torch.float32, got torch.float16"),
    "v dtype": ({"v": double}, TypeError, "v must be torch.float32, got torch.float64"),
    "bias dtype": ({"bias": half}, TypeError, "bias must be torch.float32, got torch.float16"),
    "ids dtype": ({"ids": lambda t: t.long()}, TypeError, "ids must be torch.int32, got torch.int64"),
    "table dtype": ({"table": lambda t: t.int()}, TypeError, "table must be torch.bool, got torch.int32"),
    "q elsewhere": ({"q": meta}, ValueError, "k must be on meta like q, got cpu"),
    "k elsewhere": ({"k": meta}, ValueError, "k must be on cpu like q, got meta"),
    "ids elsewhere": ({"ids": meta}, ValueError, "ids must be on cpu like q, got meta"),
    "all elsewhere": (
        dict.fromkeys(("q", "k", "v", "bias", "ids", "table"), meta),
        RuntimeError,
        "tensors are on meta, the kernels need",
    ),
    "q rank": ({"q": flat}, ValueError, "q must have the 4 axes [B, 4, Sq, 16], got shape (4, 20, 16)"),
    "k rank": ({"k": deeper}, ValueError, "k must have the 4 axes [B=2, 2, Sk, 16], got shape (1, 2, 2, 30, 16)"),
    "bias rank": ({"bias": flat}, ValueError, "bias must have the 2 axes [4, Sk=30], got shape (30,)"),
    "q heads": (
        {"q": lambda t: t[:, :3]},
        ValueError,
        "q must have shape [B, 4, Sq, 16], got (2, 3, 20, 16): axis 1 is 3, not 4",
    ),
    "q dim": ({"q": lambda t: t[..., :8]}, ValueError, "axis 3 is 8, not 16"),
    "k heads": ({"k": lambda t: t[:, :1]}, ValueError, "k must have shape [B=2, 2, Sk, 16], got (2, 1, 30, 16)"),
    "k batch": ({"k": lambda t: t[:1]}, ValueError, "axis 0 is 1, not 2, as q has it"),
    "v keys": (
        {"v": lambda t: t[:, :, :29]},
        ValueError,
        "v must have shape [B=2, 2, Sk=30, 24], got (2, 2, 29, 24): axis 2 is 29, not 30, as k has it",
    ),
    "v dim": ({"v": lambda t: t[..., :16]}, ValueError, "axis 3 is 16, not 24"),
    "bias keys": (
        {"bias": lambda t: t[:, 1:]},
        ValueError,
        "bias must have shape [4, Sk=30], got (4, 29): axis 1 is 29, not 30, as k has it",
    ),
    "bias heads": ({"bias": lambda t: t[:1]}, ValueError, "bias must have shape"),
    "ids batch": ({"ids": lambda t: t[:1]}, ValueError, "ids must have shape [B=2, Sk=30], got (1, 30)"),
    "table columns": ({"table": lambda t: t.expand(6, 2)}, ValueError, "table must have shape [n, 1], got (6, 2)"),
    "table multiple": ({"table": lambda t: t[:5]}, ValueError, "n is 5, the spec has it as a multiple of 2"),
    "table length": (
        {"table": lambda t: t.repeat(2, 1)},
        ValueError,
        "n is 12, the package was compiled for at most 8: raise it by `sizes: {n: {max: …}}`",
    ),
    "too many rows": (
        {"q": lambda t: t[:, :, :1].expand(2, 4, 65, 16)},
        ValueError,
        "Sq is 65, the package was compiled for at most 64",
    ),
    "q stride": (
        {"q": strided},
        ValueError,
        "q must be contiguous along its last axis, got strides (1280, 320, 1, 20): call .contiguous()",
    ),
    "k stride": ({"k": strided}, ValueError, "k must be contiguous"),
    "v stride": ({"v": strided}, ValueError, "v must be contiguous"),
    "last axis expanded": ({"k": lambda t: t[..., :1].expand(t.shape)}, ValueError, "k must be contiguous"),
    "no q": ({"q": None}, TypeError, "q must be a tensor, got nothing"),
    "no bias": ({"bias": None}, TypeError, "bias must be a tensor, got nothing"),
    "bias left out": ({"bias": ...}, TypeError, "required keyword-only argument: 'bias'"),
    "unknown argument": ({"biass": 1}, TypeError, "unexpected keyword argument 'biass'"),
    "a list": ({"k": [1.0]}, TypeError, "k must be a tensor, got list"),
    "an array": ({"ids": lambda t: t.numpy()}, TypeError, "ids must be a tensor, got ndarray"),
    "a number": ({"v": 1.0}, TypeError, "v must be a tensor, got float"),
    "gradient": (
        {"q": lambda t: t.requires_grad_()},
        RuntimeError,
        "q requires a gradient, but this package has no backward",
    ),
    "bias gradient": ({"bias": lambda t: t.requires_grad_()}, RuntimeError, "bias requires a gradient"),
    "scale zero": ({"scale": 0.0}, ValueError, "scale must be positive and finite in fp32, got 0.0"),
    "scale negative": ({"scale": -1}, ValueError, "scale must be positive and finite in fp32, got -1"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be positive and finite in fp32, got nan"),
    "scale inf": ({"scale": float("inf")}, ValueError, "scale must be positive and finite in fp32, got inf"),
    "scale too large": ({"scale": 1e39}, ValueError, "scale must be positive and finite in fp32, got 1e+39"),
    "scale too small": ({"scale": 1e-39}, ValueError, "scale must be positive and finite in fp32, got 1e-39"),
    "scale a huge int": ({"scale": 10**400}, ValueError, "scale must be positive and finite in fp32"),
    "scale a bool": ({"scale": True}, TypeError, "scale must be a float, got bool"),
    "scale a word": ({"scale": "1"}, TypeError, "scale must be a float, got str"),
    "scale a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a float, got Tensor"),
}

BAD_PACKED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": deeper}, ValueError, "q must have the 3 axes [Tq, 2, 16], got shape (1, 20, 2, 16)"),
    "heads": ({"k": lambda t: t[:, :1]}, ValueError, "k must have shape [Tk, 2, 16], got (20, 1, 16)"),
    "offsets dtype": (
        {"cu_seqlens_q": lambda t: t.long()},
        TypeError,
        "cu_seqlens_q must be torch.int32, got torch.int64",
    ),
    "offsets rank": (
        {"cu_seqlens_k": deeper},
        ValueError,
        "cu_seqlens_k must have the 1 axes [B + 1=3], got shape (1, 3)",
    ),
    "offsets length": (
        {"cu_seqlens_k": lambda t: t[:2]},
        ValueError,
        "cu_seqlens_k must have shape [B + 1=3], got (2,): axis 0 is 2, not 3, as cu_seqlens_q",
    ),
    "offsets elsewhere": ({"cu_seqlens_q": meta}, ValueError, "cu_seqlens_q must be on cpu like q, got meta"),
    "offsets missing": ({"cu_seqlens_q": ...}, TypeError, "required keyword-only argument: 'cu_seqlens_q'"),
    "another batch": ({"lens": lambda t: t[:1]}, ValueError, "lens is for 1 sequences, cu_seqlens_q has 2"),
    "no offsets": (
        {"cu_seqlens_q": lambda t: t[:0], "cu_seqlens_k": lambda t: t[:0]},
        ValueError,
        "cu_seqlens_q must hold B + 1 offsets, got none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case: str) -> None:
    changes, kind, text = BAD[case]
    with pytest.raises(kind, match=re.escape(text)) as raised:
        call(**changes)
    assert raised.type is kind
    if "argument" not in text:
        assert str(raised.value).startswith("emitted_")


@pytest.mark.parametrize("case", BAD_PACKED)
def test_bad_packed_calls(case: str) -> None:
    changes, kind, text = BAD_PACKED[case]
    with pytest.raises(kind, match=re.escape(text)):
        call_packed(**changes)


def test_the_right_calls_are_right() -> None:
    assert call().shape == (2, 4, 20, 24)
    assert call_packed().shape == (20, 2, 16)


def test_a_bad_call_spoils_nothing() -> None:
    before = call()
    with pytest.raises(ValueError, match="v must"):
        call(v=strided)
    assert torch.equal(call(), before)


def test_expanded_operands_are_fine() -> None:
    one = normal(1, 1, 30, 16)
    want = call(k=one.expand(2, 2, 30, 16).contiguous())
    assert torch.equal(call(k=one.expand(2, 2, 30, 16)), want)
    row = normal(30)
    assert torch.equal(call(bias=row.expand(4, 30)), call(bias=row.repeat(4, 1)))
    assert torch.equal(call(ids=torch.zeros((), dtype=torch.int32).expand(2, 30)), call())


def test_inputs_may_have_any_strides() -> None:
    assert torch.equal(call(bias=normal(4, 30).mT.contiguous().mT), call())
    assert torch.equal(call(ids=torch.zeros(2, 60, dtype=torch.int32)[:, ::2]), call())


def test_gradients_are_no_matter_where_none_are_wanted() -> None:
    with torch.no_grad():
        assert torch.equal(call(q=lambda t: t.requires_grad_()), call())
    with torch.inference_mode():
        assert call().shape == (2, 4, 20, 24)
    assert call(q=lambda t: torch.nn.Parameter(t, requires_grad=False)).grad_fn is None


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("mask", ["true", "causal", "x[i] == x[j]"])
def test_empty_calls(mask: str, shape: tuple[int, int, int]) -> None:
    p = package(f"heads: 2\ndims: 16\ndtype: fp32\ninputs: {{x: {{shape: [Sk], dtype: int32}}}}\nmask: {mask}")
    b, rows, keys = shape
    k = normal(b, 2, keys, 16)
    o, lse = p(normal(b, 2, rows, 16), k, k, x=torch.zeros(keys, dtype=torch.int32), return_lse=True)
    assert o.shape == (b, 2, rows, 16)
    assert lse.shape == (b, 2, rows)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


def test_an_empty_call_needs_no_scale_and_no_config() -> None:
    p = package("heads: 2\ndims: 16\ndtype: fp32\nscale: 1.0 / Sk", target="sm_90")
    k = normal(1, 2, 0, 16)
    assert (p(normal(1, 2, 3, 16), k, k) == 0).all()


def test_a_scale_of_the_sizes() -> None:
    p = package("heads: 2\ndims: 16\ndtype: fp32\nscale: log(Sk) / 2")
    q, k = normal(1, 2, 5, 16), normal(1, 2, 9, 16)
    assert torch.equal(p(q, k, k), p(q, k, k, scale=float(torch.tensor(9.0).log()) / 2))
    one = normal(1, 2, 1, 16)
    with pytest.raises(ValueError, match="scale must be positive and finite in fp32, got 0"):
        p(q, one, one)
    assert p(q, one, one, scale=1.0).shape == (1, 2, 5, 16)
    assert package("heads: 2\ndims: 16\ndtype: fp32\nscale: log(Sk - 1.0)")
    with pytest.raises(ValueError, match=r"the spec's scale has no value for \{.*'Sk': 1"):
        package("heads: 2\ndims: 16\ndtype: fp32\nscale: log(Sk - 1.0)")(q, one, one)


def test_fixed_sizes() -> None:
    p = package("heads: 2\ndims: 16\ndtype: fp32\nmask: j < Sk - 2\nsizes: {Sk: 8, B: {max: 2}}")
    q, k = normal(2, 2, 5, 16), normal(2, 2, 8, 16)
    assert p(q, k, k).shape == q.shape
    with pytest.raises(ValueError, match="Sk is 7, the spec fixes it to 8"):
        p(q, k[:, :, :7], k[:, :, :7])
    q, k = q[:1].expand(3, 2, 5, 16), k[:1].expand(3, 2, 8, 16)
    with pytest.raises(ValueError, match="B is 3, the package was compiled for at most 2"):
        p(q, k, k)


def test_more_keys_than_were_proven() -> None:
    p = package("heads: 2\ndims: 16\ndtype: fp32")
    k = normal(1, 2, 1, 16).expand(1, 2, 2**24 + 1, 16)
    with pytest.raises(ValueError, match=r"Sk is 16777217, the package was compiled for at most 16777216"):
        p(normal(1, 2, 5, 16), k, k)


def test_more_programs_than_a_gpu_launches() -> None:
    p = package("heads: 256\ndims: 1\ndtype: fp32").tiles(16, 16)
    q = torch.zeros(1).expand(2**10, 256, 2**20, 1)
    k = torch.zeros(1).expand(2**10, 256, 1, 1)
    with pytest.raises(ValueError, match=r"programs are more than a GPU launches at once"):
        p.module._RUNNER.plan((q, k, k), False, False)


def test_choose() -> None:
    p = package("heads: 2\ndims: 16\ndtype: fp32", target="sm_80")
    config, rule = p.module.choose("cpu", Sq=4096)
    assert config["num_warps"] > 0
    assert rule == "interpreted with the config of sm_80"
    assert p.module.choose("cpu", Sq=1)[0]["BM"] == 16
    with pytest.raises(
        RuntimeError, match="was compiled for sm_80 and cannot run on meta: compile it with --target meta"
    ):
        p.module.choose("meta")
