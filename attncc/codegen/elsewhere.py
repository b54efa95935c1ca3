"""The kernels of an emitted package, compiled as a call would have them, for a GPU that need not be here.

Only for processes of their own: a stand-in takes the place of Triton's driver.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from attncc.device import Device

LENGTH: Final = 4096
"""Queries and keys of the call that is compiled for; no constant depends on them."""


@dataclass(frozen=True, slots=True)
class Driver:
    """What Triton asks of a driver before it compiles."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target_of(device: Device) -> Any:
    """The device as Triton knows it."""
    gpu_target = import_module("triton.backends.compiler").GPUTarget
    if device.vendor == "amd":
        return gpu_target("hip", device.arch, device.warp_size)
    return gpu_target("cuda", int(device.arch.removeprefix("sm_")), device.warp_size)


def opened(folder: Path, device: Device) -> Any:
    """The package in this folder, as if this process had such a GPU."""
    torch: Any = import_module("torch")
    import_module("triton").runtime.driver.set_active(Driver(target_of(device)))
    torch.cuda.get_device_properties = _always(SimpleNamespace(multi_processor_count=device.sms))
    torch.cuda.current_device = _always(0)
    sys.path.insert(0, str(folder.parent))
    package = importlib.import_module(folder.name)
    if (folder / "_engine.py").exists():
        engine: Any = import_module(f"{folder.name}._engine")
        engine.counter = lambda: torch.zeros(3, dtype=torch.int32)
    return package


def compiled(package: Any, config: Mapping[str, int]) -> Iterator[Any]:
    """The kernels of a large call with this config as Triton compiles them, an engine's first."""
    torch: Any = import_module("torch")
    variant, runner = package.VARIANT, package._RUNNER
    runner = getattr(runner, "gpu", runner)
    sizes = {axis: x.fixed or (2 if axis == "B" else min(LENGTH, x.most)) for axis, x in variant.sizes.items()}
    fill = import_module(f"{package.__name__}._checks").fill
    sizes["B + 1"] = sizes["B"] + 1  # sequences are packed between so many marks
    tensors = [torch.zeros(fill(t.axes, sizes), dtype=t.dtype) for t in variant.tensors]
    plan = SimpleNamespace(output=fill(variant.output, sizes), lse=fill(variant.lse, sizes) if variant.lse else None)
    numbers = {"ENGINE": 0} | sizes | dict(config) | {"WRITE_LSE": int(plan.lse is not None)}
    due = sorted((k for k in variant.kernels if k.when(numbers)), key=lambda k: k.launcher is None)
    shapes = runner.shapes(tensors, plan, numbers, due)
    made = {"o": tensors[0].dtype, "lse": torch.float32} | {
        s.name: s.dtype for s in variant.scratch if s.name in shapes
    }
    given = [*tensors, *(torch.zeros(shapes[name].shape, dtype=dtype) for name, dtype in made.items())]
    options = {k: config[k] for k in import_module(f"{package.__name__}._gpu").OPTIONS if config.get(k)}
    for kernel in due:
        launch = runner.bind(kernel, shapes, numbers, {"TMA": bool(config.get("TMA"))}, options)
        arguments = launch.prepared(launch.bound, given, 0.1, launch.make_map)
        yield kernel.function.warmup(*arguments, grid=(launch.programs,), **launch.options)


def disassembled(made: Any) -> str:
    """A compiled kernel's machine code for an NVIDIA GPU as text."""
    return _asked(made, [import_module("triton").knobs.nvidia.nvdisasm.path, "-c"])


def resource_usage(made: Any) -> str:
    """What `cuobjdump` says of a compiled kernel's registers and stack."""
    return _asked(made, [import_module("triton").knobs.nvidia.cuobjdump.path, "--dump-resource-usage"])


def _asked(made: Any, command: list[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="attncc-cubin-") as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        return subprocess.run([*command, str(cubin)], capture_output=True, text=True, check=True).stdout


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value
