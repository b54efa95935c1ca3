"""The normaliser as an algebra: init, step, merge, finish over an associative partial state.

A state is what a set of keys contributes to a row. Loops step through tiles; splits `merge` states of disjoint key
sets, as stream-K fragments and rings will. Whoever adds a normaliser adds a row to `NORMALIZERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from attncc.ir.attention import Attention, Normalizer
from attncc.ir.build import Builder, column, dot, full, reduce, reshape
from attncc.ir.expr import Dim, Dtype, Expr, cast_to, const, ew, maximum, name, where

LOG2E: Final = math.log2(math.e)
LN2: Final = math.log(2)
LOWEST: Final = -(2.0**127)
"""Below every finite logit, yet finite: a row that sees no key keeps it, and exp2(-inf - LOWEST) is 0."""
LANES: Final = 8
"""A row's sum is kept in this many parts until the end, so that the loop has no sum across threads."""
LANES_OF_FEW: Final = "BN/4"
"""The same of query tiles of few rows, whose warps stand side by side over the keys."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One key tile as a normaliser sees it."""

    x: Expr
    """[BM, BN]: x * c is the score, in units of log 2 where the rule is exponential."""
    c: Expr
    """A number, or one for each row."""
    masked: Expr
    """Whether `keep` is to be applied; fixed when the kernel is compiled."""
    keep: Callable[[], Expr]
    """Binds [BM, BN], true where a key counts."""
    values: Callable[[], tuple[Expr, ...]]
    """Loads V as [BN, width] pieces; called after the scores, so that K and V can share shared memory."""
    accumulators: tuple[str, ...]
    """Names of the [BM, width] accumulators, one a piece."""
    weigh: Callable[[Expr, Dtype], Expr] = cast_to
    """Weights as the product with values of a dtype takes them."""
    scaled: Callable[[Expr], tuple[tuple[Expr, ...], Expr | None]] = lambda p: ((), None)
    """Binds the terms whose sum are the weights of values as they are held, none where those are the weights
    themselves; and what else the tile adds to all columns of a row, [BM]."""
    above: Callable[[], Expr | None] = lambda: None
    """Binds by how much the peak of a state is to be above a tile's greatest score, in units of log 2: weights as
    values are held then have a range that a narrow dtype has; called after `keep`."""
    few: bool = False
    """Whether rows may be less than tensor cores multiply."""


@dataclass(frozen=True, slots=True)
class End:
    """What becomes of accumulators: divided by `divisor` or multiplied by `factor`, or left; a number for each row."""

    divisor: Expr | None = None
    factor: Expr | None = None
    lse: Expr | None = None
    """Where the normaliser has one."""

    def of(self, acc: Expr) -> Expr:
        """The output of an accumulator [BM, width], or of one row's, [width]."""
        if self.factor is not None:
            return acc * _to_columns(self.factor)
        return acc if self.divisor is None else acc / _to_columns(self.divisor)


def _to_columns(x: Expr) -> Expr:
    return column(x) if x.shape else x


@dataclass(frozen=True, slots=True)
class Rule:
    """init(b): binds what beside the accumulators makes the state; step(b, tile): adds one tile.
    finish(b, m, total, sink): what ends rows of such a greatest score and sum, which not all normalisers have.
    """

    state: tuple[Expr, ...]
    init: Callable[[Builder], None]
    step: Callable[[Builder, Tile], None]
    finish: Callable[[Builder, Expr, Expr, Expr | None], End]
    sums: Expr | None = None
    """Parts of a row's sum, [BM, lanes]."""
    peak: Expr | None = None
    """[BM] in units of log 2: sums and accumulators are relative to 2 ** peak; to 1 where there is none."""
    exponential: bool = False
    """Whether scores are wanted in units of log 2."""


def _accumulate(b: Builder, tile: Tile, p: Expr, decay: Expr | None) -> None:
    values = tile.values()
    terms, moved = tile.scaled(p)
    for text, v in zip(tile.accumulators, values, strict=True):
        acc = name(text, "f32", ("BM", v.shape[1]))
        acc = acc if decay is None else acc * column(decay)
        acc = acc if moved is None else acc + column(moved)
        for w in terms or (tile.weigh(p, v.dtype),):
            acc = dot(w, v, acc, few=tile.few)
        b.let(text, acc)


M: Final = name("m", "f32", ("BM",))
TOTAL: Final = name("total", "f32", ("BM",))


def _sums(lanes: Dim) -> Expr:
    return name("l", "f32", ("BM", lanes))


def _begin_sums(b: Builder, lanes: Dim) -> None:
    b.let("l", full(("BM", lanes), 0.0), "running sum, in parts that one thread holds")


def _parts(p: Expr, lanes: Dim) -> Expr:
    """[BM, lanes] sums of a tile's weights."""
    parts: Dim = f"BN/{lanes}" if isinstance(lanes, int) else int(lanes.partition("/")[2])
    return reduce("sum", reshape(p, ("BM", parts, lanes)), 1)


def _softmax(lanes: Dim) -> Rule:
    def init(b: Builder) -> None:
        b.let("m", full(("BM",), LOWEST), "running maximum, in units of log 2")
        _begin_sums(b, lanes)

    sums = _sums(lanes)
    return Rule((M, sums), init, partial(_softmax_step, lanes), _softmax_finish, sums, M, exponential=True)


