"""The kernel for few queries: lanes run over the columns of a head, and the keys are split between tasks.

A task has one key head, the rows that it serves (the queries of a group's heads), and a share of the keys. It leaves
each row's partial state (the maximum m in units of log 2, the sum l, the unnormalised output) in `work`; a second
loop merges the shares. Scores of a tile of keys lie side by side, so that formulas run over lanes of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm import vector
from attncc.codegen.tvm.formulas import Formulas, narrow, widen
from attncc.codegen.tvm.frame import Frame, Operand, Processor, Task
from attncc.codegen.tvm.isa import KEYS, Isa
from attncc.codegen.tvm.normalizers import LEAST, QK
from attncc.codegen.tvm.vector import (
    LN2,
    LOG2E,
    Value,
    cast,
    exp2,
    full,
    let,
    over_lanes,
    quotient,
    real,
    registers,
    run,
    select,
    whole,
    widened,
)
from attncc.ir.attention import Attention
from attncc.ir.expr import TRUE
from attncc.ir.factors import split_multiplier

FUNCTION: Final = "decode"
ROWS: Final = 16
"""Rows of a task at most: what `_cpu.Runner` calls it for."""
OWN_KEYS: Final = 512
"""Keys of a share, where its size may depend on nothing else: `_cpu.Runner` counts by it."""
CHUNK: Final = 4 * KEYS
"""Keys that stay in the cache while all rows read them."""
TOGETHER: Final = 4
"""Keys, or vectors of columns, that are summed at once."""


def decode(attn: Attention, isa: Isa) -> Any:
    """The kernel of a softmax variant; its arguments are those of `Frame` for shared keys."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(FUNCTION)
        T.func_attr({"tirx.noalias": True})
        frame = Frame(attn, isa, Processor(isa), shared=True)
        kernel = Decode(frame)
        with T.parallel(0, let(frame.batch * attn.heads.kv * frame.shares)) as number:
            kernel.share(number)
        with T.parallel(0, let(frame.batch * attn.heads.q * kernel.queries)) as number:
            kernel.merge(number)
    return builder.get()


@dataclass(frozen=True, slots=True)
class Share:
    """A task: a key head and some of its keys, and the buffers of its rows."""

    b: Value
    hk: Value
    number: Value
    q: Any
    """[ROWS, width]: the queries in fp32."""
    p: Any
    """[KEYS]: scores, then weights."""
    seen: Any
    """[KEYS]: 1 for a key that counts."""


