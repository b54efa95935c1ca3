"""From scores to weights, a tile of keys at a time: each normalizer's running values are vectors of query rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm import vector
from attncc.codegen.tvm.frame import Task
from attncc.codegen.tvm.isa import Machine
from attncc.codegen.tvm.layout import Layout
from attncc.codegen.tvm.vector import LN2, LOG2E, Value, exp2, full, lanes, let, real, registers, select, whole, widened
from attncc.ir.attention import Attention, Normalizer
from attncc.ir.expr import Expr, name
from attncc.ir.factors import split_multiplier

QK: Final = name("qk", "f32")
LEAST: Final = -1e38
"""Where a running maximum starts: below any score, above what a hidden pair has, and finite."""


class Lines(Protocol):
    """What a skeleton asks of a normalizer."""

    hidden: float
    """The score of a pair that does not count."""
    is_plain: bool
    """Whether products of queries (times their factor) and keys are the scores."""

    def formulas(self) -> list[Expr]:
        """What is computed per row, before the keys are walked where no key moves it."""
        ...

    def query_factor(self) -> Value | None:
        """What the queries are multiplied by when they are loaded, so that no score has to be."""
        ...

    def start(self) -> None: ...

    def begin_tile(self) -> None: ...

    def score(self, qk: Value, v: int) -> Value: ...

    def look(self, s: Value, v: int) -> None:
        """Sees a score before it is stored."""
        ...

    def weigh(self) -> None:
        """Scores in `p` become weights."""
        ...

    def rescaled(self, o: Value, v: int) -> Value: ...

    def finish(self) -> Any:
        """Divides `o`; a buffer of the rows' log-sum-exp, if there is one."""
        ...


class _Rows:
    """What normalizers share: values of rows, and the tile's scores and output."""

    def __init__(self, attn: Attention, task: Task, layout: Layout) -> None:
        self.attn, self.task, self.layout, self.isa = attn, task, layout, layout.isa
        self.part = attn.part

    def vectors(self) -> Any:
        """A value a row."""
        return registers(self.isa.vectors, "float32" if self.isa.lanes == 1 else f"float32x{self.isa.lanes}")

    def each(self, what: Callable[[int], None]) -> None:
        for v in range(self.isa.vectors):
            what(v)

    def each_weight(self, weight: Callable[[Value, int], Value], total: Any) -> None:
        """Scores become weights, which `total` sums."""
        p = self.layout.p

        def one(n: Value) -> None:
            for v in range(self.isa.vectors):
                at = self.layout.at(n, v)
                w = let(weight(p[at], v))
                if total is not None:
                    T.buffer_store(total, total[v] + w, [v])
                T.buffer_store(p, w, [at])

        self.layout.each_key(one)

    def scale_output(self, factor: Callable[[int], Value]) -> None:
        """o times a factor a row; 0 where that is 0, whatever o holds."""
        o = self.layout.o
        factors = [let(factor(v)) for v in range(self.isa.vectors)]

        def one(d: Value) -> None:
            for v, f in enumerate(factors):
                at = self.layout.at(d, v)
                T.buffer_store(o, select(tirx.EQ(f, full(0.0, self.isa)), full(0.0, self.isa), o[at] * f), [at])

        self.layout.each_column(one)


