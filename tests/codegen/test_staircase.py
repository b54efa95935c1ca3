"""Packages over a cache that loses bits as it ages, run by Triton's interpreter: their bits are the oracle's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from codegen.emitted import Package, normal, package, passes
from torch import Tensor

from attncc import driver, spec
from attncc.check.cached import Places, hold_all
from attncc.check.cases import Case
from attncc.check.pages import Pages, lay_out, poison
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import Unsupported
from attncc.ir.staircase import Level, levels
from attncc.passes.lower.defaults import default_configs
from attncc.reference.operands import Sequence
from attncc.reference.quantize import quantized
from attncc.reference.staircase import descend

HEAD = "heads: {q: 4, kv: 2}\ndims: 32\ndtype: fp16\nmask: causal\nkv: paged(64)\n"
STEPS = "[(16, fp16), (32, int8), (64, int4), (inf, int2)]"
FORMS = {
    "KIVI's groups": f"{STEPS}, per=group(16), symmetric=false",
    "wide groups": "[(32, fp16), (96, int4), (inf, int2)], per=group(32), symmetric=false",
    "tokens": f"{STEPS}, per=token",
    "tokens with zero points": "[(16, fp16), (inf, int8)], per=token, symmetric=false",
    "a long first step": "[(16, fp16), (48, fp16), (inf, int4)], per=group(16)",
    "rising bits": "[(16, fp16), (32, int2), (inf, int8)], per=group(16)",
}


def cache(form: str, head: str = HEAD) -> Package:
    return package(f"{head}quantize:\n  cache: staircase({FORMS.get(form, form)})")


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_attention(form: str) -> None:
    p = cache(form)
    passes(p.tiles(16, 32 if "wide" in form else 16), Case(3, 5, 150))
    passes(p.tiles(16, 32 if "wide" in form else 16, one_pass=1, split=1, fill=12), Case(3, 1, 130, "nan_keys"))


@pytest.mark.parametrize(
    "head",
    [
        "heads: {q: 6, kv: 2, v: 3}\ndims: {qk: 64, v: 32}\ndtype: fp16\nmask: causal\nkv: paged(64)\n",
        f"{HEAD}layout: varlen\n",
        f"{HEAD}layout: bshd\n",
        "heads: 2\ndims: 32\ndtype: fp16\nscore: softcap(qk * scale, 3) - 0.1 * (i - j)\nkv: paged(128)\n",
        f"{HEAD}schedule: split_kv(3)\n",
    ],
)
def test_other_variants(head: str) -> None:
    p = cache("KIVI's groups", head).tiles(16, 16)
    passes(p, Case(2, 5, 120, "nan_around"))
    if "varlen" not in head:
        passes(p.tiles(16, 16, split=1, fill=12), Case(3, 1, 120, "nan_neighbour"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 16), (2, 0, 16), (1, 4, 0), (0, 16, 16), (2, 1, 64), (2, 3, 65)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    passes(cache("KIVI's groups").tiles(16, 16), Case(*shape))


@pytest.mark.parametrize("trait", ["unaligned", "expanded", "large_logits", "last_axis_strided"])
def test_operands(trait: Any) -> None:
    outcome = cache("tokens").tiles(16, 16).agrees(Case(3, 3, 90, trait))
    assert outcome.passed, outcome


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [0, 15, 16, 33, 97])
def test_what_is_stored_stands_for_the_numbers_of_the_oracle(form: str, length: int) -> None:
    """Which takes segments through their whole history (`reference.quantize`)."""
    attn = cache(form).attn
    q, k, v = (normal(h, length, 32, seed=n, dtype=torch.float16).float() for n, h in enumerate((4, 2, 2)))
    held = quantized(attn, Sequence(0, q, k, v)).sequence
    for operand, x, want in (("k", k, held.k), ("v", v, held.v)):
        assert torch.equal(descend(attn, levels(attn, operand), x).numbers, want)


# -- what is written -------------------------------------------------------------------------------

LENGTHS = [130, 0, 77, 16]


def tokens(p: Package, lengths: list[int]) -> list[dict[str, Tensor]]:
    """Keys and values [S, H, D] of each sequence."""
    heads = {"k": (p.attn.heads.kv, p.attn.dims.qk), "v": (p.attn.heads.v, p.attn.dims.v)}
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[p.attn.dtype]
    return [
        {x: normal(n, *heads[x], seed=2 * at + (x == "v"), dtype=dtype) for x in heads} for at, n in enumerate(lengths)
    ]


def expected(p: Package, rows: list[dict[str, Tensor]], pages: Pages) -> dict[str, Tensor]:
    place = Places(p.attn, 0, pages, torch.device("cpu"), torch.clone, rows[0]["k"].dtype)
    return hold_all(p.attn, rows, place)[2]


def nothing(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(poison(t.shape, t.dtype, t.device))


def same(p: Package, got: Mapping[str, Tensor], rows: list[dict[str, Tensor]], pages: Pages) -> None:
    """All that holds a token on the step where its age puts it; other rows may hold what was there before."""
    wanted = expected(p, rows, pages)
    for level in (x for operand in "kv" for x in levels(p.attn, operand)):
        for name in (level.name, level.scales, level.zeros):
            if name in wanted:
                known = holds_tokens(p, level, name, wanted[name], [len(s["k"]) for s in rows], pages)
                assert torch.equal(got[name][known], wanted[name][known]), name


def holds_tokens(p: Package, level: Level, name: str, like: Tensor, lengths: list[int], pages: Pages) -> Tensor:
    steps, known = levels(p.attn, level.operand), torch.zeros(like.shape, dtype=torch.bool)
    group = level.group if level.over_tokens and name != level.name else 1
    for b, length in enumerate(lengths):
        for t in range(length):
            age = length // level.segment - t // level.segment
            if [x for x in steps if x.begin <= age][-1:] != [level] and (age > 0 or level is not steps[0]):
                continue
            if level.room:
                known[b, :, t % level.room // group] = True
            elif name == level.name:
                known[pages.table[b, t // pages.size], t % pages.size] = True
            else:
                known[pages.table[b, t // pages.size], :, t % pages.size // group] = True
    return known


def append(p: Package, rows: list[dict[str, Tensor]], into: dict[str, Tensor], pages: Pages, cuts: list[int]) -> None:
    """All tokens, so many of each sequence behind every call."""
    for lo, hi in pairwise([0, *cuts]):
        part = [{x: t[lo:hi] for x, t in s.items()} for s in rows]
        p.module.append(**call(p, part, [min(lo, len(s["k"])) for s in rows], pages), **into)


def call(p: Package, part: list[dict[str, Tensor]], lengths: list[int], pages: Pages) -> dict[str, Tensor]:
    """A call's tokens; those of one length in a call of rows."""
    where = {"lengths": torch.tensor(lengths, dtype=torch.int32), "block_table": pages.table}
    if p.attn.layout == "varlen":
        marks = torch.tensor([0, *torch.tensor([len(s["k"]) for s in part]).cumsum(0).tolist()], dtype=torch.int32)
        return {f"{x}_new": torch.cat([s[x] for s in part]) for x in "kv"} | where | {"cu_seqlens_new": marks}
    new = {f"{x}_new": torch.stack([s[x] for s in part]) for x in "kv"}
    return {k: t if p.attn.layout == "bshd" else t.transpose(1, 2) for k, t in new.items()} | where


