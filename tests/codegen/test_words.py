"""Caches of few bits that kernels read in words of two bytes: by Triton's interpreter against the oracle's numbers, and
the machine code of what is compiled for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codegen.emitted import Package, package, passes

from attncc.check.cases import Case
from attncc.check.operands import draw

HEAD = "heads: {q: 4, kv: 2}\ndims: 64\ndtype: fp16\nmask: causal\n"
PAGED = "kv: paged(8)"
FORMATS = [
    *("int8", "int8(per=token)", "int8(per=token, symmetric=false)", "int8(per=head, symmetric=false)"),
    *("int4(per=token)", "int4(per=token, symmetric=false)", "int4(per=head)", "fp8_e4m3(per=head)"),
    "fp8_e4m3(per=token)",
]
STORAGE = {
    "rows": "",
    "bshd": "layout: bshd",
    "pages of whole tiles": "kv: paged(64)",
    "packed": "layout: varlen",
    "packed queries over pages": "layout: varlen\nkv: paged(16)",
}


def cache(form: str, more: str = PAGED, head: str = HEAD) -> Package:
    p = package(f"{head}{more}\nquantize: {{cache: '{form}'}}")
    assert {t.name for t in p.module.VARIANT.tensors if t.words} == {"k", "v"}
    return p


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str) -> None:
    p = cache(form)
    passes(p.tiles(16, 16), Case(3, 5, 45))
    passes(p.tiles(8, 32, one_pass=1, split=1, fill=12), Case(3, 2, 70, "nan_keys"))


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("form", ["int8(per=token, symmetric=false)", "int4(per=token)"])
def test_storage(form: str, storage: str) -> None:
    p = cache(form, STORAGE[storage])
    passes(p.tiles(16, 16), Case(3, 20, 41, "nan_around"))
    if "varlen" not in STORAGE[storage]:
        passes(p.tiles(8, 16, split=1, fill=12), Case(3, 1, 41, "nan_neighbour"))


OTHERS = {
    "pieces": "heads: {q: 4, kv: 2}\ndims: {qk: 192, v: 64}\ndtype: fp16\nmask: causal\n",
    "other value heads": "heads: {q: 12, kv: 2, v: 3}\ndims: 64\ndtype: fp16\nmask: causal\n",
    "a score that is not linear": f"{HEAD}score: softcap(qk * scale, 3) - 0.1 * (i - j)\n",
    "sigmoid": f"{HEAD}normalizer: sigmoid\noutputs: [o]\n",
    "a window": HEAD.replace("causal", "causal & window(9)"),
    "keys that only some heads see": HEAD.replace("causal", "(j <= i) & ((h < 2) | (j % 3 > 0))"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_variants(other: str) -> None:
    p = cache("int4(per=token, symmetric=false)", PAGED, OTHERS[other])
    passes(p.tiles(8, 16), Case(2, 5, 45), Case(2, 3, 45, "nan_keys"))


@pytest.mark.parametrize("trait", ["unaligned", "expanded", "large_logits", "last_axis_strided"])
def test_operands(trait: Any) -> None:
    outcome = cache("int8(per=token, symmetric=false)").tiles(16, 16).agrees(Case(3, 3, 41, trait))
    assert outcome.passed, outcome


@pytest.mark.parametrize("more", [PAGED, "kv: paged(64)"])
def test_codes_at_odd_addresses_are_read_by_bytes(more: str) -> None:
    p = cache("int8(per=token)", more).tiles(8, 16, split=1)
    x = draw(p.attn, Case(2, 1, 70), torch.float16, torch.Generator().manual_seed(0))
    there = p(*x.positional, **x.keywords)
    room = torch.zeros(x.cache["k"].numel() + 1, dtype=torch.int8)[1:].view(x.cache["k"].shape)
    room.copy_(x.cache["k"])
    assert room.data_ptr() % 2
    assert torch.equal(p(x.q, room, **{**x.keywords, "v": x.cache["v"]}), there)


def test_products_in_fp32_are_exact() -> None:
    """Over codes too: tensor cores would cut fp32 operands to 10 bits."""
    p = package(f"{HEAD.replace('fp16', 'fp32')}{PAGED}\nquantize: {{cache: 'int8(per=token)'}}")
    text = (p.path / "kernels.py").read_text()
    assert text.count('input_precision="ieee"') == text.count("tl.dot(") > 0
