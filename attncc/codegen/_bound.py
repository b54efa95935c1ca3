"""The arguments of an emitted package's launches, whatever starts them: bound once, completed in every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

ADDRESSES_KEPT = 256

ToMap = Callable[[int, torch.Tensor, str, list[int]], Any]


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
class Binding:
    """One kernel of a plan: what it is given. What starts it is a subclass."""

    function: Any
    programs: int
    options: dict[str, int]
    bound: Bound = field(default_factory=Bound)

    def __call__(self, tensors: list[Any], scale: float, stream: int) -> None:
        """Starts the kernel on a stream of the current device."""
        raise NotImplementedError

    def flat(self, parameters: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """The parameters as they are bound; an engine's tuples are taken apart."""
        return parameters

    def own(self, at: int, kind: str) -> Any:
        """The value of a parameter that only an engine has, or None where each call makes it."""
        raise NotImplementedError(f"{kind} at {at}")

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


@dataclass(frozen=True)
class Way:
    """How the kernels of a package are started: by Triton, or from cubins."""

    bind: Callable[[Any, int, dict[str, int]], Binding]
    """A launch of a kernel, of so many programs, with these options."""
    triton: str
    """The version that makes their machine code, or made it."""
    interpreted: bool = False
    has_ptx: Callable[[], bool] = lambda: True
    """Whether kernels may hold PTX."""
    has_fp8: Callable[[], bool] = lambda: torch.cuda.get_device_capability(None) >= (8, 9)
    """Whether the GPU makes numbers of fp8 itself."""
    may_be_early: Callable[[], bool] = lambda: False
    """Whether a launch's programs can begin before those of the launch before it have ended."""


def current_stream(device: int) -> int:
    """The stream's handle, without an object around it."""
    return torch._C._cuda_getCurrentRawStream(device)


def operand_view(t: torch.Tensor, axes: str) -> torch.Tensor:
    """An operand as [b, h, row, column]."""
    match axes:
        case "bhsd":
            return t
        case "bshd":
            return t.transpose(1, 2)
        case _:
            return t.transpose(0, 1).unsqueeze(0)


def as_words(t: torch.Tensor) -> bool:
    """Whether two bytes of a tensor's last axis are a word wherever it is read: rows begin at even addresses."""
    return t.stride(-1) == 1 and not any(step % 2 for step in (t.data_ptr(), t.storage_offset(), *t.stride()[:-1]))


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
