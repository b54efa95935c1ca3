"""What the command line and Python callers do with a spec: compile it, explain it, check it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from attncc import passes, spec
from attncc.check.run import Outcome, Report, check_package
from attncc.check.stand_in import stand_in
from attncc.codegen.backends import share_out
from attncc.codegen.configs import TargetConfigs, uses_engine
from attncc.codegen.cpu import decodes, is_carried
from attncc.codegen.cuda import Cubin
from attncc.codegen.gate import examine
from attncc.codegen.package import emit
from attncc.codegen.prebuilt import ahead, prebuild
from attncc.device import DEVICES, Device, find, here
from attncc.errors import CompilerBug, SpecError, Unsupported, nearest
from attncc.ir.attention import Attention
from attncc.ir.primitives import primitives
from attncc.ir.text import digest, text
from attncc.ir.tile import Program
from attncc.ir.verify import verify_program
from attncc.passes.lower import short
from attncc.passes.lower.defaults import default_configs
from attncc.passes.lower.select import gaps, select
from attncc.spec import Spec
from attncc.version import VERSION

__all__ = [
    "Outcome",
    "Progress",
    "Report",
    "Stage",
    "System",
    "check",
    "compile",
    "explain",
    "load",
    "schema",
    "systems",
    "targets",
]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""

Files = Mapping[str, str | bytes]
"""Of a package, by path."""
Tuned = Callable[[Attention, Device, str], TargetConfigs | None]
"""What measurements give a variant on a device, if any do: called with it as it leaves the passes, and its digest."""

SPEC_STAGE: Final = "spec"
PROGRAM_STAGE: Final = "lower"
EXAMPLES: Final = Path(__file__).parents[1] / "examples"
LOWERINGS: Final[Mapping[str, Callable[[Attention], bool]]] = {
    "triton: forward": lambda attn: True,
    "triton: decode": lambda attn: not short.gap(attn),
    "tvm: forward": is_carried,
    "tvm: decode": lambda attn: is_carried(attn) and decodes(attn),
}
"""What there is for the variants that a skeleton carries."""
ENGINES: Final = {
    "hopper": "the Hopper engine serves large calls",
    "latent": "the latent engine serves calls of few queries",
    "": "no engine",
}
STAGES: Final = (SPEC_STAGE, *(name for name, _ in passes.PIPELINE), PROGRAM_STAGE)


@dataclass(frozen=True, slots=True)
class Stage:
    """The IR as it stands behind one step of the compiler."""

    name: str
    text: str
    missing: tuple[str, ...] = ()
    """lower: the keys that have no lowering yet; the text then says what is supported."""


@dataclass(frozen=True, slots=True)
class System:
    """What is known of one spec of a directory."""

    file: str
    name: str
    family: str = ""
    source: str = ""
    primitives: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """By key of the spec; what is left out is plain dense attention."""
    lowerings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """The keys that no lowering carries yet."""
    error: str = ""
    """Why it does not load."""


def load(source: Spec | str | os.PathLike[str]) -> Spec:
    """The spec itself, or the one in the file of this name."""
    return source if isinstance(source, Spec) else spec.load(Path(source))


def compile(
    source: Spec | str | os.PathLike[str],
    out: str | os.PathLike[str],
    targets: Sequence[str | Device] | None = None,
    progress: Progress | None = None,
    backend: str | None = None,
    tuned: Tuned | None = None,
    aot: Sequence[str | Device] | None = None,
    cache: Path | None = None,
    portable: bool = True,
) -> Path:
    """Writes the package of a spec into the directory `out`, and returns its path, out/<name>.

    An earlier package there is replaced in one step; anything else of that name is refused. `backend` is what makes
    kernels for GPUs: `triton` where none is named, or `tvm`, whose packages need no Triton. CPUs always have TVM's.
    A device of which `tuned` knows nothing gets the default rule. `aot`: NVIDIA GPUs that are targets too, and whose
    cubins of Triton's kernels are put beside them: where these run, a first call compiles nothing, and needs neither
    Triton nor a compiler. `cache`: a folder of Triton's, which keeps the engines that are compiled to be examined.
    `portable`: whether a package for CPUs has a library for each kind of those that share this one's architecture, or
    the best for this one alone.
    """
    report = progress or _silent
    loaded = load(source)
    devices = resolve(targets, aot)
    prebuilt = tuple(dict.fromkeys(d.arch for d in ahead(aot, backend)))
    shares = share_out(devices, backend)
    goal = Path(out) / loaded.attention.name
    if goal.exists() and not _is_package(goal):
        raise SpecError(f"{goal} exists and is no attncc package", hint="choose another -o, or remove it")
    report("passes", 0, 5)
    with _place(loaded):
        attn, program = lower(loaded.attention)
        report("printing", 1, 5)
        libraries = cpu_libraries(attn, portable) if shares.libraries else {}
        binaries = cubins(attn, shares.cubins) if shares.cubins else {}
        made_by, name = f"attncc {VERSION}", digest(loaded.attention)

        def files_of(configs: Sequence[TargetConfigs]) -> Files:
            return emit(attn, program, loaded.text, configs, made_by, name, libraries, binaries, prebuilt)

        known = [tuned(attn, device, name) if tuned else None for device in shares.kernels]
        report("examining engines", 2, 5)
        files = _allowed(attn, shares.kernels, known, files_of, cache)
        if prebuilt:
            report("compiling ahead", 3, 5)
            files = {**files, **_cubins_ahead(files, loaded.attention.name, shares.kernels, prebuilt)}
    report("writing", 4, 5)
    _replace_tree(goal, files)
    report("done", 5, 5)
    return goal


def _allowed(
    attn: Attention,
    devices: Sequence[Device],
    known: Sequence[TargetConfigs | None],
    files_of: Callable[[Sequence[TargetConfigs]], Files],
    cache: Path | None,
) -> Files:
    """The files with configs whose engine may run: tuned ones, else those of the default rule, else without it."""
    configs = [k or default_config(attn, device) for k, device in zip(known, devices, strict=True)]
    files = files_of(configs)
    faults = _faults(files, attn.name, configs, cache)
    if faults and any(c.is_tuned and uses_engine(c) for c in configs):
        configs = [_untuned(attn, d, c, faults[0]) for d, c in zip(devices, configs, strict=True)]
        files = files_of(configs)
        faults = _faults(files, attn.name, configs, cache)
    if faults:
        engines = zip(devices, configs, strict=True)
        files = files_of([default_config(attn, d, faults[0]) if uses_engine(c) else c for d, c in engines])
    return files


def _untuned(attn: Attention, device: Device, configs: TargetConfigs, fault: str) -> TargetConfigs:
    """The default rule in place of a tuned table with an engine."""
    if not configs.is_tuned or not uses_engine(configs):
        return configs
    default = default_config(attn, device)
    return replace(default, origin=f"{default.origin} What was tuned is left out: {fault}.")


def resolve(targets: Sequence[str | Device] | None, aot: Sequence[str | Device] | None = None) -> tuple[Device, ...]:
    """The devices of these names, and of `aot` those of no architecture among them.

    The GPUs that are here, else the CPU, where none is named.
    """
    if not targets and not aot:
        return here()
    named = tuple(dict.fromkeys(t if isinstance(t, Device) else find(t) for t in targets or ()))
    more = tuple(dict.fromkeys(t if isinstance(t, Device) else find(t) for t in aot or ()))
    return (*named, *(d for d in more if d.arch not in {n.arch for n in named}))


def _cubins_ahead(
    files: Mapping[str, str | bytes], name: str, devices: Sequence[Device], architectures: Sequence[str]
) -> dict[str, bytes]:
    """The files of a package's `aot`."""
    made: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="attncc-") as folder:
        package = Path(folder) / name
        _replace_tree(package, files)
        for arch in architectures:
            made |= prebuild(package, arch, [d.name for d in devices if d.arch == arch])
    return made


