"""Cubins of an emitted package for a GPU that need not be here: every launch that its calls can make, compiled ahead.

It runs in a process of its own, for it takes the place of Triton's driver. What calls make of a launch is asked of the
package's own code; which of a launch's arguments are multiples of 16 differs from call to call, and by LEVELS here.
Triton assumes that of the entries of tuples too, whatever the kernel says: so an engine is looked at on each of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from attncc.codegen import gate
from attncc.codegen._index import digest
from attncc.codegen.elsewhere import large_call, opened, runner_of
from attncc.device import Device, find
from attncc.errors import CompilerBug, SpecError, Unsupported

NO_PATHS: Final = {"TRITON_DISABLE_LINE_INFO": "1"}
"""Cubins would name the source's place on this machine, and be three times as large."""
ALIGNED: Final = 16
ODD: Final = 3
FAR: Final = 2**40 + 1
"""Numbers: of one all that Triton may assume holds, of another that it takes 32 bits, of the last nothing."""
REFUSED: Final = 3
"""Exit status of the child where something cannot be compiled ahead; it has said what."""


@dataclass(frozen=True, slots=True)
class Level:
    """What is assumed of a call: its numbers by what they are, and its tensors' addresses."""

    operands: int
    """Strides of operands."""
    others: int
    """Those of other tensors, but for the last axis."""
    rest: int
    sizes: int
    aligned: bool


LEVELS: Final = (
    Level(ALIGNED, ALIGNED, ODD, ALIGNED, True),
    Level(ALIGNED, ODD, ODD, ODD, True),
    Level(FAR, FAR, FAR, ODD, False),
)
"""The most special first; the last takes every call."""


@dataclass(frozen=True, slots=True)
class Unaligned:
    """Stands for a tensor at any address."""

    dtype: Any

    def data_ptr(self) -> int:
        return 1


def ahead(names: Sequence[str | Device] | None, backend: str | None) -> tuple[Device, ...]:
    """The devices that cubins are made for ahead, from what was asked for."""
    if names is not None and not names:
        raise SpecError("--aot names no architecture", hint="--aot sm_80,sm_90")
    devices = tuple(x if isinstance(x, Device) else find(x) for x in names or ())
    for device in devices:
        if device.vendor != "nvidia":
            raise SpecError(f"--aot: no cubin runs on target '{device.name}'", hint="name NVIDIA GPUs, such as sm_90")
    if devices and backend == "tvm":
        raise SpecError("--aot is for Triton's kernels; packages of --backend tvm hold cubins anyway")
    return devices


def prebuild(package: Path, arch: str, targets: Sequence[str]) -> dict[str, bytes]:
    """The files of a package's `aot/<arch>`: cubins for all that the configs of `targets` ask for, and their index."""
    with tempfile.TemporaryDirectory(prefix="attncc-aot-") as scratch:
        out = Path(scratch, "out")
        out.mkdir()
        child = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(package), arch, str(out), *targets],
            env=gate.environment(scratch) | NO_PATHS,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode == REFUSED:
            raise Unsupported(f"--aot {arch}: {child.stdout.strip()}", hint="leave --aot out: Triton compiles it")
        if child.returncode:
            raise CompilerBug(f"the kernels of '{package.name}' do not compile for {arch}:\n{child.stderr[-4000:]}")
        return {f"aot/{arch}/{path.name}": path.read_bytes() for path in sorted(out.iterdir())}


# -- inside the child ----------------------------------------------------------------------------


