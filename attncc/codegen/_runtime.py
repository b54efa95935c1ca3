"""The host side of an emitted package: checks a call, plans it once, and launches its kernels.

This file is the same in every package attncc emits; what differs is the `Variant` it is given. The first call
with a new combination of shapes, strides and dtypes makes a plan (checks, config, grid, compiled kernels); later
ones look it up. Nothing here reads device memory, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: no GPU, so kernels run on the CPU

from triton.tools.tensor_descriptor import TensorDescriptor

from ._checks import Sizes, Tensor, check_scale, check_tensors, fill

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
PLANS_KEPT = 1024
ADDRESSES_KEPT = 64

Config = Mapping[str, int]


@dataclass(frozen=True)
class Scratch:
    """A temporary that one kernel fills and a later one reads."""

    name: str
    shape: Callable[[Sizes], tuple[int, ...]]
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """One launch: the kernel, how many programs, and what its parameters are.

    A parameter is ("tile", tensor, rows, columns), ("tensor", name), ("stride", tensor, axis), ("size", name),
    ("scale",), ("knob", name), ("constant", number) or ("flag", name).
    """

    function: Any
    programs: Callable[[Sizes], int]
    parameters: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Variant:
    """Everything a package knows of its attention variant."""

    name: str
    tensors: tuple[Tensor, ...]
    """q, k, v, then the other arguments in the order of the signature."""
    axes: Mapping[str, str]
    """Where an operand's b, h, s axes are: "bhsd", "bshd", or "shd" for packed sequences."""
    output: tuple[int | str, ...]
    lse: tuple[int | str, ...] | None
    limits: Mapping[str, int]
    """The greatest size each axis may have: kernels were proven to address no more."""
    scale: Callable[[Sizes], float]
    kernels: tuple[Kernel, ...]
    scratch: tuple[Scratch, ...]
    configs: Mapping[str, Any]
    """Modules of configs by the device or architecture they were made for."""
    hardware_tanh: bool = False
    on_miss: str = "warn"


@dataclass
class Plan:
    """What calls of one combination of shapes, strides and dtypes share."""

    sizes: Sizes
    scale: float
    launches: list[Launch]
    output_shape: tuple[int, ...]
    lse_shape: tuple[int, ...] | None
    empty: bool = False
    device: int = -1


@dataclass
class Launch:
    """One kernel of a plan: its arguments are the same in every call but for addresses and the scale."""

    function: Any
    programs: int
    arguments: list[Any]
    places: list[tuple[int, str]]
    """Which arguments are tensors, by the tensor's name."""
    tiles: list[tuple[int, str, list[int]]]
    """Which are descriptors: the tensor, and the block's shape."""
    scale_at: int
    options: dict[str, int]
    compiled: Any = None
    descriptors: dict[tuple[int, int], Any] = field(default_factory=dict)