class Softmax(_Rows):
    """The online softmax in powers of 2, with an optional sink."""

    hidden = float("-inf")

    def __init__(self, attn: Attention, task: Task, layout: Layout) -> None:
        super().__init__(attn, task, layout)
        self.inner, self.multiplier = split_multiplier(self.part.score)
        self.is_plain = self.inner == QK and layout.scales_queries
        self.m, self.l, self.a, self.top = (self.vectors() for _ in range(4))

    def formulas(self) -> list[Expr]:
        sink = self.part.normalizer.sink
        return [self.inner, *([] if sink is None else [sink])]

    def _factor(self) -> Value:
        """From scores to units of log 2."""
        return let(self.task.formulas.value(self.multiplier, 0) * real(LOG2E))

    def query_factor(self) -> Value | None:
        return self._factor() if self.is_plain else None

    def start(self) -> None:
        self.factor = None if self.is_plain else self._factor()

        def one(v: int) -> None:
            T.buffer_store(self.m, full(LEAST, self.isa), [v])
            T.buffer_store(self.l, full(0.0, self.isa), [v])

        self.each(one)

    def begin_tile(self) -> None:
        self.each(lambda v: T.buffer_store(self.top, self.m[v], [v]))

    def score(self, qk: Value, v: int) -> Value:
        if self.factor is None:
            return qk
        s = widened(self.task.formulas.value(self.inner, v, let(qk)), self.isa.lanes)
        return s * widened(self.factor, self.isa.lanes)

    def look(self, s: Value, v: int) -> None:
        T.buffer_store(self.top, vector.largest(self.top[v], s), [v])

    def weigh(self) -> None:
        self.layout.across(T.max, self.top)

        def settle(v: int) -> None:
            T.buffer_store(self.a, exp2(self.m[v] - self.top[v], self.isa, falls=True), [v])
            T.buffer_store(self.m, self.top[v], [v])
            T.buffer_store(self.l, self.l[v] * self.a[v], [v])

        self.each(settle)
        self.each_weight(lambda s, v: exp2(s - self.m[v], self.isa, falls=True), self.l)

    def rescaled(self, o: Value, v: int) -> Value:
        return o * self.a[v]

    def finish(self) -> Any:
        self.layout.across(_add, self.l)
        one, zero = full(1.0, self.isa), full(0.0, self.isa)
        kept = self._lse() if self.attn.wants("lse") else None
        sink = self.part.normalizer.sink

        def factor(v: int) -> Value:
            total, share = self.l[v], one
            if sink is not None:
                s = let(widened(self.task.formulas.value(sink, v) * real(LOG2E), self.isa.lanes))
                above = let(vector.largest(self.m[v], s))
                share = exp2(self.m[v] - above, self.isa, falls=True)
                total = let(self.l[v] * share + exp2(s - above, self.isa, falls=True))
            empty = let(tirx.EQ(self.l[v], zero))
            return select(empty, zero, share / select(empty, one, total))

        self.scale_output(factor)
        return kept

    def _lse(self) -> Any:
        kept = registers(self.isa.vectors * self.isa.lanes, "float32")

        def one(v: int) -> None:
            lse = let((self.m[v] + vector.called("log2")(self.l[v], self.isa)) * full(LN2, self.isa))
            empty = tirx.EQ(self.l[v], full(0.0, self.isa))
            T.buffer_store(kept, select(empty, full(self.hidden, self.isa), lse), [self.layout.at(whole(0), v)])

        self.each(one)
        return kept


def _add(a: Value, b: Value) -> Value:
    return a + b


Weight = Callable[[Value, Machine], Value]


class Pointwise(_Rows):
    """Weights that each pair has by itself: sigmoid, relu, none, and linear, which divides by their sum."""

    def __init__(self, attn: Attention, task: Task, layout: Layout, weight: Weight, hidden: float) -> None:
        super().__init__(attn, task, layout)
        self.weight, self.hidden, self.is_plain = weight, hidden, self.part.score == QK
        self.sum = self.vectors() if self.part.normalizer.kind == "linear" else None

    def formulas(self) -> list[Expr]:
        return [self.part.score]

    def query_factor(self) -> Value | None:
        return None

    def start(self) -> None:
        if self.sum is not None:
            self.each(lambda v: T.buffer_store(self.sum, full(0.0, self.isa), [v]))

    def begin_tile(self) -> None:
        """Nothing runs along."""

    def score(self, qk: Value, v: int) -> Value:
        return widened(self.task.formulas.value(self.part.score, v, let(qk)), self.isa.lanes)

    def look(self, s: Value, v: int) -> None:
        """No score decides on another."""

    def weigh(self) -> None:
        self.each_weight(lambda s, v: self.weight(s, self.isa), self.sum)

    def rescaled(self, o: Value, v: int) -> Value:
        return o

    def finish(self) -> Any:
        total = self.sum
        if total is None:
            return None
        self.layout.across(_add, total)

        def factor(v: int) -> Value:
            whole_sum = let(total[v] + full(self.part.normalizer.eps, self.isa))
            empty = let(tirx.EQ(whole_sum, full(0.0, self.isa)))
            return select(
                empty, full(0.0, self.isa), full(1.0, self.isa) / select(empty, full(1.0, self.isa), whole_sum)
            )

        self.scale_output(factor)
        return None


def _relu(s: Value, isa: Machine) -> Value:
    return vector.largest(widened(real(0.0), lanes(s)), s)


def _same(s: Value, isa: Machine) -> Value:
    return s


WEIGHTS: Final[Mapping[str, tuple[Weight, float]]] = {
    "sigmoid": (vector.sigmoid, float("-inf")),
    "relu": (_relu, 0.0),
    "none": (_same, 0.0),
    "linear": (_same, 0.0),
}
"""The weight of a score, and the score whose weight is 0."""


def lines(normalizer: Normalizer, attn: Attention, task: Task, layout: Layout) -> Lines:
    """The normalizer of a tile."""
    if normalizer.kind == "softmax":
        return Softmax(attn, task, layout)
    return Pointwise(attn, task, layout, *WEIGHTS[normalizer.kind])
