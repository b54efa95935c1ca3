"""The forward kernel for CPUs: a task a query tile, whose rows are the lanes of vector registers.

Scores and weights are kept transposed, [keys, rows]: then K and V are read in place, an element at a time, as
broadcasts; no sum goes across lanes; and what a row needs is elementwise. Each product fills a register tile of
`isa.keys` keys (or columns) times `isa.vectors` vectors of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.formulas import Formulas
from attncc.codegen.tvm.frame import Frame, Task
from attncc.codegen.tvm.isa import KEYS, Isa
from attncc.codegen.tvm.normalizers import lines
from attncc.codegen.tvm.tiles import Tiles
from attncc.codegen.tvm.vector import Value, cast, let, registers, whole, widened
from attncc.ir.attention import Attention, KeyTiles, Part
from attncc.ir.expr import TRUE

FUNCTION: Final = "attention"


def forward(attn: Attention, isa: Isa) -> Any:
    """The kernel of a variant that left the passes, as a TVM function; its arguments are those of `Frame`."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(FUNCTION)
        T.func_attr({"tirx.noalias": True})
        frame = Frame(attn, isa)
        frame.for_each_task(lambda task: _query_tile(frame, task))
    return builder.get()


def _query_tile(frame: Frame, task: Task) -> None:
    """Walks the keys that the tile's rows may see, and stores its rows."""
    attn, part, f = frame.attn, frame.attn.part, task.formulas
    Tiles.allocate(frame, task)
    normalizer = lines(part.normalizer, attn, frame, task)
    tiles = Tiles(frame, task, normalizer)
    walk = Walk(part, frame.isa, task)
    f.prepare([*normalizer.formulas(), part.mask])
    tiles.load_queries(normalizer.query_factor())
    tiles.zero_output()
    normalizer.start()
    lo, hi = walk.bounds()
    f.seal()
    first = let(T.truncdiv(lo, whole(KEYS)))
    count = T.max(T.truncdiv(hi + (KEYS - 1), whole(KEYS)) - first, whole(0))
    with T.serial(0, let(count)) as number:
        n0 = let((first + number) * KEYS)
        walk.visit(n0, lambda: _key_tile(tiles, n0, None), lambda: _key_tile(tiles, n0, walk.counts(n0)))
    kept = normalizer.finish()
    tiles.store_output()
    if kept is not None:
        tiles.store_lse(kept)


def _key_tile(tiles: Tiles, n0: Value, counts: Callable[[Value, int], Value] | None) -> None:
    """One step over KEYS keys. `counts`: some pairs do not, or the tile's end is behind the last key."""
    if tiles.widens:
        tiles.widen_keys(n0)
    tiles.lines.begin_tile()
    tiles.scores(n0, counts)
    tiles.lines.weigh()
    if counts is None:
        tiles.values(n0, clamped=False)
        return
    with T.If(tiles.holds_nonfinite(n0)):  # 0 times NaN is NaN, and rows that do not see it must not become it
        with T.Then():
            tiles.values(n0, True, counts)
        with T.Else():
            tiles.values(n0, clamped=True)


class Walk:
    """Which key tiles a query tile visits, and in which of them every pair counts, from the solved mask."""

    def __init__(self, part: Part, isa: Isa, task: Task) -> None:
        assert part.key_tiles is not None
        self.tiles: KeyTiles = part.key_tiles
        self.mask, self.isa, self.task = part.mask, isa, task

    def bounds(self) -> tuple[Value, Value]:
        """[lo, hi): every key that some row of the tile sees."""
        f, keys = self.task.formulas, self.task.keys
        lo: Value = keys
        hi: Value = whole(0)
        for r in self.tiles.ranges:
            lo = let(T.min(lo, T.max(f.value(r.lo, 0), whole(0))))
            hi = let(T.max(hi, T.min(f.value(r.hi, 0), keys)))
        f.prepare([e for r in self.tiles.ranges for e in (r.full_lo, r.full_hi)])
        return lo, hi

    def counts(self, n0: Value) -> Callable[[Value, int], Value]:
        """Whether rows see a key of the tile, which may be behind the last one."""
        f, keys, lanes = self.task.formulas, self.task.keys, self.isa.lanes

        def pair(n: Value, v: int) -> Value:
            j = n0 + n
            if v == 0:
                f.at_key(let(T.min(j, keys - 1)))
            inside = widened(j < keys, lanes)
            return inside if self.mask == TRUE else tirx.And(inside, widened(f.value(self.mask, v), lanes))

        return pair

    def visit(self, n0: Value, full: Callable[[], None], cut: Callable[[], None]) -> None:
        """Does `full` or `cut` with a tile, or neither where no row sees any of it."""
        whole_tile = n0 + KEYS <= self.task.keys
        if self.mask == TRUE:
            _either(let(whole_tile), full, cut)
            return
        seen, every = self._verdict(n0)
        with T.If(seen), T.Then():
            _either(let(tirx.And(every, whole_tile)), full, lambda: self._cut(n0, whole_tile, full, cut))

    def _verdict(self, n0: Value) -> tuple[Value, Value]:
        """Whether a row may see some key of the tile; whether every row certainly sees all of it."""
        f = self.task.formulas
        seen: Value = tirx.const(False, "bool")
        every: Value = tirx.const(False, "bool")
        for r in self.tiles.ranges:
            lo, hi, full_lo, full_hi = (f.value(e, 0) for e in (r.lo, r.hi, r.full_lo, r.full_hi))
            seen = tirx.Or(seen, tirx.And(n0 < hi, n0 + KEYS > lo))
            every = tirx.Or(every, tirx.And(n0 >= full_lo, n0 + KEYS <= full_hi))
        if self.tiles.skip is not None:
            ends = {"j0": n0, "j1": let(T.min(n0 + KEYS, self.task.keys) - 1)}
            here = Formulas(self.isa, f.arrays, {**f.task, **ends}, f.rows)
            seen = tirx.And(let(seen), here.value(self.tiles.skip, 0))
        return let(seen), let(every)

    def _cut(self, n0: Value, whole_tile: Value, full: Callable[[], None], cut: Callable[[], None]) -> None:
        """A tile that the mask cuts; where only data tells, it may hide or show it whole."""
        if not self.tiles.listed:
            cut()
            return
        lanes = T.ramp(whole(0), 1, self.isa.lanes)
        some, every = registers(self.isa.lanes, "int32"), registers(self.isa.lanes, "int32")
        T.buffer_store(some, widened(whole(0), self.isa.lanes), [lanes])
        T.buffer_store(every, widened(whole(1), self.isa.lanes), [lanes])
        counts = self.counts(n0)
        with T.serial(0, KEYS // self._step()) as n:
            for v in range(self.isa.vectors):
                seen = let(cast(counts(n * self._step(), v), "int32"))
                T.buffer_store(some, some[lanes] | seen, [lanes])
                T.buffer_store(every, every[lanes] & seen, [lanes])
        with T.serial(1, self.isa.lanes) as lane:
            T.buffer_store(some, some[0] | some[lane], [0])
            T.buffer_store(every, every[0] & every[lane], [0])
        with T.If(tirx.NE(some[0], whole(0))), T.Then():
            _either(let(tirx.And(tirx.NE(every[0], whole(0)), whole_tile)), full, cut)

    def _step(self) -> int:
        """How far apart keys are asked: the mask is constant in between."""
        width = self.tiles.granularity[1]
        return KEYS if width % KEYS == 0 else width if KEYS % width == 0 else 1


def _either(condition: Value, yes: Callable[[], None], no: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            yes()
        with T.Else():
            no()
