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
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from attncc.codegen import assembly
from attncc.codegen.uniform import undefined

LENGTH: Final = 4096
"""Queries and keys of the call that it is compiled for; no constant depends on them."""
PATIENCE: Final = 120
"""Seconds."""
FEW: Final = 6
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
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    try:
        with tempfile.TemporaryDirectory(prefix="attncc-gate-") as scratch:
            child = subprocess.run(
                [sys.executable, "-m", __spec__.name, str(package)],
                env=kept | {"TRITON_CACHE_DIR": scratch},
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


# -- inside the child ----------------------------------------------------------------------------


class Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> Any:
        return import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _arguments(package: Any) -> tuple[Any, list[Any], dict[str, int]]:
    """The engine's function, and the arguments and options of a large call."""
    torch: Any = import_module("torch")
    variant, runner = package.VARIANT, package._RUNNER
    runner = getattr(runner, "gpu", runner)
    sizes = {axis: x.fixed or (2 if axis == "B" else LENGTH) for axis, x in variant.sizes.items()}
    fill = import_module(f"{package.__name__}._checks").fill
    sizes["B + 1"] = sizes["B"] + 1  # sequences are packed between so many marks
    tensors = [torch.zeros(fill(t.axes, sizes), dtype=t.dtype) for t in variant.tensors]
    plan = SimpleNamespace(output=fill(variant.output, sizes), lse=fill(variant.lse, sizes) if variant.lse else None)
    config = next(c for m in variant.configs.values() for _, c in m.TABLE if c.get("ENGINE"))
    numbers = sizes | dict(config) | {"WRITE_LSE": int(plan.lse is not None)}
    kernel = next(k for k in variant.kernels if k.launcher is not None)
    shapes = runner.shapes(tensors, plan, numbers, [kernel])
    launch = runner.bind(kernel, shapes, numbers, {"TMA": True}, {})
    made = {"o": tensors[0].dtype, "lse": torch.float32} | {
        s.name: s.dtype for s in variant.scratch if s.name in shapes
    }
    given = [*tensors, *(torch.zeros(shapes[name].shape, dtype=dtype) for name, dtype in made.items())]
    return kernel.function, launch.prepared(given, 0.1), launch.options


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def _judge(made: Any) -> Findings:
    triton: Any = import_module("triton")
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory(prefix="attncc-gate-") as folder:
        ptx, cubin = Path(folder, "engine.ptx"), Path(folder, "engine.cubin")
        ptx.write_text(made.asm["ptx"])
        cubin.write_bytes(made.asm["cubin"])
        ptxas = import_module("triton.backends.nvidia.compiler").get_ptxas(90).path
        command = [ptxas, "-v", "-arch=sm_90a", str(ptx), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode:
            raise RuntimeError(said.stderr)
        command = [tools.nvdisasm.path, "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = assembly.read(text, assembly.SASS)
    reasons = [f"ptxas serialises its products ({note})" for note in re.findall(r"C75\d\d", said.stdout + said.stderr)]
    reasons += [f"ptxas reads UR{u.register} before it is written: {u.instruction}" for u in undefined(text)[:1]]
    reasons += ["registers of the main loop spill"] * (counts.turn.get("spill_load", 0) > FEW)
    return Findings(tuple(dict.fromkeys(reasons)), dict(counts.total), dict(counts.turn), made.metadata.shared)


def _main(folder: Path) -> None:
    triton: Any = import_module("triton")
    torch: Any = import_module("torch")
    triton.runtime.driver.set_active(Driver())
    properties = SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_properties = _always(properties)
    torch.cuda.current_device = _always(0)
    sys.path.insert(0, str(folder.parent))
    package = importlib.import_module(folder.name)
    engine: Any = import_module(f"{folder.name}._engine")
    engine.counter = lambda: torch.zeros(3, dtype=torch.int32)
    function, given, options = _arguments(package)
    print(json.dumps(asdict(_judge(function.warmup(*given, grid=(132,), **options)))))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
