"""The emitted package: kernels, host side, configs and the spec, as a mapping from relative path to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Final

from attncc.codegen import append as append_module
from attncc.codegen.call import (
    axes_text,
    cache_rows,
    dtype_of,
    has_lse,
    indices,
    key_axes,
    opening,
    sentence,
    tuple_text,
    width_of,
    write_attention,
)
from attncc.codegen.configs import TargetConfigs, configs_text, uses_engine
from attncc.codegen.cpu import decodes
from attncc.codegen.cuda import Cubin
from attncc.codegen.engine import print_engine
from attncc.codegen.host import host_function
from attncc.codegen.modules import MODULES, engine_module, kernels_module, prologue_module
from attncc.codegen.parameters import engine_launch, engine_parameters, kernel_parameters, mapping, parameters_name
from attncc.codegen.source import Writer, filled, module_text
from attncc.codegen.tensors import TORCH_DTYPE, axes_of, input_tensor, scratch_entry, size_bounds, strided
from attncc.codegen.triton import lower_name, print_kernels
from attncc.ir.attention import SIZE_NAMES, Attention
from attncc.ir.cache import beside
from attncc.ir.expr import WORD, Expr, const, eq, ew, name
from attncc.ir.tile import Kernel, Launch, Program, Scratch
from attncc.ir.widths import entry_width, exit_width

ENGINE_FILES: Final[Mapping[str, tuple[str, ...]]] = {
    "hopper": (
        "_hopper",
        "_consumer",
        "_steps",
        "_products",
        "_turns",
        "_ribbon",
        "_masks",
        "_weights",
        "_limits",
        "_softmax",
        "_parts",
        "_gluon",
    ),
    "latent": ("_latent", "_latent_consumer", "_latent_steps", "_softmax", "_gluon"),
}
"""An engine's own source."""
INDEX_AXES: Final[Mapping[str, str]] = {
    "cu_seqlens_q": '("B + 1",)', "cu_seqlens_k": '("B + 1",)', "seqused_k": '("B",)',
}  # fmt: skip


def without_engine(program: Program) -> Program:
    """The program of portable kernels alone."""
    if program.engine is None:
        return program
    beside = {x.kernel for x in program.engine.launches} - {x.kernel for x in program.launches}
    return replace(program, engine=None, kernels=tuple(k for k in program.kernels if k.name not in beside))


def with_append(program: Program) -> Program:
    """The program with the kernels of the call that appends, as one module has them."""
    if program.append is None:
        return program
    return replace(program, kernels=(*program.kernels, *program.append.kernels))


def scratch_of(program: Program) -> tuple[Scratch, ...]:
    return program.scratch if program.engine is None else (*program.scratch, *program.engine.scratch)


def emit(
    attn: Attention,
    program: Program,
    spec_text: str,
    targets: Sequence[TargetConfigs],
    made_by: str,
    digest: str,
    libraries: Mapping[str, bytes] = {},
    cubins: Mapping[str, Cubin] = {},
    ahead: Sequence[str] = (),
) -> dict[str, str | bytes]:
    """Every file of the package, by its path inside it; the same input gives the same bytes.

    Args:
        attn: the variant as it left the passes.
        targets: what Triton kernels are for; none where the package is for CPUs alone.
        made_by: name and version of the compiler, for the headers.
        digest: of the variant, for the headers.
        libraries: machine code for CPUs by the name of the instruction set.
        cubins: machine code for NVIDIA GPUs by architecture, in place of Triton kernels.
        ahead: architectures whose cubins of the Triton kernels will stand beside them.
    """
    program = program if any(map(uses_engine, targets)) else without_engine(program)
    texts, flags = print_kernels(with_append(program))
    header = _header(attn, program, made_by, digest)
    engine = program.engine
    fragments = [k for k in program.kernels if k.dialect == "gluon"]
    beside: dict[str, str | bytes] = (
        {}
        if engine is None
        else {
            f"{engine.name}.py": engine_module(attn, engine.name, print_engine(engine), header),
            **_copied(*ENGINE_FILES[engine.name], "_engine", "_persistent"),
        }
    )
    gpu: dict[str, str | bytes] = {
        "kernels.py": kernels_module(attn, texts, header),
        **_copied("_bound", "_cards", "_gpu", "_launch"),
        **(_copied("_driver", "_index", "_persistent", "_prebuilt") if ahead else {}),
        **(_copied("_append") if program.append else {}),
        **({"prologue.py": prologue_module(attn, fragments, header), **_copied("_fragments")} if fragments else {}),
        "configs/__init__.py": '"""Launch configs, one module a device."""\n',
        **{f"configs/{t.target}.py": configs_text(attn, t) for t in targets},
    }
    cpu: dict[str, str | bytes] = _copied("_cpu")
    cpu |= {f"cpu/{isa}.so": code for isa, code in libraries.items()}
    cuda: dict[str, str | bytes] = _copied("_cuda", "_driver")
    cuda |= {f"cuda/{arch}.cubin": built.code for arch, built in cubins.items()}
    return {
        "__init__.py": _init(attn, program, flags, targets, header, bool(libraries), cubins, ahead),
        **_copied("_runtime", "_checks"),
        **(gpu | beside if targets else {}),
        **(cpu if libraries else {}),
        **(cuda if cubins else {}),
        "spec.yaml": spec_text,
    }


