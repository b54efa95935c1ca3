"""Compiles emitted Triton kernels for a GPU that is not here, and reports what the binary needs.

The toolchain is the one inside Triton (LLVM, ptxas, nvdisasm). It runs in a process of its own: a crash
of it is one failed job, and this process may meanwhile use Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

from attncc.codegen import assembly
from attncc.codegen.elsewhere import target_of
from attncc.device import Vendor, find
from attncc.errors import CompilerBug, Unsupported


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to compile; every parameter stands either in `signature` or in `constexprs`."""

    source: str
    """The Python file that holds the kernel; it imports nothing but Triton."""
    kernel: str
    target: str
    """An architecture or a card, by its name in the device table."""
    signature: Mapping[str, str]
    """Triton's types: `*fp32`, `i32`, `fp32`, `tensordesc<bf16[1, 1, 64, 128]>`."""
    constexprs: Mapping[str, int | float | bool | str | None] = field(default_factory=dict[str, Any])
    options: Mapping[str, int] = field(default_factory=dict[str, int])
    """num_warps, num_stages, maxnreg."""
    aligned: Sequence[str] = ()
    """Pointers and numbers that are multiples of 16."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program of a compiled kernel takes, and what its code holds."""

    kernel: str
    target: str
    triton: str
    """Version of the compiler."""
    registers: int
    """Per thread."""
    spill_bytes: int
    """Stored and loaded per thread, registers that did not fit."""
    shared_bytes: int
    instructions: Mapping[str, int]
    """Count by kind, such as `wgmma`; kinds that do not occur are left out."""
    loop: Mapping[str, int]
    """The same inside the main loops: the innermost ones that multiply matrices."""
    notes: Sequence[str] = ()
    """What the assembler complains of, such as wgmma that it had to serialise (C7510 to C7515)."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that ended without a binary."""

    reason: str


def build(job: Job) -> Resources:
    """Compiles one kernel that must compile."""
    (outcome,) = build_all([job])
    if isinstance(outcome, Failed):
        raise CompilerBug(f"kernel '{job.kernel}' does not compile for {job.target}:\n{outcome.reason}")
    return outcome


def build_all(jobs: Sequence[Job], workers: int = 1) -> tuple[Resources | Failed, ...]:
    """Compiles each job; the outcomes stand in the order of the jobs."""
    for job in jobs:
        if not find(job.target).is_gpu:
            raise Unsupported(f"nothing is compiled ahead of time for {job.target}", hint="name a GPU target")
    workers = max(1, min(workers, len(jobs)))
    outcomes: list[Resources | Failed] = [Failed("not run")] * len(jobs)
    with ThreadPoolExecutor(workers) as pool:
        for first, share in enumerate(pool.map(_compile_share, (jobs[i::workers] for i in range(workers)))):
            outcomes[first::workers] = share
    return tuple(outcomes)


def _compile_share(jobs: Sequence[Job]) -> list[Resources | Failed]:
    """Compiles jobs in a process, and in another one what a crash left undone."""
    outcomes: list[Resources | Failed] = []
    while len(outcomes) < len(jobs):
        done, reason = _compile_in_child(jobs[len(outcomes) :])
        outcomes += done
        if len(outcomes) < len(jobs):
            outcomes.append(Failed(reason))
    return outcomes


def _compile_in_child(jobs: Sequence[Job]) -> tuple[list[Resources | Failed], str]:
    """What the process finished, and why it stopped where it did."""
    with tempfile.TemporaryDirectory(prefix="attncc-aot-") as scratch:
        child = subprocess.run(
            [sys.executable, "-m", __spec__.name],
            input=json.dumps([asdict(job) for job in jobs]),
            env=_environment(scratch),
            capture_output=True,
            text=True,
            check=False,
        )
    raw = [json.loads(line) for line in child.stdout.splitlines()]
    done: list[Resources | Failed] = [Failed(**r) if "reason" in r else Resources(**r) for r in raw]
    return done, f"the compiler's process ended with {child.returncode}:\n{child.stderr[-4000:]}"


