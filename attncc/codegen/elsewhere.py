"""The kernels of an emitted package, compiled as a call would have them, for a GPU that need not be here.

Only for processes of their own: a stand-in takes the place of Triton's driver.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The package in this folder, as if this process had such a GPU; its engine needs no memory of one."""
    torch: Any = import_module("torch")
    import_module("triton").runtime.driver.set_active(Driver(target_of(device)))
    torch.cuda.get_device_properties = _always(SimpleNamespace(multi_processor_count=device.sms))
    torch.cuda.current_device = _always(0)
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


@dataclass(frozen=True, slots=True)
class Call:
    """A large call of a package, with tensors that have no memory."""

    runner: Any
    sizes: Mapping[str, int]
    tensors: Sequence[Any]

    def launches(self, config: Mapping[str, int], with_lse: bool, with_maps: bool) -> tuple[list[Any], list[Any]]:
        """What it starts with this config, and the tensors that these launches know by number."""
        torch: Any = import_module("torch")
        variant, sizes = self.runner.variant, self.sizes
        if config.get("ENGINE") and config.get("SPLIT"):  # an engine of few queries, perhaps of one alone
            sizes = {**sizes, "Sq": 1}
        fill = _checks(self.runner).fill
        lse = fill(variant.lse, sizes) if with_lse else None
        plan = SimpleNamespace(output=fill(variant.output, sizes), lse=lse, scratch=[])
        launches = self.runner.launches(plan, self.tensors, sizes, config, with_lse, with_maps)
        own = [(plan.output, self.tensors[0].dtype), (lse, torch.float32), *plan.scratch]
        made = [s if s is None else torch.empty(s, dtype=d, device="meta") for s, d in own]
        return launches, [*self.tensors, *made]


def large_call(runner: Any) -> Call:
    """A call of LENGTH queries and keys, or of as many as the variant allows."""
    torch: Any = import_module("torch")
    sizes = {axis: x.fixed or _size(axis, x) for axis, x in runner.variant.sizes.items()}
    sizes["B + 1"] = sizes["B"] + 1  # sequences are packed between so many marks
    for axis in {a for t in runner.variant.tensors for a in t.axes if str(a).startswith("Sk / ")}:
        page = int(axis.removeprefix("Sk / "))
        sizes["Sk"] -= sizes["Sk"] % page
        sizes |= {axis: sizes["Sk"] // page, "all pages": sizes["B"] * sizes["Sk"] // page}
    for axis in {str(a) for t in runner.variant.tensors for a in t.axes} - sizes.keys():
        sizes[axis] = LENGTH  # of a row that packed sequences share
    shapes = ((_checks(runner).fill(t.axes, sizes), t.dtype) for t in runner.variant.tensors)
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
    gpu = import_module(f"{type(runner).__module__.rpartition('.')[0]}._gpu")
    return Call(runner, sizes, gpu.seen(tensors, gpu.views(runner.variant, tensors)))


def _size(axis: str, size: Any) -> int:
    return 2 if axis == "B" else min(size.most, LENGTH) // size.multiple * size.multiple


def _checks(runner: Any) -> Any:
    """The package's own module of checks, of which the runner's is a neighbour."""
    return import_module(f"{type(runner).__module__.rpartition('.')[0]}._checks")


def compiled(package: Any, config: Mapping[str, int], *, aligned: bool = True) -> Iterator[Any]:
    """The kernels of a large call with this config as Triton compiles them, an engine's first.

    `aligned`: whether tensors begin where tensor maps can read them; portable kernels alone do without.
    """
    runner = runner_of(package)
    call = large_call(runner)
    launches, tensors = call.launches(config, runner.variant.lse is not None, with_maps=aligned)
    if not aligned:
        tensors = [*map(_astray, call.tensors), *tensors[len(call.tensors) :]]
    for launch in sorted(launches, key=lambda x: "args" not in x.bound.at):
        yield launch.compile(launch.prepared(launch.bound, tensors, 0.1, launch.make_map))


def _astray(t: Any) -> Any:
    """A tensor like this one that begins an element behind where memory is allotted."""
    return t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1)


def has_pieces(package: Any) -> bool:
    """Whether an operand is read as several tiles side by side."""
    kernels = runner_of(package).variant.kernels
    tiles = {(p[1], p[3]) for k in kernels for p in k.parameters if p[0] == "tile"}
    return len(tiles) > len({operand for operand, _ in tiles})


def is_careful(made: Any) -> bool:
    """Whether it is the pass that does lost tiles again: few calls have any, and its time is of no account."""
    names = made.src.fn.arg_names
    return "PASS" in names and made.src.constants.get((names.index("PASS"),)) == 1


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
