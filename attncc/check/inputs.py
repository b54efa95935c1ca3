"""Extra tensors for a call: values that a spec's expressions can mean something with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Attention, Input
from attncc.ir.expr import Expr, const, name
from attncc.ir.intervals import Interval, interval
from attncc.ir.rewrite import buffers, transform, walk

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
OWN_SIZE: Final = 16
"""Of a size that nothing else tells."""
DISTINCT: Final = 3
"""Values of an integer input that is only compared with itself, such as a document number."""


def draw_inputs(attn: Attention, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """A tensor for each input, on the generator's device.

    Integers that index another input stay inside of it; sorted ones are offsets into the keys; names of a
    spec's own are given the size that the indices reach.
    """
    known = dict(sizes)
    for size in attn.sizes:
        if size.fixed is not None:
            known.setdefault(size.name, size.fixed)
    for declared in attn.inputs:
        for axis, entry in enumerate(declared.shape):
            if isinstance(entry, str) and entry not in known:
                known[entry] = own_size(attn, declared, axis, known)
    shapes = {x.name: tuple(e if isinstance(e, int) else known[e] for e in x.shape) for x in attn.inputs}
    return {x.name: _draw(attn, x, shapes, known, generator) for x in attn.inputs}


def expressions(attn: Attention) -> Iterator[Expr]:
    """All expressions that read inputs."""
    yield attn.scale
    for part in attn.parts:
        yield part.score
        yield part.mask
        if part.normalizer.sink is not None:
            yield part.normalizer.sink
    for step in (*attn.prologue, *attn.epilogue):
        yield from step.args


def own_size(attn: Attention, declared: Input, axis: int, sizes: Mapping[str, int]) -> int:
    """How long the axis must be for every index into it that can be bounded."""
    entry = str(declared.shape[axis])
    reached = [reach(index, attn, sizes) for n, a, index in _indices(attn) if (n, a) == (declared.name, axis)]
    wanted = max((r for r in reached if r is not None), default=OWN_SIZE)
    size = attn.size(entry)
    rounded = -(-max(1, wanted) // size.multiple) * size.multiple
    return rounded if size.max is None else min(rounded, size.max)


def reach(index: Expr, attn: Attention, sizes: Mapping[str, int]) -> int | None:
    """One more than the largest value of an index expression, None if it is not known."""
    high = interval(transform(index, _unread), _positions(attn, sizes))[1]
    return int(high.value) + 1 if high is not None and high.value is not None else None


def _unread(e: Expr) -> Expr | None:
    """What is read from a tensor becomes a name that nothing bounds."""
    return name("?") if e.op in ("load", "bucket") else None


def _positions(attn: Attention, sizes: Mapping[str, int]) -> dict[str, Interval]:
    """The values that names of positions and sizes take in this call."""
    query, key = sizes["Sq"], sizes["Sk"]
    env = {n: _range(value, value) for n, value in sizes.items()}
    counts = {"b": sizes["B"], "h": attn.heads.q, "hk": attn.heads.kv, "row": query, "j": key}
    env |= {n: _range(0, count - 1) for n, count in counts.items()}
    return env | {"i": _range(min(0, key - query), max(query, key) - 1)}


def _range(lo: int, hi: int) -> Interval:
    return const(lo), const(hi)


def _indices(attn: Attention) -> Iterator[tuple[str, int, Expr]]:
    """Every index into an input: the input, the axis, the expression."""
    for e in expressions(attn):
        for node in walk(e):
            if node.op == "load":
                yield from ((str(node.attr), axis, index) for axis, index in enumerate(node.args))


def _draw(
    attn: Attention,
    x: Input,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> Tensor:
    dtype, shape, device = DTYPES[x.dtype], shapes[x.name], generator.device
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator, device=device) * _gain(attn, x.name, shape)).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator, device=device) < 0.7
    most = min(_bound(attn, x.name, shapes, sizes), torch.iinfo(dtype).max)
    values = torch.randint(0, max(1, most), shape, generator=generator, device=device)
    return (values.sort(-1).values if x.sorted else values).to(dtype)


def _gain(attn: Attention, x: str, shape: tuple[int, ...]) -> float:
    """Of matrices that steps multiply by, so that operands keep their size."""
    for step in (*attn.prologue, *attn.epilogue):
        if step.words[:1] == (x,) and step.name == "absorb":
            return shape[-2] ** -0.5
        if step.words[:1] == (x,) and step.name == "causal_conv":
            inner = shape[-2] if dict(step.kwargs).get("groups") == "heads" else 1
            return (inner * shape[-1]) ** -0.5
    return 1.0


def _bound(attn: Attention, x: str, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> int:
    """Exclusive upper end of an integer input: of the axes it indexes, else by what it is used for."""
    axes = [shapes[other][axis] for other, axis, index in _indices(attn) if other != x and x in buffers(index)]
    if axes:
        return min(axes)
    if attn.align.kind == "input" and attn.align.input == x:
        return max(0, sizes["Sk"] - sizes["Sq"]) + 1
    if compared(attn, x):
        return DISTINCT
    return sizes["Sk"] + 1


def compared(attn: Attention, x: str) -> bool:
    """Whether entries of input x are compared with each other, as document numbers are."""
    return any(_compares(node, x) for e in expressions(attn) for node in walk(e))


def _compares(e: Expr, x: str) -> bool:
    """Whether e compares two entries of x with each other."""
    return e.op == "eq" and all(a.op == "load" and a.attr == x for a in e.args)
