"""The GPU side of an emitted package: checks a call, plans it once, and launches its kernels.

The first call with a new combination of shapes, strides and dtypes makes a plan (checks, config, grid, compiled
kernels); later ones look it up. Nothing here reads device memory, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._bound import Binding, Way, as_words, current_stream, map_fits, operand_view
from ._cards import Here, counted, find_file, row, told
from ._checks import Sizes, check_scale, check_tensors, default_scale, fill, keep
from ._runtime import Config, Kernel, Result, Variant

OPTIONS = ("num_warps", "num_stages", "maxnreg")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


Views = tuple[tuple[int, torch.dtype], ...]
"""Numbers of the tensors of which kernels read the bits, and as what."""


@dataclass
class Plan:
    """What calls of one combination of shapes, strides and dtypes share."""

    scale: float
    """For calls that give none."""
    output: tuple[int, ...]
    lse: tuple[int, ...] | None
    scratch: list[tuple[tuple[int, ...], torch.dtype]]
    launches: list[Binding]
    device: int
    empty: bool = False
    viewed: Views = ()
    interpreted: bool = False


class Runner:
    """Calls a variant on a GPU, or in Triton's interpreter where triton was imported for that."""

    def __init__(self, variant: Variant, way: Way) -> None:
        self.variant, self.way = variant, way
        self.plans: dict[Any, Plan] = {}
        self.files: dict[torch.device, tuple[Any, str]] = {}

    def __call__(self, tensors: Sequence[torch.Tensor], scale: float | None, with_lse: bool) -> Result:
        """Runs on `tensors`, which stand in the order of `variant.tensors`."""
        key = (with_lse, scale is None, *[(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors])
        plan = self.plans.get(key)
        if plan is None:
            plan = keep(self.plans, key, self.plan(tensors, with_lse, scale is None))
        factor = plan.scale if scale is None else check_scale(self.variant.name, scale)
        q = tensors[0]
        o = q.new_empty(plan.output)
        lse = None if plan.lse is None else q.new_empty(plan.lse, dtype=torch.float32)
        if plan.empty:
            return o.zero_(), None if lse is None else lse.fill_(-math.inf)
        if plan.device >= 0 and plan.device != torch.cuda.current_device():
            with torch.cuda.device(plan.device):
                run(plan, [*tensors, o, lse], factor)
        else:
            run(plan, [*tensors, o, lse], factor)
        return o, lse

    # -- once per combination of shapes, strides and dtypes --------------------------------------

    def plan(self, tensors: Sequence[torch.Tensor], with_lse: bool, with_scale: bool) -> Plan:
        """`with_scale`: the call gives none, so that the spec's own is due."""
        v, q = self.variant, tensors[0]
        sizes = check_tensors(v.name, v.tensors, tensors, v.sizes)
        if not q.is_cuda and not (self.way.interpreted and q.is_cpu):
            raise RuntimeError(
                f"{v.name}: tensors are on {q.device}, the kernels need a GPU; to interpret them on the CPU "
                "set TRITON_INTERPRET=1 before anything imports triton"
            )
        lse = None if v.lse is None or not with_lse else fill(v.lse, sizes)
        device = q.device.index if q.is_cuda else -1
        plan = Plan(1.0, fill(v.output, sizes), lse, [], [], device, interpreted=self.way.interpreted)
        plan.viewed = views(v, tensors)
        tensors = seen(tensors, plan.viewed)
        if 0 in plan.output or counted(sizes).get("pairs", 0) == 0:
            plan.empty = True
            return plan
        if with_scale:
            plan.scale = default_scale(v.name, v.scale, sizes)
        _, config = row(self.file(q.device)[0], counted(sizes))
        plan.launches = self.launches(plan, tensors, sizes, config, lse is not None, self.maps_fit(tensors))
        return plan

    def launches(
        self,
        plan: Plan,
        tensors: Sequence[torch.Tensor],
        sizes: Sizes,
        config: Config,
        with_lse: bool,
        with_maps: bool,
    ) -> list[Binding]:
        """What a call with this config starts; `plan` hears of the scratch. `with_maps`: operands fit tensor maps."""
        v, interpreted = self.variant, self.way.interpreted
        numbers = sizes | {k: x for k, x in config.items() if k not in OPTIONS} | {"WRITE_LSE": int(with_lse)}
        in_words = all(t.dtype == torch.int16 for x, t in zip(v.tensors, tensors, strict=True) if x.words)
        flags = {"TMA": bool(numbers.pop("TMA", 0)) and not interpreted and with_maps and in_words}
        flags |= {"WORDS": in_words, "PTX": self.way.has_ptx()}
        # the engine reads operands by tensor maps alone
        numbers["ENGINE"] = int(bool(config.get("ENGINE")) and flags["TMA"] and self.is_examined())
        due = [k for k in v.kernels if k.when(numbers)]
        shapes = self.shapes(tensors, plan, numbers, due)
        plan.scratch = [(tuple(shapes[s.name].shape), s.dtype) for s in v.scratch if s.name in shapes]
        options = {} if interpreted else config
        return [self.bind(k, shapes, numbers, flags, chosen(options, k.options)) for k in due]

    def is_examined(self) -> bool:
        """Whether the Triton here makes the machine code of the engine that was looked at."""
        v = self.variant
        if v.examined == self.way.triton:
            return True
        what = f"{v.name}: the engine was examined with Triton {v.examined}, this is {self.way.triton}"
        if v.on_miss == "error":
            raise RuntimeError(f"{what}, and on_miss is 'error'")
        if v.on_miss == "warn":
            warnings.warn(f"{what}: portable kernels run instead; compile the package here for one", stacklevel=6)
        return False

    def shapes(
        self, tensors: Sequence[torch.Tensor], plan: Plan, numbers: Sizes, due: Sequence[Kernel]
    ) -> dict[str, torch.Tensor]:
        """Every tensor of a call by name, those still to be made without memory, in the order `run` has them."""
        v = self.variant
        used = {entry[1] for k in due for entry in entries(k) if len(entry) > 1}
        named = {t.name: x for t, x in zip(v.tensors, tensors, strict=True)}
        named["o"] = torch.empty(plan.output, dtype=tensors[0].dtype, device="meta")
        named["lse"] = torch.empty(plan.lse or (0, 0, 0), device="meta")
        made = [s for s in v.scratch if s.name in used]
        return named | {s.name: torch.empty(s.shape(numbers), dtype=s.dtype, device="meta") for s in made}

    def maps_fit(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether all operands can be read, and the output written, through tensor maps."""
        width = self.variant.output[-1]
        assert isinstance(width, int)
        named = zip(self.variant.tensors, tensors, strict=True)
        fits = all(map_fits(t, self.variant.axes[x.name]) for x, t in named if x.tiled)
        return fits and width * tensors[0].element_size() % 16 == 0

    def bind(
        self,
        kernel: Kernel,
        shapes: Mapping[str, torch.Tensor],
        numbers: Sizes,
        flags: Mapping[str, bool],
        options: dict[str, int],
    ) -> Binding:
        """A launch with every argument in place that does not change from call to call."""
        programs = kernel.programs(numbers)
        launch = self.way.bind(kernel, programs, options)
        if programs >= 2**31:
            raise ValueError(
                f"{self.variant.name}: {programs} programs are more than a GPU launches at once (2**31 - 1)"
            )
        numbers = {**numbers, **kernel.constants}
        order = {name: n for n, name in enumerate(shapes)}
        axes = self.variant.axes
        for at, parameter in enumerate(launch.flat(kernel.parameters)):
            value: Any = None
            match parameter:
                case ("args", *_) | ("counter",) | ("programs",) | ("absent",):
                    value = launch.own(at, parameter[0])
                case ("tile", name, rows, columns) if flags["TMA"]:
                    block = [1, 1, *(numbers.get(d, d) for d in (rows, columns))]
                    launch.bound.tiles.append((at, order[name], axes[name], block))
                case ("block", name, rows, columns):
                    lines = numbers.get(rows, rows)
                    block = [1, 1, min(lines & -lines, columns), columns]
                    launch.bound.tiles.append((at, order[name], axes[name], block))
                case ("tile", name, _, _) | ("tensor", name):
                    launch.bound.tensors.append((at, order[name]))
                case ("stride", name, axis):
                    t = operand_view(shapes[name], axes[name]) if name in axes else shapes[name]
                    value = t.stride(axis)
                case ("size", name) | ("knob", name):
                    value = numbers[name]
                case ("flag", name):
                    value = flags[name]
                case _:
                    launch.bound.at["scale"] = at
            launch.bound.arguments.append(value)
        return launch

    def choose(self, device: torch.device, sizes: Sizes) -> tuple[Config, str]:
        """The config for a device and shape, and the rule that chose it."""
        module, rule = self.file(device)
        sizes = counted(sizes)
        bounds, config = row(module, sizes)
        return config, f"{rule}{told(module, bounds, sizes, self.way.triton)}"

    def file(self, device: torch.device) -> tuple[Any, str]:
        """The module of configs for a device, and why it is that one."""
        if device in self.files:
            return self.files[device]
        v = self.variant
        found = find_file(v.configs, device)
        if found is None:
            here = Here.of(device) if device.type == "cuda" else Here(device.type, device.type)
            raise RuntimeError(
                f"{v.name} was compiled for {', '.join(sorted(v.configs))} and cannot run on {here.name}: "
                f"compile it with --target {here.arch}"
            )
        if not found.is_own and v.on_miss == "error":
            raise RuntimeError(f"{v.name}: {found.rule}, and on_miss is 'error'")
        if not found.is_own and v.on_miss == "warn":
            warnings.warn(f"{v.name}: {found.rule}; `attncc compile --target` adds one", stacklevel=5)
        self.files[device] = v.configs[found.name], found.rule
        return self.files[device]


def chosen(config: Config, fixed: Config) -> dict[str, int]:
    """What a config asks of Triton, but for what a launch fixes; 0 leaves it to that."""
    found = {k: fixed.get(k, n) for k, n in config.items() if k in OPTIONS}
    return {k: n for k, n in found.items() if n}


def run(plan: Plan, tensors: list[Any], scale: float) -> None:
    """Launches a plan's kernels on the arguments, o and lse of one call."""
    q = tensors[0]
    given = tensors = seen(tensors, plan.viewed)
    if plan.interpreted and q.dtype == torch.bfloat16:  # the kernels' BF16 is fp32 then
        tensors = [widened(t) if t is not None and t.dtype == q.dtype else t for t in tensors]
    tensors += made(plan, q)
    stream = current_stream(plan.device) if q.is_cuda else 0
    for launch in plan.launches:
        launch(tensors, scale, stream)
    if given is not tensors:
        o = len(given) - 2
        given[o].copy_(tensors[o])


def made(plan: Plan, like: torch.Tensor) -> list[torch.Tensor]:
    """The temporaries of a call."""
    wide = {torch.bfloat16: torch.float32} if plan.interpreted else {}
    return [like.new_empty(shape, dtype=wide.get(dtype, dtype)) for shape, dtype in plan.scratch]


def views(variant: Variant, tensors: Sequence[torch.Tensor]) -> Views:
    """fp8 as bytes, of which kernels put numbers together, and codes as words, if all of them can be."""
    codes = [n for n, x in enumerate(variant.tensors) if x.words]
    in_words = all(as_words(tensors[n]) for n in codes)
    found = {n: torch.uint8 for n, t in enumerate(tensors) if t.dtype in FP8}
    return tuple((found | (dict.fromkeys(codes, torch.int16) if in_words else {})).items())


def seen(tensors: Sequence[Any], viewed: Views) -> list[Any]:
    """Tensors as kernels are given them."""
    out = [*tensors]
    for n, dtype in viewed:
        out[n] = out[n].view(dtype)
    return out


def widened(t: torch.Tensor) -> torch.Tensor:
    """A tensor in fp32 with the strides it has, which the plan knows."""
    if not t.numel():
        return t.float()
    span = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).float().as_strided(t.shape, t.stride(), 0)


def entries(kernel: Kernel) -> Iterator[tuple[Any, ...]]:
    """A kernel's parameters, those of tuples among them."""
    for parameter in kernel.parameters:
        yield from parameter[1:] if parameter[0] == "args" else (parameter,)
