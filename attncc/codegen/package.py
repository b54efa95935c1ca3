"""The emitted package: kernels, host side, configs and the spec, as a mapping from relative path to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from attncc.codegen.host import host_expr, host_function
from attncc.codegen.source import Writer, filled, module_text
from attncc.codegen.triton import handles, print_kernels, strides
from attncc.ir.attention import SIZE_NAMES, Attention, Size
from attncc.ir.expr import Dim, Dtype, Expr
from attncc.ir.rewrite import names
from attncc.ir.tile import Kernel, Launch, Param, Program

TORCH_DTYPE: Final[Mapping[str, str]] = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int32": "int32", "int64": "int64", "int8": "int8",
    "uint8": "uint8", "bool": "bool",
}  # fmt: skip
SCRATCH_DTYPE: Final[Mapping[Dtype, str]] = {
    "i32": "int32", "i64": "int64", "i8": "int8", "u8": "uint8", "f16": "float16", "bf16": "bfloat16", "f32": "float32",
    "bool": "bool",
}  # fmt: skip
AXES: Final[Mapping[str, tuple[str, ...]]] = {
    "bhsd": ("B", "H", "S", "D"), "bshd": ("B", "S", "H", "D"), "varlen": ("T", "H", "D"),
}  # fmt: skip
STRIDED: Final[Mapping[str, str]] = {"bhsd": "bhsd", "bshd": "bshd", "varlen": "shd"}


@dataclass(frozen=True, slots=True)
class TargetConfigs:
    """What a package knows of one target: rows of (upper bounds of sizes, config), the last without bounds."""

    target: str
    rows: tuple[tuple[Mapping[str, int], Mapping[str, int]], ...]
    origin: str
    """How the configs were found: a default rule, or a measurement and its certificate."""


def emit(
    attn: Attention, program: Program, spec_text: str, targets: Sequence[TargetConfigs], made_by: str, digest: str
) -> dict[str, str]:
    """Every file of the package, by its path inside it; the same input gives the same bytes.

    Args:
        attn: the variant as it left the passes.
        made_by: name and version of the compiler, for the headers.
        digest: of the variant, for the headers.
    """
    texts, flags = print_kernels(program)
    header = _header(attn, program, made_by, digest)
    return {
        "__init__.py": _init(attn, program, flags, targets, header),
        "kernels.py": _kernels(attn, texts, header),
        "_runtime.py": module_text("_runtime"),
        "_launch.py": module_text("_launch"),
        "_checks.py": module_text("_checks"),
        "configs/__init__.py": '"""Launch configs, one module a device."""\n',
        **{f"configs/{t.target}.py": _configs(attn, t) for t in targets},
        "spec.yaml": spec_text,
    }


def _header(attn: Attention, program: Program, made_by: str, digest: str) -> list[str]:
    return [
        f"From spec.yaml by {made_by}; variant {digest}. To change it, edit the spec and run",
        "`attncc compile spec.yaml -o OUT`.",
        "",
        f"Skeleton: {program.skeleton}, for {program.why}.",
    ]


def _kernels(attn: Attention, texts: Sequence[str], header: Iterable[str]) -> str:
    w = Writer()
    w.line(f'"""Triton kernels of {attn.name}.')
    w.line()
    w.block(header)
    w.line()
    w.block(NOTATION)
    w.line('"""')
    w.line()
    w.block(["import triton", "import triton.language as tl"])
    if any("BF16" in text for text in texts):
        w.block(["", *BF16])
    for text in texts:
        w.block(["", ""])
        w.block(text.splitlines())
    return w.text()


BF16: Final = (
    "# the interpreter multiplies bf16 bit patterns: it is given fp32, and computes in that",
    "BF16 = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)",
)
NOTATION: Final = (
    "B batch, Hq and Hk query and key heads, Sq queries, Sk keys; Q K V O operands [b, h, row, column], given as",
    "tensor descriptors where TMA is set, else as pointers; x_b x_h x_s their strides. BM rows and BN keys make a",
    "tile; i and j are positions in the sequence. The softmax runs in powers of 2: m is the running maximum, l the",
    "running sum.",
)


