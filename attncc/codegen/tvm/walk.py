"""Which key tiles a query tile visits, and in which of them every pair counts, from the solved mask."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.formulas import Formulas
from attncc.codegen.tvm.frame import Task
from attncc.codegen.tvm.vector import Value, let, whole, widened
from attncc.ir.attention import KeyTiles, Part
from attncc.ir.expr import TRUE

Counts = Callable[[Value, int], Value]
"""Whether the rows of a vector see key n of the tile."""


class Walk:
    """Asks the mask about tiles of `keys` keys."""

    def __init__(self, part: Part, task: Task, keys: int) -> None:
        assert part.key_tiles is not None
        self.tiles: KeyTiles = part.key_tiles
        self.mask, self.task, self.keys = part.mask, task, keys

    def bounds(self) -> tuple[Value, Value]:
        """[first, end): the numbers of the tiles that hold every key that some row of the query tile sees."""
        f, keys = self.task.formulas, self.task.keys
        lo: Value = keys
        hi: Value = whole(0)
        for r in self.tiles.ranges:
            lo = let(T.min(lo, T.max(f.value(r.lo, 0), whole(0))))
            hi = let(T.max(hi, T.min(f.value(r.hi, 0), keys)))
        f.prepare([e for r in self.tiles.ranges for e in (r.full_lo, r.full_hi)])
        first = let(T.truncdiv(lo, whole(self.keys)))
        return first, let(T.max(T.truncdiv(hi + (self.keys - 1), whole(self.keys)), first))

    def is_whole(self, n0: Value) -> Value:
        """Whether the tile ends before the keys do."""
        return n0 + self.keys <= self.task.keys

    def counts(self, n0: Value) -> Counts:
        """Whether rows see a key of the tile, which may be behind the last one."""
        f, keys = self.task.formulas, self.task.keys
        f.read_tile([self.mask], n0)

        def pair(n: Value, v: int) -> Value:
            j = n0 + n
            if v == 0:
                f.at_key(let(T.min(j, keys - 1)))
            inside = widened(j < keys, f.isa.lanes)
            return inside if self.mask == TRUE else tirx.And(inside, widened(f.value(self.mask, v), f.isa.lanes))

        return pair

    def verdict(self, n0: Value) -> tuple[Value, Value]:
        """Whether a row may see some key of the tile; whether every row certainly sees all of it, were it whole."""
        if self.mask == TRUE:
            return tirx.const(True, "bool"), tirx.const(True, "bool")
        f = self.task.formulas
        seen: Value = tirx.const(False, "bool")
        every: Value = tirx.const(False, "bool")
        for r in self.tiles.ranges:
            lo, hi, full_lo, full_hi = (f.value(e, 0) for e in (r.lo, r.hi, r.full_lo, r.full_hi))
            seen = tirx.Or(seen, tirx.And(n0 < hi, n0 + self.keys > lo))
            every = tirx.Or(every, tirx.And(n0 >= full_lo, n0 + self.keys <= full_hi))
        if self.tiles.skip is not None:
            ends = {"j0": n0, "j1": let(T.min(n0 + self.keys, self.task.keys) - 1)}
            here = Formulas(f.isa, f.arrays, {**f.task, **ends}, f.rows, f.over_rows)
            seen = tirx.And(let(seen), here.value(self.tiles.skip, 0))
        return let(seen), let(every)

    def stride(self) -> int:
        """How far apart keys are to be asked where only data tells: the mask is constant in between."""
        width = self.tiles.granularity[1]
        return self.keys if width % self.keys == 0 else width if self.keys % width == 0 else 1
