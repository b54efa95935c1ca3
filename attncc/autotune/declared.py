"""The shapes to tune on, and operands as sparse as they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from attncc.check.inputs import compared
from attncc.check.operands import Operands
from attncc.errors import SpecError, Unsupported, nearest
from attncc.ir.attention import Attention

Shape = Mapping[str, int | float]
"""B, Sq and Sk; `sparsity`, the share of its entries that a boolean input hides; `documents`, how many stand one after
another; `weight`, how much the shape counts beside the others."""

SIZES: Final = ("B", "Sq", "Sk")
WORDS: Final = ("sparsity", "documents", "weight")
FAMILY: Final[tuple[Shape, ...]] = (
    {"B": 16, "Sq": 1024, "Sk": 1024},
    {"B": 4, "Sq": 4096, "Sk": 4096},
    {"B": 1, "Sq": 16384, "Sk": 16384},
)
"""Where a spec and the caller name none: as many tokens each, in many short sequences or one long one."""
INTERPRETED: Final[tuple[Shape, ...]] = ({"B": 1, "Sq": 128, "Sk": 128},)
"""Triton's interpreter needs a second for as much."""


def shapes_of(attn: Attention, given: Iterable[Shape] | None, large: bool) -> tuple[Shape, ...]:
    """The caller's shapes, else the spec's, else the family's; within the spec's bounds.

    Raises:
        SpecError: for an unknown key, a size below 1, or one that the spec does not allow.
        Unsupported: for the spec's own size names, which are drawn by what indexes them.
    """
    wanted = [*given] if given is not None else [dict(case) for case in attn.tune]
    wanted = wanted or [dict(_fitted(attn, s)) for s in (FAMILY if large else INTERPRETED)]
    return tuple(dict(_checked(attn, s)) for s in wanted)  # pyright: ignore[reportArgumentType] (text is refused there)


def sizes_of(shape: Shape) -> dict[str, int]:
    """What a shape says of sizes alone."""
    return {name: int(shape[name]) for name in SIZES}


def named(shape: Shape) -> str:
    """`B=2 Sq=4096 Sk=4096`."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _fitted(attn: Attention, shape: Shape) -> Iterable[tuple[str, int]]:
    """A shape of the family as a spec with bounds allows it."""
    for name, n in shape.items():
        size = attn.size(name)
        most = n if size.max is None else min(n, size.max)
        yield name, size.fixed or max(1, int(most) // size.multiple) * size.multiple


def _checked(attn: Attention, shape: Mapping[str, int | float | str]) -> Iterable[tuple[str, int | float]]:
    given = {"B": 1, **shape}
    for here, other in (("Sq", "Sk"), ("Sk", "Sq")):
        if here not in given and other in given:
            given[here] = given[other]
    if missing := [name for name in SIZES if name not in given]:
        raise SpecError(f"the shape {dict(shape)} lacks {missing[0]}", hint="write B=2,Sq=4096,Sk=4096")
    own = {s for x in attn.inputs for s in x.shape if isinstance(s, str)}
    for name, value in given.items():
        if name in own and name not in SIZES:
            raise Unsupported(f"'{name}' in a shape to tune on: it is drawn by what indexes it", key="tune")
        if name not in (*SIZES, *WORDS):
            raise SpecError(f"unknown key '{name}' in a shape to tune on", hint=nearest(name, (*SIZES, *WORDS)))
        if isinstance(value, str | bool):
            raise SpecError(f"'{name}' of a shape must be a number, got {value!r}")
        if name in SIZES:
            _allowed(attn, name, value)
        yield name, value
    if not 0 <= float(given.get("sparsity", 0)) < 1:
        raise SpecError(f"'sparsity' must be in [0, 1), got {given['sparsity']}")
    if int(given.get("documents", 1)) < 1 or float(given.get("weight", 1)) <= 0:
        raise SpecError("'documents' and 'weight' of a shape must be above 0")


def _allowed(attn: Attention, name: str, value: int | float) -> None:
    size = attn.size(name)
    if not isinstance(value, int) or value < 1:
        raise SpecError(f"'{name}' of a shape must be a whole number that is at least 1, got {value}")
    if size.fixed is not None and value != size.fixed:
        raise SpecError(f"'{name}' is fixed to {size.fixed} by the spec, the shape has {value}")
    if (size.max is not None and value > size.max) or value % size.multiple:
        raise SpecError(f"'{name}' = {value} is not allowed: at most {size.max}, a multiple of {size.multiple}")


def as_declared(attn: Attention, x: Operands, shape: Shape, generator: torch.Generator) -> Operands:
    """The operands with inputs as sparse as the shape says; the others stay as they are."""
    inputs = dict(x.inputs)
    for name, old in x.inputs.items():
        if old.dtype == torch.bool and "sparsity" in shape:
            inputs[name] = _uniform(old, generator) >= shape["sparsity"]
        elif "documents" in shape and compared(attn, name):
            numbers = (_uniform(old, generator) * shape["documents"]).to(old.dtype)
            inputs[name] = numbers.sort(-1).values
    return replace(x, inputs=inputs)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)