def _configs(attn: Attention, t: TargetConfigs) -> str:
    w = Writer()
    w.line(f'"""Configs of {attn.name} for {t.target}: plain data.')
    w.line()
    w.line(t.origin)
    w.line('"""')
    w.line()
    w.line("# the first row whose bounds hold: ({size: at most}, config)")
    w.line("TABLE = (")
    with w.indented():
        for bounds, config in t.rows:
            w.line(f"({_mapping(bounds)},")
            w.line(f" {_mapping(config)}),")
    w.line(")")
    return w.text()


def _mapping(m: Mapping[str, int]) -> str:
    return "{" + ", ".join(f'"{k}": {v}' for k, v in m.items()) + "}"


def _init(
    attn: Attention,
    program: Program,
    flags: Mapping[str, Sequence[str]],
    targets: Sequence[TargetConfigs],
    header: Iterable[str],
) -> str:
    w = Writer()
    w.line(f'"""{attn.name}: {_sentence(attn.doc or "an attention variant")}')
    w.line()
    w.block(header)
    w.line('"""')
    w.line()
    body = Writer()
    _variant(body, attn, program, targets)
    w.block(["import math", ""] if "math." in body.text() else [])
    w.block(["import torch", ""])
    w.line("from . import _runtime, kernels")
    w.line(f"from .configs import {', '.join(sorted(t.target for t in targets))}")
    w.line("from ._checks import Size, Tensor")
    w.line(f"from ._runtime import Kernel, Runner, {'Scratch, ' if program.scratch else ''}Variant")
    w.line()
    for kernel in program.kernels:
        _parameters(w, kernel, flags[kernel.name], _parameters_name(attn, kernel))
        w.line()
    w.block(body.text().splitlines())
    w.line()
    w.line("_RUNNER = Runner(VARIANT)")
    w.line(f'_OP = _runtime.register("{attn.name}", _RUNNER)')
    w.block(["", ""])
    _attention(w, attn)
    w.block(["", ""])
    w.line("def choose(device, **sizes):")
    with w.indented():
        w.line('"""The config for a torch device and sizes such as Sq=4096, and the rule that chose it."""')
        w.line("return _RUNNER.choose(torch.device(device), sizes)")
    return w.text()


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
            w.block(_tensors(attn))
        w.line("),")
        w.line(f"axes={_strings(_operand_axes(attn, program))},")
        w.line(f"output={_axes(attn, 'Hq', 'Sq', attn.dims.v)},")
        lse = '("Hq", "Tq")' if attn.layout == "varlen" else '("B", "Hq", "Sq")'
        w.line(f"lse={_fixed(attn, lse) if _has_lse(attn) else None},")
        w.line(f"sizes={{{', '.join(_sizes(attn))}}},")
        w.line(f"scale={host_function(attn.scale)},")
        w.line("kernels=(")
        with w.indented():
            for launch in program.launches:
                _launch(w, attn, program.kernel(launch.kernel), launch)
        w.line("),")
        w.line("scratch=(" + ("),") * (not program.scratch))
        with w.indented():
            for s in program.scratch:
                shape = _tuple(map(host_expr, s.shape))
                w.entry(f'Scratch("{s.name}", lambda n: {shape}, torch.{SCRATCH_DTYPE[s.dtype]})')
        w.block(["),"] * bool(program.scratch))
        w.line(f"configs={{{', '.join(_quoted(t.target) for t in sorted(targets, key=lambda t: t.target))}}},")
    w.line(")")


def _operand_axes(attn: Attention, program: Program) -> dict[str, str]:
    """Where each operand's axes are; scratch operands have them in the kernel's order."""
    scratch = {p.name: "bhsd" for k in program.kernels for p in k.params if p.role == "operand" and p.extent is None}
    return dict.fromkeys("qkvo", STRIDED[attn.layout]) | scratch


def _quoted(target: str) -> str:
    return f'"{target}": {target}'


def _strings(m: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{k}": "{v}"' for k, v in m.items()) + "}"


def _has_lse(attn: Attention) -> bool:
    return attn.wants("lse") and attn.parts[0].normalizer.kind == "softmax"