def _faults(files: Files, name: str, configs: Sequence[TargetConfigs], cache: Path | None) -> tuple[str, ...]:
    """Why the engine of a package must not run, by its machine code."""
    if not any(map(uses_engine, configs)):
        return ()
    with tempfile.TemporaryDirectory(prefix="attncc-") as folder:
        package = Path(folder) / name
        _replace_tree(package, files)
        return examine(package, cache).reasons


def lower(attn: Attention) -> tuple[Attention, Program]:
    """A variant as the passes leave it, and its tile program; both verified."""
    rewritten = passes.run(attn)
    program = select(rewritten)
    verify_program(program)
    return rewritten, program


def cpu_libraries(attn: Attention, portable: bool = True) -> Mapping[str, bytes]:
    """Machine code for this machine's kind of processor, or for it alone."""
    return _tvm("libraries", "choose a GPU with --target").libraries(attn, portable)


def cubins(attn: Attention, devices: Sequence[Device]) -> Mapping[str, Cubin]:
    """Machine code for NVIDIA GPUs, by architecture."""
    return _tvm("cuda.libraries", "--backend triton").cubins(attn, devices)


def _tvm(module: str, instead: str) -> Any:
    """A module of the TVM back-end: TVM takes seconds to import, so only who needs it does."""
    try:
        return import_module(f"attncc.codegen.tvm.{module}")
    except ModuleNotFoundError as error:
        if error.name not in ("tvm", "tvm_ffi"):
            raise
        hint = f"pip install apache-tvm, or {instead}"
        raise Unsupported("these kernels are built by TVM, which is not installed", hint=hint) from None


