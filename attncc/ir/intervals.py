"""Interval analysis: the least and greatest value of an expression while its names run over ranges.

An interval is a pair of expressions (least, greatest), None where nothing is known; that of a boolean is
(true everywhere, true somewhere). Bounds are expressions themselves, so what comes out is a formula that a
kernel can evaluate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attncc.ir.expr import FALSE, TRUE, Expr, const, eq, ew, maximum, minimum, where
from attncc.ir.rewrite import names

Bound = Expr | None
Interval = tuple[Bound, Bound]

UNKNOWN: Final[Interval] = (None, None)


def _both(f: Callable[[Expr, Expr], Expr], a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else f(a, b)


def _hull(candidates: list[Bound]) -> Interval:
    if any(c is None for c in candidates):
        return UNKNOWN
    low = high = candidates[0]
    for c in candidates[1:]:
        low, high = _both(minimum, low, c), _both(maximum, high, c)
    return low, high


def _add(a: Interval, b: Interval) -> Interval:
    return _both(Expr.__add__, a[0], b[0]), _both(Expr.__add__, a[1], b[1])


def _neg(a: Interval) -> Interval:
    return (None if a[1] is None else -a[1]), (None if a[0] is None else -a[0])


def _sub(a: Interval, b: Interval) -> Interval:
    return _add(a, _neg(b))


def _mul(a: Interval, b: Interval) -> Interval:
    for x, y in ((a, b), (b, a)):
        if x[0] is not None and x[0] == x[1] and is_positive(x[0]):
            c = x[0]
            return tuple(None if bound is None else bound * c for bound in y)  # type: ignore[return-value]
    return _hull([_both(Expr.__mul__, x, y) for x in a for y in b])


def _by_positive(f: Callable[[Expr, Expr], Expr], a: Interval, b: Interval) -> Interval:
    if b[0] is None or b[0] != b[1] or not is_positive(b[0]):
        return UNKNOWN
    return _both(f, a[0], b[0]), _both(f, a[1], b[0])


def _div(a: Interval, b: Interval) -> Interval:
    return _by_positive(Expr.__truediv__, a, b)


def _floordiv(a: Interval, b: Interval) -> Interval:
    return _by_positive(Expr.__floordiv__, a, b)


def _mod(a: Interval, b: Interval) -> Interval:
    """Exact inside one period; the whole of [0, n - 1] where the argument crosses a multiple."""
    n = b[0]
    if n is None or n != b[1] or not is_positive(n):
        return UNKNOWN
    if a[0] is None or a[1] is None:
        return const(0), n - 1
    same = eq(a[0] // n, a[1] // n)
    return where(same, a[0] % n, 0), where(same, a[1] % n, n - 1)


def _min(a: Interval, b: Interval) -> Interval:
    high = a[1] if b[1] is None else b[1] if a[1] is None else minimum(a[1], b[1])
    return _both(minimum, a[0], b[0]), high


def _max(a: Interval, b: Interval) -> Interval:
    low = a[0] if b[0] is None else b[0] if a[0] is None else maximum(a[0], b[0])
    return low, _both(maximum, a[1], b[1])


def _abs(a: Interval) -> Interval:
    if a[0] is None or a[1] is None:
        return const(0), None
    return maximum(maximum(a[0], -a[1]), 0), maximum(a[1], -a[0])


def _where(c: Interval, a: Interval, b: Interval) -> Interval:
    if c[0] == TRUE:
        return a
    if c[1] == FALSE:
        return b
    return _both(minimum, a[0], b[0]), _both(maximum, a[1], b[1])


def _compare(op: str) -> Callable[[Interval, Interval], Interval]:
    """`a < b` and its like: true everywhere by the far ends, somewhere by the near ends."""

    def rule(a: Interval, b: Interval) -> Interval:
        if op in ("gt", "ge"):
            a, b = b, a
        strict = "lt" if op in ("lt", "gt") else "le"
        every = FALSE if a[1] is None or b[0] is None else ew(strict, a[1], b[0])
        some = TRUE if a[0] is None or b[1] is None else ew(strict, a[0], b[1])
        return every, some

    return rule


def _eq(a: Interval, b: Interval) -> Interval:
    known = None not in (*a, *b)
    every = eq(a[0], a[1]) & eq(b[0], b[1]) & eq(a[0], b[0]) if known else FALSE  # type: ignore[arg-type]
    low, high = _compare("le")(a, b)[1], _compare("ge")(a, b)[1]
    return every, (low or TRUE) & (high or TRUE)


def _not(a: Interval) -> Interval:
    return ~(a[1] or TRUE), ~(a[0] or FALSE)


def _ne(a: Interval, b: Interval) -> Interval:
    return _not(_eq(a, b))


def _logical(op: str) -> Callable[[Interval, Interval], Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        return ew(op, a[0] or FALSE, b[0] or FALSE), ew(op, a[1] or TRUE, b[1] or TRUE)

    return rule


def _rising(op: str) -> Callable[[Interval], Interval]:
    def rule(a: Interval) -> Interval:
        return (None if a[0] is None else ew(op, a[0])), (None if a[1] is None else ew(op, a[1]))

    return rule


def _falling(op: str) -> Callable[[Interval], Interval]:
    return lambda a: _rising(op)((a[1], a[0]))


def _wave(_: Interval) -> Interval:
    return const(-1.0), const(1.0)


def _unknown(*_: Interval) -> Interval:
    return UNKNOWN


def is_positive(e: Expr) -> bool:
    """Whether `e` is certainly > 0: a positive number, or a size (every other name is an index)."""
    if e.value is not None:
        return e.value > 0
    return e.op == "name" and e.attr not in INDEX_NAMES


INDEX_NAMES: Final = frozenset({"b", "h", "hk", "i", "j", "row", "i0", "i1", "j0", "j1", "qk", "scale"})

INTERVALS: Final[dict[str, Callable[..., Interval]]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _unknown,
    "neg": _neg,
    "abs": _abs,
    "min": _min,
    "max": _max,
    "where": _where,
    "lt": _compare("lt"),
    "le": _compare("le"),
    "gt": _compare("gt"),
    "ge": _compare("ge"),
    "eq": _eq,
    "ne": _ne,
    "and": _logical("and"),
    "or": _logical("or"),
    "not": _not,
    "exp": _rising("exp"),
    "exp2": _rising("exp2"),
    "log": _rising("log"),
    "log2": _rising("log2"),
    "log1p": _rising("log1p"),
    "sqrt": _rising("sqrt"),
    "rsqrt": _falling("rsqrt"),
    "sigmoid": _rising("sigmoid"),
    "tanh": _rising("tanh"),
    "sin": _wave,
    "cos": _wave,
    "erf": _rising("erf"),
    "floor": _rising("floor"),
}


def interval(e: Expr, env: Mapping[str, Interval]) -> Interval:
    """The least and greatest value of `e` while the names of `env` run over their intervals.

    Other names stand for themselves. A tensor read is known where its index does not move, or moves
    with the query row alone (then it is a minimum or maximum over the tile's rows).
    """
    if e.op == "const" or e.op == "name":
        found = env.get(str(e.attr)) if e.op == "name" else None
        return found or (e, e)
    args = [interval(a, env) for a in e.args]
    if e.op in INTERVALS:
        return INTERVALS[e.op](*args)
    if e.op == "cast":
        return tuple(None if a is None else Expr("cast", (a,), None, e.dtype) for a in args[0])  # type: ignore[return-value]
    if e.op in ("load", "bucket"):
        low = tuple(a[0] for a in args)
        if None not in low and low == tuple(a[1] for a in args):
            same = Expr(e.op, low, e.attr, e.dtype)  # type: ignore[arg-type]
            return same, same
        if not names(e) & {"j", "j0", "j1"}:
            return Expr("rows_min", (e,), None, e.dtype), Expr("rows_max", (e,), None, e.dtype)
    return UNKNOWN
