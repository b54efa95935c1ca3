"""One process a measurement: some compile at once, then each in turn has the GPU to itself; none can spoil another."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.cases import Case
from benchmarks.decode_cases import Decode, Series

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A kind of measurement: fwd, mask, host or decode of a case, or series of several."""

    kind: str
    case: Case | Decode | Series

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.case.shape}"


@dataclass(frozen=True, slots=True)
class Result:
    """Rows, or why there are none: the result was wrong, the process failed, or time was up."""

    job: Job
    rows: tuple[Row, ...] = ()
    why: str = ""


@dataclass(slots=True)
class Worker:
    """A job's process, and our end of the pipe to it."""

    job: Job
    process: Any
    pipe: Connection


def run_jobs(
    jobs: Sequence[Job], folder: str, rounds: int, slots: int, compile_until: float, until: float
) -> Iterator[Result]:
    """Results in the order of `jobs`; the times are of time.monotonic().

    Args:
        slots: how many may compile at once.
        compile_until: when whatever still compiles is given up.
        until: when no further measurement begins.
    """
    ready, failed = compiled(jobs, folder, rounds, slots, compile_until)
    try:
        for job in jobs:
            if job in failed:
                yield Result(job, why=failed[job])
            elif time.monotonic() > until:
                yield Result(job, why="not begun: the budget is spent")
            else:
                yield measured(ready[job], until)
    finally:
        for worker in ready.values():
            worker.process.kill()


def compiled(
    jobs: Sequence[Job], folder: str, rounds: int, slots: int, until: float
) -> tuple[dict[Job, Worker], dict[Job, str]]:
    """Workers that are ready to measure, and why others are not."""
    ready: dict[Job, Worker] = {}
    failed: dict[Job, str] = {}
    running: dict[Connection, Worker] = {}
    # what takes longest to compile first; in the table's order otherwise
    todo = sorted(jobs, key=lambda job: job.kind != "mask")
    while todo or running:
        while todo and len(running) < slots:
            worker = start(todo.pop(0), folder, rounds)
            running[worker.pipe] = worker
        heard = wait(list(running), max(0.0, until - time.monotonic()))
        for pipe in heard:
            worker = running.pop(pipe)  # type: ignore[index]
            verdict, detail = received(worker.pipe)
            if verdict == "ready":
                ready[worker.job] = worker
            else:
                failed[worker.job] = str(detail)
        if not heard:
            for worker in running.values():
                worker.process.kill()
            late = [*(w.job for w in running.values()), *todo]
            return ready, failed | dict.fromkeys(late, "not ready: compiling took too long")
    return ready, failed


def start(job: Job, folder: str, rounds: int) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(job, folder, rounds, theirs), daemon=True)
    process.start()
    theirs.close()
    return Worker(job, process, ours)


def measured(worker: Worker, until: float) -> Result:
    """Lets a worker that is ready measure, and waits for what it says; a minute past the budget it is stopped."""
    try:
        worker.pipe.send("go")
    except OSError:
        return Result(worker.job, why="the process ended")
    if not worker.pipe.poll(max(60.0, until - time.monotonic() + 60.0)):
        worker.process.kill()
        return Result(worker.job, why="stopped: measuring took too long")
    verdict, detail = received(worker.pipe)
    worker.process.join(10)
    if verdict == "rows":
        return Result(worker.job, rows=tuple(detail))
    return Result(worker.job, why=str(detail))


def received(pipe: Connection) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return "failed", "the process ended without a word"


def _serve(job: Job, folder: str, rounds: int, pipe: Connection) -> None:
    """The process itself: compiles, says so, waits for its turn, measures."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    sys.path.insert(0, folder)
    try:
        from benchmarks.measure import Rejected, prepare
    except ImportError as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    try:
        act = prepare(job.kind, job.case, rounds)
        pipe.send(("ready", None))
        pipe.recv()
        pipe.send(("rows", act()))
    except Rejected as error:
        pipe.send(("failed", f"REJECTED: {error}"))
    except Exception:
        pipe.send(("failed", traceback.format_exc(limit=-4)))
