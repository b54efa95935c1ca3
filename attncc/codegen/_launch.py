"""Launches of an emitted package's kernels: what can be prepared is, and kept; the same in every package."""

from __future__ import annotations

import inspect
import os
import sys
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

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton was imported to interpret kernels: its own functions are as it found the environment then."""
ADDRESSES_KEPT = 256
TRITON = triton.__version__


ToMap = Callable[[int, torch.Tensor, str, list[int]], Any]
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
class Bound:
    """The arguments of a kernel, in their places: in every call the same but for tensors and the scale."""

    arguments: list[Any] = field(default_factory=list[Any])
    tensors: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(place among the arguments, number of the tensor among those of the call)."""
    tiles: list[tuple[int, int, str, list[int]]] = field(default_factory=list[tuple[int, int, str, list[int]]])
    """The same for operands read through descriptors, with their axes and the block's shape."""
    at: dict[str, int] = field(default_factory=dict[str, int])
    """Places of the scale, and of what only an engine has."""

    def unfolded(self, encoded: Mapping[int, list[Any]]) -> Bound:
        """With several arguments in the place of one: of those the first alone differs from call to call."""
        to: list[int] = []
        arguments: list[Any] = []
        for at, value in enumerate(self.arguments):
            to.append(len(arguments))
            arguments += encoded.get(at, [value])
        to.append(len(arguments))
        tensors = [(to[at], number) for at, number in self.tensors]
        tiles = [(to[at], number, axes, block) for at, number, axes, block in self.tiles]
        return Bound(arguments, tensors, tiles, {name: to[at] for name, at in self.at.items()})


@dataclass
class Launch:
    """One kernel of a plan."""

    function: Any
    programs: int
    options: dict[str, int]
    bound: Bound = field(default_factory=Bound)
    compiled: Any = None
    direct: Bound | None = None
    """What the compiled kernel takes."""
    start: Any = None
    """What starts it on a stream with that."""
    encode: dict[int, Callable[[Any], list[Any]]] = field(default_factory=dict[int, Callable[[Any], list[Any]]])
    kept: dict[tuple[int, int], Any] = field(default_factory=dict[tuple[int, int], Any])

    def __call__(self, tensors: list[Any], scale: float, stream: int) -> None:
        """Starts the kernel on the current stream: the first time through Triton's front door, then directly."""
        if self.compiled is None or INTERPRETED or observed():
            given = self.prepared(self.bound, tensors, scale, self.make_map)
            self.compiled = self.function[(self.programs,)](*given, **self.options)
            return
        direct = self.direct or self.enter(tensors)
        self.start(stream, self.prepared(direct, tensors, scale, self.kept_map))

    def enter(self, tensors: list[Any]) -> Bound:
        """Finds the way past Triton's front door."""
        tiles = self.bound.tiles
        self.start, encode = entry(self.compiled, self.programs, [at for at, *_ in tiles])
        made = {at: encode(at, self.make_map(at, tensors[number], axes, block)) for at, number, axes, block in tiles}
        self.direct = self.bound.unfolded(made)
        places = zip(tiles, self.direct.tiles, strict=True)
        self.encode = {new[0]: partial(encode, old[0]) for old, new in places}
        return self.direct

    def flat(self, parameters: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """The parameters as they are bound; an engine's tuples are taken apart."""
        return parameters

    def prepared(self, bound: Bound, tensors: list[Any], scale: float, to_map: ToMap) -> list[Any]:
        """The arguments of one call."""
        arguments = bound.arguments.copy()
        for at, number in bound.tensors:
            arguments[at] = tensors[number]
        if "scale" in bound.at:
            arguments[bound.at["scale"]] = scale
        for at, number, axes, block in bound.tiles:
            arguments[at] = to_map(at, tensors[number], axes, block)
        return arguments

    def make_map(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        """A tensor map of [b, h, row, column]."""
        view = operand_view(t, axes)
        return TensorDescriptor(view, list(view.shape), map_strides(view), block)

    def kept_map(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        """The same as the compiled kernel takes it, kept by address: shape and strides are the plan's."""
        address = t.data_ptr()
        found = self.kept.get((at, address))
        if found is None:
            made = self.make_map(at, t, axes, block)
            made.base = Address(address, made.base.dtype)
            if len(self.kept) >= ADDRESSES_KEPT:
                self.kept.clear()
            found = self.kept[at, address] = self.encode[at](made)[0]
        return found


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


def current_stream(device: int) -> int:
    """The stream's handle, without an object around it."""
    return triton.runtime.driver.active.get_current_stream(device)


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
