"""Bad calls of the oracle: each is refused with the argument's name, what was expected and what came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import b, h, i, j, plain, qk, scale
from torch import Tensor

from attncc import reference
from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Input, Size, Storage
from attncc.ir.expr import load

BIAS = (Input("bias", ("B", "Hq", "Sq", "Sk")),)
DENSE = plain(mask=j <= i)
BIASED = plain(score=qk * scale + load("bias", b, h, i, j), inputs=BIAS)
PACKED = plain(mask=j <= i, layout="varlen")
PAGED = plain(kv=Storage("paged", page_size=4))
LATENT = plain(kv=Storage("latent"))
LATENT_PAGES = plain(kv=Storage("latent", page_size=4, rope=2))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes: Any) -> dict[str, Any]:
    return {"q": zeros(2, 4, 3, 8), "k": zeros(2, 2, 5, 8), "v": zeros(2, 2, 5, 8), **changes}


def packed(**changes: Any) -> dict[str, Any]:
    operands = {"q": zeros(7, 4, 8), "k": zeros(9, 2, 8), "v": zeros(9, 2, 8)}
    return {**operands, "cu_seqlens_q": ints(0, 3, 7), "cu_seqlens_k": ints(0, 4, 9), **changes}


def paged(**changes: Any) -> dict[str, Any]:
    operands = {"q": zeros(2, 4, 3, 8), "k": zeros(6, 4, 2, 8), "v": zeros(6, 4, 2, 8)}
    return {**operands, "block_table": torch.tensor([[0, 5], [2, 3]]), "seqused_k": ints(8, 5), **changes}


def biased(x: Any) -> dict[str, Any]:
    return dense(inputs={"bias": x})


GOOD: dict[str, tuple[Attention, dict[str, Any]]] = {
    "dense": (DENSE, dense()),
    "biased": (BIASED, biased(zeros(2, 4, 3, 5))),
    "packed": (PACKED, packed()),
    "paged": (PAGED, paged()),
    "latent": (LATENT, {"q": zeros(2, 4, 3, 8), "k": zeros(2, 2, 5, 8)}),
    "latent pages": (LATENT_PAGES, paged(v=None)),
    "no batch": (DENSE, {"q": zeros(0, 4, 3, 8), "k": zeros(0, 2, 5, 8), "v": zeros(0, 2, 5, 8)}),
    "no sequences": (PACKED, packed(q=zeros(0, 4, 8), cu_seqlens_q=ints(0), cu_seqlens_k=ints(0))),
    "expanded": (DENSE, dense(k=zeros(1, 2, 1, 8).expand(2, 2, 5, 8))),
    "half": (DENSE, {name: x.bfloat16() for name, x in dense().items()}),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_calls_pass(case: str) -> None:
    attn, arguments = GOOD[case]
    o, lse = reference.attention(attn, **arguments, return_lse=True)
    assert o.shape == (*arguments["q"].shape[:-1], attn.dims.v)
    packed_rows = (4, len(arguments["q"]))
    assert lse.shape == (packed_rows if attn.layout == "varlen" else arguments["q"].shape[:-1])
    assert bool(o.eq(0).all())


BAD: dict[str, tuple[Attention, dict[str, Any], type[Exception], str]] = {
    "q is no tensor": (DENSE, dense(q=[1.0]), TypeError, "q: expected a tensor, got list"),
    "k is None": (DENSE, dense(k=None), TypeError, "k: expected a tensor, got NoneType"),
    "v left out": (DENSE, dense(v=None), TypeError, "v: expected a tensor, got NoneType"),
    "q of three axes": (DENSE, dense(q=zeros(4, 3, 8)), ValueError, r"q: expected 4 axes \[B, H, S, D\]"),
    "k of five axes": (DENSE, dense(k=zeros(1, 2, 2, 5, 8)), ValueError, "k: expected 4 axes"),
    "integer q": (DENSE, dense(q=zeros(2, 4, 3, 8, dtype=torch.int32)), TypeError, "q: expected a floating-point"),
    "mixed dtypes": (DENSE, dense(k=zeros(2, 2, 5, 8).half()), TypeError, "k: expected torch.float32 as q has"),
    "mixed dtypes of v": (DENSE, dense(v=zeros(2, 2, 5, 8).double()), TypeError, "v: expected torch.float32"),
    "query heads": (DENSE, dense(q=zeros(2, 3, 3, 8)), ValueError, "q: expected 4 heads"),
    "key heads": (DENSE, dense(k=zeros(2, 4, 5, 8)), ValueError, "k: expected 2 heads"),
    "value heads": (DENSE, dense(v=zeros(2, 1, 5, 8)), ValueError, "v: expected 2 heads"),
    "layout mixed up": (DENSE, dense(q=zeros(2, 3, 4, 8)), ValueError, r"q: expected 4 heads in \[B, H, S, D\]"),
    "columns of q": (DENSE, dense(q=zeros(2, 4, 3, 16)), ValueError, "q: expected a last axis of 8"),
    "columns of k": (DENSE, dense(k=zeros(2, 2, 5, 16)), ValueError, "k: expected a last axis of 8"),
    "columns of v": (DENSE, dense(v=zeros(2, 2, 5, 4)), ValueError, "v: expected a last axis of 8"),
    "batches differ": (DENSE, dense(k=zeros(3, 2, 5, 8)), ValueError, "batch of 2 as q has, got 3"),
    "lengths differ": (DENSE, dense(v=zeros(2, 2, 6, 8)), ValueError, "v: expected 5 keys as k has .*, got 6"),
    "packed offsets of a dense layout": (DENSE, dense(cu_seqlens_q=ints(0, 3)), TypeError, "cu_seqlens_q: the layout"),
    "packed key offsets of a dense layout": (DENSE, dense(cu_seqlens_k=ints(0, 3)), TypeError, "cu_seqlens_k: the"),
    "table of dense keys": (DENSE, dense(block_table=torch.zeros(2, 1, dtype=torch.int32)), TypeError, "block_table"),
    "missing input": (BIASED, dense(), TypeError, "bias: the input is missing"),
    "unknown input": (BIASED, dense(inputs={"bais": zeros(2, 4, 3, 5)}), TypeError, "bais: not an input.*'bias'"),
    "input of another rank": (BIASED, biased(zeros(4, 3, 5)), ValueError, r"bias: expected 4 axes \[B, Hq, Sq, Sk\]"),
    "input of another size": (BIASED, biased(zeros(2, 4, 3, 6)), ValueError, "bias: expected 5 at axis 3"),
    "input too small": (BIASED, biased(zeros(2, 4, 2, 5)), ValueError, "bias: expected 3 at axis 2"),
    "input that would broadcast": (BIASED, biased(zeros(2, 1, 3, 5)), ValueError, "bias: expected 4 at axis 1"),
    "integer input": (BIASED, biased(zeros(2, 4, 3, 5, dtype=torch.int32)), TypeError, "bias: expected a floating"),
    "input that is no tensor": (BIASED, biased(1.0), TypeError, "bias: expected a tensor, got float"),
    "float for an integer input": (
        plain(inputs=(Input("ids", ("B",), "int32"),)),
        dense(inputs={"ids": zeros(2)}),
        TypeError,
        "ids: expected an integer dtype, got torch.float32",
    ),
    "integer for a bool input": (
        plain(inputs=(Input("on", ("B",), "bool"),)),
        dense(inputs={"on": ints(0, 1)}),
        TypeError,
        "on: expected torch.bool",
    ),
    "unsorted": (
        plain(inputs=(Input("cuts", ("n",), "int32", sorted=True),)),
        dense(inputs={"cuts": ints(3, 1)}),
        ValueError,
        "cuts: declared sorted",
    ),
    "own sizes that differ": (
        plain(inputs=(Input("x", ("n",)), Input("y", ("n",)))),
        dense(inputs={"x": zeros(3), "y": zeros(4)}),
        ValueError,
        "y: expected 3 at axis 0",
    ),
    "size that is fixed": (plain(sizes=(Size("B", fixed=3),)), dense(), ValueError, "B: the spec fixes it to 3, got 2"),
    "no query offsets": (PACKED, packed(cu_seqlens_q=None), TypeError, "cu_seqlens_q: missing"),
    "no key offsets": (PACKED, packed(cu_seqlens_k=None), TypeError, "cu_seqlens_k: missing"),
    "offsets that do not start at 0": (PACKED, packed(cu_seqlens_q=ints(1, 7)), ValueError, "0 at its start, got 1"),
    "offsets that decrease": (
        PACKED,
        packed(cu_seqlens_q=ints(0, 5, 3)),
        ValueError,
        "non-decreasing offsets, got 5 and then 3 at entry 2",
    ),
    "offsets beyond the rows": (PACKED, packed(cu_seqlens_k=ints(0, 4, 10)), ValueError, "ends at 10, behind the 9"),
    "offsets of another batch": (PACKED, packed(cu_seqlens_k=ints(0, 9)), ValueError, "3 offsets .*, got 2"),
    "offsets of two axes": (PACKED, packed(cu_seqlens_q=torch.zeros(2, 2, dtype=torch.int32)), ValueError, "B . 1"),
    "no offsets at all": (PACKED, packed(cu_seqlens_q=ints()), ValueError, "expected shape"),
    "float offsets": (PACKED, packed(cu_seqlens_q=zeros(3)), TypeError, "cu_seqlens_q: expected int32 or int64"),
    "offsets as a list": (PACKED, packed(cu_seqlens_q=[0, 3, 7]), TypeError, "cu_seqlens_q: expected a tensor"),
    "packed q of four axes": (PACKED, packed(q=zeros(1, 7, 4, 8)), ValueError, r"q: expected 3 axes \[T, H, D\]"),
    "no table": (PAGED, paged(block_table=None), TypeError, "block_table: missing; kv is paged"),
    "no lengths": (PAGED, paged(seqused_k=None), TypeError, "seqused_k: missing; kv is paged"),
    "packed keys in pages": (PAGED, paged(cu_seqlens_k=ints(0, 3)), TypeError, "cu_seqlens_k: kv is paged"),
    "table of another batch": (PAGED, paged(block_table=ints(0, 1)[None]), ValueError, r"block_table: .* \[2, pages\]"),
    "table of one axis": (PAGED, paged(block_table=ints(0, 1)), ValueError, "block_table: expected shape"),
    "page outside": (PAGED, paged(block_table=torch.tensor([[0, 6], [2, 3]])), ValueError, "sequence 0 uses a page"),
    "negative page in use": (PAGED, paged(block_table=torch.tensor([[0, -1], [2, 3]])), ValueError, "uses a page"),
    "more keys than pages": (PAGED, paged(seqused_k=ints(9, 5)), ValueError, "sequence 0 has 9 keys, expected 0 to 8"),
    "negative length": (PAGED, paged(seqused_k=ints(8, -1)), ValueError, "sequence 1 has -1 keys"),
    "lengths of another batch": (PAGED, paged(seqused_k=ints(8)), ValueError, r"seqused_k: expected shape \[2\]"),
    "float lengths": (PAGED, paged(seqused_k=zeros(2)), TypeError, "seqused_k: expected int32 or int64"),
    "pages of another size": (PAGED, paged(k=zeros(6, 8, 2, 8)), ValueError, "k: expected pages of 4 keys"),
    "dense keys for pages": (PAGED, paged(k=zeros(2, 2, 8, 8)), ValueError, "k: expected 2 heads"),
    "values beside latent keys": (LATENT, dense(), TypeError, "v: kv is latent"),
    "values beside latent pages": (LATENT_PAGES, paged(), TypeError, "v: kv is latent"),
    "latent pages of another size": (LATENT_PAGES, paged(k=zeros(6, 8, 2, 8), v=None), ValueError, "pages of 4 keys"),
    "latents in rows for pages": (LATENT_PAGES, paged(k=zeros(2, 2, 8, 8), v=None), ValueError, "k: expected 2 heads"),
    "latent pages without a table": (LATENT_PAGES, paged(v=None, block_table=None), TypeError, "block_table: missing"),
    "a table for latents in rows": (LATENT, paged(v=None, k=zeros(2, 2, 8, 8)), TypeError, "block_table: kv is not"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused(case: str) -> None:
    attn, arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        reference.attention(attn, **arguments)


def test_operands_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="k: expected device cpu as q has, got meta"):
        reference.attention(DENSE, **dense(k=torch.zeros(2, 2, 5, 8, device="meta")))


def test_lse_of_sigmoid_is_refused() -> None:
    attn = replace(DENSE, parts=(replace(DENSE.part, normalizer=replace(DENSE.part.normalizer, kind="sigmoid")),))
    reference.attention(attn, **dense())
    with pytest.raises(Unsupported, match="lse") as refusal:
        reference.attention(attn, **dense(), return_lse=True)
    assert refusal.value.key == "outputs"
