"""Launches of an emitted package's kernels: what can be prepared is, and kept; the same in every package."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: no GPU, so kernels run on the CPU

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton was imported to interpret kernels: its own functions are as it found the environment then."""
ADDRESSES_KEPT = 256
TRITON = triton.__version__


class Address:
    """Stands for a tensor in a kept descriptor, which must not keep the tensor's memory alive."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype) -> None:
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        return self.pointer


@dataclass
class Launch:
    """One kernel of a plan: in every call its arguments are the same but for tensors and the scale."""

    function: Any
    programs: int
    options: dict[str, int]
    arguments: list[Any] = field(default_factory=list[Any])
    tensors: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(place among the arguments, number of the tensor among those of the call)."""
    tiles: list[tuple[int, int, str, list[int]]] = field(default_factory=list[tuple[int, int, str, list[int]]])
    """The same for operands read through descriptors, with their axes and the block's shape."""
    scale_at: int = -1
    compiled: Any = None
    descriptors: dict[tuple[int, int], Any] = field(default_factory=dict[tuple[int, int], Any])

    def __call__(self, tensors: list[Any], scale: float) -> None:
        """Starts the kernel on the current stream: the first time through Triton's front door, then directly."""
        arguments = self.prepared(tensors, scale)
        compiled = self.compiled
        if compiled is None or INTERPRETED or observed():
            self.compiled = self.function[(self.programs,)](*arguments, **self.options)
            return
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        packed = compiled.packed_metadata
        compiled.run(self.programs, 1, 1, stream, compiled.function, packed, None, None, None, *arguments)

    def flat(self, parameters: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """The parameters as they are bound; an engine's tuples are taken apart."""
        return parameters

    def prepared(self, tensors: list[Any], scale: float) -> list[Any]:
        """The arguments of one call."""
        arguments = self.arguments.copy()
        for at, number in self.tensors:
            arguments[at] = tensors[number]
        if self.scale_at >= 0:
            arguments[self.scale_at] = scale
        for at, number, axes, block in self.tiles:
            arguments[at] = self.descriptor(at, tensors[number], axes, block)
        return arguments

    def descriptor(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        """A tensor map of [b, h, row, column], kept by address: shape and strides are the plan's."""
        address = t.data_ptr()
        found = self.descriptors.get((at, address))
        if found is None:
            view = operand_view(t, axes)
            made = self.make_map(view, map_strides(view), block)
            if self.compiled is None:  # Triton compiles from the tensor itself
                return made
            made.base = Address(address, t.dtype)
            if len(self.descriptors) >= ADDRESSES_KEPT:
                self.descriptors.clear()
            self.descriptors[at, address] = found = made
        return found

    def make_map(self, view: torch.Tensor, strides: list[int], block: list[int]) -> Any:
        return TensorDescriptor(view, list(view.shape), strides, block)


def observed() -> bool:
    """Whether a profiler wants to hear of launches, which only Triton's front door tells it."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


def operand_view(t: torch.Tensor, axes: str) -> torch.Tensor:
    """An operand as [b, h, row, column]."""
    match axes:
        case "bhsd":
            return t
        case "bshd":
            return t.transpose(1, 2)
        case _:
            return t.transpose(0, 1).unsqueeze(0)


def map_strides(view: torch.Tensor) -> list[int]:
    """Strides of a tensor map: those of axes of size 1, along which nothing steps, are made whole 16 bytes."""
    strides = list(view.stride())
    for axis in range(3):
        if view.shape[axis] == 1:
            strides[axis] = 16 // view.element_size() * -(-view.shape[-1] * view.element_size() // 16)
    strides[3] = 1
    return strides


def map_fits(t: torch.Tensor, axes: str) -> bool:
    """Whether an operand can be read by a tensor map: aligned, no expanded axis, strides of whole 16 bytes."""
    view = operand_view(t, axes)
    steps = [s * t.element_size() for s in map_strides(view)[:3]]
    return t.data_ptr() % 16 == 0 and all(s % 16 == 0 and 0 < s < 2**40 for s in steps)