def _copied(*names: str) -> dict[str, str | bytes]:
    """Files that are the same in every package."""
    return {f"{name}.py": module_text(name) for name in names}


def _header(attn: Attention, program: Program, made_by: str, digest: str) -> list[str]:
    return [
        f"From spec.yaml by {made_by}; variant {digest}. To change it, edit the spec and run",
        "`attncc compile spec.yaml -o OUT`.",
        "",
        f"Skeleton: {program.skeleton}, for {program.why}.",
    ]


def _init(
    attn: Attention,
    program: Program,
    flags: Mapping[str, Sequence[str]],
    targets: Sequence[TargetConfigs],
    header: Iterable[str],
    has_library: bool,
    cubins: Mapping[str, Cubin],
    ahead: Sequence[str],
) -> str:
    w = Writer()
    w.block(opening(f"{attn.name}: {sentence(attn.doc or 'an attention variant')}", 117))
    w.line()
    w.block(header)
    w.line('"""')
    w.line()
    body = Writer()
    _variant(body, attn, program, targets)
    w.block(["import math", ""] if "math." in body.text() else [])
    w.block(["import torch", ""])
    with_engine = program.engine is not None
    engine = {} if program.engine is None else {f"_{program.engine.name}": True}
    with_triton = {"_engine": with_engine, **engine, "kernels": bool(targets)}
    with_triton["prologue"] = any(k.dialect == "gluon" for k in program.kernels)
    appending = program.append if targets else None
    sides = {
        "_append": appending is not None,
        "_cpu": has_library,
        "_cuda": bool(cubins),
        "_gpu": bool(targets) and not ahead,
        "_launch": bool(targets) and not ahead,
        "_prebuilt": bool(ahead),
        "_runtime": True,
        **({} if ahead else with_triton),
    }
    w.line(f"from . import {', '.join(sorted(name for name, used in sides.items() if used))}")
    w.block([f"from .configs import {', '.join(sorted(t.target for t in targets))}"] if targets else [])
    w.line("from ._checks import Size, Tensor")
    has_scratch = bool(scratch_of(program)) or (appending is not None and bool(appending.scratch))
    kinds = ["Kernel", *(["Scratch"] if has_scratch else [])] if targets else []
    w.line(f"from ._runtime import {', '.join([*kinds, 'Variant'])}")
    w.line()
    if ahead:
        w.line("# these import Triton, which a call that has a cubin does not need")
        w.block([f'{name} = _prebuilt.Later("{name}")' for name, used in with_triton.items() if used])
        w.line()
    for kernel in with_append(program).kernels if targets else ():
        kernel_parameters(w, kernel, flags[kernel.name], parameters_name(attn, kernel))
        w.line()
    if program.engine is not None:
        engine_parameters(w, attn, program.engine)
        w.line()
    w.block(body.text().splitlines())
    w.line()
    if cubins:
        _blocks(w, cubins)
        w.line()
    w.line(f"_RUNNER = {_runner(attn, bool(targets), bool(cubins), has_library, ahead)}")
    w.line(f'_OP = _runtime.register("{attn.name}", _RUNNER)')
    w.block(["", ""])
    write_attention(w, attn)
    if appending is not None:
        append_module.write(w, attn, appending, ahead)
    w.block(["", ""])
    w.line("def choose(device, **sizes):")
    with w.indented():
        w.line('"""The config for a torch device and sizes such as Sq=4096, and the rule that chose it."""')
        w.line("return _RUNNER.choose(torch.device(device), sizes)")
    return w.text()


