"""Whether the engine of an emitted package may run: it is compiled for a GPU that need not be here, and looked at.

It runs in a process of its own, for it takes the place of Triton's driver.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from attncc.codegen import assembly
from attncc.codegen.uniform import undefined, unwritten

LENGTH: Final = 4096
"""Queries and keys of the call that it is compiled for; no constant depends on them."""
PATIENCE: Final = 120
"""Seconds."""
FEW: Final = 8
"""Words that all consumers together may reload in a turn of some 450 instructions each."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What was seen of a compiled engine."""

    reasons: tuple[str, ...]
    """Why it must not run; empty if it may."""
    instructions: dict[str, int] = field(default_factory=dict[str, int])
    loop: dict[str, int] = field(default_factory=dict[str, int])
    """Counts by kind, in all and in the shortest turn of the innermost loops that multiply."""
    shared_bytes: int = 0


def examine(package: Path) -> Findings:
    """Compiles the engine of a package on disk, and judges it."""
    try:
        with tempfile.TemporaryDirectory(prefix="attncc-gate-") as scratch:
            child = subprocess.run(
                [sys.executable, "-m", __spec__.name, str(package)],
                env=environment(scratch),
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
    except subprocess.TimeoutExpired:
        return Findings((f"it does not compile within {PATIENCE} s",))
    if child.returncode:
        said = [line for line in child.stderr.splitlines() if "Error" in line] or ["no word of why"]
        return Findings((f"it does not compile: {said[-1].strip()}",))
    found = json.loads(child.stdout.splitlines()[-1])
    return Findings(**(found | {"reasons": tuple(found["reasons"])}))


def environment(scratch: str) -> dict[str, str]:
    """A child's: ours without the interpreter, and with a cache of its own."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": path, "TRITON_CACHE_DIR": scratch}


# -- inside the child ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Driver:
    """What Triton asks of a driver before it compiles."""

    arch: int

    def get_current_target(self) -> Any:
        return import_module("triton.backends.compiler").GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _launches(package: Any) -> list[tuple[Any, list[Any], dict[str, int]]]:
    """The kernels of a large call, the engine's first, each with its arguments and options."""
    torch: Any = import_module("torch")
    runner = runner_of(package)
    variant = runner.variant
    sizes = {axis: x.fixed or (2 if axis == "B" else LENGTH) for axis, x in variant.sizes.items()}
    fill = import_module(f"{package.__name__}._checks").fill
    sizes["B + 1"] = sizes["B"] + 1  # sequences are packed between so many marks
    tensors = [torch.zeros(fill(t.axes, sizes), dtype=t.dtype) for t in variant.tensors]
    plan = SimpleNamespace(output=fill(variant.output, sizes), lse=fill(variant.lse, sizes) if variant.lse else None)
    config = next(c for m in variant.configs.values() for _, c in m.TABLE if c.get("ENGINE"))
    numbers = sizes | dict(config) | {"WRITE_LSE": int(plan.lse is not None)}
    due = sorted((k for k in variant.kernels if k.when(numbers)), key=lambda k: k.launcher is None)
    shapes = runner.shapes(tensors, plan, numbers, due)
    made = {"o": tensors[0].dtype, "lse": torch.float32} | {
        s.name: s.dtype for s in variant.scratch if s.name in shapes
    }
    given = [*tensors, *(torch.zeros(shapes[name].shape, dtype=dtype) for name, dtype in made.items())]
    options = {k: config[k] for k in import_module(f"{package.__name__}._gpu").OPTIONS if config.get(k)}
    bound = [(k, runner.bind(k, shapes, numbers, {"TMA": True}, options)) for k in due]
    return [(k.function, x.prepared(x.bound, given, 0.1, x.make_map), x.options) for k, x in bound]


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def judge(made: Any) -> Findings:
    """What is to be said of a compiled engine."""
    ptxas = import_module("triton.backends.nvidia.compiler").get_ptxas(90).path
    with tempfile.TemporaryDirectory(prefix="attncc-gate-") as folder:
        ptx = Path(folder, "engine.ptx")
        ptx.write_text(made.asm["ptx"])
        command = [ptxas, "-v", "-arch=sm_90a", str(ptx), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode:
            raise RuntimeError(said.stderr)
    text = _disassembled(made)
    counts = assembly.read(text, assembly.SASS)
    reasons = [f"ptxas serialises its products ({note})" for note in re.findall(r"C75\d\d", said.stdout + said.stderr)]
    reasons += [f"ptxas reads UR{u.register} before it is written: {u.instruction}" for u in undefined(text)[:1]]
    reasons += [f"ptxas reads R{u.register} before it is written: {u.instruction}" for u in unwritten(text)[:1]]
    reasons += ["registers of the main loop spill"] * (counts.turn.get("spill_load", 0) > FEW)
    return Findings(tuple(dict.fromkeys(reasons)), dict(counts.total), dict(counts.turn), made.metadata.shared)


def _judge_beside(made: Any) -> tuple[str, ...]:
    """What is to be said against a kernel that runs beside the engine."""
    found = unwritten(_disassembled(made))[:1]
    return tuple(f"in {made.name} ptxas reads R{u.register} before it is written: {u.instruction}" for u in found)


def _disassembled(made: Any) -> str:
    with tempfile.TemporaryDirectory(prefix="attncc-gate-") as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        command = [import_module("triton").knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stand_in(arch: int) -> None:
    """Makes Triton compile for a GPU that is not here, and torch speak of it."""
    triton: Any = import_module("triton")
    torch: Any = import_module("torch")
    triton.runtime.driver.set_active(Driver(arch))
    torch.cuda.get_device_properties = _always(SimpleNamespace(multi_processor_count=132))
    torch.cuda.current_device = _always(0)


def package_at(folder: Path) -> Any:
    """The package, whose engine needs no memory of a GPU."""
    torch: Any = import_module("torch")
    sys.path.insert(0, str(folder.parent))
    package = importlib.import_module(folder.name)
    if (folder / "_persistent.py").exists():
        persistent: Any = import_module(f"{folder.name}._persistent")
        persistent.counter = lambda: torch.zeros(3, dtype=torch.int32)
        persistent.nowhere = lambda: torch.zeros(1)
    return package


def runner_of(package: Any) -> Any:
    """What calls a package's kernels by Triton."""
    runner = getattr(package._RUNNER, "gpu", package._RUNNER)
    return runner.by_triton("no GPU is here") if hasattr(runner, "by_triton") else runner


def _main(folder: Path) -> None:
    stand_in(90)
    package = package_at(folder)
    made = [f.warmup(*given, grid=(132,), **options) for f, given, options in _launches(package)]
    found = judge(made[0])
    beside = tuple(reason for x in made[1:] for reason in _judge_beside(x))
    print(json.dumps(asdict(replace(found, reasons=(*found.reasons, *beside)))))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
