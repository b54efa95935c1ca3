"""How long an emitted package takes to find the row of its decision table: what a call with new shapes pays for one.

`python -m benchmarks.lookup --json FILE` compiles a package and times its look-up for tables of 1 to 12 rows, of which
the last one, which has no bounds, is the one that holds: all others are read before it. Beside it stands the whole plan
of such a call.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from attncc import driver, spec
from attncc.check.run import imported
from attncc.device import INTERPRETER
from benchmarks import report
from benchmarks.report import Row

SPEC: Final = "attncc: 1\nname: looked_up\nheads: 2\ndims: 16\ndtype: fp32\nmask: causal\n"
SIZES: Final = {"B": 4, "Sq": 4096, "Sk": 4096}
ROWS: Final = range(1, 13)
AXES: Final = ("pairs", "Sq", "Sk", "B")
REPEAT: Final = 50
"""Look-ups of one sample: few, so that most samples are not interrupted."""
PLANS: Final = 2


def main() -> int:
    args = parser().parse_args()
    rows = measured(args.rounds)
    for row in rows:
        print(f"{row['case']:24} {row['ns']:9.0f} ns  {row['spread_ns'][0]:.0f}–{row['spread_ns'][1]:.0f}")
    if args.json:
        head = report.cpu_meta()
        report.save(args.json, head | {"python": sys.version.split()[0], "rounds": args.rounds}, rows, [])
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.lookup", description=__doc__)
    top.add_argument("--json", type=Path, metavar="FILE")
    top.add_argument("--rounds", type=int, default=2001, help="samples of each, in turn")
    return top


def measured(rounds: int) -> list[Row]:
    """Rows of every length of table, and of a plan."""
    os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder:
        package = driver.compile(spec.loads(SPEC), folder, [INTERPRETER])
        with imported(package) as module, torch.no_grad():
            calls, counts = looked_up(module)
            return timed(calls, counts, rounds)


def looked_up(module: Any) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """What is timed, and how often in a sample."""
    runner = getattr(module._RUNNER, "gpu", module._RUNNER)
    here = torch.device("cpu")
    file, _ = runner.file(here)
    cards = sys.modules[type(runner).__module__]  # has what it imports from _cards
    config = file.TABLE[-1][1]
    calls: dict[str, Callable[[], Any]] = {}
    for count in ROWS:
        table = Table(table_of(count, config))
        found, _ = cards.row(table, cards.counted(SIZES))
        if found:
            raise AssertionError(f"a row of {count} with bounds {found} holds")
        calls[f"table of {count}"] = lambda t=table: cards.row(t, cards.counted(SIZES))
    tensors = [torch.empty(1, 2, 128, 16) for _ in "qkv"]
    calls["a call's whole plan"] = lambda: runner.plan(tensors, True, True)
    return calls, dict.fromkeys(calls, REPEAT) | {"a call's whole plan": PLANS}


class Table:
    """Stands for a module of configs."""

    def __init__(self, rows: tuple[tuple[Mapping[str, int], Mapping[str, int]], ...]) -> None:
        self.TABLE = rows


def table_of(count: int, config: Mapping[str, int]) -> tuple[tuple[Mapping[str, int], Mapping[str, int]], ...]:
    """Rows as tuning makes them, one or two bounds each, of which the last alone holds for SIZES.

    Of two bounds the first one holds, so that both are read.
    """
    rows = []
    for n in range(count - 1):
        held, broken = AXES[(n + 1) % 4], AXES[n % 4]
        bounds = {broken: n % 3 + 1} if n % 2 else {held: 2**40, broken: n % 3 + 1}
        rows.append((bounds, config))
    return (*rows, ({}, config))


def timed(calls: Mapping[str, Callable[[], Any]], counts: Mapping[str, int], rounds: int) -> list[Row]:
    """Nanoseconds of one call, in rounds."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            for _ in range(counts[name]):
                call()
            seen[name].append((time.perf_counter_ns() - begin) / counts[name])
    rows: list[Row] = []
    for name, ns in seen.items():
        low, middle, high = statistics.quantiles(ns, n=4, method="inclusive")
        rows.append({"case": name, "ns": round(middle), "spread_ns": [round(low), round(high)], "least_ns": min(ns)})
    return rows


if __name__ == "__main__":
    sys.exit(main())
