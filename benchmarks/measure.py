"""What one process measures: a case, a mask's set-up, or the host's time of a call; each compiles first, then waits."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import report
from benchmarks.cases import SCALE, Case
from benchmarks.check import Rejected, errors, poisoned
from benchmarks.decode_cases import Decode, Series
from benchmarks.decode_measure import decode, series
from benchmarks.operands import inputs, mask_mod, operands, visible_pairs
from benchmarks.peers import EAGER_LENGTH, answering, gpu_peers
from benchmarks.timing import Timing, device_ms, graphed_ms, interleaved, interleaved_host

Row = dict[str, Any]
Act = Callable[[], list[Row]]


def prepare(kind: str, case: Case | Decode | Series, rounds: int) -> Act:
    """Compiles everything; what it returns then measures with the GPU to itself."""
    with torch.no_grad():
        act = PREPARE[kind](case, rounds)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.no_grad()(act)


# -- attention -----------------------------------------------------------------------------------


def _attention(case: Case, rounds: int) -> Act:
    qkv, given = operands(case), inputs(case)
    package = importlib.import_module(case.package)
    ours: Callable[[], Any] = lambda: package.attention(*qkv, **given, return_lse=True)
    calls, absent = answering(case.name, {"attncc": ours}, gpu_peers(case, qkv, given))

    def act() -> list[Row]:
        with poisoned():
            o, lse = ours()
        found = errors(case, qkv, given, o, lse)
        if not found.ok:
            raise Rejected(str(found))
        rows = report.compared(case.name, interleaved(calls, rounds), case.flops(visible_pairs(case, given)))
        measured = {"o_error": found.o, "lse_error": found.lse}
        return [row | (measured if row["impl"] == "attncc" else {}) for row in rows] + absent

    return act


# -- masks ---------------------------------------------------------------------------------------


def _mask(case: Case, rounds: int) -> Act:
    """FlexAttention's table of a mask, compiled as its documentation advises; ours where a kernel lists tiles."""
    given = inputs(case)
    mod = mask_mod(case, given)
    compiled = torch.compile(create_block_mask)
    start = time.monotonic()
    compiled(mod, None, None, case.s, case.s)
    torch.cuda.synchronize()
    first_s = time.monotonic() - start
    package = importlib.import_module(case.package)

    def act() -> list[Row]:
        name = f"mask/{case.shape}"
        theirs = Timing(tuple(device_ms(lambda: compiled(mod, None, None, case.s, case.s), 5) for _ in range(rounds)))
        peer: Row = {"case": name, "impl": "FlexAttention", "ms": round(theirs.ms, 5), "spread": theirs.spread}
        peer["first_s"] = round(first_s, 1)
        if case.s <= EAGER_LENGTH:
            peer["eager_ms"] = round(device_ms(lambda: create_block_mask(mod, None, None, case.s, case.s), 3), 3)
        ours = classification(package, (*operands(case), *given.values()))
        row: Row = {"case": name, "impl": "attncc", "ms": 0.0, "peer": "FlexAttention"}
        if ours is not None:
            row |= {"ms": round(ours.ms, 5), "spread": ours.spread}
            row["ratio"] = round(theirs.ms / ours.ms, 1)
        return [row, peer]

    return act


def classification(package: ModuleType, tensors: tuple[torch.Tensor, ...]) -> Timing | None:
    """Device time of the kernel that lists key tiles, apart from attention; None where the mask needs none."""
    variant = package.VARIANT
    kernels = tuple(k for k in variant.kernels if k.function.__name__.endswith("_classify"))
    if not kernels:
        return None
    runner = type(package._RUNNER)(replace(variant, kernels=kernels), package._RUNNER.way)
    return graphed_ms(lambda: runner(tensors, None, False))


# -- the host ------------------------------------------------------------------------------------


def _host(case: Case, rounds: int) -> Act:
    def act() -> list[Row]:
        q, k, v = operands(case)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        sdpa(q, k, v, scale=SCALE)
        torch.cuda.synchronize()
        start = time.monotonic()
        package = importlib.import_module(case.package)
        package.attention(q, k, v)
        torch.cuda.synchronize()
        first_s = time.monotonic() - start
        times = interleaved_host(
            {
                "attncc": lambda: package.attention(q, k, v),
                "attncc, with lse": lambda: package.attention(q, k, v, return_lse=True),
                "SDPA": lambda: sdpa(q, k, v, scale=SCALE),
            },
            rounds,
        )
        rows: list[Row] = []
        for impl, t in times.items():
            row: Row = {"case": f"host/{case.shape}", "impl": impl, "ms": round(t.ms, 5), "spread": t.spread}
            rows.append(row if impl == "SDPA" else row | report.ratio("SDPA", t.against(times["SDPA"])))
        rows[0]["first_call_s"] = round(first_s, 2)
        return rows

    return act


PREPARE: Mapping[str, Callable[[Any, int], Act]] = {
    "fwd": _attention, "mask": _mask, "host": _host, "decode": decode, "series": series,
}  # fmt: skip
