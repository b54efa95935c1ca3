"""Legality of both IR levels: all faults of a variant or a program, each in its context, as one `CompilerBug`.

`ir.rules` has the types of expressions; here is what holds beyond one formula: which names and tensors
exist where, and what statements, kernels and launches owe each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Final

from attncc.errors import CompilerBug, nearest
from attncc.ir.attention import POSITION_NAMES, SIZE_NAMES, Attention, Call, KeyTiles, Part
from attncc.ir.expr import FLOATS, INTS, Dtype, Expr
from attncc.ir.rewrite import names, walk
from attncc.ir.rules import Tensor, faults, leaves_first, malformed
from attncc.ir.text import text
from attncc.ir.tile import Program
from attncc.ir.verify_program import program_faults

INPUT_DTYPES: Final[Mapping[str, Dtype]] = {
    "fp32": "f32", "fp16": "f32", "bf16": "f32", "int32": "i32", "int64": "i64", "int8": "i32", "uint8": "i32",
    "bool": "bool",
}  # fmt: skip
"""The dtype that formulas read an input as."""

FLOAT_NAMES: Final = frozenset({"qk", "scale"})
ROW_NAMES: Final = frozenset({"b", "h", "hk", "i", "row"})
TILE_NAMES: Final = frozenset({"b", "h", "hk", "i0", "i1", "row0", "row1"})
MAX_DIM: Final = 1024

Fault = tuple[str, str]
"""Where, and what is wrong there."""


def verify_attention(attn: Attention) -> None:
    """Raises `CompilerBug` with every rule that the variant breaks."""
    _report(f"attention '{attn.name}'", list(_attention(attn)))


def verify_program(program: Program) -> None:
    """Raises `CompilerBug` with every rule that the program breaks."""
    _report(f"program '{program.name}'", list(program_faults(program)))


def _report(subject: str, found: list[Fault]) -> None:
    if found:
        lines = "".join(f"\n  {where}\n    {what}" for where, what in dict.fromkeys(found))
        raise CompilerBug(f"{subject} breaks {len(dict.fromkeys(found))} rules of the IR:{lines}")


def _attention(attn: Attention) -> Iterator[Fault]:
    yield from _sizes(attn)
    yield from _inputs(attn)
    if not attn.parts:
        yield "parts", "there is none"
    for n, part in enumerate(attn.parts):
        yield from _part(attn, part, f"parts[{n}]")
    yield from _formula(attn, "scale", attn.scale, _size_names(attn), FLOATS + INTS)
    for n, e in enumerate(attn.combine.args):
        yield from _formula(attn, f"combine.args[{n}]", e, _size_names(attn) | ROW_NAMES, FLOATS + INTS)


def _sizes(attn: Attention) -> Iterator[Fault]:
    heads, dims = attn.heads, attn.dims
    for field, count in (("q", heads.q), ("kv", heads.kv), ("v", heads.v)):
        if count < 1:
            yield f"heads.{field}", f"expected at least 1, got {count}"
        elif heads.q % count:
            yield f"heads.{field}", f"expected a divisor of the {heads.q} query heads, got {count}"
    for field, dim in (("qk", dims.qk), ("v", dims.v)):
        if not 1 <= dim <= MAX_DIM:
            yield f"dims.{field}", f"expected 1 to {MAX_DIM}, got {dim}"
    for size in attn.sizes:
        if size.multiple < 1 or (size.max or 1) < 1 or (size.fixed or 0) < 0:
            yield f"sizes.{size.name}", f"impossible bounds: {size}"


def _inputs(attn: Attention) -> Iterator[Fault]:
    declared = [i.name for i in attn.inputs]
    reserved = {*SIZE_NAMES, *POSITION_NAMES, *FLOAT_NAMES}
    for n, i in enumerate(attn.inputs):
        where = f"inputs.{i.name}"
        if i.name in declared[:n]:
            yield where, "declared twice"
        if i.name in reserved:
            yield where, "the name is taken by a position or size"
        if i.dtype not in INPUT_DTYPES:
            yield where, f"unknown dtype '{i.dtype}'; {nearest(i.dtype, INPUT_DTYPES)}"
        elif i.sorted and INPUT_DTYPES[i.dtype] not in INTS:
            yield where, f"only integers can be sorted, got {i.dtype}"
        if any(isinstance(entry, int) and entry < 1 for entry in i.shape):
            yield where, f"impossible shape {list(i.shape)}"
    if attn.align.kind == "input":
        yield from _int_input(attn, "align", attn.align.input, 1)


def _int_input(attn: Attention, where: str, name: str, rank: int) -> Iterator[Fault]:
    """That an input exists, holds integers and has `rank` axes."""
    for i in attn.inputs:
        if i.name == name:
            if INPUT_DTYPES.get(i.dtype) not in INTS or len(i.shape) != rank:
                yield where, f"needs an integer input of {rank} axes, '{name}' is {i.dtype}{list(i.shape)}"
            return
    yield where, f"input '{name}' is not declared"


def _part(attn: Attention, part: Part, at: str) -> Iterator[Fault]:
    sizes = _size_names(attn)
    positions = sizes | frozenset(POSITION_NAMES)
    yield from _formula(attn, f"{at}.score", part.score, positions | FLOAT_NAMES, FLOATS)
    yield from _formula(attn, f"{at}.mask", part.mask, positions, ("bool",))
    if part.normalizer.sink is not None:
        yield from _formula(attn, f"{at}.normalizer.sink", part.normalizer.sink, sizes | ROW_NAMES, FLOATS + INTS)
    if part.normalizer.sink is not None and part.normalizer.kind != "softmax":
        yield f"{at}.normalizer", f"{part.normalizer.kind} has no sink"
    if not part.normalizer.eps >= 0:
        yield f"{at}.normalizer", f"expected eps >= 0, got {part.normalizer.eps}"
    if not 0 <= part.dropout < 1:
        yield f"{at}.dropout", f"expected a probability in [0, 1), got {part.dropout}"
    yield from _storage(attn, part, f"{at}.kv")
    if part.key_tiles is not None:
        yield from _key_tiles(attn, part.key_tiles, f"{at}.key_tiles")
    for field, call in _calls(part):
        for n, e in enumerate(call.args):
            yield from _formula(attn, f"{at}.{field}.args[{n}]", e, positions | FLOAT_NAMES, ("bool", *FLOATS, *INTS))


def _storage(attn: Attention, part: Part, at: str) -> Iterator[Fault]:
    kv = part.kv
    if kv.kind == "paged" and (kv.page_size or 0) < 1:
        yield at, f"paged storage needs a page size, got {kv.page_size}"
    if kv.kind == "latent" and attn.dims.v > attn.dims.qk:
        yield at, f"latent values are the first columns of the keys, but Dv {attn.dims.v} > Dqk {attn.dims.qk}"
    if kv.kind == "gathered":
        yield from _int_input(attn, at, kv.index, 4)


def _calls(part: Part) -> Iterator[tuple[str, Call]]:
    if part.select is not None:
        yield from (("select.score", part.select.score), ("select.rule", part.select.rule))
        yield from (("select.force", call) for call in part.select.force)
    if part.state is not None:
        yield from (("state.decay", part.state.decay), ("state.update", part.state.update))


def _key_tiles(attn: Attention, tiles: KeyTiles, at: str) -> Iterator[Fault]:
    allowed = _size_names(attn) | TILE_NAMES
    for n, r in enumerate(tiles.ranges):
        for field in ("lo", "hi", "full_lo", "full_hi"):
            yield from _formula(attn, f"{at}.ranges[{n}].{field}", getattr(r, field), allowed, INTS)
    if tiles.skip is not None:
        yield from _formula(attn, f"{at}.skip", tiles.skip, allowed | {"j0", "j1"}, ("bool",))
    if min(tiles.granularity) < 1:
        yield at, f"impossible granularity {tiles.granularity}"


def _size_names(attn: Attention) -> frozenset[str]:
    own = chain.from_iterable(i.shape for i in attn.inputs)
    return frozenset(SIZE_NAMES) | {size for size in own if isinstance(size, str)} | {s.name for s in attn.sizes}


def _formula(
    attn: Attention, where: str, e: Expr, allowed: frozenset[str], dtypes: tuple[Dtype, ...]
) -> Iterator[Fault]:
    """Faults of one scalar formula: its nodes, the names it reads, and its dtype."""
    place = where if any(map(malformed, walk(e))) else f"{where}: {text(e)}"
    inputs = {i.name: Tensor(INPUT_DTYPES.get(i.dtype, "f32"), len(i.shape)) for i in attn.inputs}
    for node in leaves_first(e):
        what = faults(node, inputs, "scalar")
        if what:
            yield place, what
        if node.op == "name" and (node.dtype != ("f32" if node.attr in FLOAT_NAMES else "i32") or node.shape):
            yield place, f"'{node.attr}' is given as {node.dtype}"
    for name in sorted(_read(e) - allowed):
        yield place, f"'{name}' is not known here; {nearest(name, allowed)}"
    if e.dtype not in dtypes:
        yield place, f"expected {' or '.join(dtypes)}, got {e.dtype}"


def _read(e: Expr) -> frozenset[str]:
    """The names a formula reads, but for the rows that `rows_min` and `rows_max` run over."""
    if e.op in ("rows_min", "rows_max"):
        return names(e) - {"i", "row"}
    if e.op == "name":
        return frozenset({str(e.attr)})
    if e.op == "qdot":  # reads the query, which is where qk is
        return frozenset(chain.from_iterable(map(_read, e.args))) | {"qk"}
    return frozenset(chain.from_iterable(map(_read, e.args)))