class Address:
    """Stands for a tensor in a kept descriptor, which must not keep the tensor's memory alive."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype) -> None:
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        return self.pointer


class Runner:
    """Calls a variant; `choose` says which config a device and shape get, and by which rule."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.plans: dict[Any, Plan] = {}

    def __call__(
        self, tensors: Sequence[torch.Tensor], scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs on `tensors`, which stand in the order of `variant.tensors`."""
        key = tuple([(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors])
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plan(tensors)
            if len(self.plans) >= PLANS_KEPT:
                self.plans.clear()
            self.plans[key] = plan
        factor = plan.scale if scale is None else check_scale(self.variant.name, scale)
        q = tensors[0]
        o = torch.empty(plan.output_shape, dtype=q.dtype, device=q.device)
        lse = None if plan.lse_shape is None else torch.empty(plan.lse_shape, dtype=torch.float32, device=q.device)
        if plan.empty:
            return o.zero_(), None if lse is None else lse.fill_(-math.inf)
        if plan.device >= 0 and plan.device != torch.cuda.current_device():
            with torch.cuda.device(plan.device):
                self.launch(plan, tensors, o, lse, factor)
        else:
            self.launch(plan, tensors, o, lse, factor)
        return o, lse

    def launch(
        self, plan: Plan, tensors: Sequence[torch.Tensor], o: torch.Tensor, lse: torch.Tensor | None, scale: float
    ) -> None:
        named = {t.name: x for t, x in zip(self.variant.tensors, tensors, strict=True)} | {"o": o, "lse": lse}
        if INTERPRETED and o.dtype == torch.bfloat16:  # the interpreter multiplies bf16 bit patterns
            widen = {n: x.float() if x is not None and x.dtype == o.dtype else x for n, x in named.items()}
            self.run(plan, widen, scale)
            o.copy_(widen["o"])
            return
        self.run(plan, named, scale)

    def run(self, plan: Plan, named: dict[str, Any], scale: float) -> None:
        device = named["q"].device
        for s in self.variant.scratch:
            named[s.name] = torch.empty(s.shape(plan.sizes), dtype=s.dtype, device=device)
        for launch in plan.launches:
            arguments = launch.arguments.copy()
            for at, name in launch.places:
                arguments[at] = named[name]
            if launch.scale_at >= 0:
                arguments[launch.scale_at] = scale
            for at, name, block in launch.tiles:
                arguments[at] = self.descriptor(launch, at, named[name], self.variant.axes[name], block)
            start(launch, arguments)

    def descriptor(self, launch: Launch, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        """A tensor map of [b, h, row, column], kept by address: shape and strides are the plan's."""
        address = t.data_ptr()
        found = launch.descriptors.get((at, address))
        if found is None:
            view = operand_view(t, axes)
            made = TensorDescriptor(view, list(view.shape), list(map(int, tma_strides(view))), block)
            if launch.compiled is None:  # triton compiles from the real thing
                return made
            made.base = Address(address, t.dtype)
            if len(launch.descriptors) >= ADDRESSES_KEPT:
                launch.descriptors.clear()
            launch.descriptors[at, address] = found = made
        return found

    # -- once per combination of shapes, strides and dtypes --------------------------------------

    def plan(self, tensors: Sequence[torch.Tensor]) -> Plan:
        v = self.variant
        sizes = check_tensors(v.name, v.tensors, tensors, v.limits)
        q = tensors[0]
        if not q.is_cuda and not INTERPRETED:
            raise RuntimeError(
                f"{v.name}: tensors are on {q.device}, the kernels need a GPU; to interpret them on the CPU "
                "set TRITON_INTERPRET=1 before anything imports triton"
            )
        lse_shape = None if v.lse is None else fill(v.lse, sizes)
        shapes = (fill(v.output, sizes), lse_shape)
        plan = Plan(sizes, v.scale(sizes), [], *shapes, device=q.device.index if q.is_cuda else -1)
        check_scale(v.name, plan.scale)
        keys = sizes.get("Tk", sizes.get("Sk", 0))
        plan.empty = 0 in plan.output_shape or keys == 0 or sizes["B"] == 0
        if plan.empty:
            return plan
        config, _ = self.choose(q.device, sizes)
        options = {k: x for k, x in config.items() if k in ("num_warps", "num_stages", "maxnreg") and x}
        knobs = {k: x for k, x in config.items() if k not in ("num_warps", "num_stages", "maxnreg")}
        flags = {
            "TMA": bool(knobs.pop("TMA", 0)) and not INTERPRETED and self.descriptors_fit(tensors),
            "HARDWARE": v.hardware_tanh and q.is_cuda and torch.version.hip is None,
        }
        bound = sizes | knobs
        plan.sizes = bound
        named = {t.name: x for t, x in zip(v.tensors, tensors, strict=True)}
        named["o"] = torch.empty(plan.output_shape, dtype=q.dtype, device="meta")
        if plan.lse_shape is not None:
            named["lse"] = torch.empty(plan.lse_shape, dtype=torch.float32, device="meta")
        for s in v.scratch:
            named[s.name] = torch.empty(s.shape(bound), dtype=s.dtype, device="meta")
        plan.launches = [self.bind(k, named, bound, flags, options) for k in v.kernels]
        return plan

    def bind(
        self, kernel: Kernel, named: Mapping[str, torch.Tensor], sizes: Sizes, flags: Mapping[str, bool], options: Any
    ) -> Launch:
        if INTERPRETED:
            options = {}
        launch = Launch(kernel.function, kernel.programs(sizes), [], [], [], -1, options)
        if launch.programs >= 2**31:
            raise ValueError(
                f"{self.variant.name}: {launch.programs} programs are more than a GPU launches at once (2**31 - 1)"
            )
        for at, parameter in enumerate(kernel.parameters):
            launch.arguments.append(None)
            match parameter:
                case ("tile", name, rows, columns):
                    if flags["TMA"]:
                        launch.tiles.append((at, name, [1, 1, *(sizes.get(d, d) for d in (rows, columns))]))
                    else:
                        launch.places.append((at, name))
                case ("tensor", name):
                    launch.places.append((at, name))
                case ("stride", name, axis):
                    t = named[name]
                    launch.arguments[at] = (
                        operand_view(t, self.variant.axes[name]).stride(axis)
                        if name in self.variant.axes
                        else t.stride(axis)
                    )
                case ("size", name) | ("knob", name):
                    launch.arguments[at] = sizes[name]
                case ("flag", name):
                    launch.arguments[at] = flags[name]
                case ("constant", number):
                    launch.arguments[at] = number
                case ("scale",):
                    launch.scale_at = at
                case _:
                    raise AssertionError(parameter)
        return launch

    def descriptors_fit(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the operands can be read by tensor maps: aligned, no expanded axis, strides of whole 16 bytes."""
        for t in tensors[:3]:
            view = operand_view(t, self.variant.axes["q"])
            steps = [s * t.element_size() for s in tma_strides(view)[:-1]]
            if t.data_ptr() % 16 or any(s % 16 or s <= 0 or s >= 2**40 for s in steps):
                return False
        return fill(self.variant.output, {}, partial=True)[-1] * tensors[0].element_size() % 16 == 0

    def choose(self, device: torch.device, sizes: Sizes) -> tuple[Config, str]:
        """The config for a device and shape, and the rule that chose it."""
        for name, rule in device_names(device):
            module = self.variant.configs.get(name)
            if module is not None:
                return pick(module, sizes), rule
        name, rule = self.nearest(device)
        if self.variant.on_miss == "error":
            raise RuntimeError(f"{self.variant.name}: {rule}, and on_miss is 'error'")
        if self.variant.on_miss == "warn":
            warnings.warn(f"{self.variant.name}: {rule}; `attncc compile --target` adds one", stacklevel=4)
        return pick(self.variant.configs[name], sizes), rule

    def nearest(self, device: torch.device) -> tuple[str, str]:
        """The newest architecture that is no newer than this one, else the first there is."""
        here = device_names(device)[0][0]
        if device.type == "cuda" and torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(device)
            older = [n for n in self.variant.configs if n.startswith("sm_") and int(n[3:]) <= 10 * major + minor]
            if older:
                name = max(older, key=lambda n: int(n[3:]))
                return name, f"no config for {here}, using that of {name}, the nearest older architecture"
        if device.type == "cpu":
            name = sorted(self.variant.configs)[0]
            return name, f"no config for {here}, using that of {name}"
        raise RuntimeError(
            f"{self.variant.name} was compiled for {', '.join(sorted(self.variant.configs))} and cannot run on {here}: "
            f"compile it with --target {here}"
        )


def start(launch: Launch, arguments: list[Any]) -> None:
    """Launches; the first time through Triton's front door, then straight into the compiled kernel."""
    compiled = launch.compiled
    if compiled is None:
        launch.compiled = launch.function[(launch.programs,)](*arguments, **launch.options) or False
        return
    if compiled is False:  # interpreted
        launch.function[(launch.programs,)](*arguments, **launch.options)
        return
    compiled[(launch.programs, 1, 1)](*arguments)


def operand_view(t: torch.Tensor, axes: str) -> torch.Tensor:
    """An operand as [b, h, row, column]."""
    match axes:
        case "bhsd":
            return t
        case "bshd":
            return t.transpose(1, 2)
        case _:
            return t.transpose(0, 1).unsqueeze(0)


def tma_strides(view: torch.Tensor) -> list[int]:
    """Strides of an operand, where those of axes of size 1, which nothing steps along, fit the axis inside them."""
    strides = list(view.stride())
    span = view.shape[-1]
    span += -span % (16 // view.element_size())
    for axis in sorted(range(3), key=lambda a: (strides[a], -a)):
        if view.shape[axis] == 1:
            strides[axis] = span
        span = max(span, strides[axis] * view.shape[axis])
    return strides


def pick(module: Any, sizes: Sizes) -> Config:
    """The first row of a decision table whose bounds hold."""
    for bounds, config in module.TABLE:
        if all(sizes.get(name, 0) <= most for name, most in bounds.items()):
            return config
    raise RuntimeError(f"{module.__name__}: no row of TABLE is without bounds")


def device_names(device: torch.device) -> list[tuple[str, str]]:
    """Names under which a device's configs may be filed, the most exact first."""
    if device.type != "cuda":
        return [(device.type, "the device's own file")]
    p = torch.cuda.get_device_properties(device)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    card = p.name.lower().replace(" ", "_").replace("-", "_")
    return [(card, "the card's own file"), (arch, "the architecture's file")]


# -- torch.compile, export and autograd ----------------------------------------------------------


def register(package: str, runner: Runner) -> Any:
    """The variant as a torch operator `attncc_<package>::forward`, with shapes for tracing; it has no backward."""
    v = runner.variant
    arguments = ", ".join(f"Tensor {t.name}" for t in v.tensors)
    results = "Tensor" if v.lse is None else "(Tensor, Tensor)"

    def forward(*arguments: Any) -> Any:
        *tensors, scale = arguments
        o, lse = runner(tensors, scale)
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
    runner: Runner, op: Any, tensors: Sequence[torch.Tensor], scale: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Straight to the kernels for plain tensors; through the operator while torch traces."""
    name = runner.variant.name
    plain = True
    for expected, t in zip(runner.variant.tensors, tensors, strict=True):
        if not isinstance(t, torch.Tensor):
            got = "nothing" if t is None else type(t).__name__
            raise TypeError(f"{name}: {expected.name} must be a tensor, got {got}")
        plain = plain and type(t) in (torch.Tensor, torch.nn.Parameter)
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: {expected.name} requires a gradient, but this package has no backward: "
                "call it under torch.no_grad()"
            )
    if plain and not torch.compiler.is_compiling():
        return runner(tensors, scale)
    result = op(*tensors, scale)
    return result if isinstance(result, tuple) else (result, None)
