"""A thread of a block, as formulas and tasks see it: pointers for tensors, and a few rows of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.cuda.warps import ATOM, Warps
from attncc.codegen.tvm.formulas import stored
from attncc.codegen.tvm.frame import FLAT, Tensors, View
from attncc.codegen.tvm.vector import Value, cast, kind, let, registers, whole

EVERY_THREAD: Final = 0xFFFFFFFF
MOST_BLOCKS: Final = 2**31 - 1
BITS: Final = {"float16": "uint16"}
"""fp16 is taken as its bits, as bf16 is: CUDA's own type wants headers."""


class Block:
    """The arguments and the rows of one thread.

    A thread holds, of each of its warp's 16-row tiles, the rows that a tensor core's result gives it: `lane // 4`, and
    that plus 8. The four lanes of a quad share rows.
    """

    def __init__(self, warps: Warps, open_until_end: ExitStack) -> None:
        self.warps, self.stack = warps, open_until_end
        self.number: Value = None
        """Of the block, and of the thread in it, once `declare`'s views are made."""
        self.thread: Value = None

    def declare(self, tensors: Tensors) -> Callable[[], dict[str, View]]:
        """Pointer, extents and strides of each tensor."""
        pointers = {name: self._pointer(name, element(dtype)) for name, (_, dtype) in tensors.items()}
        sizes = {n: [self._sizes(f"{n}_{what}", rank) for what in "ns"] for n, (rank, _) in tensors.items()}

        def views() -> dict[str, View]:
            enter = self.stack.enter_context
            self.number = enter(T.launch_thread("blockIdx.x", MOST_BLOCKS))
            self.thread = enter(T.launch_thread("threadIdx.x", self.warps.threads))
            return {n: View(flat(pointers[n], element(dtype)), *sizes[n]) for n, (_, dtype) in tensors.items()}

        return views

    def _pointer(self, name: str, dtype: str) -> Value:
        to = tvm.ir.PointerType(tvm.ir.PrimType(dtype), "global")
        return T.arg(name, tirx.Var(name, to))

    def _sizes(self, stem: str, rank: int) -> tuple[Value, ...]:
        return tuple(T.arg(f"{stem}{axis}", T.int64()) for axis in range(rank))

    @property
    def warp(self) -> Value:
        return T.truncdiv(self.thread, whole(32))

    @property
    def lane(self) -> Value:
        return T.truncmod(self.thread, whole(32))

    def rows(self, row0: Value) -> list[Value]:
        first = let(row0 + self.warp * (ATOM * self.warps.tiles) + T.truncdiv(self.lane, whole(4)))
        return [first + 8 * v for v in range(self.warps.vectors)]

    def over_rows(self, pick: Callable[[Value, Value], Value], x: Value) -> Value:
        """Over the warp by shuffles, over the block through shared memory."""
        best = registers(1, kind(x))
        T.buffer_store(best, x, [0])
        for step in (4, 8, 16):
            T.buffer_store(best, pick(best[0], shuffle_xor(best[0], step)), [0])
        of_warps = T.alloc_buffer((self.warps.warps,), kind(x), scope="shared")
        T.buffer_store(of_warps, best[0], [self.warp])
        barrier()
        for n in range(self.warps.warps):
            T.buffer_store(best, pick(best[0], of_warps[n]), [0])
        barrier()
        return best[0]


def element(dtype: str) -> str:
    """How CUDA kernels take an element that the spec calls `dtype`."""
    return BITS.get(stored(dtype), stored(dtype))


def flat(pointer: Value, dtype: str) -> Any:
    """All that a pointer leads to, element by element."""
    return T.decl_buffer((whole(FLAT, "int64"),), dtype, data=pointer, align=1)


def shuffle_xor(x: Value, step: int) -> Value:
    """What the lane whose number differs by these bits has."""
    return T.cuda._shfl_xor_sync(whole(EVERY_THREAD, "uint32"), x, step, 32)


def shuffle(x: Value, lane: Value) -> Value:
    return T.cuda._shfl_sync(whole(EVERY_THREAD, "uint32"), x, lane, 32)


def any_thread(x: Value) -> Value:
    """1 if x, 1 or 0, is 1 in a thread of the block; a barrier."""
    return let(cast(T.cuda.syncthreads_or(x), "int32"))


def all_threads(x: Value) -> Value:
    """1 if x, 1 or 0, is 1 in every thread of the block; a barrier."""
    return let(cast(T.cuda.syncthreads_and(x), "int32"))


def barrier() -> None:
    T.evaluate(T.cuda.cta_sync())


def ptx(instruction: str, *operands: Value) -> None:
    """One instruction of PTX, its results first."""
    T.evaluate(T.ptx[instruction](*operands))
