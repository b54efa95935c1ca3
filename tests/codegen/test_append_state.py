"""Decoding by variants whose steps look at earlier tokens, by Triton's interpreter: the oracle has whole sequences.

What a call of tokens makes of them, behind those that calls before have left, is what it is in the middle of a prefill.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from codegen.appended import offsets
from codegen.emitted import Package, normal, package
from torch import Tensor

from attncc import driver, reference, spec
from attncc.check.pages import lay_out, poison
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import Unsupported
from attncc.ir.keeping import keep, recalled

CCA = """prologue:
  - causal_conv(a, groups=depthwise, bias=u)
  - causal_conv(c, groups=heads, bias=w)
  - mean_residual(scale=0.5)
  - value_shift(fraction=0.5)
  - l2_norm(to=4, eps=0.0078125)
  - temperature(t[hk], on=k)
  - rope(dims=16, base=5000)
inputs:
  a: {shape: [6, 32, FIRST]}
  u: {shape: [6, 32]}
  c: {shape: [6, 32, 32, SECOND]}
  w: {shape: [6, 32]}
  t: {shape: [Hk]}
"""
STEPS = {
    "cca": CCA.replace("FIRST", "2").replace("SECOND", "2"),
    "cca of wide convolutions": CCA.replace("FIRST", "4").replace("SECOND", "3"),
    "residual first": "prologue: [mean_residual, 'causal_conv(a)', 'rope(pairs=interleaved)']\n"
    "inputs: {a: {shape: [6, 32, 3]}}",
    "of keys alone": "prologue: ['causal_conv(a, on=k)', silu, rope]\ninputs: {a: {shape: [2, 32, 4]}}",
    "of values": "prologue: ['causal_conv(a, on=v)', 'value_shift(fraction=0.25)', rope]\n"
    "inputs: {a: {shape: [64, 1, 4]}}",
    "with steps between": "prologue: ['causal_conv(a)', silu, 'causal_conv(c)']\n"
    "inputs: {a: {shape: [6, 32, 3]}, c: {shape: [6, 32, 2]}}",
    "residual alone": "prologue: [mean_residual]",
}
STORAGE = {
    "pages": "kv: paged(8)",
    "rows": "kv: cache",
    "bshd": "kv: paged(8)\nlayout: bshd",
    "packed": "kv: cache\nlayout: varlen",
    "packed, into pages": "kv: paged(8)\nlayout: varlen",
}
LENGTHS = [23, 9, 1]
CUTS = (6, 7, 8, 12)


def head(dtype: str) -> str:
    return f"heads: {{q: 4, kv: 2}}\ndims: 32\ndtype: {dtype}\nmask: causal\n"


def built(storage: str, steps: str, form: str = "", dtype: str = "fp32") -> Package:
    quantize = f"quantize: {{cache: '{form}'}}\n" if form else ""
    return package(f"{head(dtype)}{STORAGE[storage]}\n{quantize}{STEPS[steps]}").tiles(16, 16)


class Decoding:
    """Sequences, what a package carries of them, and what the oracle makes of whole ones."""

    def __init__(self, p: Package, lengths: list[int], ring: int = 0) -> None:
        self.p, self.lengths, attn = p, lengths, p.attn
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[attn.dtype]
        self.heads = {"q": 4, "k": 2, "v": 2}
        self.rows = [
            {x: normal(n, h, 32, seed=3 * at + ord(x), dtype=self.dtype) for x, h in self.heads.items()}
            for at, n in enumerate(lengths)
        ]
        sizes = {"Hk": 2}
        self.inputs = {
            x.name: normal(*(sizes[n] if isinstance(n, str) else n for n in x.shape), seed=ord(x.name))
            * (0.2 if len(x.shape) > 3 else 1)
            for x in attn.inputs
        }
        size = attn.page_size
        self.pages = lay_out(lengths, 4, size, torch.Generator().manual_seed(0)) if size else None
        known = {"B": len(lengths), "Sk": max(lengths), "Tk": sum(lengths)}
        known |= {"Sr": ring or max(recalled(keep(attn)).values(), default=0)}
        known |= {"all pages": 0 if self.pages is None else self.pages.count}
        tensors = [t for t in p.module.APPENDING.tensors if t.name in "kv" or t.name.endswith(("_state", "_scales"))]
        self.carried = {
            t.name: nothing([known[n] if isinstance(n, str) else n for n in t.axes], t.dtype) for t in tensors
        }
        self.outputs = [torch.full((n, 4, 32), torch.nan) for n in lengths]

    def expected(self) -> list[Tensor]:
        """[S, H, D] of whole sequences."""
        bare = tuple(replace(part, kv=type(part.kv)()) for part in self.p.attn.parts)
        attn = replace(self.p.attn, parts=bare, quantize=(), layout="bhsd")
        return [
            reference.attention(attn, *(s[x].transpose(0, 1)[None] for x in "qkv"), inputs=self.inputs)[0].transpose(
                0, 1
            )
            for s in self.rows
        ]

    def append(self, lo: int, hi: int, rows: list[dict[str, Tensor]] | None = None) -> Tensor:
        """The tokens [lo, hi) of each sequence that has them; the queries behind their steps."""
        part = [{x: t[lo:hi] for x, t in s.items()} for s in rows or self.rows]
        packed, rest = self.p.attn.layout == "varlen", dict[str, Tensor]()
        at = [torch.arange(lo, lo + len(s["q"]), dtype=torch.int32) for s in part]
        if packed:
            new = {f"{x}_new": torch.cat([s[x] for s in part]) for x in "qkv"}
            if self.pages is None:
                begins = offsets(self.lengths)
                at = [a + begin for a, begin in zip(at, begins, strict=False)]
                rest["cu_seqlens_k"] = begins
            rest |= {"cu_seqlens_new": offsets([len(s["q"]) for s in part]), "positions": torch.cat(at)}
        else:
            most = max(len(a) for a in at)
            new = {f"{x}_new": torch.stack([behind(s[x], most, torch.nan) for s in part]) for x in "qkv"}
            new = new if self.p.attn.layout == "bshd" else {x: t.transpose(1, 2) for x, t in new.items()}
            rest["positions"] = torch.stack([behind(a, most, -1) for a in at])
        rest |= {} if self.pages is None else {"block_table": self.pages.table}
        q = torch.full_like(new["q_new"], torch.nan)
        self.p.module.append(**new, q=q, **self.carried, **rest, **self.inputs)
        return q

    def attend(self, lo: int, hi: int, q: Tensor) -> None:
        """Attention of these tokens over the cache as far as it is filled."""
        filled = [min(hi, n) for n in self.lengths]
        counts = [max(0, n - lo) for n in filled]
        cache = {x: t for x, t in self.carried.items() if not x.endswith("_state")}
        where: dict[str, Tensor] = {}
        packed = self.p.attn.layout == "varlen"
        if packed:
            where["cu_seqlens_q"] = offsets(counts)
        if self.pages is not None:
            where |= {"block_table": self.pages.table, "seqused_k": torch.tensor(filled, dtype=torch.int32)}
        elif packed:
            begins = offsets(self.lengths).tolist()
            kept = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, filled, strict=False)])
            cache, where["cu_seqlens_k"] = {x: t[kept] for x, t in cache.items()}, offsets(filled)
        else:
            cache = {x: t[:, :, : filled[0]] for x, t in cache.items()}
        o = self.p(q.nan_to_num(), **cache, **where)
        rows = o if self.p.attn.layout != "bhsd" else o.transpose(1, 2)
        cuts = offsets(counts).tolist()
        for n, count in enumerate(counts):
            mine = rows[cuts[n] : cuts[n + 1]] if packed else rows[n, rows.shape[1] - count :]
            self.outputs[n][lo : lo + count] = mine.float()

    def run(self, *cuts: int) -> None:
        for lo, hi in pairwise((0, *cuts, max(self.lengths))):
            self.attend(lo, hi, self.append(lo, hi))

    def agrees(self, loose: float) -> None:
        for ours, theirs in zip(self.outputs, self.expected(), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=loose)


def nothing(shape: list[int], dtype: torch.dtype) -> Tensor:
    if dtype.itemsize > 1:
        return poison(shape, dtype, torch.device("cpu"))
    return poison(shape, torch.int8 if dtype == torch.int8 else torch.uint8, torch.device("cpu")).view(dtype)


def behind(t: Tensor, length: int, value: float) -> Tensor:
    """With rows of padding before it, so that last rows are last tokens."""
    return torch.cat([torch.full((length - len(t), *t.shape[1:]), value, dtype=t.dtype), t])


@pytest.mark.parametrize("steps", STEPS)
def test_steps(steps: str) -> None:
    d = Decoding(built("pages", steps), LENGTHS)
    d.run(*CUTS)
    d.agrees(2e-5)


@pytest.mark.parametrize("storage", [s for s in STORAGE if s != "pages"])
def test_storage(storage: str) -> None:
    d = Decoding(built(storage, "cca"), [14, 14] if storage == "rows" else LENGTHS)
    d.run(*CUTS)
    d.agrees(2e-5)


def test_one_token_a_call_from_the_first() -> None:
    d = Decoding(built("pages", "cca"), [9, 4])
    d.run(*range(1, 9))
    d.agrees(2e-5)


def test_calls_do_not_tell_how_tokens_came() -> None:
    """Prefill in one call and token by token leave the same bits: queries, cache, and what is carried."""
    whole, single = (Decoding(built("pages", "cca"), [9, 9]) for _ in range(2))
    q = whole.append(0, 9)
    each = [single.append(at, at + 1) for at in range(9)]
    torch.testing.assert_close(torch.cat(each, 2), q, rtol=1e-6, atol=1e-6)
    for name, t in whole.carried.items():
        close = {"rtol": 0.0, "atol": 0.0} if name.endswith("_state") else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(single.carried[name], t, equal_nan=True, **close)


@pytest.mark.parametrize(("dtype", "form", "loose"), [("fp16", "", 5e-3), ("fp32", "int8(per=token)", 5e-2)])
def test_formats(dtype: str, form: str, loose: float) -> None:
    d = Decoding(built("pages", "cca", form, dtype), LENGTHS)
    d.run(*CUTS)
    d.agrees(loose)


def test_tokens_may_be_taken_back_as_far_as_rings_reach() -> None:
    """Drafts that were refused are written again, behind tokens that a longer ring still has."""
    d = Decoding(built("pages", "cca"), [14, 14], ring=5)
    d.append(0, 8)
    wrong = [{x: t + 1 for x, t in s.items()} for s in d.rows]
    d.append(8, 11, wrong)
    for lo, hi in pairwise((0, 8)):
        d.attend(lo, hi, torch.zeros(2, 4, 8, 32))
    d.attend(8, 14, d.append(8, 14))
    for ours, theirs in zip(d.outputs, d.expected(), strict=True):
        torch.testing.assert_close(ours[8:].double(), theirs[8:], rtol=0, atol=2e-5)


def test_tokens_without_a_place_leave_everything_as_it_was() -> None:
    d = Decoding(built("pages", "cca"), [9, 9])
    d.append(0, 6)
    before = {name: t.clone() for name, t in d.carried.items()}
    table = {"block_table": d.pages.table} if d.pages is not None else {}
    new = {f"{x}_new": normal(2, h, 3, 32, seed=5) for x, h in d.heads.items()}
    q = torch.full((2, 4, 3, 32), torch.nan)
    for place in (-1, 32, 2**31 - 1, -(2**31)):
        positions = torch.full((2, 3), place, dtype=torch.int32)
        d.p.module.append(**new, q=q, **d.carried, positions=positions, **table, **d.inputs)
    assert bool(q.isnan().all())
    for name, t in before.items():
        torch.testing.assert_close(d.carried[name], t, rtol=0, atol=0, equal_nan=True)


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("q_state", lambda t: t[:, :, :1], ValueError, "k_state must have shape .* axis 2 is 2, not 1, as q_state"),
    ("k_state", lambda t: t.half(), TypeError, "k_state must be torch.float32, got torch.float16"),
    ("v_state", lambda t: None, TypeError, "append: v_state must be a tensor, got nothing"),
    ("q", lambda t: t[:, :, :2], ValueError, "q must have shape .* axis 2 is 2, not 6, as q_new has it"),
    ("a", lambda t: t[..., :1], ValueError, "a must have shape"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD)
def test_bad_calls(name: str, change: Any, kind: type[Exception], message: str) -> None:
    d = Decoding(built("pages", "cca"), [9])
    assert d.pages is not None
    x: dict[str, Any] = {f"{y}_new": normal(1, h, 6, 32, seed=5) for y, h in d.heads.items()}
    x |= {"q": torch.zeros(1, 4, 6, 32), "positions": torch.arange(6, dtype=torch.int32)[None]}
    x |= {**d.carried, **d.inputs, "block_table": d.pages.table}
    x[name] = change(x[name])
    with pytest.raises(kind, match=message):
        d.p.module.append(**x)


def test_it_can_be_traced() -> None:
    d = Decoding(built("pages", "cca"), [9])
    assert d.pages is not None
    x: dict[str, Any] = {f"{y}_new": normal(1, h, 6, 32, seed=5) for y, h in d.heads.items()}
    x |= {"q": torch.zeros(1, 4, 6, 32), "positions": torch.arange(6, dtype=torch.int32)[None]}
    x |= {**{n: torch.zeros_like(t) for n, t in d.carried.items()}, **d.inputs, "block_table": d.pages.table}
    named = [x[t.name] for t in d.p.module.APPENDING.tensors]
    torch.library.opcheck(d.p.module._APPEND, tuple(named), test_utils=("test_schema", "test_faketensor"))


def test_rings_that_are_too_short() -> None:
    d = Decoding(built("pages", "cca"), [9], ring=1)
    with pytest.raises(ValueError, match="Sr is 1, the kernels need 2 at least"):
        d.append(0, 3)


REFUSED = {
    "align: top_left\nprologue: ['causal_conv(a, on=k)']\ninputs: {a: {shape: [2, 32, 2]}}": "align",
    "prologue: ['causal_conv(q_state, on=k)']\ninputs: {q_state: {shape: [2, 32, 2]}}": "inputs of other names",
    "prologue: ['causal_conv(a, on=k)']\ninputs: {a: {shape: [3, 32, 2]}}": "weights of as many channels",
    "prologue: ['causal_conv(a, on=k)']\ninputs: {a: {shape: [2, 32, taps]}}": "weights of as many channels",
    "prologue: [value_shift, 'smooth(on=k)']": "its mean over all tokens is not known yet",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_not_carried(body: str) -> None:
    loaded = spec.loads(f"attncc: 1\nname: refused\n{head('bf16')}kv: paged(8)\n{body}\n")
    with pytest.raises(Unsupported, match=REFUSED[body]) as caught:
        driver.lower(loaded.attention)
    assert caught.value.key == "prologue"


def test_kernels_for_hopper_do_not_spill() -> None:
    steps = STEPS["cca"].replace("[6, 32", "[10, 128").replace("128, 32, 2", "128, 128, 2")
    p = package(f"heads: {{q: 8, kv: 2}}\ndims: 128\nmask: causal\nkv: paged(64)\n{steps}", target="sm_90")
    _, program = driver.lower(p.attn)
    assert program.append is not None
    found = jobs(program.append, str(p.path / "kernels.py"), find("sm_90"), {"num_warps": 4})
    assert len(found) == 3
    for name, outcome in zip(found, build_all([*found.values()]), strict=True):
        assert not isinstance(outcome, Failed), outcome.reason
        assert outcome.spill_bytes == 0, name
