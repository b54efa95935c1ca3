"""The CPU side of an emitted package: checks a call once, and runs a library that was built for this processor.

The libraries in `cpu/` need tvm_ffi to be loaded and called, and nothing else of TVM. Their loops run on torch's own
OpenMP threads, so `torch.set_num_threads` holds for them too.
"""

from __future__ import annotations

import ctypes
import math
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from ._checks import Sizes, check_scale, check_tensors, default_scale, fill, keep, own_sizes
from ._runtime import Config, Result, Variant

FEW_ROWS = 16
"""Up to so many queries of a group, a kernel for few of them is called."""
TASKS_A_THREAD, MOST_SHARES, LEAST_KEYS = 2, 32, 512
OWN_KEYS = 512
"""Keys of a share, where a sequence's bits must not depend on its neighbours."""
WIDEST = 16
"""Lanes of the widest vectors, to whole ones of which those kernels fill up rows."""
FOLDER = Path(__file__).resolve().parent / "cpu"
CHOICES = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}
"""What torch says of an x86 processor: the libraries that run on it, the widest first."""
BITS = {torch.bfloat16: torch.uint16, torch.bool: torch.uint8}
"""Elements that kernels take as their bits."""
HOOKS = ("__TVMBackendParallelLaunch", "__TVMBackendAllocWorkspace", "__TVMBackendFreeWorkspace")
OPENMP = ("libgomp", "libomp", "libiomp")


@dataclass(frozen=True)
class Plan:
    """What calls of one combination of shapes, strides and dtypes share."""

    scale: float
    """For calls that give none."""
    output: tuple[int, ...]
    lse: tuple[int, ...]
    own: tuple[int, ...]
    """Sizes of the spec's own."""
    packed: bool
    empty: bool
    shares: int
    """Between how many tasks the keys of a head are split, where the call has few queries; else 0."""
    work: int
    """Elements that those tasks leave."""


