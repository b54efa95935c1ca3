"""The call that writes new tokens into a cache, run by Triton's interpreter: its bits are the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from codegen.appended import LENGTHS, empty, expected, given, same, sequences, write
from codegen.emitted import Package, normal, package
from torch import Tensor

from attncc.check.pages import lay_out

HEAD = "heads: {q: 4, kv: 2}\ndims: 32\ndtype: fp16\nmask: causal\n"
FOUND = [
    *("int8(per=token)", "int8(per=token, symmetric=false)", "int8(per=group(5), symmetric=false)"),
    *("int4(per=token)", "int4(per=token, symmetric=false)", "int4(per=group(8))", "fp8_e4m3(per=group(16))"),
    *("fp8_e5m2(per=token)", "int4(per=group(24), symmetric=false)"),
]
GIVEN = ["int8", "int8(per=head, symmetric=false)", "int4(per=channel, symmetric=false)", "fp8_e4m3(per=head)"]
STORAGE = {
    "rows": "",
    "bshd": "layout: bshd",
    "pages": "kv: paged(8)",
    "packed": "layout: varlen",
    "packed, into pages": "layout: varlen\nkv: paged(16)",
}


def cache(form: str, more: str = "kv: paged(8)", head: str = HEAD) -> Package:
    return package(f"{head}{more}" + (f"\nquantize: {{cache: '{form}'}}" if form else ""))


def written(p: Package, lengths: list[int], cut: int = 11) -> None:
    rows = sequences(p, lengths)
    size = p.attn.page_size
    pages = lay_out(lengths, 6, size, torch.Generator().manual_seed(0)) if size else None
    wanted = expected(p, rows, pages)
    got = empty(wanted, p)
    write(p, rows, pages, got, cut)
    same(got, wanted)


@pytest.mark.parametrize("form", [*FOUND, *GIVEN, ""])
def test_formats(form: str) -> None:
    written(cache(form), LENGTHS)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("form", ["int8(per=group(8), symmetric=false)", "int4(per=token)", "fp8_e4m3(per=token)"])
def test_storage(form: str, storage: str) -> None:
    ragged = "varlen" in STORAGE[storage] or "paged" in STORAGE[storage]
    written(cache(form, STORAGE[storage]), LENGTHS if ragged else [21, 21])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["int8(per=token, symmetric=false)", ""])
def test_dtypes(form: str, dtype: str) -> None:
    written(cache(form, head=HEAD.replace("fp16", dtype)), LENGTHS)


def test_a_latent_with_its_rope_columns() -> None:
    head = "heads: {q: 4, kv: 1}\ndims: {qk: 80, v: 64}\ndtype: fp16\nmask: causal\n"
    written(cache("fp8_e4m3(per=group(16))", "kv: latent(rope=16)", head), [21, 21])


def test_what_is_no_number_spoils_its_own_group_alone() -> None:
    p = cache("int8(per=token, symmetric=false)")
    rows = sequences(p, [9])
    rows[0]["k"][3, 0, 5], rows[0]["v"][4, 1, 0], rows[0]["k"][5, 1] = torch.nan, torch.inf, 0.25
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    wanted = expected(p, rows, pages)
    got = empty(wanted, p)
    write(p, rows, pages, got, 4)
    same(got, wanted)
    kept = got["k_scales"][pages.table[0, :2].long()].transpose(0, 1).flatten(1)[:, :9]
    assert kept.isnan().nonzero().tolist() == [[0, 3]]


def test_tokens_without_a_place_are_left_out() -> None:
    p = cache("int8(per=token)")
    rows = sequences(p, [9])
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    got = empty(expected(p, rows, pages), p)
    before = {name: t.clone() for name, t in got.items()}
    for place in (-1, 16, 2**31 - 1, -(2**31)):
        where = [torch.full((9,), place, dtype=torch.int32)]
        p.module.append(**given(p, rows, where, [9], pages), **got)
        same(got, before)


def test_a_call_of_no_tokens() -> None:
    p = cache("int8(per=token)")
    rows = sequences(p, [9])
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    got = empty(expected(p, rows, pages), p)
    part = [{x: t[:0] for x, t in rows[0].items()}]
    p.module.append(**given(p, part, [torch.zeros(0, dtype=torch.int32)], [9], pages), **got)


def test_attention_over_what_was_written_is_that_over_the_oracle_s_cache() -> None:
    p = cache("int4(per=token, symmetric=false)").tiles(16, 16)
    rows = sequences(p, LENGTHS)
    pages = lay_out(LENGTHS, 6, 8, torch.Generator().manual_seed(0))
    wanted = expected(p, rows, pages)
    got = empty(wanted, p)
    write(p, rows, pages, got, 30)
    q = normal(4, 4, 2, 32, seed=9, dtype=torch.float16)
    where = {"block_table": pages.table, "seqused_k": pages.used}
    assert torch.equal(p(q, **got, **where), p(q, **wanted, **where))


def test_it_can_be_traced() -> None:
    p = cache("int8(per=token)")
    rows = sequences(p, [9])
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    wanted = expected(p, rows, pages)
    got = empty(wanted, p)
    call = given(p, rows, [torch.arange(9, dtype=torch.int32)], [9], pages)
    named = {t.name: {**call, **got}[t.name] for t in p.module.APPENDING.tensors}
    torch.library.opcheck(p.module._APPEND, tuple(named.values()), test_utils=("test_schema", "test_faketensor"))
    p.module._APPEND(*named.values())
    same(got, wanted)


def test_variants_without_a_cache_of_their_own_have_no_such_call() -> None:
    assert not hasattr(package(f"{HEAD}").module, "append")


Change = Callable[[Tensor], Any]
BAD: list[tuple[str, Change, type[Exception], str]] = [
    ("positions", lambda t: t.long(), TypeError, "append: positions must be torch.int32, got torch.int64"),
    ("positions", lambda t: None, TypeError, "append: positions must be a tensor, got nothing"),
    ("positions", lambda t: t[:, :3], ValueError, "positions must have shape .* axis 1 is 3, not 9, as k_new has it"),
    ("k_new", lambda t: t.float(), TypeError, "k_new must be torch.float16, got torch.float32"),
    ("v_new", lambda t: t[:, :1], ValueError, "v_new must have shape .* axis 1 is 1, not 2"),
    ("k", lambda t: t.view(torch.uint8), TypeError, "k must be torch.int8, got torch.uint8"),
    ("v_scales", lambda t: t[1:], ValueError, "v_scales must have shape .* as k has it"),
    ("block_table", lambda t: t.to("meta"), ValueError, "block_table must be on cpu like k_new, got meta"),
    ("k_new", lambda t: t.float().requires_grad_().half(), RuntimeError, "k_new requires a gradient"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD)
def test_bad_calls(name: str, change: Change, kind: type[Exception], message: str) -> None:
    p = cache("int8(per=token)")
    rows = sequences(p, [9])
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    x = {**given(p, rows, [torch.arange(9, dtype=torch.int32)], [9], pages), **empty(expected(p, rows, pages), p)}
    x[name] = change(x[name])
    with pytest.raises(kind, match=message):
        p.module.append(**x)
