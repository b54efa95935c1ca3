"""Attention on the CPU: attncc against torch's SDPA and FlexAttention, checked, then timed in alternating calls.

`python -m benchmarks.cpu --json FILE` compiles every package of the table, checks it against float64 and times it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cpu_cases import CASES, FIXED
from benchmarks.cpu_measure import Bench, Row, attention, build, cold, fixed, host

Step = Callable[[Bench], list[Row]]


def main() -> int:
    """1 if anything was wrong or failed."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    chosen = {name: step for name, step in steps().items() if args.only in name}
    if not chosen:
        print(f"no measurement's name holds '{args.only}'", file=sys.stderr)
        return 2
    rows: list[Row] = []
    without: list[Row] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder, torch.no_grad():
        sys.path.insert(0, folder)
        rounds, seconds = (7, 0.5) if args.quick else (args.rounds, args.seconds)
        bench = Bench(Path(folder), rounds, seconds, args.flex)
        for name, step in chosen.items():
            found = measured(name, step, bench)
            rows += [row for row in found if "missing" not in row]
            without += [row for row in found if "missing" in row]
            print(f"{time.monotonic() - begun:4.0f} s  {name}: {report.line(found)}", flush=True)
            if args.json:
                report.save(args.json, report.cpu_meta(), rows, without)
    print("", report.markdown(rows) if args.markdown else report.table(rows), "", report.summary(rows), sep="\n")
    for entry in without:
        print(f"no result of {entry['impl']} for {entry['case']}: {entry['missing']}")
    return int(any(entry["impl"] == "attncc" for entry in without))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    top.add_argument("--only", default="", metavar="SUBSTRING", help="measurements whose name holds this")
    top.add_argument("--json", type=Path, metavar="FILE")
    top.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    top.add_argument("--rounds", type=int, default=200, help="of calls in turn, at most")
    top.add_argument("--seconds", type=float, default=5.0, help="for the rounds of a case; 5 rounds there are anyway")
    top.add_argument("--quick", action="store_true", help="few rounds: whether it works, not how fast it is")
    top.add_argument("--flex", action="store_true", help="time compiled FlexAttention too, which needs g++ and minutes")
    top.add_argument("--threads", type=int, default=2)
    return top


def steps() -> dict[str, Step]:
    """Every measurement by its name: the kind of work, and the case."""
    out: dict[str, Step] = {}
    for work, cases in CASES.items():
        for case in cases:
            out[f"{work}: {case.name}"] = lambda bench, work=work, case=case: [
                row | {"work": work} for row in attention(bench, case)
            ]
    out |= {f"fixed: {case.name}": lambda bench, case=case: fixed(bench, case) for case in FIXED}
    return out | {"host": host, "build": build, "cold": cold}


def measured(name: str, step: Step, bench: Bench) -> list[Row]:
    """A step's rows, or one that says why there are none: the others go on."""
    try:
        return step(bench)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        return [{"case": name, "impl": "attncc", "missing": why}]


if __name__ == "__main__":
    sys.exit(main())
