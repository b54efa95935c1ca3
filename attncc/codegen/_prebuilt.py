"""Kernels that were compiled ahead of a package's deployment: a call finds its cubins, and needs no compiler.

`aot/` has a folder an architecture, with cubins and an index that says what each of them takes. A call for which there
is none goes through Triton where that is installed, and says so.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import _driver, _gpu
from ._bound import ADDRESSES_KEPT, Binding, Way, map_strides, operand_view
from ._checks import Sizes
from ._index import FORMATS, Cubin, Damaged, Field, Place, digest, laid_out, read
from ._persistent import Persistent
from ._runtime import Config, Kernel, Variant

FOLDER = Path(__file__).resolve().parent / "aot"
MUCH_SHARED = 48 * 1024
"""Bytes of a block that every GPU has."""


class Missing(Exception):
    """No cubin was made for a launch."""


@dataclass(frozen=True)
class Named:
    """A function or class that stands in a module which imports Triton."""

    module: str
    name: str

    def load(self) -> Any:
        return getattr(import_module(f"{__package__}.{self.module}"), self.name)


class Later:
    """Stands for such a module until something is loaded from it."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Named:
        return Named(self.module, name)


# -- one launch ----------------------------------------------------------------------------------


@dataclass
class CubinLaunch(Binding):
    """One kernel of a plan, started by the driver."""

    function: Named
    cubin: Cubin | None = None
    loaded: _driver.Function | None = None
    content: bytearray = field(default_factory=bytearray)
    """The parameters, those that calls change left open."""
    offsets: list[int] = field(default_factory=list[int])
    changing: list[tuple[int, str, int]] = field(default_factory=list[tuple[int, str, int]])
    """(offset, kind, place) of those."""
    idle: list[_driver.Parameters] = field(default_factory=list[_driver.Parameters])
    """No two threads fill the same memory at once."""
    kept: dict[tuple[int, int], bytes] = field(default_factory=dict[tuple[int, int], bytes])
    """Maps by place and address."""

    def __call__(self, tensors: list[Any], scale: float, stream: int) -> None:
        assert self.loaded is not None
        given = flattened(self.prepared(self.bound, tensors, scale, self.kept_map))
        try:
            parameters = self.idle.pop()
        except IndexError:
            parameters = _driver.Parameters(bytes(self.content), self.offsets)
        for offset, kind, place in self.changing:
            value = given[place]
            value = value.data_ptr() if kind == "pointer" else value
            struct.pack_into(FORMATS[kind].code, parameters.content, offset, value)
        _driver.start(self.loaded, self.programs, stream, parameters, early=bool(self.options.get("launch_pdl")))
        self.idle.append(parameters)

    def take(self, cubins: Sequence[Cubin], tensors: list[Any]) -> Cubin:
        """The first cubin that takes a call with these tensors."""
        given = flattened(self.prepared(self.bound, tensors, 1.0, lambda at, t, axes, block: operand_view(t, axes)))
        found = next((c for c in cubins if takes(c, given, self.options)), None)
        if found is None:
            raise Missing(f"kernel {self.function.name} has no cubin for a call of these strides and this alignment")
        self.cubin = found
        fields, size = laid_out(found.places)
        self.content, self.offsets = bytearray(size), [f.offset for f in fields]
        for f in fields:
            if f.kind in ("i32", "i64"):
                struct.pack_into(FORMATS[f.kind].code, self.content, f.offset, number(f, given))
            elif f.place is not None:
                self.changing.append((f.offset, f.kind, f.place))
        return found

    def kept_map(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> bytes:
        """The map of an operand, kept by address: shape and strides are the plan's."""
        assert self.cubin is not None
        address = t.data_ptr()
        found = self.kept.get((at, address))
        if found is None:
            meta, view = self.cubin.places[at].detail, operand_view(t, axes)
            steps = [step * meta["item"] for step in map_strides(view)[:-1]]
            if len(self.kept) >= ADDRESSES_KEPT:
                self.kept.clear()
            made = _driver.encode(address, meta["dtype"], meta["swizzle"], [*view.shape], steps, meta["box"])
            found = self.kept[at, address] = made
        return found


@dataclass
class PersistentCubin(Persistent, CubinLaunch):
    """The same of an engine's blocks."""


def bind(kernel: Kernel, programs: int, options: dict[str, int]) -> CubinLaunch:
    return (PersistentCubin if kernel.launcher else CubinLaunch)(kernel.function, programs, options)


def may_be_early() -> bool:
    """Whether the current GPU has programmatic dependent launches."""
    return torch.version.hip is None and torch.cuda.get_device_capability(None) >= (9, 0)


def number(f: Field, given: Sequence[Any]) -> int:
    """An integer that is the same in every call of a plan: an argument, or a size or stride behind a tensor map."""
    x = given[f.place]
    return x if f.part is None else [*x.shape, *map_strides(x)][f.part]


def flattened(arguments: Sequence[Any]) -> list[Any]:
    """Arguments with the entries of tuples in their place."""
    out: list[Any] = []
    for x in arguments:
        out += x if isinstance(x, tuple) else (x,)
    return out


def takes(cubin: Cubin, given: Sequence[Any], options: Mapping[str, int]) -> bool:
    """Whether a cubin was made for these arguments and options."""
    if cubin.options != options or len(cubin.places) != len(given):
        return False
    return all(map(fits, cubin.places, given))


def fits(place: Place, x: Any) -> bool:
    """Whether an argument is what a cubin takes at a place."""
    match place.kind:
        case "constant":
            return x is None if place.detail is None else not isinstance(x, torch.Tensor) and x == place.detail
        case "pointer":
            return isinstance(x, torch.Tensor) and x.data_ptr() % place.detail == 0
        case "i32" | "i64":
            bits = 8 * FORMATS[place.kind].size - 1
            return isinstance(x, int) and -(2**bits) <= x < 2**bits and x % place.detail == 0
        case "map":
            return isinstance(x, torch.Tensor)
        case _:
            return isinstance(x, float)


# -- the runner ----------------------------------------------------------------------------------


class Runner(_gpu.Runner):
    """Calls a variant on a GPU from cubins; `architectures`: those that there are cubins for."""

    def __init__(self, variant: Variant, architectures: Sequence[str]) -> None:
        super().__init__(variant, Way(bind, variant.examined, may_be_early=may_be_early))
        self.architectures = architectures
        self.cubins: dict[str, Mapping[str, Sequence[Cubin]]] = {}
        self.functions: dict[tuple[int, str], _driver.Function] = {}
        self.other: _gpu.Runner | None = None

    def plan(self, tensors: Sequence[torch.Tensor], with_lse: bool, with_scale: bool) -> _gpu.Plan:
        device = tensors[0].device
        if device.type != "cuda":
            return self.by_triton(f"tensors are on {device}, cubins need a GPU").plan(tensors, with_lse, with_scale)
        try:
            with torch.cuda.device(device):
                return super().plan(tensors, with_lse, with_scale)
        except Missing as missing:
            why = f"{self.variant.name}: {missing}"
        if self.variant.on_miss == "error":
            raise RuntimeError(f"{why}, and on_miss is 'error'")
        other = self.by_triton(why)
        if self.variant.on_miss == "warn":
            warnings.warn(f"{why}: Triton compiles one", stacklevel=4)
        return other.plan(tensors, with_lse, with_scale)

    def by_triton(self, why: str) -> _gpu.Runner:
        """The runner for what there are no cubins for."""
        if self.other is None:
            try:
                way = Named("_launch", "BY_TRITON").load()
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                raise RuntimeError(f"{why}, and Triton, which would compile one, is not installed") from None
            kernels = tuple(
                replace(k, function=k.function.load(), launcher=k.launcher.load() if k.launcher else None)
                for k in self.variant.kernels
            )
            self.other = _gpu.Runner(replace(self.variant, kernels=kernels), way)
        return self.other

    def bind(
        self,
        kernel: Kernel,
        shapes: Mapping[str, torch.Tensor],
        numbers: Sizes,
        flags: Mapping[str, bool],
        options: dict[str, int],
    ) -> Binding:
        launch = super().bind(kernel, shapes, numbers, flags, options)
        assert isinstance(launch, CubinLaunch)
        device = shapes["q"].device
        arch = self.find(device)
        given = [None if name == "lse" and not numbers["WRITE_LSE"] else t for name, t in shapes.items()]
        cubin = launch.take(self.read(arch).get(launch.function.name, ()), given)
        launch.loaded = self.load(device, arch, cubin)
        return launch

    def choose(self, device: torch.device, sizes: Sizes) -> tuple[Config, str]:
        config, rule = super().choose(device, sizes)
        if device.type != "cuda":
            return config, rule
        try:
            return config, f"{rule}; the cubins of aot/{self.find(device)}"
        except Missing as missing:
            return config, f"{rule}; {missing}: Triton compiles them"

    def find(self, device: torch.device) -> str:
        """The architecture whose cubins a GPU runs: its own, or an older one of the same generation up to sm_89."""
        major, minor = torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)
        here = 10 * major + minor
        known = [int(arch.removeprefix("sm_")) for arch in self.architectures]
        runs = [n for n in known if n == here or (n < here < 90 and n // 10 == major)]
        if not runs:
            what = f"sm_{here}" if here else "AMD's GPUs"
            raise Missing(f"there are cubins for {', '.join(self.architectures)}, none for {what}")
        return f"sm_{max(runs)}"

    def read(self, arch: str) -> Mapping[str, Sequence[Cubin]]:
        """The cubins of an architecture by kernel."""
        if arch not in self.cubins:
            try:
                self.cubins[arch] = read(FOLDER / arch / "index.json")
            except Damaged as error:
                raise self.damaged(arch, str(error)) from None
        return self.cubins[arch]

    def load(self, device: torch.device, arch: str, cubin: Cubin) -> _driver.Function:
        """A kernel's handle on a device, which is the current one; its module is loaded once."""
        found = self.functions.get((device.index, cubin.file))
        if found is not None:
            return found
        limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if cubin.shared_bytes > limit:
            raise RuntimeError(
                f"{self.variant.name}: a block of {cubin.symbol} takes {cubin.shared_bytes} bytes of shared memory, "
                f"this GPU has {limit}: compile the package with --aot for it"
            )
        try:
            code = (FOLDER / arch / cubin.file).read_bytes()
        except OSError as error:
            raise self.damaged(arch, f"{cubin.file} cannot be read ({error.strerror})") from None
        if digest(code) != cubin.digest:
            raise self.damaged(arch, f"{cubin.file} is not what was compiled")
        _driver.enter_context(device)
        handle = _driver.load(code, cubin.symbol, cubin.shared_bytes)
        if cubin.shared_bytes > MUCH_SHARED:
            _driver.prefer_shared(handle)
        found = _driver.Function(handle, device, cubin.threads, cubin.shared_bytes)
        self.functions[device.index, cubin.file] = found
        return found

    def damaged(self, arch: str, what: str) -> RuntimeError:
        return RuntimeError(f"{self.variant.name}: aot/{arch}: {what}: compile the package again with --aot {arch}")