def _fixed(attn: Attention, text: str) -> str:
    return text.replace('"Hq"', str(attn.heads.q))


def _sizes(attn: Attention) -> list[str]:
    """What a call's sizes may be: formulas were proven for these."""
    own = {s: None for x in attn.inputs for s in x.shape if isinstance(s, str) and s not in SIZE_NAMES}
    sizes = ("B", "Tq", "Tk") if attn.layout == "varlen" else ("B", "Sq", "Sk")
    return [f'"{s}": {_size_bounds(attn.size(s))}' for s in (*sizes, *own)]


def _size_bounds(size: Size) -> str:
    fixed = "" if size.fixed is None else f", fixed={size.fixed}"
    return f"Size({size.most}{fixed}{f', multiple={size.multiple}' if size.multiple > 1 else ''})"


def _tuple(texts: Iterable[str]) -> str:
    entries = list(texts)
    return f"({', '.join(entries)}{',' * (len(entries) == 1)})"


def _sentence(text: str) -> str:
    """A user's words inside a docstring: nothing in them ends it or escapes."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text.replace("\\", "\\\\"))
    shown = shown.replace('"""', r"\"\"\"")
    return shown if shown.endswith((".", "!", "?")) else f"{shown}."


def _axes(attn: Attention, heads: str, length: str, dim: int) -> str:
    count = {"Hq": attn.heads.q, "Hk": attn.heads.kv, "Hv": attn.heads.v}[heads]
    values = {"B": '"B"', "H": str(count), "S": f'"{length}"', "T": f'"T{length[1:]}"', "D": str(dim)}
    return f"({', '.join(values[a] for a in AXES[attn.layout])})"


def _tensors(attn: Attention) -> list[str]:
    dtype = f"torch.{TORCH_DTYPE[attn.dtype]}"
    out = [
        f'Tensor("q", {_axes(attn, "Hq", "Sq", attn.dims.qk)}, {dtype}, tiled=True),',
        f'Tensor("k", {_axes(attn, "Hk", "Sk", attn.dims.qk)}, {dtype}, tiled=True),',
        f'Tensor("v", {_axes(attn, "Hv", "Sk", attn.dims.v)}, {dtype}, tiled=True),',
    ]
    if attn.layout == "varlen":
        out += [f'Tensor("{n}", ("B + 1",), torch.int32),' for n in PACKED]
    known = {"Hq": attn.heads.q, "Hk": attn.heads.kv, "Hv": attn.heads.v, "Dqk": attn.dims.qk, "Dv": attn.dims.v}
    for x in attn.inputs:
        shape = [known.get(s, s) if isinstance(s, str) else s for s in x.shape]
        axes = _tuple(f'"{s}"' if isinstance(s, str) else str(s) for s in shape)
        out.append(f'Tensor("{x.name}", {axes}, torch.{TORCH_DTYPE[x.dtype]}),')
    return out


PACKED: Final = ("cu_seqlens_q", "cu_seqlens_k")


def arguments(attn: Attention) -> list[str]:
    """Names of the tensors of a call, in the order of `Variant.tensors`."""
    return ["q", "k", "v", *(PACKED if attn.layout == "varlen" else ()), *(x.name for x in attn.inputs)]


def _parameters_name(attn: Attention, k: Kernel) -> str:
    return k.name.removeprefix(f"{attn.name}_").upper()


def _parameters(w: Writer, k: Kernel, flags: Sequence[str], name: str) -> None:
    """A table of a kernel's parameters, in the order of the printed signature."""
    tensors = [p for p in k.params if p.role in ("operand", "buffer")]
    groups = [
        [e for p in tensors for e in _handle_entries(p)],
        [f'("stride", "{_argument(p)}", {axis})' for p in tensors for axis in range(len(strides(p)))],
        ['("scale",)' if p.name == "scale" else f'("size", "{_size(p.name)}")' for p in k.params if p.role == "scalar"],
        [f'("knob", "{p.name}")' for p in k.params if p.role == "constexpr"] + [f'("flag", "{f}")' for f in flags],
    ]
    w.line(f"# parameters of kernels.{k.name}")
    w.line(f"{name} = (")
    with w.indented():
        for group in groups:
            w.block(filled(group))
    w.line(")")