class Decode:
    """Emits both loops."""

    def __init__(self, frame: Frame[Isa]) -> None:
        self.frame, self.attn, self.isa = frame, frame.attn, frame.isa
        self.part = self.attn.part
        assert self.part.key_tiles is not None
        self.ranges = self.part.key_tiles.ranges
        self.score, self.multiplier = split_multiplier(self.part.score)
        self.group = self.attn.heads.q // self.attn.heads.kv
        self.queries = let(cast(frame.q.length, "int32"))
        self.keys = let(cast(frame.k.length, "int32"))
        self.widths = {"k": self._whole(self.attn.dims.qk), "v": self._whole(self.attn.dims.v)}

    def _whole(self, width: int) -> int:
        """Columns as whole vectors."""
        return -(-width // self.isa.lanes) * self.isa.lanes

    # -- a share of the keys -------------------------------------------------------------------------

    def share(self, number: Value) -> None:
        shares, heads = self.frame.shares, whole(self.attn.heads.kv)
        b, hk = T.truncdiv(number, heads * shares), T.truncmod(T.truncdiv(number, shares), heads)
        q = T.alloc_buffer((ROWS * self.widths["k"],), "float32", scope="local")
        at = Share(let(b), let(hk), let(number), q, registers(KEYS, "float32"), registers(KEYS, "float32"))
        size = self.size()
        first = let(T.truncmod(number, shares) * size)
        end = let(T.min(first + size, self.keys))
        rows = let(self.queries * self.group)
        self.load_queries(at, rows)
        with T.serial(0, let(T.max(quotient(end - first + (CHUNK - 1), whole(CHUNK)), whole(0)))) as chunk:
            start = let(first + chunk * CHUNK)
            with T.serial(0, rows) as row:
                self.row(at, row, start, let(T.min(start + CHUNK, end)))

    def size(self) -> Value:
        """Keys of a share."""
        if self.attn.is_apart:
            return whole(OWN_KEYS)
        tiles, shares = quotient(self.keys + (KEYS - 1), whole(KEYS)), self.frame.shares
        return let(quotient(tiles + shares - 1, shares) * KEYS)

    def head(self, hk: Value, row: Value) -> Value:
        """The query head of a task's row."""
        member = T.truncdiv(row, self.queries)
        if self.attn.heads.map == "tile":
            return let(member * self.attn.heads.kv + hk)
        return let(hk * self.group + member)

    def load_queries(self, at: Share, rows: Value) -> None:
        """Rows in fp32, times the constant factor of scores, zeros behind them; and empty states."""
        width = self.widths["k"]
        scope = self.formulas(at.b, at.hk, at.hk, whole(0))
        factor = let(scope.value(self.multiplier, 0) * real(LOG2E))
        with T.serial(0, rows) as row:
            start = let(self.frame.q.start(at.b, self.head(at.hk, row), T.truncmod(row, self.queries)))
            with T.serial(0, self.attn.dims.qk) as d:
                q = widen(self.frame.q.flat[start + cast(d, "int64")], self.attn.dtype)
                T.buffer_store(at.q, q * factor if self.score == QK else q, [row * width + d])
            with T.serial(self.attn.dims.qk, width) as d:
                T.buffer_store(at.q, real(0.0), [row * width + d])
            state = self.state(at.number, row)
            T.buffer_store(self.frame.work, real(LEAST), [state])
            with T.serial(1, self.widths["v"] + 2) as d:
                T.buffer_store(self.frame.work, real(0.0), [state + cast(d, "int64")])

    def state(self, task: Value, row: Value) -> Value:
        """Where a row's m, l and output stand in `work`."""
        rows = self.queries * self.group
        return let((cast(task, "int64") * cast(rows, "int64") + cast(row, "int64")) * (self.widths["v"] + 2))

    def formulas(self, b: Value, h: Value, hk: Value, query: Value) -> Formulas:
        """What names mean in a row, whose position is a scalar."""
        zero = whole(0)
        task = Task(b, h, hk, hk, query, self.queries, self.keys, zero, zero, Formulas(self.isa, {}, {}, []))
        return self.frame.formulas_of_row(task)

    def row(self, at: Share, row: Value, start: Value, end: Value) -> None:
        """A row over a chunk of keys, no further than its mask lets it see."""
        f = self.formulas(at.b, self.head(at.hk, row), at.hk, let(T.truncmod(row, self.queries)))
        f.prepare([self.score, self.part.mask])
        factor = let(f.value(self.multiplier, 0) * real(LOG2E))
        bounds = [tuple(let(f.value(e, 0)) for e in (r.lo, r.hi, r.full_lo, r.full_hi)) for r in self.ranges]
        f.seal()
        state = self.state(at.number, row)
        with T.serial(0, let(quotient(end - start + (KEYS - 1), whole(KEYS)))) as tile:
            n0 = let(start + tile * KEYS)
            seen, every = self.verdict(bounds, n0, end)
            with T.If(seen), T.Then(), T.If(every):
                with T.Then():
                    self.tile(at, f, row, state, factor, n0, end, cut=False)
                with T.Else():
                    self.tile(at, f, row, state, factor, n0, end, cut=True)

    def verdict(self, bounds: list[tuple[Value, ...]], n0: Value, end: Value) -> tuple[Value, Value]:
        """Whether the row may see a key of the tile; whether it certainly sees all, and the tile is whole."""
        inside = n0 + KEYS <= end
        if self.part.mask == TRUE:
            return tirx.const(True, "bool"), let(inside)
        seen: Value = tirx.const(False, "bool")
        every: Value = tirx.const(False, "bool")
        for lo, hi, full_lo, full_hi in bounds:
            seen = let(tirx.Or(seen, tirx.And(n0 < hi, n0 + KEYS > lo)))
            every = let(tirx.Or(every, tirx.And(n0 >= full_lo, n0 + KEYS <= full_hi)))
        return seen, let(tirx.And(every, inside))

    def tile(
        self, at: Share, f: Formulas, row: Value, state: Value, factor: Value, n0: Value, end: Value, cut: bool
    ) -> None:
        """KEYS keys join a row's state. `cut`: some of them do not count."""
        self.products(at, row, n0, end, cut)
        top = self.weigh(at, f, state, factor, n0, end, cut)
        self.values(at, state, top, n0, end, cut)

    # -- products ------------------------------------------------------------------------------------

    def reader(self, at: Share, name: str, n0: Value, n: Value, end: Value, cut: bool) -> Callable[[Value], Value]:
        """Vectors of a key's (or value's) row by their first column, in fp32; zeros behind the last column."""
        x, width = (self.frame.k, self.attn.dims.qk) if name == "k" else (self.frame.v, self.attn.dims.v)
        j = T.min(n0 + n, end - 1) if cut else n0 + n
        start = let(x.start(at.b, at.hk, j))

        def read(column: Value) -> Value:
            if isinstance(column, int) and column + self.isa.lanes > width:
                return self.last_vector(x, start, column, width)
            at = start + (whole(column, "int64") if isinstance(column, int) else cast(column, "int64"))
            return widen(let(x.flat[run(at, self.isa)]), self.attn.dtype)

        return read

    def last_vector(self, x: Operand, start: Value, column: int, width: int) -> Value:
        """The vector that the row's end cuts, an element at a time: what lies behind may be nobody's memory."""
        lanes = registers(self.isa.lanes, "float32")
        T.buffer_store(lanes, full(0.0, self.isa), [run(whole(0), self.isa)])
        for lane in range(width - column):
            value = widen(x.flat[start + whole(column + lane, "int64")], self.attn.dtype)
            T.buffer_store(lanes, value, [whole(lane)])
        return lanes[run(whole(0), self.isa)]

    def products(self, at: Share, row: Value, n0: Value, end: Value, cut: bool) -> None:
        """The row times each key, into p."""
        width, lanes = self.widths["k"], self.isa.lanes
        acc = registers(TOGETHER * lanes, "float32")
        sums = [run(whole(u * lanes), self.isa) for u in range(TOGETHER)]
        with T.serial(0, KEYS // TOGETHER) as turn:
            reads = [self.reader(at, "k", n0, turn * TOGETHER + u, end, cut) for u in range(TOGETHER)]
            for u in range(TOGETHER):
                T.buffer_store(acc, full(0.0, self.isa), [sums[u]])

            def add(column: Value) -> None:
                q = let(at.q[run(row * width + column, self.isa)])
                for place, read in zip(sums, reads, strict=True):
                    T.buffer_store(acc, acc[place] + read(column) * q, [place])

            with T.serial(0, self.attn.dims.qk // lanes) as c:
                add(let(c * lanes))
            if self.attn.dims.qk < width:
                add(width - lanes)
            for u in range(TOGETHER):
                T.buffer_store(at.p, self.total(acc[sums[u]]), [turn * TOGETHER + u])

    def total(self, x: Value) -> Value:
        """The sum of a vector's lanes, by halves."""
        count = self.isa.lanes
        while count > 2:
            count //= 2
            x = let(x)
            half = f"float32x{count}"
            x = T.vectorlow(half, x) + T.vectorhigh(half, x)
        x = let(x)
        return T.Shuffle([x], [0]) + T.Shuffle([x], [1])

    def weigh(self, at: Share, f: Formulas, state: Value, factor: Value, n0: Value, end: Value, cut: bool) -> Value:
        """Products in p become weights; the factor by which the row's state shrinks comes back."""
        lanes, work = self.isa.lanes, self.frame.work
        top = registers(lanes, "float32")
        all_lanes = run(whole(0), self.isa)
        T.buffer_store(top, widened(work[state], lanes), [all_lanes])
        with T.serial(0, KEYS // lanes) as c:
            place = run(let(c * lanes), self.isa)
            j = let(T.min(T.ramp(n0 + c * lanes, 1, lanes), widened(end - 1, lanes)))
            f.at_key(j)
            s = at.p[place]
            if self.score != QK:
                s = widened(f.value(self.score, 0, let(s)), lanes) * widened(factor, lanes)
            if cut:
                counts = T.ramp(n0 + c * lanes, 1, lanes) < widened(end, lanes)
                if self.part.mask != TRUE:
                    counts = tirx.And(counts, widened(f.value(self.part.mask, 0), lanes))
                counts = let(counts)
                s = select(counts, s, full(float("-inf"), self.isa))
                T.buffer_store(at.seen, select(counts, full(1.0, self.isa), full(0.0, self.isa)), [place])
            s = let(s)
            T.buffer_store(at.p, s, [place])
            T.buffer_store(top, vector.largest(top[all_lanes], s), [all_lanes])
        greatest = let(over_lanes(vector.largest, top[all_lanes]))
        total = registers(lanes, "float32")
        T.buffer_store(total, full(0.0, self.isa), [all_lanes])
        with T.serial(0, KEYS // lanes) as c:
            place = run(let(c * lanes), self.isa)
            weight = exp2(at.p[place] - widened(greatest, lanes), self.isa, falls=True)
            T.buffer_store(at.p, weight, [place])
            T.buffer_store(total, total[all_lanes] + weight, [all_lanes])
        shrinks = let(self.scalar_exp2(work[state] - greatest))
        T.buffer_store(work, greatest, [state])
        T.buffer_store(work, work[state + 1] * shrinks + self.total(total[all_lanes]), [state + 1])
        return shrinks

    def scalar_exp2(self, x: Value) -> Value:
        """2**x for x not above 0."""
        kept = registers(self.isa.lanes, "float32")
        T.buffer_store(kept, exp2(widened(let(x), self.isa.lanes), self.isa, falls=True), [run(whole(0), self.isa)])
        return kept[0]

    def values(self, at: Share, state: Value, shrinks: Value, n0: Value, end: Value, cut: bool) -> None:
        """The row's output times how much it shrinks, plus the weighted values."""
        lanes, work = self.isa.lanes, self.frame.work
        vectors = self.widths["v"] // lanes
        for first in range(0, vectors, TOGETHER):
            count = min(TOGETHER, vectors - first)
            acc = registers(count * lanes, "float32")
            places = [run(whole(u * lanes), self.isa) for u in range(count)]
            outputs = [run(state + whole(2 + (first + u) * lanes, "int64"), self.isa) for u in range(count)]
            for place, output in zip(places, outputs, strict=True):
                T.buffer_store(acc, work[output] * widened(shrinks, lanes), [place])
            with T.serial(0, KEYS) as n:

                def add(n: Value = n, first: int = first, acc: Any = acc, places: list[Value] = places) -> None:
                    read = self.reader(at, "v", n0, n, end, cut)
                    p = let(widened(at.p[n], lanes))
                    for u, place in enumerate(places):
                        T.buffer_store(acc, acc[place] + read((first + u) * lanes) * p, [place])

                if cut:  # 0 times NaN is NaN
                    with T.If(tirx.NE(at.seen[n], real(0.0))), T.Then():
                        add()
                else:
                    add()
            for place, output in zip(places, outputs, strict=True):
                T.buffer_store(work, acc[place], [output])

    # -- the shares together -------------------------------------------------------------------------

    def merge(self, number: Value) -> None:
        """One row of one head: the softmax over all shares, the sink's taken off."""
        attn, frame, work = self.attn, self.frame, self.frame.work
        heads = whole(attn.heads.q)
        b, h = let(T.truncdiv(number, heads * self.queries)), let(T.truncmod(T.truncdiv(number, self.queries), heads))
        query = let(T.truncmod(number, self.queries))
        tiled = attn.heads.map == "tile"
        hk = let(frame.served_by(h, attn.heads.kv))
        member = T.truncdiv(h, whole(attn.heads.kv)) if tiled else T.truncmod(h, whole(self.group))
        row = let(member * self.queries + query)
        first = let((b * attn.heads.kv + hk) * frame.shares)
        kept = registers(2, "float32")  # the greatest maximum, the sum
        T.buffer_store(kept, real(LEAST), [0])
        T.buffer_store(kept, real(0.0), [1])
        with T.serial(0, frame.shares) as s:
            T.buffer_store(kept, vector.largest(kept[0], work[self.state(first + s, row)]), [0])
        with T.serial(0, frame.shares) as s:
            state = self.state(first + s, row)
            T.buffer_store(work, self.scalar_exp2(work[state] - kept[0]), [state])  # in the maximum's place
            T.buffer_store(kept, kept[1] + work[state + 1] * work[state], [1])
        empty = let(tirx.EQ(kept[1], real(0.0)))
        if attn.wants("lse"):
            lse = let((kept[0] + T.log2(kept[1])) * real(LN2))
            place = cast(b, "int64") * frame.lse_strides[0] + cast(h, "int64") * frame.lse_strides[1]
            place = place + cast(query, "int64") * frame.lse_strides[2]
            T.buffer_store(frame.lse, T.Select(empty, real(float("-inf")), lse), [place])
        divisor = let(T.Select(empty, real(1.0), kept[1] + self.sink_share(b, h, hk, query, kept)))
        start = let(frame.o.start(b, h, query))
        with T.serial(0, attn.dims.v) as d:
            total = registers(1, "float32")
            T.buffer_store(total, real(0.0), [0])
            with T.serial(0, frame.shares) as s:
                state = self.state(first + s, row)
                T.buffer_store(total, total[0] + work[state + cast(d + 2, "int64")] * work[state], [0])
            o = T.Select(empty, real(0.0), total[0] / divisor)
            T.buffer_store(frame.o.flat, narrow(o, attn.dtype), [start + cast(d, "int64")])

    def sink_share(self, b: Value, h: Value, hk: Value, query: Value, kept: Any) -> Value:
        """What the sink adds to a row's sum, relative to its greatest score."""
        sink = self.part.normalizer.sink
        if sink is None:
            return real(0.0)
        s = let(self.formulas(b, h, hk, query).value(sink, 0) * real(LOG2E))
        return T.exp2(s - kept[0])
