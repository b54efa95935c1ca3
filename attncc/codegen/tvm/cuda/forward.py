"""The forward kernel for NVIDIA GPUs: a block a query tile, which walks the key tiles that its rows can see.

While a tile is multiplied the next one is copied; which that is, the mask has said before.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.cuda.block import Block, all_threads, any_thread, barrier, flat, ptx, shuffle
from attncc.codegen.tvm.cuda.fragments import NAMES, Fragments
from attncc.codegen.tvm.cuda.shared import Shared
from attncc.codegen.tvm.cuda.warps import Warps
from attncc.codegen.tvm.formulas import widen
from attncc.codegen.tvm.frame import Frame, Task
from attncc.codegen.tvm.normalizers import lines
from attncc.codegen.tvm.vector import Value, cast, converted, let, real, registers, select, whole
from attncc.codegen.tvm.walk import Walk
from attncc.ir.attention import Attention

IN_CHUNKS: Final = "attention"
"""The kernel for operands that lie on 16 bytes."""
ANY: Final = "attention_any"


def forward(attn: Attention, warps: Warps, name: str) -> Any:
    """A kernel of a variant that left the passes, as a TVM function; its arguments are those of `Frame`."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        device_kernel = {"calling_conv": 2, "global_symbol": name}
        T.func_attr({"tirx.noalias": True, **device_kernel})
        with ExitStack() as open_until_end:
            block = Block(warps, open_until_end)
            frame = Frame(attn, warps, block)
            _, tiles = frame.tasks()
            frame.on_task(block.number, tiles, lambda task: QueryTile(frame, block, task, name == IN_CHUNKS).compute())
    return builder.get()


class Cursor:
    """A key tile: its number, whether every pair in it counts, and the stage it is in."""

    def __init__(self) -> None:
        self.registers: Any = registers(3, "int32")

    @property
    def number(self) -> Value:
        return self.registers[0]

    @property
    def is_full(self) -> Value:
        return tirx.NE(self.registers[1], whole(0))

    @property
    def stage(self) -> Value:
        return self.registers[2]

    def put(self, number: Value | None = None, is_full: Value | None = None, stage: Value | None = None) -> None:
        for at, value in enumerate((number, is_full, stage)):
            if value is not None:
                T.buffer_store(self.registers, cast(value, "int32"), [at])


