"""Legality of what a variant is written with: its formulas, and the names of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Final

from attncc.errors import nearest
from attncc.ir.attention import SIZE_NAMES, Attention
from attncc.ir.expr import FLOATS, Dtype, Expr
from attncc.ir.rewrite import names, walk
from attncc.ir.rules import Tensor, faults, leaves_first, malformed
from attncc.ir.text import text

INPUT_DTYPES: Final[Mapping[str, Dtype]] = {
    "fp32": "f32", "fp16": "f32", "bf16": "f32", "int32": "i32", "int64": "i64", "int8": "i32", "uint8": "i32",
    "bool": "bool",
}  # fmt: skip
"""The dtype that formulas read an input as."""

FLOAT_NAMES: Final = frozenset({"qk", "scale"})

Fault = tuple[str, str]
"""Where, and what is wrong there."""


def size_names(attn: Attention) -> frozenset[str]:
    own = chain.from_iterable(i.shape for i in attn.inputs)
    return frozenset(SIZE_NAMES) | {size for size in own if isinstance(size, str)} | {s.name for s in attn.sizes}


def formula_faults(
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
        if node.op == "qdot" and node.attr in inputs and attn.input(str(node.attr)).shape[-1:] not in _widths(attn):
            yield place, f"'{node.attr}' has no rows of {attn.dims.qk} for a query"
    for name in sorted(_read(e) - allowed):
        yield place, f"'{name}' is not known here; {nearest(name, allowed)}"
    if e.dtype not in dtypes:
        yield place, f"expected {' or '.join(dtypes)}, got {e.dtype}"


def _widths(attn: Attention) -> tuple[tuple[int | str], ...]:
    return ("Dqk",), (attn.dims.qk,)


def _read(e: Expr) -> frozenset[str]:
    """The names a formula reads, but for the rows that `rows_min` and `rows_max` run over."""
    if e.op in ("rows_min", "rows_max"):
        return names(e) - {"i", "row"}
    if e.op == "name":
        return frozenset({str(e.attr)})
    if e.op == "qdot":  # reads the query, which is where qk is
        return frozenset(chain.from_iterable(map(_read, e.args))) | {"qk"}
    return frozenset(chain.from_iterable(map(_read, e.args)))


def input_faults(
    attn: Attention, where: str, name: str, dtypes: tuple[Dtype, ...] = FLOATS, rank: int | None = None
) -> Iterator[Fault]:
    """That an input exists, is read as one of `dtypes`, and has `rank` axes."""
    for i in attn.inputs:
        if i.name == name:
            if INPUT_DTYPES.get(i.dtype) not in dtypes or len(i.shape) != (len(i.shape) if rank is None else rank):
                kind = "a float input" if dtypes == FLOATS else "an integer input"
                axes = "" if rank is None else f" of {rank} axes"
                yield where, f"needs {kind}{axes}, '{name}' is {i.dtype}{list(i.shape)}"
            return
    yield where, f"input '{name}' is not declared"