def _blocks(w: Writer, cubins: Mapping[str, Cubin]) -> None:
    w.line("BLOCKS = {")
    with w.indented():
        for arch, built in sorted(cubins.items()):
            numbers = (
                f"rows={built.rows}, keys={built.keys}, threads={built.threads}, shared_bytes={built.shared_bytes}"
            )
            w.line(f'"{arch}": _cuda.Block({numbers}),')
    w.line("}")


def _runner(attn: Attention, for_triton: bool, for_cuda: bool, for_cpu: bool, ahead: Sequence[str]) -> str:
    group = f", group={attn.heads.q // attn.heads.kv}" if decodes(attn) else ""
    apart = ", apart=True" if group and attn.is_apart else ""
    cpu = f"_cpu.Runner(VARIANT{group}{apart})"
    gpu = "_gpu.Runner(VARIANT, _launch.BY_TRITON)"
    if ahead:
        quoted = (f'"{arch}"' for arch in ahead)
        gpu = f"_prebuilt.Runner(VARIANT, {tuple_text(quoted)})"
    elif for_cuda:
        gpu = f"_cuda.Runner(VARIANT, {attn.heads.q}, BLOCKS)"
    if not for_cpu:
        return gpu
    return f"_runtime.Either({gpu}, {cpu})" if for_triton or for_cuda else cpu


def _variant(
    w: Writer,
    attn: Attention,
    program: Program,
    targets: Sequence[TargetConfigs],
) -> None:
    w.line("VARIANT = Variant(")
    with w.indented():
        w.line(f'name="{attn.name}",')
        w.line("tensors=(")
        with w.indented():
            w.block(_tensors(attn, program))
        w.line("),")
        w.line(f"output={axes_text(attn, 'Hq', 'Sq', exit_width(attn))},")
        lse = '("Hq", "Tq")' if attn.layout == "varlen" else '("B", "Hq", "Sq")'
        w.line(f"lse={_fixed(attn, lse) if has_lse(attn) else None},")
        w.line(f"sizes={{{', '.join(_sizes(attn))}}},")
        w.line(f"scale={host_function(attn.scale)},")
        if targets:
            _gpu_fields(w, attn, program, targets)
    w.line(")")


def _gpu_fields(w: Writer, attn: Attention, program: Program, targets: Sequence[TargetConfigs]) -> None:
    """What Triton kernels need beside the variant."""
    w.line("axes={")
    with w.indented():
        w.block(filled(f'"{operand}": "{axes}"' for operand, axes in _operand_axes(attn, program).items()))
    w.line("},")
    w.line("kernels=(")
    with w.indented():
        before, after = _launches(program)
        for launch in before:
            _launch(w, attn, program.kernel(launch.kernel), launch)
        if program.engine is not None:
            engine_launch(w, attn, program.engine)
        for launch in after:
            _launch(w, attn, program.kernel(launch.kernel), launch)
    w.line("),")
    scratch = scratch_of(program)
    w.line("scratch=(" + ("),") * (not scratch))
    with w.indented():
        for s in scratch:
            w.entry(scratch_entry(s))
    w.block(["),"] * bool(scratch))
    w.line(f"configs={{{', '.join(_quoted(t.target) for t in sorted(targets, key=lambda t: t.target))}}},")
    if program.engine is not None:
        w.line(f'examined="{version("triton")}",')