def _launch(w: Writer, attn: Attention, k: Kernel, launch: Launch) -> None:
    w.line("Kernel(")
    with w.indented():
        w.line(f"kernels.{k.name},")
        w.entry(host_function(k.grid))
        w.line(f"{_parameters_name(attn, k)},")
        if launch.constants:
            w.line(f"constants={_mapping(dict(launch.constants))},")
        if launch.when is not None:
            w.entry(f"when={host_function(launch.when)}")
    w.line("),")


def _handle_entries(p: Param) -> list[str]:
    if not p.tiles:
        return [f'("tensor", "{_argument(p)}")'] * len(handles(p))
    return [f'("tile", "{_argument(p)}", {_dim(rows)}, {_dim(columns)})' for rows, columns in p.tiles]


def _dim(d: Dim) -> str:
    return str(d) if isinstance(d, int) else f'"{d}"'


def _argument(p: Param) -> str:
    """The call's argument (or scratch) that a kernel's tensor is."""
    return p.name.removesuffix("_ptr") if p.name.endswith("_ptr") else p.name.lower()


def _size(text: str) -> str:
    return text.removeprefix("len_")


def _attention(w: Writer, attn: Attention) -> None:
    extra = arguments(attn)[3:]
    keywords = "".join(f"{n}, " for n in extra)
    returns = ", return_lse=False" if _has_lse(attn) else ""
    w.line(f"def attention(q, k, v, *, {keywords}scale=None{returns}):")
    with w.indented():
        w.line(f'"""{_sentence(attn.doc or attn.name)}')
        w.line()
        w.line("Args:")
        with w.indented():
            w.block(_argument_docs(attn))
        w.line()
        w.line("Returns:")
        with w.indented():
            w.line(f"o: {_shown(attn, 'Hq', 'Sq', attn.dims.v)} {attn.dtype}")
            if _has_lse(attn):
                w.line(_lse_doc(attn))
        w.line()
        w.line("Raises:")
        with w.indented():
            w.line("TypeError, ValueError: an argument's dtype, device, shape or stride is wrong; says which and how.")
        w.line('"""')
        tensors = ", ".join(arguments(attn))
        w.line(f"o, lse = _runtime.call(_RUNNER, _OP, ({tensors}), scale{', return_lse' if _has_lse(attn) else ''})")
        w.line("return (o, lse) if return_lse else o" if _has_lse(attn) else "return o")


def _lse_doc(attn: Attention) -> str:
    shape = f"[{attn.heads.q}, Tq]" if attn.layout == "varlen" else f"[B, {attn.heads.q}, Sq]"
    return f"lse: {shape} fp32, natural log, -inf for a row that sees no key; only with return_lse"


def _shown(attn: Attention, heads: str, length: str, dim: int) -> str:
    return _axes(attn, heads, length, dim).replace('"', "").replace("(", "[").replace(")", "]")


def _argument_docs(attn: Attention) -> list[str]:
    out = [
        f"q: {_shown(attn, 'Hq', 'Sq', attn.dims.qk)} {attn.dtype}",
        f"k: {_shown(attn, 'Hk', 'Sk', attn.dims.qk)} {attn.dtype}",
        f"v: {_shown(attn, 'Hv', 'Sk', attn.dims.v)} {attn.dtype}",
    ]
    if attn.layout == "varlen":
        out += [f"{n}: [B + 1] int32, where each sequence begins; the last entry is the total" for n in PACKED]
    out += [f"{x.name}: [{', '.join(map(str, x.shape))}] {x.dtype}" for x in attn.inputs]
    out.append(f"scale: positive float that qk is multiplied by; default {_scale_doc(attn.scale)}")
    return out


def _scale_doc(scale: Expr) -> str:
    text = host_expr(scale).replace("n.get", "").replace('n["', "").replace('"]', "")
    return text if names(scale) else f"{float(scale.value or 0):g}" if scale.value is not None else text
