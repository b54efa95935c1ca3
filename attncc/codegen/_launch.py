"""Launches of an emitted package's kernels by Triton: what can be prepared is, and kept."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: no GPU, so kernels run on the CPU

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._bound import ADDRESSES_KEPT, Binding, Bound, Way, map_strides, operand_view

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton was imported to interpret kernels: its own functions are as it found the environment then."""
TRITON = triton.__version__
THREAD = threading.local()

Start = Callable[[int, list[Any]], None]
Encode = Callable[[int, Any], list[Any]]
"""What becomes of the descriptor at a place: the arguments that stand for it, the map itself first."""


class Address:
    """Stands for a tensor in a kept descriptor, which must not keep the tensor's memory alive."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype) -> None:
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        return self.pointer


@dataclass
class Launch(Binding):
    """One kernel of a plan, started by Triton."""

    compiled: Any = None
    direct: Bound | None = None
    """What the compiled kernel takes."""
    start: Any = None
    """What starts it on a stream with that."""
    encode: dict[int, Callable[[Any], list[Any]]] = field(default_factory=dict[int, Callable[[Any], list[Any]]])
    kept: dict[tuple[int, int], Any] = field(default_factory=dict[tuple[int, int], Any])

    def __call__(self, tensors: list[Any], scale: float, stream: int) -> None:
        """Starts the kernel on the current stream: the first time through Triton's front door, then directly."""
        if self.compiled is None or INTERPRETED:
            self.compiled = self.first(self.prepared(self.bound, tensors, scale, self.make_map))
        elif observed():
            self.compiled[self.programs, 1, 1](*self.prepared(self.bound, tensors, scale, self.make_map))
        else:
            direct = self.direct or self.enter(tensors)
            self.start(stream, self.prepared(direct, tensors, scale, self.kept_map))

    def first(self, given: list[Any]) -> Any:
        """Compiles the kernel and starts it."""
        return self.function[(self.programs,)](*given, **self.options)

    def compile(self, given: list[Any]) -> Any:
        """The kernel that takes such arguments, which is not started."""
        return self.function.warmup(*given, grid=(self.programs,), **self.options)

    def enter(self, tensors: list[Any]) -> Bound:
        """Finds the way past Triton's front door."""
        tiles = self.bound.tiles
        for _, number, *_ in tiles[:1]:
            enter_context(tensors[number])
        self.start, encode = entry(self.compiled, self.programs, [at for at, *_ in tiles])
        made = {at: encode(at, self.make_map(at, tensors[number], axes, block)) for at, number, axes, block in tiles}
        self.direct = self.bound.unfolded(made)
        places = zip(tiles, self.direct.tiles, strict=True)
        self.encode = {new[0]: partial(encode, old[0]) for old, new in places}
        return self.direct

    def make_map(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        """A tensor map of [b, h, row, column]."""
        view = operand_view(t, axes)
        return TensorDescriptor(view, list(view.shape), map_strides(view), block)

    def kept_map(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        """The same as the compiled kernel takes it, kept by address: shape and strides are the plan's."""
        address = t.data_ptr()
        found = self.kept.get((at, address))
        if found is None:
            enter_context(t)
            made = self.make_map(at, t, axes, block)
            made.base = Address(address, made.base.dtype)
            if len(self.kept) >= ADDRESSES_KEPT:
                self.kept.clear()
            found = self.kept[at, address] = self.encode[at](made)[0]
        return found


def enter_context(t: torch.Tensor) -> None:
    """Gives the thread torch's context: one that never called CUDA has none, and maps of a tensor are encoded in it."""
    if t.is_cuda and not getattr(THREAD, "entered", False):
        torch.cuda.mem_get_info(t.device)
        THREAD.entered = True


def entry(compiled: Any, programs: int, maps: Sequence[int]) -> tuple[Start, Encode]:
    """What starts a compiled kernel, and what makes of the descriptors at these places what that takes.

    Triton encodes descriptors in a wrapper around the function that starts a kernel, in every call and for some
    microseconds each. Where that wrapper is found as Triton 3.6 has it we go past it, with maps that are encoded
    already; elsewhere through it.
    """
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    inner: Mapping[str, Any] = {}
    if inspect.isfunction(getattr(run, "launch", None)):
        inner = inspect.getclosurevars(run.launch).nonlocals
    if not {"launcher", "tensordesc_meta"} <= inner.keys() or run.global_scratch_size or run.profile_scratch_size:
        return (
            lambda stream, given: run(programs, 1, 1, stream, function, packed, None, None, None, *given),
            lambda at, descriptor: [descriptor],
        )
    metas = dict(zip(sorted(maps), inner["tensordesc_meta"], strict=True))
    make: Any = sys.modules[run.launch.__module__]
    launch = partial(inner["launcher"], programs, 1, 1)
    between = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None)
    return (
        lambda stream, given: launch(stream, *between, *given),
        lambda at, descriptor: make.make_tensordesc_arg(descriptor, metas[at]),
    )


def observed() -> bool:
    """Whether a profiler wants to hear of launches, which only Triton's front door tells it."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


def bind(kernel: Any, programs: int, options: dict[str, int]) -> Launch:
    """A launch of a kernel, by its own class where it has one."""
    return (kernel.launcher or Launch)(kernel.function, programs, options)


def has_ptx() -> bool:
    """Whether Triton compiles for a GPU of NVIDIA's."""
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"


def has_fp8() -> bool:
    """Whether it is one that makes numbers of fp8 itself."""
    return has_ptx() and triton.runtime.driver.active.get_current_target().arch >= 89


def may_be_early() -> bool:
    """Whether the GPU has programmatic dependent launches."""
    return has_ptx() and triton.runtime.driver.active.get_current_target().arch >= 90


BY_TRITON = Way(bind, TRITON, INTERPRETED, has_ptx, has_fp8, may_be_early)
