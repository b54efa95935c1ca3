"""Q, K and V in a block's shared memory: tiles of rows, each row padded with PAD elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.cuda.block import Block, any_thread, ptx
from attncc.codegen.tvm.cuda.warps import ELEMENT, PAD, STAGES, Warps, padded
from attncc.codegen.tvm.frame import Frame, Operand, Task
from attncc.codegen.tvm.vector import Value, cast, let, registers, whole

CHUNK: Final = 8
"""Elements that one asynchronous copy moves: 16 bytes."""


class Tile:
    """Rows of one operand; `copies` of them, of which one is copied while another is read."""

    def __init__(self, first: int, rows: int, columns: int, copies: int) -> None:
        self.first, self.rows, self.columns, self.copies = first, rows, columns, copies
        self.width = padded(columns)
        self.stride = self.width + PAD

    @property
    def size(self) -> int:
        """Elements of one copy."""
        return self.rows * self.stride


class Shared:
    """The block's dynamic shared memory, and the copies into it."""

    def __init__(self, frame: Frame[Warps], block: Block, task: Task, in_chunks: bool) -> None:
        """`in_chunks`: operands lie on 16 bytes, and so do their rows, each a multiple of that."""
        self.frame, self.block, self.task, self.in_chunks = frame, block, task, in_chunks
        dims, warps = frame.attn.dims, frame.isa
        self.q = Tile(0, warps.rows, dims.qk, 1)
        self.k = Tile(self.q.size, warps.keys, dims.qk, STAGES)
        self.v = Tile(self.k.first + STAGES * self.k.size, warps.keys, dims.v, STAGES)
        count = self.v.first + STAGES * self.v.size
        self.flat: Any = T.alloc_buffer((count,), "uint16", scope="shared.dyn")
        pointer = tirx.buffer_data(self.flat)
        self.pairs: Any = T.decl_buffer((count // 2,), "uint32", data=pointer, scope="shared.dyn")
        """Two elements at a time."""
        base = registers(1, "uint32")
        T.buffer_store(base, T.cuda.cvta_generic_to_shared(T.address_of(self.flat[0])), [0])
        self.base = base[0]

    def address(self, tile: Tile, row: Value, column: Value) -> Value:
        """Of an element of the first copy, as PTX has it."""
        at = cast(row * tile.stride + column, "uint32")
        return self.base + at * whole(ELEMENT, "uint32") + whole(tile.first * ELEMENT, "uint32")

    def load_queries(self) -> None:
        t = self.task
        self._load(self.q, self.frame.q, t.h, t.q0, t.row0, t.queries, whole(0))

    def load_keys(self, n0: Value, stage: Value) -> None:
        """Begins to copy a tile of K and V; what is behind the last key becomes 0."""
        t = self.task
        self._load(self.k, self.frame.k, t.hk, t.k0, n0, t.keys, stage)
        self._load(self.v, self.frame.v, t.hv, t.k0, n0, t.keys, stage)

    def commit(self) -> None:
        if self.in_chunks:
            ptx("cp.async.commit_group")

    def wait(self) -> None:
        """Until this thread's copies are there."""
        if self.in_chunks:
            ptx("cp.async.wait_group", 0)

    def _load(self, tile: Tile, x: Operand, head: Value, first: Value, row0: Value, end: Value, stage: Value) -> None:
        start = let(x.start(self.task.b, head, first))
        shift = let(stage * tile.size)
        move = self._chunk if self.in_chunks else self._element
        step = CHUNK if self.in_chunks else 1
        across = tile.width // step

        def one(number: Value) -> None:
            row, column = let(T.truncdiv(number, whole(across))), let(T.truncmod(number, whole(across)) * step)
            inside = let(tirx.And(row0 + row < end, column < tile.columns))
            source = cast(T.min(row0 + row, end - 1), "int64") * x.row + cast(
                T.min(column, tile.columns - step), "int64"
            )
            move(tile, x, let(start + source), row, column, shift, inside)

        self._each(tile.rows * across, one)

    def _each(self, count: int, one: Callable[[Value], None]) -> None:
        """Numbers from 0 to count, shared out between the threads."""
        threads = self.frame.isa.threads
        with T.serial(0, -(-count // threads)) as turn:
            number = let(turn * threads + self.block.thread)
            if count % threads:
                with T.If(number < count), T.Then():
                    one(number)
            else:
                one(number)

    def _chunk(
        self, tile: Tile, x: Operand, source: Value, row: Value, column: Value, shift: Value, inside: Value
    ) -> None:
        to = self.address(tile, row, column) + cast(shift * ELEMENT, "uint32")
        size = T.Select(inside, whole(CHUNK * ELEMENT, "uint32"), whole(0, "uint32"))  # the rest becomes 0
        ptx("cp.async.cg.shared.global", to, T.address_of(x.flat[source]), CHUNK * ELEMENT, size)

    def _element(
        self, tile: Tile, x: Operand, source: Value, row: Value, column: Value, shift: Value, inside: Value
    ) -> None:
        value = T.Select(inside, x.flat[source], whole(0, "uint16"))
        T.buffer_store(self.flat, value, [tile.first + shift + row * tile.stride + column])

    def holds_nonfinite(self, stage: Value) -> Value:
        """1 if V of a stage has a NaN or an infinity, which 0 times is not 0; all threads look together."""
        exponent = 0x7F80 if self.frame.attn.dtype == "bf16" else 0x7C00
        low, high = whole(exponent, "uint32"), whole(exponent << 16, "uint32")
        tile = self.v
        found = registers(1, "int32")
        T.buffer_store(found, whole(0), [0])
        start = let(T.truncdiv(tile.first + stage * tile.size, whole(2)))

        def one(number: Value) -> None:
            across = tile.width // 2
            row, column = T.truncdiv(number, whole(across)), T.truncmod(number, whole(across))
            two = let(self.pairs[start + row * (tile.stride // 2) + column])
            full = tirx.Or(tirx.EQ(two & low, low), tirx.EQ(two & high, high))
            T.buffer_store(found, found[0] | cast(full, "int32"), [0])

        self._each(tile.rows * tile.width // 2, one)
        return any_thread(found[0])
