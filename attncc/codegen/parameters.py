"""The tables by which a package knows its kernels: what stands at each place of a signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attncc.codegen.host import host_function
from attncc.codegen.source import Writer, filled
from attncc.codegen.triton import handles, strides
from attncc.ir.attention import Attention
from attncc.ir.build import quotient
from attncc.ir.expr import Dim, name
from attncc.ir.tile import Engine, Kernel, Param, Program


def mapping(m: Mapping[str, int]) -> str:
    return "{" + ", ".join(f'"{k}": {v}' for k, v in m.items()) + "}"


def parameters_name(attn: Attention, k: Kernel) -> str:
    return k.name.removeprefix(f"{attn.name}_").upper()


def kernel_parameters(w: Writer, k: Kernel, flags: Sequence[str], name: str) -> None:
    """A table of a kernel's parameters, in the order of the printed signature."""
    tensors = [p for p in k.params if p.role in ("operand", "buffer")]
    groups = [
        [e for p in tensors for e in _handle_entries(p)],
        [e for p in tensors for e in _strides(p)],
        [_number(p) for p in k.params if p.role == "scalar"],
        [f'("knob", "{p.name}")' for p in k.params if p.role == "constexpr"] + [f'("flag", "{f}")' for f in flags],
    ]
    w.line(f"# parameters of kernels.{k.name}")
    w.line(f"{name} = (")
    with w.indented():
        for group in groups:
            w.block(filled(group))
    w.line(")")


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


# -- an engine ---------------------------------------------------------------------------------


def engine_parameters(w: Writer, attn: Attention, program: Program, engine: Engine) -> None:
    """A table of the engine's parameters, in the order of its signature."""
    qk, v = attn.dims.qk, attn.dims.v
    lost = program.scratch[-1].name if engine.after else "lse"  # not written where nothing can be hidden
    maps = [f'("tile", "q", 64, {qk})', f'("tile", "k", "E_KEYS", {qk})', f'("tile", "v", "E_KEYS", {v})']
    tensors = [*maps, f'("tile", "o", 64, {v})', '("tensor", "lse")', f'("tensor", "{lost}")', '("counter",)']
    numbers = [*(f'("stride", "lse", {axis})' for axis in range(3)), '("programs",)']
    buffers = [p for p in engine.args if p.role == "buffer"]
    args = [
        *(e for p in buffers for e in (f'("tensor", "{_argument(p)}")', *_strides(p))),
        *(_number(p) for p in engine.args if p.role == "scalar"),
    ]
    knobs = [f'("knob", "{k.name}")' for k in engine.knobs] + ['("knob", "WRITE_LSE")']
    w.line("# parameters of _hopper.forward")
    w.line("HOPPER = (")
    with w.indented():
        w.block(filled(tensors))
        w.block(filled(numbers))
        w.block(filled(['("args"', *args[:-1], f"{args[-1]})"]))
        w.block(filled([*knobs, '("knob", "HEADS")', '("knob", "MARK_LOST")']))
    w.line(")")


def engine_launch(w: Writer, attn: Attention, engine: Engine) -> None:
    """Of as many programs as there are query tiles, which its blocks share."""
    rows = name("E_CONSUMERS") * 64
    tiles = quotient(name("Sq") + (rows - 1), rows) * name("B") * attn.heads.q
    w.line("Kernel(")
    with w.indented():
        w.line("_hopper.forward,")
        w.entry(host_function(tiles))
        w.line("HOPPER,")
        w.line(f"constants={mapping({'HEADS': attn.heads.q, 'MARK_LOST': int(bool(engine.after))})},")
        w.entry(f"when={host_function(name('ENGINE') > 0)}")
        w.line("launcher=_engine.EngineLaunch,")
    w.line("),")


def _strides(p: Param) -> list[str]:
    return [f'("stride", "{_argument(p)}", {axis})' for axis in range(len(strides(p)))]


def _number(p: Param) -> str:
    return '("scale",)' if p.name == "scale" else f'("size", "{_size(p.name)}")'
