"""What is measured on a CPU: attention, the least time of a call, and how long it takes to have a package."""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from attncc import driver, spec
from benchmarks import report
from benchmarks.cases import SCALE, Case
from benchmarks.check import Errors, errors, poisoned
from benchmarks.cpu_cases import TINY, TYPICAL, has_ceiling
from benchmarks.operands import inputs, operands, visible_pairs
from benchmarks.peers import cpu_peers, sdpa
from benchmarks.timing import Timing, alternating

Row = dict[str, Any]
MM: Final = 2048
"""Of the square product whose rate is the ceiling."""
ROOT: Final = Path(__file__).parents[1]
FIRST_USE: Final = f"""
import sys, torch, {TYPICAL.package} as package
q, k, v = torch.randn(3, 1, {TYPICAL.hq}, 100, {TYPICAL.dqk}).unbind()
o = package.attention(q, k, v)
want = torch.nn.functional.scaled_dot_product_attention(
    q.double(), k.double(), v.double(), is_causal=True, scale={SCALE})
assert (o - want).abs().max() < 1e-5, "the result is wrong"
assert not {{"attncc", "tvm"}} & sys.modules.keys(), "more than tvm_ffi was loaded"
"""
"""A program that uses the package where there is neither attncc nor TVM."""


class Rejected(Exception):
    """A result that is wrong, and so is not timed."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where packages are written, and how much is timed."""

    folder: Path
    rounds: int
    seconds: float
    """For the rounds of a case."""
    with_flex: bool = False

    def package(self, case: Case) -> Any:
        """The case's package, compiled at its first use."""
        return self.compiled(case.package, case.spec)

    def compiled(self, name: str, text: str) -> Any:
        if not (self.folder / name).exists():
            driver.compile(spec.loads(text), self.folder, ["cpu"])
            importlib.invalidate_caches()
        return importlib.import_module(name)

    def alternating(self, calls: dict[str, Callable[[], Any]], between: Callable[[], Any] | None = None) -> Any:
        return alternating(calls, self.rounds, self.seconds, between)


# -- attention -----------------------------------------------------------------------------------


def attention(bench: Bench, case: Case) -> list[Row]:
    """A case against each of its peers, and against torch.mm where that is the ceiling.

    Raises:
        Rejected: our result, or a peer's, is not that of float64.
    """
    qkv, given = operands(case, "cpu"), inputs(case, "cpu")
    package = bench.package(case)
    with poisoned():
        o, lse = package.attention(*qkv, **given, return_lse=True)
    found = errors(case, qkv, given, o, lse)
    _accept("attncc", found)
    calls: dict[str, Callable[[], Any]] = {"attncc": lambda: package.attention(*qkv, **given)}
    rows: list[Row] = []
    for name, call in cpu_peers(case, qkv, given, bench.with_flex).items():
        try:
            o = call()
        except Exception as error:  # a compiler's, of any kind
            rows.append({"case": case.name, "impl": name, "missing": f"{type(error).__name__}: {error}".split("\n")[0]})
            continue
        _accept(name, errors(case, qkv, given, o, None))
        calls[name] = call
    flops = case.flops(visible_pairs(case, given))
    times = bench.alternating(calls)
    if case.sq == 1:
        rows += report.compared(case.name, times, sum(x.nbytes for x in qkv[1:]), "tbps")
    else:
        rows += report.compared(case.name, times, flops)
    if has_ceiling(case):
        a = torch.randn(MM, MM)
        times = bench.alternating({"attncc": calls["attncc"], "torch.mm": lambda: a @ a})
        times["torch.mm"] = times["torch.mm"].times(flops / (2 * MM**3))  # as if it did as many
        rows += report.compared(case.name, times, flops)
    measured = {"o_error": found.o, "lse_error": found.lse}
    return [row | (measured if row["impl"] == "attncc" else {}) for row in rows]


def _accept(name: str, found: Errors) -> None:
    if not found.ok:
        raise Rejected(f"{name}: {found}")


