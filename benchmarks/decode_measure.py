"""What one process measures of a call of one query: compiled first, checked against float64, timed from CUDA graphs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from attncc.check.pages import lay_out
from benchmarks import report
from benchmarks.cases import SCALE
from benchmarks.check import LIMITS, Errors, Rejected, poisoned
from benchmarks.decode_cases import PACKED, Decode, Series
from benchmarks.peers import answering
from benchmarks.timing import Call, interleaved_graphs

Row = dict[str, Any]
CAP: Final = 30.0
COMPARED: Final = 3
"""Sequences whose first and last heads are compared."""


def decode(case: Decode, rounds: int) -> Callable[[], list[Row]]:
    """Compiles everything; what it returns then measures with the GPU to itself."""
    given = operands(case, "cuda")
    ours = {"attncc": call_of(case.package, given)}
    ours |= {f"attncc, {x}": call_of(case.rival_package(x), given) for x in case.rivals}
    calls, absent = answering(case.name, ours, peers(case, given))
    ways = readers(case, given) if "bytes" in case.peers else {}
    for call in ways.values():
        call()

    def act() -> list[Row]:
        found: dict[str, Errors] = {}
        for name, call in ours.items():
            with poisoned():
                o, lse = call()
            found[name] = errors(case, given, o, lse)
            if not found[name].ok:
                raise Rejected(f"{name}: {found[name]}")
        for name in calls.keys() - ours.keys():
            off = errors(case, given, calls[name](), None)
            if not off.ok:
                del calls[name]
                absent.append({"case": case.name, "impl": name, "missing": str(off)})
        if ways:
            calls["bytes"] = fastest(ways)
        rows = report.compared(case.name, interleaved_graphs(calls, rounds), case.bytes, "tbps")
        measured = {"o_error": found["attncc"].o, "lse_error": found["attncc"].lse}
        return [row | (measured if row["impl"] == "attncc" else {}) for row in rows] + absent

    return act


def series(cases: Series, rounds: int) -> Callable[[], list[Row]]:
    """The same of several cases, whose kernels are those of the first: each in turn has memory of its own."""
    first: list[Callable[[], list[Row]]] = [decode(cases.cases[0], rounds)]

    def act() -> list[Row]:
        rows = first.pop()()
        for case in cases.cases[1:]:
            torch.cuda.empty_cache()
            rows += decode(case, rounds)()
        return rows

    return act


def call_of(package: str, given: Mapping[str, Tensor]) -> Call:
    attention = importlib.import_module(package).attention
    return lambda: attention(**given, return_lse=True)


# -- tensors -------------------------------------------------------------------------------------


def operands(case: Decode, device: str) -> dict[str, Tensor]:
    """Random normal q, k, v; in pages they lie in no order, and the rest of those is NaN."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=g)

    q = normal(case.b, case.hq, 1, case.d)
    more = {"sinks": torch.randn(case.hq, device=device, generator=g)} if case.variant == "sink" else {}
    if not case.page:
        shape = (case.b, case.hk, case.lengths[0], case.d)
        return {"q": q, "k": normal(*shape), "v": normal(*shape), **more}
    pages = lay_out(list(case.lengths), -(-max(case.lengths) // case.page), case.page, g)
    k, v = (pages.fill([normal(n, case.hk, case.d) for n in case.lengths], (case.hk, case.d)) for _ in "kv")
    return {"q": q, "k": k, "v": v, "block_table": pages.table, "seqused_k": pages.used, **more}


def errors(case: Decode, given: Mapping[str, Tensor], o: Tensor, lse: Tensor | None) -> Errors:
    """Distances from float64 in some sequences and heads; infinite where a value anywhere is not finite."""
    if not all(bool(torch.isfinite(x).all()) for x in (o, lse) if x is not None):
        return Errors(math.inf, math.inf, LIMITS["bf16"])
    by_length = sorted(range(case.b), key=lambda n: case.lengths[n])
    picked = {by_length[0], by_length[-1], by_length[case.b // 2]}
    pairs: list[tuple[float, float]] = []
    for b in sorted(picked)[:COMPARED]:
        for h in (0, case.hq - 1):
            want, want_lse = exact(case, given, b, h)
            off = (o[b, h, 0].double() - want).norm() / want.norm()
            off_lse = 0.0 if lse is None else float((lse[b, h, 0].double() - want_lse).abs())
            pairs.append((float(off), off_lse))
    return Errors(max(e for e, _ in pairs), max(e for _, e in pairs), LIMITS["bf16"])


def exact(case: Decode, given: Mapping[str, Tensor], b: int, h: int) -> tuple[Tensor, Tensor]:
    """o [D] and lse of one row in float64."""
    k, v = (keys_of(case, given, x, b)[:, h // (case.hq // case.hk)].double() for x in "kv")
    s = k @ given["q"][b, h, 0].double() * SCALE
    s = CAP * torch.tanh(s / CAP) if case.variant == "softcap" else s
    lse = s.logsumexp(-1)
    total = lse if case.variant != "sink" else torch.logaddexp(lse, given["sinks"][h].double())
    return torch.exp(s - total) @ v, lse


def keys_of(case: Decode, given: Mapping[str, Tensor], which: str, b: int) -> Tensor:
    """[S, Hk, D] keys or values of a sequence."""
    x, n = given[which], case.lengths[b]
    if not case.page:
        return x[b].transpose(0, 1)
    pages = given["block_table"][b, : -(-n // case.page)].long()
    return x[pages].flatten(0, 1)[:n]


# -- peers ---------------------------------------------------------------------------------------


def peers(case: Decode, given: Mapping[str, Tensor]) -> dict[str, Call]:
    """Those of the case that can do it without a copy."""
    if case.page:
        return {PACKED: packed(case, given)} if PACKED in case.peers else {}
    found = {name: PEER[name](case, *(given[x] for x in "qkv")) for name in case.peers if name in PEER}
    return {name: call for name, call in found.items() if call is not None}


def sdpa(case: Decode, q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Call | None:
    """One of torch's; a query at the end sees all keys."""
    if case.variant not in ("none", "causal"):
        return None
    attention, gqa = torch.nn.functional.scaled_dot_product_attention, case.hq != case.hk

    def call() -> Any:
        with sdpa_kernel(backend):
            return attention(q, k, v, scale=SCALE, enable_gqa=gqa)

    return call


def flex(case: Decode, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    if case.variant == "sink":
        return None
    score = (lambda s, b, h, i, j: CAP * torch.tanh(s / CAP)) if case.variant == "softcap" else None
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda: compiled(q, k, v, score_mod=score, scale=SCALE, enable_gqa=case.hq != case.hk)


def whole(case: Decode, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """FlashAttention-2 as torch has it for packed sequences: a program a head, for it splits no keys of those.

    Keys and values are [T, H, D] then: of several sequences these are copies, made beforehand.
    """
    if case.variant not in ("none", "causal") or case.hq != case.hk:
        return None  # a group of heads in one tile is split there, too
    n, b = case.lengths[0], case.b
    if b > 1:
        k, v = (x.transpose(1, 2).contiguous().flatten(0, 1) for x in (k, v))
    else:
        k, v = (x[0].transpose(0, 1) for x in (k, v))
    q = q[:, :, 0]
    ends = [torch.arange(b + 1, dtype=torch.int32, device=q.device) * rows for rows in (1, n)]
    flash = torch.ops.aten._flash_attention_forward
    return lambda: flash(q, k, v, *ends, 1, n, 0.0, False, False, scale=SCALE)[0][:, :, None]


def packed(case: Decode, given: Mapping[str, Tensor]) -> Call:
    """FlashAttention-2 over packed copies of the pages, made beforehand: torch's has no block tables.

    Heads of a group stand in one tile there. Each sequence is cut in as many parts, by its rule in one where sequences
    and heads fill the GPU.
    """
    k, v = (torch.cat([keys_of(case, given, x, b) for b in range(case.b)]) for x in "kv")
    lengths = torch.tensor([[1, n] for n in case.lengths], device=k.device).cumsum(0, dtype=torch.int32)
    ends = [torch.nn.functional.pad(lengths[:, side], (1, 0)) for side in (0, 1)]
    q, most = given["q"][:, :, 0], max(case.lengths)
    flash = torch.ops.aten._flash_attention_forward
    return lambda: flash(q, k, v, *ends, 1, most, 0.0, False, False, scale=SCALE)[0][:, :, None]


PEER: Final[Mapping[str, Callable[[Decode, Tensor, Tensor, Tensor], Call | None]]] = {
    "cuDNN": lambda *given: sdpa(*given, SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex,
    "FlashAttention-2": whole,
    "FlashAttention-2, split": lambda *given: sdpa(*given, SDPBackend.FLASH_ATTENTION),
}


@triton.jit
def read_all(X, Y, out, words, BLOCK: tl.constexpr):
    """Reads that many words of both tensors, and keeps nothing: `out` is for what the compiler cannot rule out."""
    seen = tl.zeros([BLOCK], tl.int32)
    for first in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < words
        seen = seen ^ tl.load(X + at, mask=inside, other=0) ^ tl.load(Y + at, mask=inside, other=0)
    if tl.max(seen, 0) == 1234567891:
        tl.store(out, 1)


WAYS: Final = tuple((per_sm, block, warps) for per_sm in (2, 4, 8) for block, warps in ((4096, 4), (8192, 8)))
"""Programs a multiprocessor, words of a block, warps."""


def readers(case: Decode, given: Mapping[str, Tensor]) -> dict[tuple[int, int, int], Call]:
    """Several ways to read as many bytes as the call needs."""
    k, v = (given[x].flatten().view(torch.int32) for x in "kv")
    words = case.bytes // 8
    out = torch.empty(1, dtype=torch.int32, device=k.device)
    sms = torch.cuda.get_device_properties(k.device).multi_processor_count
    return {
        way: lambda way=way: read_all[(way[0] * sms,)](k, v, out, words, BLOCK=way[1], num_warps=way[2]) for way in WAYS
    }


def fastest(calls: Mapping[tuple[int, int, int], Call]) -> Call:
    """Timed with the GPU to itself: while others compile and warm up, any might seem the fastest."""
    times = interleaved_graphs(calls, 3)
    return calls[min(calls, key=lambda way: times[way].ms)]