class Runner:
    """Calls a variant on the CPU; the library is loaded by the first call.

    `group` query heads share a key head where the library has a kernel for few queries; 0: it has none.
    `apart`: its shares are of OWN_KEYS keys, however many sequences and threads there are.
    """

    def __init__(self, variant: Variant, group: int = 0, apart: bool = False) -> None:
        self.variant, self.group, self.apart = variant, group, apart
        self.plans: dict[Any, Plan] = {}
        self.module: Any = None

    def __call__(self, tensors: Sequence[torch.Tensor], scale: float | None, with_lse: bool) -> Result:
        key = (scale is None, torch.get_num_threads(), *[(t.shape, t.stride(), t.dtype, t.device) for t in tensors])
        plan = self.plans.get(key)
        if plan is None:
            plan = keep(self.plans, key, self.plan(tensors, scale is None))
        factor = plan.scale if scale is None else check_scale(self.variant.name, scale)
        q = tensors[0]
        lse = torch.empty(plan.lse, dtype=torch.float32)
        if plan.empty:
            return q.new_zeros(plan.output), lse.fill_(-math.inf) if with_lse else None
        o = q.new_zeros(plan.output) if plan.packed else q.new_empty(plan.output)
        if plan.packed:  # rows behind the last sequence are nobody's
            lse.fill_(-math.inf)
            for at, total in ((3, q.shape[0]), (4, tensors[1].shape[0])):
                check_starts(f"{self.variant.name}: {self.variant.tensors[at].name}", tensors[at], total)
        if self.module is None:
            self.module = load(self.variant.name)
        if plan.shares:
            work = torch.empty(plan.work, dtype=torch.float32)
            self.module["decode"](*map(bits, tensors), bits(o), lse, work, factor, *plan.own, plan.shares)
        else:
            self.module["attention"](*map(bits, tensors), bits(o), lse, factor, *plan.own)
        return o, lse if with_lse else None

    def plan(self, tensors: Sequence[torch.Tensor], with_scale: bool) -> Plan:
        """`with_scale`: the call gives none, so that the spec's own is due."""
        v = self.variant
        sizes = check_tensors(v.name, v.tensors, tensors, v.sizes)
        if not tensors[0].is_cpu:
            raise RuntimeError(
                f"{v.name}: tensors are on {tensors[0].device}, the package was compiled for CPUs alone: "
                "compile it with --target for that device too"
            )
        packed = "Tq" in sizes
        output = fill(v.output, sizes)
        rows = fill(v.lse, sizes) if v.lse else (1,) * (len(output) - 1)
        keys = sizes["Tk" if packed else "Sk"]
        empty = 0 in output or keys == 0 or sizes["B"] == 0
        factor = default_scale(v.name, v.scale, sizes) if with_scale else 1.0
        shares, work = (0, 0) if empty else self.split(sizes)
        own = own_sizes(v.sizes, sizes)
        return Plan(factor, output, rows, own, packed, empty, shares, work)

    def split(self, sizes: Sizes) -> tuple[int, int]:
        """How many shares, and elements of work, a call with few queries takes; none where it has many."""
        rows = self.group * sizes.get("Sq", 0)
        if not 0 < rows <= FEW_ROWS:
            return 0, 0
        heads, width = self.variant.tensors[1].axes, self.variant.output[-1]
        key_heads = next(a for a in heads[1:] if isinstance(a, int))
        tasks = sizes["B"] * key_heads
        wanted = -(-TASKS_A_THREAD * torch.get_num_threads() // tasks)
        shares = max(1, min(wanted, MOST_SHARES, sizes["Sk"] // LEAST_KEYS))
        shares = -(-sizes["Sk"] // OWN_KEYS) if self.apart else shares
        assert isinstance(width, int)
        return shares, tasks * shares * rows * (-(-width // WIDEST) * WIDEST + 2)

    def choose(self, device: torch.device, sizes: Sizes) -> tuple[Config, str]:
        """The library for this processor; the same for every shape."""
        return {"threads": torch.get_num_threads()}, f"the library cpu/{choice(self.variant.name)}.so"


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernel takes it; one without elements gets some, which are read as the 0 outside of it."""
    t = t if t.numel() else t.new_zeros([max(1, n) for n in t.shape])
    t = t if t.dim() else t.reshape(1)
    return t.view(BITS[t.dtype]) if t.dtype in BITS else t


def check_starts(where: str, starts: torch.Tensor, total: int) -> None:
    """Offsets of packed sequences: from 0, never falling, inside the tensor."""
    found = starts.tolist()
    if found[0] != 0 or found != sorted(found) or found[-1] > total:
        raise ValueError(f"{where} must rise from 0 to at most {total}, got {found if len(found) < 9 else starts}")


# -- libraries -----------------------------------------------------------------------------------


def suited() -> tuple[str, ...]:
    """The libraries that run on this processor, the best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    return ("neon",) if platform.machine() in ("aarch64", "arm64") else CHOICES.get(capability, ())


def choice(name: str) -> str:
    """The library that suits this processor."""
    built = {path.stem for path in FOLDER.glob("*.so")}
    for isa in suited():
        if isa in built:
            return isa
    here, capability = platform.machine(), torch.backends.cpu.get_cpu_capability()
    raise RuntimeError(
        f"{name}: this processor ({here}, {capability}) runs none of the libraries built: {', '.join(sorted(built))}"
    )


def load(name: str) -> Any:
    """The kernels of the package, its parallel loops on torch's threads.

    The library is loaded through a link of a name never used before: by its own path, the loader would hand out what
    an earlier package at this path was.
    """
    isa = choice(name)
    with tempfile.TemporaryDirectory(prefix="attncc-") as folder:
        link = Path(folder) / f"{isa}.so"
        link.symlink_to(FOLDER / f"{isa}.so")
        module, library = tvm_ffi.load_module(str(link)), ctypes.CDLL(str(link))
    pool = [ctypes.cast(f, ctypes.c_void_p).value for f in threads()]
    for which, hook in enumerate(HOOKS):
        ctypes.c_void_p.in_dll(library, hook).value = module["threads"](*pool, which)
    return module


def threads() -> tuple[Any, Any, Any]:
    """Three functions of the OpenMP library that torch has loaded."""
    torch.get_num_threads()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if any(word in line.rpartition("/")[2] for word in OPENMP):
            library = ctypes.CDLL(line[line.index("/") :])
            return library.omp_in_parallel, library.omp_get_max_threads, library.GOMP_parallel
    raise RuntimeError("torch has no OpenMP library here, whose threads CPU kernels run on")
