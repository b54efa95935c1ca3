"""The normaliser as an algebra: init, step, merge, finish over an associative partial state.

A state is what a set of keys contributes to a row. Loops step through tiles; splits `merge` states of disjoint key
sets, as stream-K fragments and rings will. Whoever adds a normaliser adds a row to `NORMALIZERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from attncc.ir.attention import Attention, Normalizer
from attncc.ir.build import Builder, column, dot, full, reduce, reshape
from attncc.ir.expr import Dtype, Expr, cast_to, const, ew, maximum, name, where

LOG2E: Final = math.log2(math.e)
LN2: Final = math.log(2)
LOWEST: Final = -(2.0**127)
"""Below every finite logit, yet finite: a row that sees no key keeps it, and exp2(-inf - LOWEST) is 0."""
LANES: Final = 8
"""A row's sum is kept in this many parts until the end, so that the loop has no sum across threads."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One key tile as a normaliser sees it."""

    x: Expr
    """[BM, BN]: x * c is the score, in units of log 2 where the rule is exponential."""
    c: Expr
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
    """Parts of a row's sum, [BM, LANES]."""
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
L: Final = name("l", "f32", ("BM", LANES))
TOTAL: Final = name("total", "f32", ("BM",))


def _softmax_init(b: Builder) -> None:
    b.let("m", full(("BM",), LOWEST), "running maximum, in units of log 2")
    b.let("l", full(("BM", LANES), 0.0), "running sum, in parts that one thread holds")


def _softmax_step(b: Builder, tile: Tile) -> None:
    x = b.let("x", tile.x, "[BM, BN]")
    with b.when(tile.masked):
        b.let("x", where(tile.keep(), x, -math.inf))
    m_new = b.let("m_new", maximum(M, reduce("max", x, 1) * tile.c), "[BM]")
    p = b.let("p", ew("exp2", x * tile.c - column(m_new)), "[BM, BN]")
    alpha = b.let("alpha", ew("exp2", M - m_new))
    parts = reduce("sum", reshape(p, ("BM", f"BN/{LANES}", LANES)), 1)
    b.let("l", L * column(alpha) + parts)
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
        _accumulate(b, tile, _weights(b, tile, f(tile.x * tile.c)), None)

    return Rule((), lambda b: None, step, lambda b, m, total, sink: End())


def _linear(eps: float) -> Rule:
    """p = score over the sum of scores plus eps."""

    def init(b: Builder) -> None:
        b.let("l", full(("BM", LANES), 0.0), "running sum, in parts that one thread holds")

    def step(b: Builder, tile: Tile) -> None:
        p = _weights(b, tile, tile.x * tile.c)
        b.let("l", L + reduce("sum", reshape(p, ("BM", f"BN/{LANES}", LANES)), 1))
        _accumulate(b, tile, p, None)

    def finish(b: Builder, m: Expr, total: Expr, sink: Expr | None) -> End:
        total = b.let("total", total + eps)
        b.note("a row that sees no key has the sum eps, or 0: its output is 0 either way")
        return End(divisor=b.let("divisor", where(ew("eq", total, const(0.0)), 1.0, total)))

    return Rule((L,), init, step, finish, sums=L)


NORMALIZERS: Final[Mapping[str, Callable[[Normalizer], Rule]]] = {
    "softmax": lambda n: Rule((M, L), _softmax_init, _softmax_step, _softmax_finish, L, M, exponential=True),
    "sigmoid": lambda n: _pointwise(lambda s: ew("sigmoid", s)),
    "relu": lambda n: _pointwise(lambda s: maximum(s, 0.0)),
    "none": lambda n: _pointwise(lambda s: s),
    "linear": lambda n: _linear(n.eps),
}


def rule_of(attn: Attention) -> Rule:
    """The rule of a variant's only part."""
    return NORMALIZERS[attn.part.normalizer.kind](attn.part.normalizer)


@dataclass(frozen=True, slots=True)
class States:
    """States of one row over disjoint sets of keys, some of many: [n], [n] and [n, width] a piece."""

    peaks: Expr | None
    totals: Expr | None
    accumulators: tuple[Expr, ...]


def merge(b: Builder, states: States, accumulators: tuple[str, ...]) -> None:
    """Adds states to the row's, whose `m` is the greatest peak of all: each but for what it is below that.

    The state of no keys adds 0 exactly, whatever else there is.
    """
    weights = None if states.peaks is None else b.let("weights", ew("exp2", states.peaks - name("m", "f32")))
    if states.totals is not None:
        totals = states.totals if weights is None else states.totals * weights
        b.let("total", name("total", "f32") + reduce("sum", totals, 0))
    for text, x in zip(accumulators, states.accumulators, strict=True):
        x = x if weights is None else x * column(weights)
        b.let(text, name(text, "f32", x.shape[1:]) + reduce("sum", x, 0))


VALUE_DTYPE: Final[Mapping[str, Dtype]] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
