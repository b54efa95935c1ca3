"""The two products of a key tile, and what is loaded and stored around them, all by register tiles."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, Final

from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.formulas import KEY_NAMES, ROW_NAMES, narrow, stored, widen
from attncc.codegen.tvm.frame import Frame, Operand, Task
from attncc.codegen.tvm.isa import KEYS, UNROLL, Isa
from attncc.codegen.tvm.normalizers import Lines
from attncc.codegen.tvm.pairs import Pairs, pair_loads
from attncc.codegen.tvm.transposing import store_unaligned, transposed, unaligned
from attncc.codegen.tvm.vector import (
    Value,
    cast,
    full,
    lanes,
    let,
    line,
    over_lanes,
    registers,
    select,
    whole,
    widened,
)
from attncc.ir.expr import Expr
from attncc.ir.rewrite import names

FEW: Final = 12
"""Operations a pair that scores are made by while their products are in registers."""
COSTS: Final = {"const": 0, "name": 0, "load": 20, "bucket": 99, "div": 4, "floordiv": 20, "mod": 20, "pow": 99} | (
    dict.fromkeys(("exp", "exp2", "sigmoid", "tanh"), 20)
    | dict.fromkeys(("log", "log2", "log1p", "sin", "cos", "erf"), 99)
)
"""Instructions of a vector, about; 1 of any other operator."""
INFINITY: Final = 0x7F800000
"""Its bits."""
Counts = Callable[[Value, int], Value]
"""Whether the rows of a vector see key n of the tile."""


class Tiles:
    """Emits the work on one query tile's buffers: q [D, rows], p [KEYS, rows], o [Dv, rows]."""

    def __init__(self, frame: Frame[Isa], task: Task, lines: Lines) -> None:
        self.frame, self.task, self.lines = frame, task, lines
        self.attn, self.isa = frame.attn, frame.isa
        self.widens = self.attn.dtype != "fp32"
        """Keys and values are made fp32 a tile at a time; else they are read where they lie."""
        self.acc: Any = registers(self.isa.keys * self.isa.vectors, f"float32x{self.isa.lanes}")
        f, formulas = task.formulas, [*lines.formulas(), self.attn.part.mask]
        self.pairs = {e: Pairs(self.isa, f, e, line) for e, line in pair_loads(formulas, f.arrays).items()}
        f.tiles.update(self.pairs)
        self.is_light = sum(_cost(e, self.pairs) for e in formulas) <= FEW

    @staticmethod
    def allocate(frame: Frame[Isa], task: Task) -> None:
        dims, rows = frame.attn.dims, frame.isa.rows
        sizes = {"q": dims.qk * rows, "p": KEYS * rows, "o": dims.v * rows}
        if frame.attn.dtype != "fp32":
            sizes |= {"k": KEYS * dims.qk, "v": KEYS * dims.v}
        for name, size in sizes.items():
            task.buffers[name] = T.alloc_buffer((size,), "float32", scope="local")

    # -- rows ----------------------------------------------------------------------------------------

    def load_queries(self, factor: Value | None) -> None:
        """Q transposed, times the factor; rows behind the last query repeat it."""
        t, x, q, rows, width = self.task, self.frame.q, self.task.buffers["q"], self.isa.rows, self.attn.dims.qk
        first, starts = let(x.start(t.b, t.h, t.q0)), registers(rows, "int64")
        with T.serial(0, rows) as m:
            row = let(first + cast(T.min(t.row0 + m, t.queries - 1), "int64") * x.row)
            T.buffer_store(starts, row, [m])
            with T.serial(self._whole(width), width) as d:
                one = widen(x.flat[row + cast(d, "int64")], self.attn.dtype)
                T.buffer_store(q, one if factor is None else one * factor, [d * rows + m])
        for_all = None if factor is None else let(widened(factor, self.isa.lanes))

        def square(v: Value, d0: Value) -> None:
            found: list[Value] = []
            for r in range(self.isa.lanes):
                at = let(starts[v * self.isa.lanes + r] + cast(d0, "int64"))
                some = unaligned(x.flat, at, self.isa.lanes, stored(self.attn.dtype))
                found.append(widen(let(some), self.attn.dtype))
            for c, column in enumerate(transposed(found)):
                T.buffer_store(q, column if for_all is None else column * for_all, [line(d0 + c, v, self.isa)])

        if self._whole(width):
            with T.serial(0, self.isa.vectors) as v, T.serial(0, width // self.isa.lanes) as c:
                square(v, let(c * self.isa.lanes))

    def _whole(self, width: int) -> int:
        """Columns that fill vectors."""
        return width // self.isa.lanes * self.isa.lanes

    def zero_output(self) -> None:
        with T.serial(0, self.attn.dims.v) as d:
            for v in range(self.isa.vectors):
                T.buffer_store(self.task.buffers["o"], full(0.0, self.isa), [line(d, v, self.isa)])

    def store_output(self) -> None:
        t, x, o, lanes, width = self.task, self.frame.o, self.task.buffers["o"], self.isa.lanes, self.attn.dims.v
        first, count = let(x.start(t.b, t.h, t.q0)), let(T.min(t.queries - t.row0, whole(self.isa.rows)))

        def by_element(m0: Value, m1: Value, d0: int, d1: int) -> None:
            with T.serial(m0, m1) as m:
                row = let(first + cast(t.row0 + m, "int64") * x.row)
                with T.serial(d0, d1) as d:
                    one = narrow(o[d * self.isa.rows + m], self.attn.dtype)
                    T.buffer_store(x.flat, one, [row + cast(d, "int64")])

        def square(v: Value, d0: Value) -> None:
            rows = transposed([o[line(d0 + c, v, self.isa)] for c in range(lanes)])
            for r, some in enumerate(rows):
                at = let(first + cast(t.row0 + (v * lanes + r), "int64") * x.row + cast(d0, "int64"))
                store_unaligned(x.flat, at, let(narrow(some, self.attn.dtype)))

        if self._whole(width):
            with T.serial(0, self.isa.vectors) as v, T.If(v * lanes + lanes <= count):
                with T.Then(), T.serial(0, width // lanes) as c:
                    square(v, let(c * lanes))
                with T.Else():
                    by_element(let(v * lanes), let(T.max(count, v * lanes)), 0, self._whole(width))
        if self._whole(width) < width:
            by_element(whole(0), count, self._whole(width), width)

    def store_lse(self, kept: Any) -> None:
        """The rows' log-sum-exp, from a buffer of them."""
        t, strides = self.task, self.frame.lse_strides
        *batch, head, row = strides
        start = cast(t.h, "int64") * head + cast(t.q0 + t.row0, "int64") * row
        start = let(start + cast(t.b, "int64") * batch[0] if batch else start)
        with T.serial(0, T.min(t.queries - t.row0, whole(self.isa.rows))) as m:
            T.buffer_store(self.frame.lse, kept[m], [start + cast(m, "int64") * row])

    # -- a key tile ----------------------------------------------------------------------------------

    def widen_keys(self, n0: Value) -> None:
        """A tile of K and V as fp32, rows behind the last key repeating it."""
        t, dims, lanes = self.task, self.attn.dims, self.isa.lanes
        for name, x, head, width in (("k", self.frame.k, t.hk, dims.qk), ("v", self.frame.v, t.hv, dims.v)):
            start = let(x.start(t.b, head, t.k0))
            with T.serial(0, KEYS) as n:
                row = let(start + cast(T.min(n0 + n, t.keys - 1), "int64") * x.row)
                with T.serial(0, width // lanes) as c:
                    at = T.ramp(row + cast(c * lanes, "int64"), whole(1, "int64"), lanes)
                    some = widen(let(x.flat[at]), self.attn.dtype)
                    T.buffer_store(t.buffers[name], some, [T.ramp(n * width + c * lanes, 1, lanes)])
                with T.serial(width // lanes * lanes, width) as d:
                    one = widen(x.flat[row + cast(d, "int64")], self.attn.dtype)
                    T.buffer_store(t.buffers[name], one, [n * width + d])

    def scores(self, n0: Value, counts: Counts | None) -> None:
        """S = K Q^T through the score's formula, into p. `counts`: some pairs do not, and keys may be missing."""
        isa, t, lines = self.isa, self.task, self.lines
        t.formulas.read_tile(lines.formulas(), n0)
        plain = counts is None and lines.is_plain
        with T.serial(0, KEYS // isa.keys) as tile:
            first = let(tile * isa.keys)
            reads = [self._row("k", n0, let(first + r), counts is not None) for r in range(isa.keys)]
            for n in range(isa.keys * isa.vectors):
                T.buffer_store(self.acc, full(0.0, self.isa), [n])

            def step(d: Value) -> None:
                q = [let(t.buffers["q"][line(d, v, self.isa)]) for v in range(isa.vectors)]
                for r, read in enumerate(reads):
                    self._add(r, let(widened(read(d), isa.lanes)), q)

            _each(self.attn.dims.qk, 1 if counts else UNROLL, step)
            for r in range(isa.keys):
                self._finish(n0, first + r, [self.acc[r * isa.vectors + v] for v in range(isa.vectors)], plain, counts)
            for pairs in self.pairs.values():
                pairs.expect(n0 + KEYS, tile, KEYS // isa.keys)
        if not (plain or self.is_light):
            self._shape(n0, counts)

    def _finish(self, n0: Value, n: Value, products: list[Value], plain: bool, counts: Counts | None) -> None:
        """Stores what became of key n: its scores, or products where scores take long."""
        if self.is_light and not plain:
            self._score(n0, n, products, counts)
            return
        for v, product in enumerate(products):
            if plain:
                self.lines.look(product, v)
            T.buffer_store(self.task.buffers["p"], product, [line(n, v, self.isa)])

    def _score(self, n0: Value, n: Value, products: list[Value], counts: Counts | None) -> None:
        """Stores the scores of key n."""
        t = self.task
        t.formulas.at_key(let(T.min(n0 + n, t.keys - 1)))
        for v, product in enumerate(products):
            s = self.lines.score(product, v)
            s = let(s if counts is None else select(counts(n, v), s, full(self.lines.hidden, self.isa)))
            self.lines.look(s, v)
            T.buffer_store(t.buffers["p"], s, [line(n, v, self.isa)])

    def _shape(self, n0: Value, counts: Counts | None) -> None:
        """Products in p become scores; in a loop of their own, for formulas are long and registers few."""
        p = self.task.buffers["p"]
        with T.serial(0, KEYS) as n:
            self._score(n0, n, [p[line(n, v, self.isa)] for v in range(self.isa.vectors)], counts)

    def values(self, n0: Value, clamped: bool, counts: Counts | None = None) -> None:
        """O = O a + V^T P. `counts`: pairs whose value may be NaN and must not even be multiplied."""
        width, keys = self.attn.dims.v, self.isa.keys
        with T.serial(0, width // keys) as d:
            self._value_columns(n0, let(d * keys), keys, clamped, counts)
        if width % keys:
            self._value_columns(n0, whole(width // keys * keys), width % keys, clamped, counts)

    def _value_columns(self, n0: Value, d0: Value, columns: int, clamped: bool, counts: Counts | None) -> None:
        isa, t = self.isa, self.task
        o, p = t.buffers["o"], t.buffers["p"]
        for c in range(columns):
            for v in range(isa.vectors):
                T.buffer_store(self.acc, self.lines.rescaled(o[line(d0 + c, v, self.isa)], v), [c * isa.vectors + v])

        def step(n: Value) -> None:
            read = self._row("v", n0, n, clamped)
            weights = [let(p[line(n, v, self.isa)]) for v in range(isa.vectors)]
            seen = [let(counts(n, v)) for v in range(isa.vectors)] if counts else []
            for c in range(columns):
                self._add(c, let(widened(read(d0 + c), isa.lanes)), weights, seen)

        _each(KEYS, 1 if clamped else UNROLL, step)
        for c in range(columns):
            for v in range(isa.vectors):
                T.buffer_store(o, self.acc[c * isa.vectors + v], [line(d0 + c, v, self.isa)])

    def _add(self, line: int, x: Value, by: list[Value], seen: list[Value] | None = None) -> None:
        """Accumulators of a line += x times a vector of rows, where they are seen."""
        for v, y in enumerate(by):
            term = select(seen[v], x * y, full(0.0, self.isa)) if seen else x * y
            at = line * self.isa.vectors + v
            T.buffer_store(self.acc, self.acc[at] + term, [at])

    def _row(self, name: str, n0: Value, n: Value, clamped: bool) -> Callable[[Value], Value]:
        """Reads elements of a row of the key tile; `clamped`: it may be behind the last key, which is read instead."""
        t = self.task
        x, head, width = self._operand(name)
        if self.widens:
            at = let(n * width)
            return lambda d: t.buffers[name][at + d]
        j = T.min(n0 + n, t.keys - 1) if clamped else n0 + n
        start = let(x.start(t.b, head, t.k0 + j))
        return lambda d: x.flat[start + cast(d, "int64")]

    def _operand(self, name: str) -> tuple[Operand, Value, int]:
        t, dims = self.task, self.attn.dims
        return (self.frame.k, t.hk, dims.qk) if name == "k" else (self.frame.v, t.hv, dims.v)

    def holds_nonfinite(self, n0: Value) -> Value:
        """Whether V of a tile has a NaN or an infinity: 0 times that is not 0."""
        count, width = self.isa.lanes, self.attn.dims.v
        most = registers(count, "int32")
        every = T.ramp(whole(0), 1, count)
        T.buffer_store(most, widened(whole(0), count), [every])
        with T.serial(0, KEYS) as n:
            read = self._row("v", n0, n, clamped=True)
            with T.serial(0, width // count) as c:
                some = read(T.ramp(c * count, 1, count)) if self.widens else self._vector(n0, n, c * count)
                T.buffer_store(most, T.max(most[every], _magnitude(some)), [every])
            with T.serial(width // count * count, width) as d:
                T.buffer_store(most, T.max(most[0], _magnitude(read(d))), [0])
        return let(over_lanes(T.max, most[every]) >= whole(INFINITY))

    def _vector(self, n0: Value, n: Value, column: Value) -> Value:
        t, x = self.task, self.frame.v
        start = x.start(t.b, t.hv, t.k0 + T.min(n0 + n, t.keys - 1)) + cast(column, "int64")
        return unaligned(x.flat, let(start), self.isa.lanes, "float32")


def _cost(e: Expr, pairs: Container[Expr]) -> int:
    """Instructions for a vector of pairs, about: those of what both its rows and its key move."""
    reads = names(e)
    if not reads & KEY_NAMES:
        return 0
    own = 1 if e in pairs else COSTS.get(e.op, 1) if reads & ROW_NAMES or "qk" in reads else 0
    return own + (0 if e in pairs else sum(_cost(a, pairs) for a in e.args))


def _each(count: int, unroll: int, step: Callable[[Value], None]) -> None:
    """`step` for 0 to count, `unroll` of them a turn of the loop."""
    with T.serial(0, count // unroll) as turn:
        for u in range(unroll):
            step(let(turn * unroll + u))
    for n in range(count // unroll * unroll, count):
        step(whole(n))


def _magnitude(x: Value) -> Value:
    """The bits of |x|, which as integers are in the order of numbers: those of infinities and NaN come last.

    Not by x * 0 or x - x, which TVM takes for 0.
    """
    bits = T.reinterpret(str(x.ty).replace("float", "int"), x)
    return let(bits & widened(whole(0x7FFFFFFF), lanes(x)))