def _softmax_step(lanes: Dim, b: Builder, tile: Tile) -> None:
    x = b.let("x", tile.x, "[BM, BN]")
    with b.when(tile.masked):
        b.let("x", where(tile.keep(), x, -math.inf))
    greatest, above = reduce("max", x, 1) * tile.c, tile.above()
    m_new = b.let("m_new", maximum(M, greatest if above is None else greatest + above), "[BM]")
    p = b.let("p", ew("exp2", x * _to_columns(tile.c) - column(m_new)), "[BM, BN]")
    alpha = b.let("alpha", ew("exp2", M - m_new))
    b.let("l", _sums(lanes) * column(alpha) + _parts(p, lanes))
    _accumulate(b, tile, p, alpha)
    b.let("m", m_new)


def _softmax_finish(b: Builder, m: Expr, total: Expr, sink: Expr | None) -> End:
    empty = b.let("empty", total <= 0.0)
    lse = where(empty, -math.inf, (m + ew("log2", where(empty, 1.0, total))) * LN2)
    if sink is None:
        return End(divisor=b.let("divisor", where(empty, 1.0, total)), lse=lse)
    b.note("the sink joins the denominator alone")
    z = b.let("z", sink * LOG2E)
    top = b.let("top", maximum(m, z))
    shrink = b.let("shrink", where(empty, 0.0, ew("exp2", m - top)))
    divisor = b.let("divisor", total * shrink + ew("exp2", z - top))
    factor = b.let("factor", where(ew("eq", divisor, const(0.0)), 0.0, shrink / divisor), "no key, and a sink of -inf")
    return End(factor=factor, lse=lse)


def _weights(b: Builder, tile: Tile, weights: Expr) -> Expr:
    """[BM, BN] weights, 0 where a key does not count."""
    p = b.let("p", weights, "[BM, BN]")
    with b.when(tile.masked):
        b.let("p", where(tile.keep(), p, 0.0))
    return p


def _pointwise(f: Callable[[Expr], Expr]) -> Rule:
    """p = f(score), summed without a denominator."""

    def step(b: Builder, tile: Tile) -> None:
        _accumulate(b, tile, _weights(b, tile, f(tile.x * _to_columns(tile.c))), None)

    return Rule((), lambda b: None, step, lambda b, m, total, sink: End())


def _linear(eps: float, lanes: Dim) -> Rule:
    """p = score over the sum of scores plus eps."""

    def step(b: Builder, tile: Tile) -> None:
        p = _weights(b, tile, tile.x * _to_columns(tile.c))
        b.let("l", sums + _parts(p, lanes))
        _accumulate(b, tile, p, None)

    def finish(b: Builder, m: Expr, total: Expr, sink: Expr | None) -> End:
        total = b.let("total", total + eps)
        b.note("a row that sees no key has the sum eps, or 0: its output is 0 either way")
        return End(divisor=b.let("divisor", where(ew("eq", total, const(0.0)), 1.0, total)))

    sums = _sums(lanes)
    return Rule((sums,), lambda b: _begin_sums(b, lanes), step, finish, sums=sums)


NORMALIZERS: Final[Mapping[str, Callable[[Normalizer, Dim], Rule]]] = {
    "softmax": lambda n, lanes: _softmax(lanes),
    "sigmoid": lambda n, lanes: _pointwise(lambda s: ew("sigmoid", s)),
    "relu": lambda n, lanes: _pointwise(lambda s: maximum(s, 0.0)),
    "none": lambda n, lanes: _pointwise(lambda s: s),
    "linear": lambda n, lanes: _linear(n.eps, lanes),
}


def rule_of(attn: Attention, lanes: Dim = LANES) -> Rule:
    """The rule of a variant's only part; `lanes`: parts in which it keeps a row's sum."""
    return NORMALIZERS[attn.part.normalizer.kind](attn.part.normalizer, lanes)


@dataclass(frozen=True, slots=True)
class States:
    """States of one row over disjoint sets of keys, some of many: [n], [n] and [n, width] a piece."""

    peaks: Expr | None
    totals: Expr | None
    accumulators: tuple[Expr, ...]


def merge(b: Builder, states: States, accumulators: tuple[str, ...]) -> None:
    """Adds states to the row's, whose `m` is the greatest peak so far: each but for what it is below that.

    The state of no keys adds 0 exactly, whatever else there is.
    """
    weights, shrink = None if states.peaks is None else _relative(b, states.peaks), name("alpha", "f32")

    def add(text: str, x: Expr, weighted: Expr) -> None:
        before = name(text, "f32", x.shape[1:])
        b.let(text, (before if weights is None else before * shrink) + reduce("sum", weighted, 0))

    if states.totals is not None:
        add("total", states.totals, states.totals if weights is None else states.totals * weights)
    for text, x in zip(accumulators, states.accumulators, strict=True):
        add(text, x, x if weights is None else x * column(weights))


def _relative(b: Builder, peaks: Expr) -> Expr:
    """Makes `m` the greatest peak with these; binds what the states before shrink by, and what these do."""
    m = name("m", "f32")
    m_new = b.let("m_new", maximum(m, reduce("max", peaks, 0)))
    b.let("alpha", ew("exp2", m - m_new))
    b.let("m", m_new)
    return b.let("weights", ew("exp2", peaks - m_new))


VALUE_DTYPE: Final[Mapping[str, Dtype]] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