def default_config(attn: Attention, device: Device, fault: str = "") -> TargetConfigs:
    """What a device gets while nothing is tuned for it; `fault` is what keeps an engine out, if anything does."""
    rows, why = default_configs(attn, device, with_engine=not fault)
    left_out = f" The engine is left out: {fault}." if fault else ""
    return TargetConfigs(device.name, rows, f"Not tuned here; a default rule for {device.arch}: {why}.{left_out}")


def explain(source: Spec | str | os.PathLike[str], pass_name: str | None = None) -> tuple[Stage, ...]:
    """The IR as loaded, behind each pass, and as tile program with the reason for its skeleton.

    `pass_name` leaves one of the stages only. Of a variant that nothing carries yet the last stage says why.
    """
    if pass_name is not None and pass_name not in STAGES:
        raise SpecError(f"unknown pass '{pass_name}'", hint=nearest(pass_name, STAGES))
    loaded = load(source)
    stages = [Stage(SPEC_STAGE, text(loaded.attention))]
    with _place(loaded):
        rewritten = passes.run(loaded.attention, lambda name, attn: stages.append(Stage(name, text(attn))))
        if pass_name in (None, PROGRAM_STAGE):
            stages.append(_lowered(rewritten))
    return tuple(s for s in stages if pass_name in (None, s.name))


def _lowered(attn: Attention) -> Stage:
    """The tile program with the reason for its skeleton, or what keeps every skeleton from the variant."""
    try:
        program = select(attn)
    except Unsupported as error:
        missing = [(gap.key, f"{gap.message}; supported: {gap.supported}") for gap in gaps(attn)]
        missing = missing or [(error.key, f"{error.message}; {error.hint}")]
        lines = "".join(f"# {line}\n" for _, line in missing)
        return Stage(
            PROGRAM_STAGE,
            f"# no skeleton carries this variant yet\n{lines}",
            tuple(dict.fromkeys(key for key, _ in missing)),
        )
    verify_program(program)
    why = f"# skeleton: {program.skeleton}\n# because: {program.why}\n"
    why += f"# on sm_90: {program.engine_gap or ENGINES[program.engine.name if program.engine else '']}\n"
    return Stage(PROGRAM_STAGE, f"{why}# calls of few queries: {short.told(attn)}\n{text(program)}")