def _launches(program: Program) -> tuple[list[Launch], list[Launch]]:
    """Of portable kernels, before an engine and after it.

    Those in whose place it stands are for calls which it does not serve, those that serve it for the others.
    """
    engine = program.engine
    if engine is None:
        return [*program.launches], []
    busy = engine.is_due
    idle = eq(name("ENGINE"), const(0)) if engine.serves is None else ew("not", busy)
    before = [_only(x, idle) if x.kernel in engine.replaces else x for x in program.launches]
    return [*before, *(_only(x, busy) for x in engine.before)], [_only(x, busy) for x in engine.after]


def _only(launch: Launch, where: Expr) -> Launch:
    """A launch where this holds, too."""
    return replace(launch, when=where if launch.when is None else where & launch.when)


def _operand_axes(attn: Attention, program: Program) -> dict[str, str]:
    """Where each operand's axes are; scratch operands have them in the kernel's order."""
    made = {s.name for s in scratch_of(program)}
    named = [p.name for k in program.kernels for p in k.params if p.role == "operand"]
    engine = program.engine
    if engine is not None:
        named += [*engine.tensors, engine.output, *([engine.beside.name] if engine.beside else [])]
    read = [x for x in named if x in made]
    given = dict.fromkeys(("q", *cache_rows(attn), "o"), strided(attn.layout))
    if attn.page_size:
        given |= dict.fromkeys(cache_rows(attn), "bshd")
    return given | dict.fromkeys(read, "bhsd")


def _quoted(target: str) -> str:
    return f'"{target}": {target}'


def _fixed(attn: Attention, text: str) -> str:
    return text.replace('"Hq"', str(attn.heads.q))


def _sizes(attn: Attention) -> list[str]:
    """What a call's sizes may be: formulas were proven for these."""
    own = {s: None for x in attn.inputs for s in x.shape if isinstance(s, str) and s not in SIZE_NAMES}
    packed = attn.layout == "varlen"
    sizes = ("B", "Tq" if packed else "Sq", "Tk" if packed and not attn.page_size else "Sk")
    return [f'"{s}": {size_bounds(attn.size(s))}' for s in (*sizes, *own)]


def _tensors(attn: Attention, program: Program) -> list[str]:
    words = {lower_name(p.name) for k in program.kernels for p in k.params if p.dtype == WORD}
    dtype = f"torch.{TORCH_DTYPE[attn.dtype]}"
    out = [
        f'Tensor("q", {axes_text(attn, "Hq", "Sq", entry_width(attn, "q"))}, {dtype}, tiled=True),',
        _stored(attn, "k", "Hk", "k" in words),
        *([] if attn.is_latent else [_stored(attn, "v", "Hv", "v" in words)]),
    ]
    for x in beside(attn):
        how = ", tiled=True" * (x.name == "k_rope") + ", contiguous=True" * x.contiguous
        out.append(f'Tensor("{x.name}", {axes_of(x.axes)}, torch.{TORCH_DTYPE[x.dtype]}{how}),')
    axes = INDEX_AXES | {"block_table": f'("B", "Sk / {attn.page_size}")'}
    out += [f'Tensor("{n}", {axes[n]}, torch.int32),' for n in indices(attn)]
    return [*out, *(input_tensor(attn, x) for x in attn.inputs)]


def _stored(attn: Attention, operand: str, heads: str, in_words: bool) -> str:
    """Keys or values as a call has them."""
    axes, dtype = key_axes(attn, heads, width_of(attn, operand)), TORCH_DTYPE[dtype_of(attn, operand)]
    return f'Tensor("{operand}", {axes}, torch.{dtype}, tiled=True{", words=True" * in_words}),'


def _launch(w: Writer, attn: Attention, k: Kernel, launch: Launch) -> None:
    w.line("Kernel(")
    with w.indented():
        w.line(f"{MODULES[k.dialect]}.{k.name},")
        w.entry(host_function(k.grid))
        w.line(f"{parameters_name(attn, k)},")
        if launch.constants:
            w.line(f"constants={mapping(dict(launch.constants))},")
        if launch.options:
            w.line(f"options={mapping(dict(launch.options))},")
        if launch.when is not None:
            w.entry(f"when={host_function(launch.when)}")
    w.line("),")
