"""Vectors from anywhere in memory, and squares of them, as many as each has lanes, that change places in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.vector import Value, lanes, let

GROUP: Final = 4
"""Lanes of 32 bits in the 128 that shuffles of x86 stay in where they are cheap; no vector has fewer."""


def transposed(rows: Sequence[Value]) -> list[Value]:
    """The columns of a square.

    Inside groups first, as an unpacking of pairs and of pairs of pairs; then groups change places among vectors.
    Integers move as floats: of integers LLVM makes longer chains.
    """
    count, dtype = len(rows), str(rows[0].ty)
    x = [let(T.reinterpret(dtype.replace("int", "float"), row)) for row in rows]
    step = 1
    while step < count:
        low, high = _unpacking(count, step) if step < GROUP else _sorting(count)
        for r in range(count):
            if not r & step:
                a, b = x[r], x[r + step]
                x[r], x[r + step] = let(T.Shuffle([a, b], low)), let(T.Shuffle([a, b], high))
        step *= 2
    # unpacking leaves column 1 of each group of 4 in place 2 and column 2 in place 1
    found = [x[c & ~3 | (c & 1) << 1 | (c & 2) >> 1] for c in range(count)]
    return [T.reinterpret(dtype, column) for column in found]


def _unpacking(count: int, width: int) -> tuple[list[int], list[int]]:
    """Runs of `width` lanes of two vectors in turn: of the first half of each group, and of the second."""

    def half(which: int) -> list[int]:
        found: list[int] = []
        for group in range(0, count, GROUP):
            for run in range(0, GROUP // 2, width):
                for vector in (0, count):
                    at = vector + group + which * GROUP // 2 + run
                    found += range(at, at + width)
        return found

    return half(0), half(1)


def _sorting(count: int) -> tuple[list[int], list[int]]:
    """The even groups of two vectors, and the odd ones."""
    groups = [range(at, at + GROUP) for at in range(0, 2 * count, GROUP)]
    return [n for g in groups[::2] for n in g], [n for g in groups[1::2] for n in g]


def unaligned(flat: Any, at: Value, count: int, dtype: str) -> Value:
    """A vector that begins at any element.

    TVM would read it element by element, and LLVM does not make a vector of that wherever its elements move on.
    """
    none = T.broadcast(tirx.const(0, dtype), count)
    return T.call_llvm_intrin(f"{dtype}x{count}", "llvm.masked.load", T.address_of(flat[at]), _every(count), none)


def store_unaligned(flat: Any, at: Value, x: Value) -> None:
    """A vector to where any element begins."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.masked.store", x, T.address_of(flat[at]), _every(lanes(x))))


def _every(count: int) -> Value:
    return T.broadcast(tirx.const(True, "bool"), count)