def systems(folder: str | os.PathLike[str] | None = None) -> tuple[System, ...]:
    """Every spec of a directory, by family and name, those that do not load last; the examples where none is named."""
    place = Path(folder) if folder is not None else EXAMPLES if EXAMPLES.is_dir() else Path("examples")
    if not place.is_dir():
        raise SpecError(f"'{place}' is no directory", hint="attncc list DIR, a directory of specs")
    return tuple(sorted(map(_system, place.glob("*.yaml")), key=lambda s: (bool(s.error), s.family, s.name)))


def _system(path: Path) -> System:
    """One spec: what it uses, and which lowerings carry it, found by running the passes."""
    try:
        attn = spec.load(path).attention
        rewritten = passes.run(attn)
        lowered = _lowered(rewritten)
    except SpecError as error:
        return System(path.name, path.stem, error=str(error))
    found = () if lowered.missing else tuple(name for name, holds in LOWERINGS.items() if holds(rewritten))
    return System(path.name, attn.name, attn.family, attn.source, primitives(attn), found, lowered.missing)


def check(
    source: Spec | str | os.PathLike[str],
    shapes: Iterable[Mapping[str, int]] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    target: str | Device | None = None,
    backend: str | None = None,
) -> Report:
    """Compiles a spec for a target that this machine can run, and compares the package with the oracle.

    Without one it is the GPU that is here, else the CPU; `interpreter` runs the Triton kernels on the CPU.
    """
    loaded = load(source)
    device = here()[0] if target is None else resolve([target])[0]
    if device.is_gpu and device.arch not in {d.arch for d in here()}:
        raise SpecError(f"target '{device.name}' cannot be checked: no such GPU is here", hint="cpu, or interpreter")
    attn, notes = stand_in(loaded.attention, device, loaded.captured)
    with tempfile.TemporaryDirectory(prefix="attncc-check-") as folder:
        package = compile(replace(loaded, attention=attn), folder, [device], backend=backend, portable=False)
        report = check_package(attn, package, device, shapes, progress or _silent, seed, loaded.captured)
    return replace(report, notes=(*notes, *report.notes))


def schema() -> dict[str, Any]:
    """The JSON Schema of a spec."""
    return spec.schema()


def targets() -> tuple[Device, ...]:
    """Every device that can be named as a target."""
    return tuple(DEVICES.values())


# -- errors with their place ---------------------------------------------------------------------


@contextmanager
def _place(loaded: Spec) -> Iterator[None]:
    """Adds the spec's line to what is unsupported, and the variant's name to our own faults."""
    try:
        yield
    except Unsupported as error:
        raise error.at(loaded.locate(error.key)) from None
    except CompilerBug as error:
        error.add_note(f"while compiling '{loaded.attention.name}' of {loaded.file}")
        raise


def _silent(what: str, done: int, total: int) -> None:
    """Reports to nobody."""


# -- packages on disk ----------------------------------------------------------------------------


def _is_package(path: Path) -> bool:
    """Whether an earlier `compile` wrote it (or it is empty, so that nothing is lost)."""
    if not path.is_dir():
        return False
    return not any(path.iterdir()) or all(
        (path / name).is_file() for name in ("__init__.py", "_runtime.py", "spec.yaml")
    )


def _replace_tree(goal: Path, files: Files) -> None:
    """Writes files into a new directory beside `goal` and puts it in goal's place."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{goal.name}-", dir=goal.parent) as scratch:
        fresh = Path(scratch) / "new"
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        if goal.exists():
            old = goal.rename(Path(scratch) / "old")
            try:
                fresh.rename(goal)
            except OSError:
                old.rename(goal)
                raise
        else:
            fresh.rename(goal)
