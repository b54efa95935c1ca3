"""The tables by which a package knows its kernels: what stands at each place of a signature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from attncc.codegen.host import host_function
from attncc.codegen.modules import MODULES
from attncc.codegen.source import Writer, filled
from attncc.codegen.triton import handles, strides
from attncc.ir.attention import Attention
from attncc.ir.expr import FLOATS, Dim
from attncc.ir.tile import Engine, Kernel, Param, reads_memory

BLOCK: Final = 64
"""Columns that stand together of operands that are multiplied in parts, the last ones of a row filled up with zeros."""


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
    w.line(f"# parameters of {MODULES[k.dialect]}.{k.name}")
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


def _maps(tensor: str, rows: str, widths: Sequence[int], turned: bool = False) -> list[str]:
    """Two places for the pieces of an operand, whose rows are its last axis where it is turned."""
    axes = [(str(width), rows) if turned else (rows, str(width)) for width in widths]
    maps = [f'("tile", "{tensor}", {", ".join(pair)})' for pair in axes]
    return [*maps, *['("absent",)'] * (2 - len(maps))]


def _block(tensor: str, rows: str) -> str:
    """An operand that is copied by blocks of 64 columns, and of as many rows as divide a tile's."""
    return f'("block", "{tensor}", {rows}, {BLOCK})'


def engine_parameters(w: Writer, attn: Attention, engine: Engine) -> None:
    """A table of the engine's parameters, in the order of its signature."""
    groups = {"hopper": _of_hopper, "latent": _of_latent}[engine.name](attn, engine)
    knobs = [*(k.name for k in engine.knobs), *SHAPES[engine.name], *constants(attn, engine)]
    w.line(f"# parameters of _{engine.name}.forward")
    w.line(f"{engine.name.upper()} = (")
    with w.indented():
        for group in groups:
            w.block(filled(group))
        w.block(filled(['("args"', *_arguments(engine)[:-1], f"{_arguments(engine)[-1]})"]))
        w.block(filled(f'("knob", "{k}")' for k in knobs))
    w.line(")")


SHAPES: Final[Mapping[str, tuple[str, ...]]] = {"hopper": ("BM",), "latent": ("BM", "BN", "SPLIT", "FILL")}
"""Knobs of portable kernels that an engine is told."""
ABSENT: Final = '("absent",)'


def _of_hopper(attn: Attention, engine: Engine) -> Iterator[list[str]]:
    packed, keys = attn.layout == "varlen", '"E_KEYS"'
    q, k, v = engine.tensors
    if engine.parts:
        maps = [_block(q, "64"), ABSENT, _block(k, keys), ABSENT, _block(v, keys), ABSENT]
        maps += [ABSENT if packed else _block(engine.output, "64"), ABSENT]
    else:
        maps = [*_maps(q, "64", engine.qk), *_maps(k, keys, engine.qk), *_maps(v, keys, engine.v, engine.turned)]
        maps += _maps(engine.output, "64", () if packed else engine.v)
    yield [*maps, ABSENT if engine.beside is None else f'("tile", "{engine.beside.name}", 64, {keys})']
    lost = engine.lost or "lse"  # not written where nothing can be hidden
    o = f'"{engine.output}"'
    out = [f'("tensor", {o})', f'("stride", {o}, 1)', f'("stride", {o}, 2)'] if packed else [ABSENT] * 3
    yield [out[0], '("tensor", "lse")', f'("tensor", "{lost}")', '("counter",)']
    yield [*out[1:], f'("stride", "lse", {0 if packed else 1})', '("knob", "WRITE_LSE")', '("programs",)']


def _of_latent(attn: Attention, engine: Engine) -> Iterator[list[str]]:
    q, k, _ = engine.tensors
    m, l, o = (text.lower() for text in engine.states)
    rest = engine.qk[0] - engine.v[0]
    yield [f'("tile", "{k}", 64, "L_WIDTH")', f'("tile", "{k}", 64, {rest})' if rest else ABSENT]
    yield [f'("tensor", "{text}")' for text in (q, engine.output, "lse", m, l, o)]
    ends = [(text, axis) for text in (q, engine.output) for axis in range(3)]
    places = [*ends, ("lse", 0), ("lse", 1), (m, 0), (o, 1), (o, 2)]
    yield [f'("stride", "{text}", {axis})' for text, axis in places]
    yield ['("knob", "WRITE_LSE")', '("knob", "OPAQUE")', '("programs",)']


def _arguments(engine: Engine) -> list[str]:
    """What the variant's own functions take."""
    buffers = [p for p in engine.args if p.role == "buffer"]
    tensors = [e for p in buffers for e in (f'("tensor", "{_argument(p)}")', *_strides(p))]
    return [*tensors, *(_number(p) for p in engine.args if p.role == "scalar")]


def constants(attn: Attention, engine: Engine) -> dict[str, int]:
    """What is fixed of an engine's launch, in the order of its signature."""
    at = {str(e.attr): n for n, e in enumerate(engine.tile)}
    reading = {f.name for f in engine.functions if reads_memory(f)}
    reads_keys = int(bool({"score", "keep"} & reading))
    if engine.name == "latent":
        keys = at["keys" if attn.page_size else "Sk"]
        return {"COLUMNS": attn.dims.v, "FACTOR": at["c"], "KEYS_AT": keys, "READS_KEYS": reads_keys}
    return {
        "MARK_LOST": int(bool(engine.lost)),
        "NUMBERS": len(engine.tile),
        "KNOWN": len(engine.known),
        "FLOATS": sum(e.dtype in FLOATS for e in engine.tile[len(engine.known) :]),
        "FACTOR": at["c"],
        "QUERIES": at["Sq"],
        "KEYS": at["Sk"],
        "KEEP_ROWS": int("rows" in reading or any(f.results for f in engine.functions if f.name == "ramp")),
        "READS_KEYS": reads_keys,
        "OWN_ROOM": int(not engine.parts and (engine.turned or engine.v != engine.qk[: len(engine.v)])),
        "HEADS": attn.heads.q,
        "COLUMNS": attn.dims.v,
        "DEPTH": attn.dims.qk,
        "PARTS": int(engine.parts),
    }


GIVEN: Final[Mapping[str, Mapping[str, int]]] = {"hopper": {}, "latent": {"OPAQUE": 0}}
"""Run-time numbers that are the same in every call."""


def engine_launch(w: Writer, attn: Attention, engine: Engine) -> None:
    """Of as many programs as there are query tiles, or parts of their keys, which its blocks share."""
    w.line("Kernel(")
    with w.indented():
        w.line(f"_{engine.name}.forward,")
        w.entry(host_function(engine.grid))
        w.line(f"{engine.name.upper()},")
        fixed = {**constants(attn, engine), **GIVEN[engine.name]}
        w.line("constants={")
        with w.indented():
            w.block(filled((f'"{name}": {number}' for name, number in fixed.items()), 96))
        w.line("},")
        w.entry(f"when={host_function(engine.is_due)}")
        w.line("launcher=_engine.EngineLaunch,")
    w.line("),")


def _strides(p: Param) -> list[str]:
    return [f'("stride", "{_argument(p)}", {axis})' for axis in range(len(strides(p)))]


def _number(p: Param) -> str:
    return '("scale",)' if p.name == "scale" else f'("size", "{_size(p.name)}")'
