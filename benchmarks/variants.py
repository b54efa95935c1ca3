"""Variants of one shape beside our own plain causal kernel, and fp8 beside cuDNN in bf16, in turns in one process.

`python -m benchmarks.variants emit DIR` writes the packages (any machine with attncc); `run DIR --json FILE` checks
those of 16 bits against float64 and measures on the GPU here; fp8, whose rounding is part of what it means, is for
`attncc check`. A ratio to `causal` is the share of its rate, in TFLOP/s of pairs that a mask leaves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from benchmarks import report
from benchmarks.cases import SCALE, Case
from benchmarks.check import Rejected, errors, poisoned
from benchmarks.command import compile_all, measure_all, two_steps
from benchmarks.operands import inputs, operands, visible_pairs
from benchmarks.peers import cudnn
from benchmarks.timing import Timing, interleaved

Row = dict[str, Any]
VARIANTS: Final = ("causal", "alibi", "relative_bias", "sink", "softcap", "window", "documents")
CASES: Final = {variant: Case(variant, 4, 16, 16, 16384, 128, 128) for variant in VARIANTS}
PLAIN: Final = {variant: Case(variant, 4, 16, 16, 16384, 128, 128) for variant in ("none", "causal")}
FP8: Final = f"""
attncc: 1
name: fp8_MASK
heads: 16
dims: 128
scale: {SCALE}
quantize: {{q: fp8_e4m3(per=head), k: fp8_e4m3(per=head), v: fp8_e4m3(per=head), p: fp8_e4m3}}
"""


def main() -> int:
    return two_steps("variants", __doc__, emit_packages, measure)


def specs() -> list[str]:
    masks = {"none": "", "causal": "mask: causal\n"}
    fp8 = [FP8.replace("MASK", variant) + masks[variant] for variant in PLAIN]
    return [*(case.spec for case in CASES.values()), *fp8]


def emit_packages(args: argparse.Namespace) -> int:
    return compile_all(specs(), args.dir, args.target)


def measure(args: argparse.Namespace) -> int:
    return measure_all(args, of_causal, few_bits)


def of_causal(rounds: int) -> list[Row]:
    qkv = operands(CASES["causal"])
    calls = {variant: _checked(case, qkv) for variant, case in CASES.items()}
    times = interleaved(calls, rounds)
    pairs = {variant: visible_pairs(case, inputs(case)) for variant, case in CASES.items()}
    rows: list[Row] = []
    for variant, case in CASES.items():
        as_much = times["causal"].times(pairs[variant] / pairs["causal"])
        row = _row(case.name, "attncc", times[variant], case.flops(pairs[variant]))
        rows.append(row | report.ratio("causal", times[variant].against(as_much)))
    return rows


def few_bits(rounds: int) -> list[Row]:
    """fp8, with the kernels that quantise."""
    rows: list[Row] = []
    for variant, case in PLAIN.items():
        qkv = operands(case)
        package = import_module(f"fp8_{variant}")
        calls: dict[str, Callable[[], Any]] = {
            "attncc": lambda p=package, x=qkv: p.attention(*x),
            "cuDNN": cudnn(case, qkv),
        }
        rows += report.compared(f"{case.name}/fp8", interleaved(calls, rounds), case.flops(visible_pairs(case, {})))
    return rows


def _checked(case: Case, qkv: Any) -> Callable[[], Any]:
    given = inputs(case)
    package = import_module(case.package)
    call = lambda: package.attention(*qkv, **given, return_lse=True)
    with poisoned():
        found = errors(case, qkv, given, *call())
    if not found.ok:
        raise Rejected(f"{case.name}: {found}")
    return call


def _row(case: str, impl: str, t: Timing, work: float) -> Row:
    return {
        "case": case,
        "impl": impl,
        "ms": round(t.ms, 5),
        "spread": t.spread,
        "tflops": float(f"{work / t.ms / 1e9:.4g}"),
    }


if __name__ == "__main__":
    sys.exit(main())