class QueryTile:
    """Emits a block's work."""

    def __init__(self, frame: Frame[Warps], block: Block, task: Task, in_chunks: bool) -> None:
        self.frame, self.block, self.task, self.in_chunks = frame, block, task, in_chunks
        self.attn, self.warps = frame.attn, frame.isa
        self.shared = Shared(frame, block, task, in_chunks)
        self.fragments = Fragments(self.attn, block, self.shared)
        self.lines = lines(self.attn.part.normalizer, self.attn, task, self.fragments)
        self.walk = Walk(self.attn.part, task, self.warps.keys)

    def compute(self) -> None:
        f = self.task.formulas
        f.prepare([*self.lines.formulas(), self.walk.mask])
        self.shared.load_queries()
        self.fragments.zero(self.fragments.o, self.fragments.columns)
        self.lines.start()
        first, end = self.walk.bounds()
        f.seal()
        here, following = Cursor(), Cursor()
        here.put(stage=whole(0))
        self._find(here, first, end)
        self._copy(here, end)
        with T.While(here.number < end):
            self._find(following, here.number + 1, end)
            following.put(stage=1 - here.stage)
            self.shared.wait()
            barrier()  # this tile is there for all, and all are done with the stage of the next
            self._copy(following, end)
            self._key_tile(here)
            here.put(following.number, following.is_full, following.stage)
        self._store(self.lines.finish())

    def _copy(self, cursor: Cursor, end: Value) -> None:
        with T.If(cursor.number < end), T.Then():
            self.shared.load_keys(let(cursor.number * self.warps.keys), let(cursor.stage))
        self.shared.commit()

    def _find(self, cursor: Cursor, start: Value, end: Value) -> None:
        """The first tile from `start` on of which a row may see a key; else `end`."""
        searches = registers(1, "int32")
        T.buffer_store(searches, whole(1), [0])
        cursor.put(number=start)
        with T.While(tirx.And(tirx.NE(searches[0], whole(0)), cursor.number < end)):
            n0 = let(cursor.number * self.warps.keys)
            seen, every = self.walk.verdict(n0)
            is_seen, is_full = registers(1, "int32"), registers(1, "int32")
            T.buffer_store(is_seen, cast(seen, "int32"), [0])
            T.buffer_store(is_full, cast(every, "int32"), [0])
            if self.walk.tiles.listed:
                with T.If(tirx.And(seen, tirx.Not(every))), T.Then():
                    self._ask(n0, is_seen, is_full)
            with T.If(tirx.NE(is_seen[0], whole(0))):
                with T.Then():
                    whole_tile = cast(self.walk.is_whole(n0), "int32")
                    cursor.put(is_full=is_full[0] & whole_tile)
                    T.buffer_store(searches, whole(0), [0])
                with T.Else():
                    cursor.put(number=cursor.number + 1)

    def _ask(self, n0: Value, is_seen: Any, is_full: Any) -> None:
        """Asks the mask for every pair of a tile: where only data tells, it may hide or show it whole."""
        counts, stride = self.walk.counts(n0), self.walk.stride()
        some, every = registers(1, "int32"), registers(1, "int32")
        T.buffer_store(some, whole(0), [0])
        T.buffer_store(every, whole(1), [0])
        with T.serial(0, self.warps.keys // stride) as n:
            for v in range(self.warps.vectors):
                seen = let(cast(counts(n * stride, v), "int32"))
                T.buffer_store(some, some[0] | seen, [0])
                T.buffer_store(every, every[0] & seen, [0])
        T.buffer_store(is_seen, any_thread(some[0]), [0])
        T.buffer_store(is_full, all_threads(every[0]), [0])

    # -- a key tile ----------------------------------------------------------------------------------

    def _key_tile(self, here: Cursor) -> None:
        n0, stage = let(here.number * self.warps.keys), let(here.stage)
        is_full = let(here.is_full)
        self.fragments.scores(stage)
        self.lines.begin_tile()
        careful = registers(1, "int32")
        T.buffer_store(careful, whole(0), [0])
        with T.If(is_full):
            with T.Then():
                self._shape(n0, cut=False)
            with T.Else():
                self._shape(n0, cut=True)
                T.buffer_store(careful, self.shared.holds_nonfinite(stage), [0])
        self.lines.weigh()
        o = self.fragments.o
        for n in range(self.fragments.columns):
            for v in range(self.warps.vectors):
                at = self.fragments.at(n, v)
                T.buffer_store(o, self.lines.rescaled(o[at], v), [at])
        with T.If(tirx.NE(careful[0], whole(0))):
            with T.Then():
                self._careful_values(n0, stage)
            with T.Else():
                self.fragments.values(stage)

    def _shape(self, n0: Value, cut: bool) -> None:
        """Products become scores."""
        fragments, p = self.fragments, self.fragments.p
        counts = self.walk.counts(n0)
        for n in range(fragments.keys):
            key = let(fragments.place(n))
            if not cut:
                self.task.formulas.at_key(let(n0 + key))
            for v in range(self.warps.vectors):
                at = fragments.at(n, v)
                seen = let(counts(key, v)) if cut else None
                s = self.lines.score(p[at], v)
                s = let(s if seen is None else select(seen, s, real(self.lines.hidden)))
                self.lines.look(s, v)
                T.buffer_store(p, s, [at])

    def _careful_values(self, n0: Value, stage: Value) -> None:
        """o += P V a key at a time: rows that do not see a NaN must not become it, and 0 times it is NaN."""
        fragments, vectors = self.fragments, self.warps.vectors
        tile, dtype = self.shared.v, self.attn.dtype
        weights: Any = registers(fragments.keys * vectors, "float32")  # asked by number: it would cost p its registers
        for n in range(fragments.keys * vectors):
            T.buffer_store(weights, fragments.p[n], [n])
        counts = self.walk.counts(n0)
        with T.serial(0, self.warps.keys) as key:
            owner = let((self.block.lane & whole(28)) | T.truncdiv(key & whole(7), whole(2)))
            own = let(T.truncdiv(key, whole(8)) * 2 + (key & whole(1)))
            seen = [let(counts(key, v)) for v in range(vectors)]
            w = [let(shuffle(weights[own * vectors + v], owner)) for v in range(vectors)]
            row = let(tile.first + stage * tile.size + key * tile.stride)
            for d in range(fragments.columns):
                x = let(widen(self.shared.flat[row + fragments.place(d)], dtype))
                for v in range(vectors):
                    at = fragments.at(d, v)
                    T.buffer_store(fragments.o, fragments.o[at] + select(seen[v], w[v] * x, real(0.0)), [at])

    # -- results -------------------------------------------------------------------------------------

    def _store(self, lse: Any) -> None:
        t, x, fragments = self.task, self.frame.o, self.fragments
        start = let(x.start(t.b, t.h, t.q0))
        for v, row in enumerate(self.block.rows(t.row0)):
            row = let(row)
            with T.If(row < t.queries), T.Then():
                at = let(start + cast(row, "int64") * x.row)
                for n in range(0, fragments.columns, 2):
                    self._store_pair(at, n, v)
                if lse is not None:
                    with T.If(tirx.EQ(self.block.lane & whole(3), whole(0))), T.Then():
                        self._store_lse(row, lse[v])

    def _store_pair(self, start: Value, n: int, v: int) -> None:
        """Two neighbouring columns: by one store where rows lie on 16 bytes."""
        width, o = self.attn.dims.v, self.fragments.o
        column = let(self.fragments.place(n))
        two = [o[self.fragments.at(n + x, v)] for x in (0, 1)]
        if self.in_chunks:
            pair = registers(1, "uint32")
            ptx(self.fragments.pack, pair[0], two[1], two[0])
            pointer = tirx.buffer_data(self.frame.o.flat)
            pairs = flat(pointer, "uint32")
            with T.If(column < width), T.Then():
                T.buffer_store(pairs, pair[0], [T.truncdiv(start + cast(column, "int64"), whole(2, "int64"))])
            return
        for x in (0, 1):
            with T.If(column + x < width), T.Then():
                stored = converted(f"cvt.rn.{NAMES[self.attn.dtype]}.f32", two[x], "uint16")
                T.buffer_store(self.frame.o.flat, stored, [start + cast(column + x, "int64")])

    def _store_lse(self, row: Value, value: Value) -> None:
        t = self.task
        *batch, head, step = self.frame.lse_strides
        at = cast(t.h, "int64") * head + cast(t.q0 + row, "int64") * step
        at = at + cast(t.b, "int64") * batch[0] if batch else at
        T.buffer_store(self.frame.lse, value, [at])