def fixed(bench: Bench, case: Case) -> list[Row]:
    """A package whose spec fixes the sizes against the one for any sizes, which must give the same bits."""
    qkv, name = operands(case, "cpu"), f"{case.package}_at_{case.s}"
    text = case.spec.replace(f"name: {case.package}\n", f"name: {name}\n")
    text += f"sizes: {{B: {case.b}, Sq: {case.sq}, Sk: {case.s}}}\n"
    packages = {"attncc": bench.compiled(name, text), "attncc dynamic": bench.package(case)}
    o, lse = packages["attncc"].attention(*qkv, return_lse=True)
    _accept("attncc", errors(case, qkv, {}, o, lse))
    if not torch.equal(o, packages["attncc dynamic"].attention(*qkv)):
        raise Rejected("results differ")
    times = bench.alternating({n: lambda p=p: p.attention(*qkv) for n, p in packages.items()})
    rows = report.compared(f"fwd/fixed/{case.shape}", times, case.flops(visible_pairs(case, {})))
    return [row | {"work": "fixed"} for row in rows]


def host(bench: Bench) -> list[Row]:
    """The smallest call, alternating with a product that wakes torch's threads."""
    q, k, v = operands(TINY, "cpu")
    package, a = bench.package(TINY), torch.randn(256, 256)
    calls = {"attncc": lambda: package.attention(q, k, v), "SDPA": sdpa(TINY, (q, k, v))}
    times = alternating(calls, bench.rounds * 10, bench.seconds, between=lambda: a @ a)
    return report.compared(f"host/{TINY.shape}", times, TINY.flops(TINY.s**2))


# -- compiling -----------------------------------------------------------------------------------


def build(bench: Bench) -> list[Row]:
    """From a spec to a library, by instruction set, when TVM is loaded; `emit_ms` of it are before LLVM."""
    isas = importlib.import_module("attncc.codegen.tvm.isa").ISAS
    kernels = importlib.import_module("attncc.codegen.tvm.libraries").kernels
    library = importlib.import_module("attncc.codegen.tvm.build").library
    library(kernels(driver.lower(spec.loads(TYPICAL.spec).attention)[0], isas[0]), isas[0])  # TVM's own first time
    rows: list[Row] = []
    for isa in isas:
        if not isa.triple.startswith(platform.machine()):
            continue
        emits, totals = [], []
        for _ in range(min(5, bench.rounds)):
            start = time.perf_counter()
            functions = kernels(driver.lower(spec.loads(TYPICAL.spec).attention)[0], isa)
            emits.append((time.perf_counter() - start) * 1e3)
            library(functions, isa)
            totals.append((time.perf_counter() - start) * 1e3)
        row = _timed(f"build/{TYPICAL.shape}/{isa.name}", totals)
        rows.append(row | {"emit_ms": round(statistics.median(emits), 2)})
    return rows


def cold(bench: Bench) -> list[Row]:
    """`attncc compile` as a process, and with it another one that loads the package and checks a result."""
    compiled, used = [], []
    for _ in range(min(3, bench.rounds)):
        with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder:
            source = Path(folder) / "spec.yaml"
            source.write_text(TYPICAL.spec)
            start = time.perf_counter()
            _run(["-m", "attncc", "compile", str(source), "-o", folder, "--target", "cpu"], ROOT)
            compiled.append((time.perf_counter() - start) * 1e3)
            _run(["-c", FIRST_USE], Path(folder))
            used.append((time.perf_counter() - start) * 1e3)
    return [_timed("cold/compile", compiled), _timed("cold/compile, load, check", used)]


def _run(arguments: list[str], where: Path) -> None:
    """Python in a process of its own, which sees what lies in `where`."""
    environment = os.environ | {"PYTHONPATH": str(where)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Rejected("; ".join(done.stderr.strip().splitlines()[-2:]))


def _timed(case: str, rounds: list[float]) -> Row:
    t = Timing(tuple(rounds))
    return {"case": case, "impl": "attncc", "ms": round(t.ms, 2), "spread": t.spread}