def _environment(scratch: str) -> dict[str, str]:
    """Ours without the interpreter, with a cache that is always cold so that ptxas always speaks."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": path, "TRITON_CACHE_DIR": scratch, "TRITON_ALWAYS_COMPILE": "1"}


# -- inside the child ----------------------------------------------------------------------------


def _serve() -> None:
    """Reads jobs from standard input; writes one outcome a line, as soon as it is known."""
    for raw in json.load(sys.stdin):
        print(json.dumps(asdict(_attempt(Job(**raw)))), flush=True)


def _attempt(job: Job) -> Resources | Failed:
    said = io.StringIO()
    with _standard_error() as diagnostics:
        try:
            with contextlib.redirect_stdout(said):
                return _compile(job, said)
        except Exception as error:  # whatever Triton raises is this job's outcome
            diagnostics.seek(0)
            heard = "\n".join(line for line in diagnostics.read().splitlines() if "error:" in line)
            return Failed("\n".join(filter(None, (f"{type(error).__name__}: {error}", heard, said.getvalue()[-4000:]))))


@contextlib.contextmanager
def _standard_error() -> Generator[IO[str]]:
    """What is written to descriptor 2 meanwhile, where LLVM puts its diagnostics; a crash's words are lost with it."""
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _compile(job: Job, said: io.StringIO) -> Resources:
    triton: Any = import_module("triton")
    compiler: Any = import_module("triton.compiler")
    triton.knobs.nvidia.dump_ptxas_log = True
    function = getattr(_module(job.source), job.kernel)
    device = find(job.target)
    source = compiler.ASTSource(
        fn=function,
        signature=_signature(job, function.arg_names),
        constexprs=dict(job.constexprs),
        attrs={(function.arg_names.index(a),): [["tt.divisibility", 16]] for a in job.aligned},
    )
    compiled = triton.compile(source, target=target_of(device), options=dict(job.options))
    figures = _READERS[device.vendor](compiled.asm, said.getvalue())
    return Resources(
        kernel=job.kernel,
        target=job.target,
        triton=triton.__version__,
        shared_bytes=compiled.metadata.shared,
        **figures,
    )


@cache
def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("attncc_kernels", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _signature(job: Job, parameters: Sequence[str]) -> dict[str, str]:
    given = {*job.signature, *job.constexprs}
    if given != set(parameters):
        missing, unknown = set(parameters) - given, given - set(parameters)
        raise TypeError(f"parameters without a type: {sorted(missing)}; unknown: {sorted(unknown)}")
    return {p: "constexpr" if p in job.constexprs else job.signature[p] for p in parameters}


def _read_nvidia(asm: Mapping[str, Any], log: str) -> dict[str, Any]:
    """Figures of a cubin and of ptxas's log."""
    triton: Any = import_module("triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = assembly.read(text, assembly.SASS)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return {
        "registers": int(only(r"Used (\d+) registers", log)),
        "spill_bytes": sum(map(int, spilled)),
        "instructions": found.total,
        "loop": found.loop,
        "notes": sorted(set(_notes(log))),
    }


def _notes(log: str) -> Iterator[str]:
    """The assembler's complaints, without the kernel's name."""
    for line in log.splitlines():
        found = re.search(r"\((C\d+)\)\s*(.*?)(?: in (?:the )?function.*)?$", line)
        if found:
            yield f"{found[1]}: {found[2].strip()}"


def _read_amd(asm: Mapping[str, Any], _: str) -> dict[str, Any]:
    """Figures of the metadata behind the code; spilled registers are 4 bytes a lane."""
    text = asm["amdgcn"]
    found = assembly.read(text, assembly.AMDGCN)
    return {
        "registers": int(only(r"\.vgpr_count:\s+(\d+)", text)),
        "spill_bytes": 4 * int(only(r"\.vgpr_spill_count:\s+(\d+)", text)),
        "instructions": found.total,
        "loop": found.loop,
    }


_READERS: Final[Mapping[Vendor, Any]] = {"nvidia": _read_nvidia, "amd": _read_amd}


def only(pattern: str, text: str) -> str:
    """The first group of a pattern that the toolchain's output must have."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the toolchain's output has no '{pattern}':\n{text[-2000:]}")
    return found[1]


if __name__ == "__main__":
    _serve()