def _main(folder: Path, arch: str, out: Path, targets: Sequence[str]) -> int:
    runner = runner_of(opened(folder, find(arch)))
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for launch, made in _compiled(runner, targets):
            name = launch.function.__name__
            entry = _entry(name, launch.options, made)
            if entry in found.setdefault(name, []):
                continue
            if "args" in launch.bound.at and (reasons := gate.judge(made).reasons):
                raise Unsupported(f"the engine, for calls that were not examined: {reasons[0]}")
            found[name].append(entry)
            (out / entry["file"]).write_bytes(made.asm["cubin"])
    except Unsupported as error:
        print(error.message)
        return REFUSED
    (out / "index.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _compiled(runner: Any, targets: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Every launch, and its compiled kernel, on every level."""
    variant, call = runner.variant, large_call(runner)
    parameters = {id(k.function): k.parameters for k in variant.kernels}
    for config, with_lse, with_maps in _calls(variant, targets):
        launches, tensors = call.launches(config, with_lse, with_maps)
        for launch in launches:
            places = launch.flat(parameters[id(launch.function)])
            for level in LEVELS:
                arguments = _arguments(launch, places, tensors, level, variant)
                yield launch, launch.function.warmup(*arguments, grid=(1,), **launch.options)


def _calls(variant: Any, targets: Sequence[str]) -> Iterator[tuple[Mapping[str, int], bool, bool]]:
    """(config, whether lse is asked for, whether operands fit tensor maps) that calls can have."""
    for target in targets:
        for _, config in variant.configs[target].TABLE:
            for with_lse in (False, True) if variant.lse else (False,):
                for with_maps in (True, False) if config.get("TMA") else (False,):
                    yield config, with_lse, with_maps


def _arguments(
    launch: Any, places: Sequence[Sequence[Any]], tensors: list[Any], level: Level, variant: Any
) -> list[Any]:
    """The arguments of a launch, of which as much holds as the level says."""
    last = {place[1]: place[2] for place in places if place[0] == "stride"}
    for at, place in enumerate(places):
        match place:
            case ("stride", name, _) if name in variant.axes:  # kernels with maps read none
                launch.bound.arguments[at] = level.rest if launch.bound.tiles else level.operands
            case ("stride", name, axis):
                launch.bound.arguments[at] = level.rest if name == "lse" or axis == last[name] else level.others
            case ("size", _):
                launch.bound.arguments[at] = level.sizes
            case _:
                pass
    given = launch.prepared(launch.bound, tensors, 0.1, launch.make_map)
    if level.aligned:
        return given
    theirs = {id(t) for t in tensors[: len(variant.tensors)]}  # what a package allocates is aligned
    return [_anywhere(x, theirs) for x in given]


def _anywhere(x: Any, theirs: Set[int]) -> Any:
    if isinstance(x, tuple):
        return tuple(_anywhere(entry, theirs) for entry in cast("tuple[Any, ...]", x))
    return Unaligned(x.dtype) if id(x) in theirs else x


def _entry(name: str, options: Mapping[str, int], made: Any) -> dict[str, Any]:
    """What the index says of a compiled kernel."""
    m = made.metadata
    wants = {
        "memory of Triton's": m.global_scratch_size,
        "a profiler's memory": m.profile_scratch_size,
        "a cluster": m.num_ctas > 1,
        "a cooperative grid": m.launch_cooperative_grid,
    }
    if unmet := [what for what, wanted in wants.items() if wanted]:
        raise Unsupported(f"kernel {name} needs {' and '.join(unmet)}, which a launch from a cubin does not give it")
    code = made.asm["cubin"]
    return {
        "file": f"{name}-{digest(code)[:12]}.cubin",
        "digest": digest(code),
        "symbol": m.name,
        "threads": 32 * m.num_warps,
        "shared_bytes": m.shared,
        "options": dict(options),
        "places": [*_places(made.src, m.tensordesc_meta or ())],
    }


def _places(source: Any, metas: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """What a kernel takes as each argument; the entries of tuples stand in their place."""
    left = iter(metas)
    for at, kind in enumerate(source.signature.values()):
        kinds: Mapping[tuple[int, ...], str] = dict(_entries(at, kind))
        for path, k in kinds.items():
            yield _place(k, source.constants.get(path), source.attrs.get(path, ()), left)


def _entries(at: int, kind: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    if isinstance(kind, str):
        yield (at,), kind
    else:
        yield from (((at, n), inner) for n, inner in enumerate(kind))


def _place(kind: str, constant: Any, attributes: Sequence[Any], metas: Iterator[Mapping[str, Any]]) -> list[Any]:
    multiple = 16 if ["tt.divisibility", 16] in attributes else 1
    if kind == "constexpr":
        return ["constant", constant]
    if kind.startswith("*"):
        return ["pointer", multiple]
    if kind.startswith("tensordesc"):
        return ["map", _map(next(metas))]
    if kind in ("i32", "i64"):
        return [kind, multiple]
    if kind == "fp32":
        return [kind]
    raise Unsupported(f"an argument of type {kind}")


def _map(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The driver's numbers of a tensor map."""
    driver = import_module("triton.backends.nvidia.driver")
    if meta["fp4_padded"]:
        raise Unsupported("a tensor map of 4 bits")
    kind = driver.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    return {"dtype": kind, "item": meta["elem_size"], "swizzle": meta["swizzle"], "box": [*meta["block_size"]]}


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
