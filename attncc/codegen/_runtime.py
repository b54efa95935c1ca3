"""What every emitted package shares, whatever it runs on: the description of its variant, and the way into a call.

This file is the same in every package attncc emits; what differs is the `Variant` it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ._checks import CHECKED, Size, Sizes, Tensor, check_indices, fill


@dataclass(frozen=True)
class Scratch:
    """A temporary that one kernel fills and a later one reads."""

    name: str
    shape: Callable[[Sizes], tuple[int, ...]]
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """One launch: the kernel, how many programs, what its parameters are, and when it is due.

    A parameter is ("tile", tensor, rows, columns), ("tensor", name), ("stride", tensor, axis), ("size", name),
    ("scale",), ("knob", name) or ("flag", name); an engine's may be ("absent",), ("counter",), ("programs",),
    ("block", tensor, rows, columns), which has a power of two of rows that divides those, and ("args", *parameters),
    which travel as a tuple.
    """

    function: Any
    programs: Callable[[Sizes], int]
    parameters: tuple[tuple[Any, ...], ...]
    constants: Mapping[str, int] = field(default_factory=dict[str, int])
    """Knobs that this launch alone fixes."""
    options: Mapping[str, int] = field(default_factory=dict[str, int])
    """Options of Triton that it fixes."""
    when: Callable[[Sizes], bool] = lambda n: True
    launcher: Any = None
    """An engine's class of launches; None for plain kernels."""


@dataclass(frozen=True)
class Variant:
    """Everything a package knows of its attention variant."""

    name: str
    tensors: tuple[Tensor, ...]
    """q, k, v, then the other arguments in the order of the signature."""
    output: tuple[int | str, ...]
    lse: tuple[int | str, ...] | None
    sizes: Mapping[str, Size]
    scale: Callable[[Sizes], float]
    axes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Where an operand's b, h, s, d axes are: "bhsd", "bshd", or "shd" for packed sequences."""
    kernels: tuple[Kernel, ...] = ()
    scratch: tuple[Scratch, ...] = ()
    configs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Modules of configs by the device or architecture they were made for."""
    examined: str = ""
    """The version of Triton whose machine code of the engine was looked at, where there is an engine."""
    on_miss: str = "warn"


Result = tuple[torch.Tensor, torch.Tensor | None]
Config = Mapping[str, int]


class Runner(Protocol):
    """Calls a variant on one kind of device; `choose` says which config a device and shape get, and by which rule."""

    variant: Variant

    def __call__(self, tensors: Sequence[torch.Tensor], scale: float | None, with_lse: bool) -> Result:
        """Runs on `tensors`, which stand in the order of `variant.tensors`."""
        ...

    def choose(self, device: torch.device, sizes: Sizes) -> tuple[Config, str]: ...


class Either:
    """A runner for the CPU beside one for the GPU."""

    def __init__(self, gpu: Runner, cpu: Runner) -> None:
        self.variant, self.gpu, self.cpu = gpu.variant, gpu, cpu

    def __call__(self, tensors: Sequence[torch.Tensor], scale: float | None, with_lse: bool) -> Result:
        return (self.cpu if tensors[0].is_cpu else self.gpu)(tensors, scale, with_lse)

    def choose(self, device: torch.device, sizes: Sizes) -> tuple[Config, str]:
        return (self.cpu if device.type == "cpu" else self.gpu).choose(device, sizes)


# -- torch.compile, export and autograd ----------------------------------------------------------


def register(package: str, runner: Runner) -> Any:
    """The variant as a torch operator `attncc_<package>::forward`, with shapes for tracing; it has no backward."""
    v = runner.variant
    arguments = ", ".join(f"Tensor {t.name}" for t in v.tensors)
    results = "Tensor" if v.lse is None else "(Tensor, Tensor)"

    def forward(*arguments: Any) -> Any:
        *tensors, scale = arguments
        o, lse = run(runner, tensors, scale, v.lse is not None)
        return o if lse is None else (o, lse)

    def fake(*arguments: Any) -> Any:
        tensors = arguments[:-1]
        sizes: Any = {}
        for expected, t in zip(v.tensors, tensors, strict=True):
            sizes |= {a: s for a, s in zip(expected.axes, t.shape, strict=True) if isinstance(a, str)}
        q = tensors[0]
        o = q.new_empty(fill(v.output, sizes))
        return o if v.lse is None else (o, q.new_empty(fill(v.lse, sizes), dtype=torch.float32))

    op = torch.library.custom_op(
        f"attncc_{package}::forward", forward, mutates_args=(), schema=f"({arguments}, float? scale) -> {results}"
    )
    op.register_fake(fake)
    return op


def call(
    runner: Runner, op: Any, tensors: Sequence[torch.Tensor], scale: float | None, with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Straight to the kernels for plain tensors; through the operator while torch traces."""
    name = runner.variant.name
    plain, grad = True, torch.is_grad_enabled()
    for n, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor):
            got = "nothing" if t is None else type(t).__name__
            raise TypeError(f"{name}: {runner.variant.tensors[n].name} must be a tensor, got {got}")
        plain = plain and type(t) in PLAIN
        if grad and t.requires_grad:
            raise RuntimeError(
                f"{name}: {runner.variant.tensors[n].name} requires a gradient, but this package has no backward: "
                "call it under torch.no_grad()"
            )
    if plain and not torch.compiler.is_compiling():
        return run(runner, tensors, scale, with_lse)
    result = op(*tensors, scale)
    return result if isinstance(result, tuple) else (result, None)


def run(runner: Runner, tensors: Sequence[torch.Tensor], scale: float | None, with_lse: bool) -> Result:
    """The kernels, behind a look at what the index tensors hold if ATTNCC_CHECK=1 was set before the import."""
    if CHECKED:
        v = runner.variant
        check_indices(v.name, v.tensors, tensors, v.sizes)
    return runner(tensors, scale, with_lse)


PLAIN = (torch.Tensor, torch.nn.Parameter)
