"""What the rules over a built attention have in common: a finding and its place, and what inputs and numbers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attncc.ir.attention import Attention, Part
from attncc.ir.expr import FLOATS, Expr
from attncc.spec.macros import LOAD_DTYPES
from attncc.spec.source import Path_

Finding = tuple[Path_, str, str]
"""Where, what is impossible there, and a hint."""
Rule = Callable[[Attention], Iterator[Finding]]
PartRule = Callable[[Attention, Part], Iterator[Finding]]


def dtype_of(attn: Attention, word: str) -> str:
    return LOAD_DTYPES[attn.input(word).dtype]


def float_input(attn: Attention, path: Path_, word: str, owner: str) -> Iterator[Finding]:
    if dtype_of(attn, word) not in FLOATS:
        yield path, f"'{owner}' needs a float input, '{word}' is {attn.input(word).dtype}", ""


def number(e: Expr | str) -> float:
    """A constant's number; an expression that varies counts as 0, so that no bound refuses it."""
    return float(e.value) if isinstance(e, Expr) and e.value is not None else 0.0


def input_axes(attn: Attention, path: Path_, word: str, owner: str, *axes: str) -> Iterator[Finding]:
    """A float input with as many axes as these, which name them."""
    yield from float_input(attn, path, word, owner)
    if len(attn.input(word).shape) != len(axes):
        yield path, f"'{owner}' reads [{', '.join(axes)}], the shape of '{word}' has other axes", ""
