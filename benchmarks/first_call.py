"""The first call of a package in a fresh process and with empty caches: from cubins, and through Triton.

`python -m benchmarks.first_call emit DIR` writes both packages of each case (any machine); `run DIR --json FILE` starts
one process a call on the GPU here. That process has torch, a CUDA context and its operands before the clock starts; for
a package with cubins it has neither Triton nor a compiler to find.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import report
from benchmarks.cases import TINY, Case
from benchmarks.check import errors
from benchmarks.operands import inputs, operands
from benchmarks.timing import Timing

CASES: Final = (TINY, Case("causal", 4, 16, 16, 8192, 128, 128), Case("documents", 4, 16, 16, 8192, 128, 128))
KINDS: Final = {"cubins": "attncc --aot", "triton": "attncc"}
"""Folders of packages, and what rows call them."""
PARTS: Final = ("import", "first")


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__)
    top.add_argument("step", choices=("emit", "run", "once"))
    top.add_argument("dir", type=Path)
    top.add_argument("--target", default="sm_90")
    top.add_argument("--json", type=Path, metavar="FILE")
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--case", type=int, default=0, help="of `once`: which one")
    args = top.parse_args()
    return {"emit": emit, "run": run, "once": once}[args.step](args)


def emit(args: argparse.Namespace) -> int:
    driver, spec = import_module("attncc.driver"), import_module("attncc.spec")
    for case in CASES:
        loaded = spec.loads(case.spec)
        print(driver.compile(loaded, args.dir / "cubins", aot=[args.target]), flush=True)
        print(driver.compile(loaded, args.dir / "triton", [args.target]), flush=True)
    return 0


def run(args: argparse.Namespace) -> int:
    """1 if a result was wrong, or a process failed."""
    rows: list[report.Row] = []
    without: list[report.Row] = []
    for n, case in enumerate(CASES):
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                found[kind].append(apart(args.dir / kind, n))
        wrong = {kind: next((r["why"] for r in results if r["why"]), "") for kind, results in found.items()}
        without += [{"case": case.name, "impl": KINDS[k], "missing": why} for k, why in wrong.items() if why]
        if not any(wrong.values()):
            rows += compared(case, found)
            print(report.line(rows[-2 * len(PARTS) :]), flush=True)
    print(report.table(rows))
    for entry in without:
        print(f"no result of {entry['impl']} for {entry['case']}: {entry['missing']}", file=sys.stderr)
    if args.json:
        report.save(args.json, report.gpu_meta(), rows, without)
    return int(bool(without))


def compared(case: Case, found: dict[str, list[dict[str, Any]]]) -> list[report.Row]:
    rows: list[report.Row] = []
    for part in PARTS:
        times = {kind: Timing(tuple(r[part] for r in results)) for kind, results in found.items()}
        ours, theirs = (
            {"case": f"{part}/{case.shape}", "impl": name, "ms": round(times[kind].ms, 3), "spread": times[kind].spread}
            for kind, name in KINDS.items()
        )
        ratio = report.ratio(KINDS["triton"], times["cubins"].against(times["triton"]))
        rows += [ours | ratio, theirs]
    return rows


def apart(folder: Path, case: int) -> dict[str, Any]:
    """What one fresh process measures."""
    with tempfile.TemporaryDirectory(prefix="attncc-first-") as cache:
        command = [sys.executable, "-m", "benchmarks.first_call", "once", str(folder.resolve()), "--case", str(case)]
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        if folder.name == "cubins":
            environment |= {"PATH": "", "CC": "/nowhere"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        return {"why": (child.stderr.strip().splitlines() or ["no word of why"])[-1]}
    return json.loads(child.stdout.splitlines()[-1])


def once(args: argparse.Namespace) -> int:
    """Times the import and the first call, and checks its result."""
    case = CASES[args.case]
    qkv, given = operands(case), inputs(case)
    torch.cuda.synchronize()
    if args.dir.name == "cubins":
        sys.modules["triton"] = None  # type: ignore[assignment]
    sys.path.insert(0, str(args.dir))
    begun = time.perf_counter()
    package = import_module(case.package)
    imported = time.perf_counter()
    with torch.no_grad():
        o, lse = package.attention(*qkv, **given, return_lse=True)
    torch.cuda.synchronize()
    done = time.perf_counter()
    found = errors(case, qkv, given, o, lse)
    times = {"import": 1e3 * (imported - begun), "first": 1e3 * (done - imported)}
    print(json.dumps(times | {"why": "" if found.ok else str(found)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
