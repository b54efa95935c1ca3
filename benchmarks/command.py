"""The command line of a table of packages: `emit` compiles them, `run` checks and times them, `plot` draws the ratios.

`emit` runs on any machine; `run` needs a GPU, torch and triton alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from benchmarks import report
from benchmarks.pool import Job, Result, Row, run_jobs

BUDGET = 480.0
Step = Callable[[argparse.Namespace], int]


@dataclass(frozen=True, slots=True)
class Table:
    """What is measured."""

    name: str
    doc: str
    specs: tuple[str, ...]
    """Of all packages that the jobs import."""
    jobs: tuple[Job, ...]
    page: Callable[[Path], str] | None = None
    """What is written of a JSON file elsewhere."""


def main(table: Table) -> int:
    args = parser(table).parse_args()
    return args.step(table, args)


def two_steps(name: str, doc: str | None, emit_to: Step, run_from: Step) -> int:
    """The command line of a benchmark with few packages of its own: `emit DIR`, then `run DIR --json FILE`."""
    top = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc)
    steps = top.add_subparsers(required=True)
    emit = steps.add_parser("emit")
    emit.add_argument("dir", type=Path)
    emit.add_argument("--target", default="sm_90")
    emit.set_defaults(step=emit_to)
    run = steps.add_parser("run")
    run.add_argument("dir", type=Path)
    run.add_argument("--json", type=Path, metavar="FILE")
    run.add_argument("--rounds", type=int, default=11)
    run.set_defaults(step=run_from)
    args = top.parse_args()
    return args.step(args)


def parser(table: Table) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=f"python -m benchmarks.{table.name}", description=table.doc)
    steps = top.add_subparsers(required=True)
    emit = steps.add_parser("emit", help="compile every package of the table")
    emit.add_argument("dir", type=Path, nargs="?", help="the same as -o")
    emit.add_argument("-o", "--output", type=Path)
    emit.add_argument("--target", default="sm_90")
    emit.set_defaults(step=emit_packages)
    run = steps.add_parser("run", help="check and time them on the GPU here")
    run.add_argument("dir", type=Path)
    run.add_argument("--only", default="", metavar="SUBSTRING", help="measurements whose name holds this")
    run.add_argument("--json", type=Path, metavar="FILE")
    run.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    run.add_argument("--budget", type=float, default=BUDGET, help="seconds for all; what is measured then is kept")
    run.add_argument("--patience", type=float, help="seconds of it for compiling (default: half)")
    run.add_argument("--rounds", type=int, default=11)
    run.add_argument(
        "--jobs", type=int, default=max(2, (os.cpu_count() or 2) - 1), help="processes that compile at once"
    )
    run.set_defaults(step=measure)
    plot = steps.add_parser("plot", help="draw the ratios of a JSON file")
    plot.add_argument("file", type=Path)
    plot.add_argument("-o", "--output", type=Path, help="an .svg or a .png (default: FILE.svg)")
    plot.set_defaults(step=draw)
    if table.page is not None:
        page = steps.add_parser("page", help="print what a document has of a JSON file")
        page.add_argument("file", type=Path)
        page.set_defaults(step=written)
    return top


def emit_packages(table: Table, args: argparse.Namespace) -> int:
    """Every package of the table, by the compiler."""
    out = args.output or args.dir
    if out is None:
        parser(table).error("emit needs a directory: -o DIR")
    return compile_all(table.specs, out, args.target)


def compile_all(specs: Iterable[str], out: Path, target: str) -> int:
    """Needs attncc, which what is measured does not."""
    driver, spec = import_module("attncc.driver"), import_module("attncc.spec")
    for text in dict.fromkeys(specs):
        print(driver.compile(spec.loads(text), out, [target]), flush=True)
    return 0


def measure_all(args: argparse.Namespace, *rows_of: Callable[[int], list[Row]]) -> int:
    """What each gives in so many rounds, of the packages in a folder: printed, and kept where that is asked for."""
    sys.path.insert(0, str(args.dir))
    rows = [row for each in rows_of for row in each(args.rounds)]
    print(report.table(rows))
    if args.json:
        report.save(args.json, report.gpu_meta(), rows, [])
    return 0


def chosen(table: Table, only: str) -> list[Job]:
    return [job for job in table.jobs if only in job.name]


def measure(table: Table, args: argparse.Namespace) -> int:
    """1 if anything was wrong, failed, or found no time."""
    begun = time.monotonic()
    wrong = obstacle(table, args.dir, args.only)
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    patience = args.budget / 2 if args.patience is None else args.patience
    rows: list[Row] = []
    without: list[Row] = []
    failed = False
    with tempfile.TemporaryDirectory(
        prefix="attncc-bench-", ignore_cleanup_errors=True
    ) as cache:  # first calls are first ones
        os.environ |= {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        limits = (begun + patience, begun + args.budget)
        for result in run_jobs(chosen(table, args.only), str(args.dir.resolve()), args.rounds, args.jobs, *limits):
            rows += [row for row in result.rows if "missing" not in row]
            without += [row for row in result.rows if "missing" in row]
            if result.why:
                failed = True
                without.append({"case": result.job.name, "impl": "attncc", "missing": result.why})
            print(f"{time.monotonic() - begun:4.0f} s  {line(result)}", flush=True)
            if args.json:
                report.save(args.json, report.gpu_meta(), rows, without)
    print("", report.markdown(rows) if args.markdown else report.table(rows), "", report.summary(rows), sep="\n")
    for entry in without:
        print(f"no result of {entry['impl']} for {entry['case']}: {entry['missing']}")
    return int(failed)


def obstacle(table: Table, folder: Path, only: str) -> str:
    """Why nothing can be measured here; empty if it can."""
    jobs = chosen(table, only)
    absent = sorted({p for job in jobs for p in job.case.packages} - {p.name for p in folder.glob("*")})
    if not jobs:
        return f"no measurement's name holds '{only}'"
    if absent:
        return f"{folder} lacks {', '.join(absent)}: run `emit` first"
    return "" if import_module("torch").cuda.is_available() else "a CUDA GPU is needed here"


def line(result: Result) -> str:
    """What came of a job, while others go on."""
    if result.why:
        return f"{result.job.name}: {result.why.strip().splitlines()[-1]}"
    return f"{result.job.name}: {report.line(result.rows)}"


def draw(table: Table, args: argparse.Namespace) -> int:
    import_module("benchmarks.plot").draw(args.file, args.output)
    return 0


def written(table: Table, args: argparse.Namespace) -> int:
    assert table.page is not None
    print(table.page(args.file))
    return 0