CUTS = {
    "a prompt, then one by one": [110, *range(111, 115)],
    "at once": [130],
    "pieces": [7, 40, 41, 90, 130],
    "whole segments": [16, 32, 64, 96, 128, 130],
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("form", ["KIVI's groups", "tokens"])
def test_tokens_are_appended(form: str, cuts: str) -> None:
    written(cache(form), [CUTS[cuts][-1]] * 2, CUTS[cuts])


def test_tokens_are_appended_one_by_one() -> None:
    written(cache("KIVI's groups"), [66], [*range(1, 67)])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dtypes_are_appended(dtype: str) -> None:
    head, form = HEAD.replace("fp16", dtype), FORMS["KIVI's groups"].replace("fp16", dtype)
    written(cache(form, f"{head}layout: bshd\n"), [97], [30, 97])


@pytest.mark.parametrize("form", [x for x in FORMS if x not in ("KIVI's groups", "tokens")])
def test_formats_are_appended(form: str) -> None:
    written(cache(form), [130], CUTS["pieces"])


def written(p: Package, lengths: list[int], cuts: list[int]) -> dict[str, Tensor]:
    rows = tokens(p, lengths)
    pages = lay_out(lengths, 3, p.attn.page_size, torch.Generator().manual_seed(0))
    got = {name: nothing(t) for name, t in expected(p, rows, pages).items()}
    append(p, rows, got, pages, cuts)
    same(p, got, rows, pages)
    return got


def test_packed_sequences_of_other_lengths() -> None:
    p = cache("KIVI's groups", f"{HEAD}layout: varlen\n")
    written(p, LENGTHS, [50, 60, 61, 130])


def test_what_has_no_room_is_left_out() -> None:
    """Behind the last page of the table, and where a sequence's length is below 0."""
    p = cache("KIVI's groups", f"{HEAD}layout: varlen\n")
    rows = tokens(p, [128, 70])
    pages = lay_out([128, 128], 2, 64, torch.Generator().manual_seed(0))
    got = {name: nothing(t) for name, t in expected(p, rows, pages).items()}
    append(p, rows, got, pages, [60, 128])
    before = {name: t.clone() for name, t in got.items()}
    more = [{x: normal(9, 2, 32, seed=7, dtype=torch.float16) for x in "kv"} for _ in rows]
    p.module.append(**call(p, more, [128, -1], pages), **got)
    for name, t in got.items():
        assert (
            torch.equal(t.nan_to_num(), before[name].nan_to_num())
            if t.is_floating_point()
            else (torch.equal(t, before[name]))
        ), name


def test_a_group_with_a_number_that_is_none() -> None:
    """Stays without a scale on all steps, as the oracle has it; its neighbours do not."""
    p = cache("KIVI's groups")
    rows = tokens(p, [80])
    rows[0]["k"][3, 0, 5], rows[0]["v"][20, 1, 9] = torch.nan, torch.inf
    pages = lay_out([80], 3, 64, torch.Generator().manual_seed(0))
    wanted = expected(p, rows, pages)
    got = {name: nothing(t) for name, t in wanted.items()}
    append(p, rows, got, pages, [50, 80])
    page = int(pages.table[0, 0])
    for name in ("k_scales", "v_scales", "k", "v"):
        assert torch.equal(got[name][page].nan_to_num(7.0)[..., :1, :], wanted[name][page].nan_to_num(7.0)[..., :1, :])
    assert wanted["k_scales"][page, 0, 0].isnan().sum() == 1


def test_attention_over_what_was_appended() -> None:
    p = cache("KIVI's groups").tiles(16, 16)
    rows = tokens(p, [120, 120])
    pages = lay_out([120, 120], 3, 64, torch.Generator().manual_seed(0))
    wanted = expected(p, rows, pages)
    got = {name: nothing(t) for name, t in wanted.items()}
    append(p, rows, got, pages, [101, 120])
    q = normal(2, 4, 2, 32, seed=9, dtype=torch.float16)
    where = {"block_table": pages.table, "seqused_k": pages.used}
    assert torch.equal(p(q, **got, **where), p(q, **wanted, **where))


def test_it_can_be_traced() -> None:
    p = cache("tokens")
    rows = tokens(p, [40])
    pages = lay_out([40], 1, 64, torch.Generator().manual_seed(0))
    got = {name: nothing(t) for name, t in expected(p, rows, pages).items()}
    x = {**call(p, rows, [0], pages), **got}
    named = tuple(x[t.name] for t in p.module.APPENDING.tensors)
    torch.library.opcheck(p.module._APPEND, named, test_utils=("test_schema", "test_faketensor"))
    p.module._APPEND(*named)
    same(p, got, rows, pages)


# -- what is refused -------------------------------------------------------------------------------

Change = Callable[[Tensor], Any]
BAD: list[tuple[str, Change, type[Exception], str]] = [
    ("lengths", lambda t: t.long(), TypeError, "append: lengths must be torch.int32, got torch.int64"),
    ("lengths", lambda t: torch.cat([t, t]), ValueError, "lengths must have shape .* axis 0 is 2, not 1"),
    ("k_int8", lambda t: t.view(torch.int8), TypeError, "k_int8 must be torch.uint8, got torch.int8"),
    ("k_int4", lambda t: t[:, :, :16], ValueError, r"k_int4 must have shape \[1, 2, 32, 16\]|axis 2 is 16, not 32"),
    ("k_fp16", lambda t: None, TypeError, "append: k_fp16 must be a tensor, got nothing"),
    ("v_int8_zeros", lambda t: t.half(), TypeError, "v_int8_zeros must be torch.float32, got torch.float16"),
    ("v_scales", lambda t: t[1:], ValueError, "v_scales must have shape .* as k has it"),
    ("v", lambda t: t.repeat(1, 1, 1, 2), ValueError, "v must have shape"),
    ("k_int4", lambda t: t.mT.contiguous().mT, ValueError, "k_int4 must be contiguous, got strides"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD)
def test_bad_calls(name: str, change: Change, kind: type[Exception], message: str) -> None:
    p = cache("KIVI's groups")
    rows = tokens(p, [9])
    pages = lay_out([9], 2, 64, torch.Generator().manual_seed(0))
    x = {**call(p, rows, [0], pages), **expected(p, rows, pages)}
    x[name] = change(x[name])
    with pytest.raises(kind, match=message):
        p.module.append(**x)


ODD = [
    ("", STEPS, "per=token", "staircases in pages of a multiple of 64 keys"),
    ("kv: paged(16)", STEPS, "per=token", "staircases in pages of a multiple of 64 keys"),
    ("kv: paged(64)", STEPS, "per=channel", "staircases per token, group(16), group(32)"),
    ("kv: paged(64)", STEPS, "symmetric=false", "staircases per token, group(16), group(32)"),
    ("kv: paged(64)", STEPS, "per=group(8)", "staircases per token, group(16), group(32)"),
    ("kv: paged(64)", STEPS, "per=token, smooth=mean", "caches whose keys have no mean taken off"),
    ("kv: paged(64)", STEPS.replace("16, fp16", "8, fp16"), "per=token", "whose first age is a multiple of 16"),
    ("kv: paged(64)", STEPS.replace("fp16", "bf16"), "per=token", "from the dtype of q down steps of int8, int4, int2"),
    ("kv: paged(64)", STEPS.replace("int4", "fp8_e4m3"), "per=token", "steps of int8, int4, int2, each there once"),
    ("kv: paged(64)", STEPS.replace("int2", "int8"), "per=token", "steps of int8, int4, int2, each there once"),
    ("kv: paged(64)\ndims: 48", STEPS, "per=token", "head dims that are powers of two from 32 to 128"),
    (
        "kv: paged(64)\nprologue: [rope]",
        STEPS,
        "per=token",
        "steps on queries alone, where tokens lose bits as they age",
    ),
    (
        "kv: paged(64)\ninputs: {k_int4: {shape: [Hq]}}\nscore: qk * k_int4[h]",
        STEPS,
        "per=token",
        "inputs of other names: those of rings and scales are the cache's",
    ),
]


@pytest.mark.parametrize(("more", "steps", "options", "supported"), ODD)
def test_what_is_not_carried(more: str, steps: str, options: str, supported: str) -> None:
    more = more if "dims" in more else f"{more}\ndims: 32"
    text = f"attncc: 1\nname: odd\nheads: 2\ndtype: fp16\n{more}\nquantize:\n  cache: staircase({steps}, {options})\n"
    with pytest.raises(Unsupported) as error:
        driver.lower(spec.loads(text).attention)
    assert error.value.key == "quantize"
    assert supported in str(error.value.hint)


# -- what is compiled ------------------------------------------------------------------------------


def test_default_configs_do_not_spill() -> None:
    """Of calls of one query and of large ones, and what writes tokens."""
    loaded = driver.load(Path(__file__).parents[2] / "examples" / "saq_staircase.yaml")
    attn, program = driver.lower(loaded.attention)
    assert program.append is not None
    body = loaded.text.split("name: saq_staircase\n")[1]
    kernels = str(package(body, "saq_staircase", target="sm_90").path / "kernels.py")
    rows, device = default_configs(attn, find("sm_90"))[0], find("sm_90")
    few, large = (next(dict(c) for _, c in rows[1:] if bool(c["SPLIT"]) == split) for split in (True, False))
    wanted = {n: j for n, j in jobs(program, kernels, device, few).items() if n.endswith("_stream PASS=3")}
    wanted |= {n: j for n, j in jobs(program, kernels, device, large).items() if n.endswith("_forward PASS=0")}
    wanted |= jobs(program.append, kernels, device, {"num_warps": 4})
    assert len(wanted) == 3
    for name, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (name, outcome.reason)
        assert outcome.spill_bytes == 0, name
        assert "append" in name or {"mma", "wgmma"} & set(outcome.loop), name
