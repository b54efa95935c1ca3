"""Two back-ends on one GPU: packages of TVM's CUDA kernels beside those of Triton's, checked, then timed in rounds.

`python -m benchmarks.backends emit DIR` writes both packages of each case (any machine); `run DIR --json FILE` measures
them on the GPU here, with cuDNN where it can do the case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import report
from benchmarks.cases import CASES, PLAIN_MASKS, TINY, Case
from benchmarks.check import errors, poisoned
from benchmarks.operands import inputs, operands, visible_pairs
from benchmarks.peers import cudnn
from benchmarks.timing import interleaved, interleaved_host

BACKENDS: Final = ("tvm", "triton")
ROWS: Final = tuple(case for case in CASES if case.s <= 16384 and case.dqk in (64, 72, 128, 192, 256))


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__)
    top.add_argument("step", choices=("emit", "run"))
    top.add_argument("dir", type=Path)
    top.add_argument("--target", default="sm_90")
    top.add_argument("--only", default="", metavar="SUBSTRING")
    top.add_argument("--json", type=Path, metavar="FILE")
    top.add_argument("--rounds", type=int, default=7)
    args = top.parse_args()
    chosen = [case for case in (*ROWS, TINY) if args.only in case.name]
    return emit(chosen, args) if args.step == "emit" else run(chosen, args)


def emit(chosen: list[Case], args: argparse.Namespace) -> int:
    driver, spec = import_module("attncc.driver"), import_module("attncc.spec")
    for text in dict.fromkeys(case.spec for case in chosen):
        for backend in BACKENDS:
            print(driver.compile(spec.loads(text), args.dir / backend, [args.target], backend=backend), flush=True)
    return 0


def packages(case: Case, folder: Path) -> dict[str, Any]:
    """The package of a case by back-end: they have one name, so each is imported as if it were the only one."""
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        sys.path.insert(0, str(folder / backend))
        found[backend] = import_module(case.package)
        sys.path.pop(0)
        for name in [n for n in sys.modules if n.split(".")[0] == case.package]:
            del sys.modules[name]
    return found


def run(chosen: list[Case], args: argparse.Namespace) -> int:
    """1 if a result was wrong."""
    rows: list[report.Row] = []
    wrong = 0
    with torch.no_grad():
        for case in chosen:
            found = host(case, args) if case == TINY else attention(case, args)
            wrong += not found
            rows += found
            print(report.line(found) if found else f"{case.name}: wrong", flush=True)
    print(report.table(rows))
    if args.json:
        report.save(args.json, report.gpu_meta(), rows, [])
    return int(wrong > 0)


def attention(case: Case, args: argparse.Namespace) -> list[report.Row]:
    """Rows of a case; none where TVM's result is wrong."""
    qkv, given = operands(case), inputs(case)
    made = packages(case, args.dir)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda p=package: p.attention(*qkv, **given, return_lse=True) for name, package in made.items()
    }
    with poisoned():
        o, lse = calls["tvm"]()
    found = errors(case, qkv, given, o, lse)
    if not found.ok:
        print(found, file=sys.stderr)
        return []
    del o, lse
    if case.variant in PLAIN_MASKS:
        calls["cuDNN"] = cudnn(case, qkv)
    names = {"tvm": "attncc", "triton": "attncc (Triton)"}
    times = {names.get(n, n): t for n, t in interleaved(calls, args.rounds).items()}
    return report.compared(case.name, times, case.flops(visible_pairs(case, given)))


def host(case: Case, args: argparse.Namespace) -> list[report.Row]:
    q, k, v = operands(case)
    made = packages(case, args.dir)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda p=package: p.attention(q, k, v) for name, package in made.items()
    }
    times = interleaved_host(calls, args.rounds)
    theirs = times["triton"]
    row = {
        "case": f"host/{case.shape}",
        "impl": "attncc",
        "ms": round(times["tvm"].ms, 5),
        "spread": times["tvm"].spread,
    }
    peer = {"case": f"host/{case.shape}", "impl": "attncc (Triton)", "ms": round(theirs.ms, 5), "spread": theirs.spread}
    return [row | report.ratio("attncc (Triton)", times["tvm"].against(theirs)), peer]


if __name__ == "__main__":
    sys.exit(main())
