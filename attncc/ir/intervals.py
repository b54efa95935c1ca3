"""Interval analysis: the least and greatest value of an expression while its names run over ranges.

An interval is a pair of expressions (least, greatest), None where nothing is known; that of a boolean is
(true everywhere, true somewhere). Bounds are expressions themselves, so what comes out is a formula that a
kernel can evaluate. Integer rules are exact up to correlation of the arguments; float rules suppose that no
argument is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attncc.ir.expr import FALSE, INTS, TRUE, Expr, cast_to, const, eq, ew, maximum, minimum, where
from attncc.ir.rewrite import names

Bound = Expr | None
Interval = tuple[Bound, Bound]

UNKNOWN: Final[Interval] = (None, None)


def _each(f: Callable[[Expr], Expr], a: Interval) -> Interval:
    """A rising function of one argument."""
    return (None if a[0] is None else f(a[0])), (None if a[1] is None else f(a[1]))


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


def _sub(a: Interval, b: Interval) -> Interval:
    return _both(Expr.__sub__, a[0], b[1]), _both(Expr.__sub__, a[1], b[0])


def _neg(a: Interval) -> Interval:
    return _each(Expr.__neg__, (a[1], a[0]))


def _mul(a: Interval, b: Interval) -> Interval:
    for x, y in ((a, b), (b, a)):
        if x[0] is not None and x[0] == x[1] and is_positive(x[0]):
            return _both(Expr.__mul__, y[0], x[0]), _both(Expr.__mul__, y[1], x[0])
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
    """Exact inside one period; the whole of [0, n - 1] where the argument crosses a multiple (to n for floats)."""
    n = b[0]
    if n is None or n != b[1] or not is_positive(n):
        return UNKNOWN
    if a[0] is None or a[1] is None:
        return const(0), n
    same = eq(a[0] // n, a[1] // n)
    last = n - 1 if a[0].dtype in INTS and n.dtype in INTS else n
    return where(same, a[0] % n, 0), where(same, a[1] % n, last)


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


def _lesser(a: Expr, b: Expr) -> Expr:
    return a & b if a.dtype == b.dtype == "bool" else minimum(a, b)


def _greater(a: Expr, b: Expr) -> Expr:
    return a | b if a.dtype == b.dtype == "bool" else maximum(a, b)


def _where(c: Interval, a: Interval, b: Interval) -> Interval:
    """The hull of both branches, less a branch that the condition rules out."""
    every, some = c[0] or FALSE, c[1] or TRUE
    low, high = _both(_lesser, a[0], b[0]), _both(_greater, a[1], b[1])
    return (
        _both(lambda x, y: where(every, x, y), a[0], _both(lambda x, y: where(some, x, y), low, b[0])),
        _both(lambda x, y: where(every, x, y), a[1], _both(lambda x, y: where(some, x, y), high, b[1])),
    )


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
    low, high = _compare("le")(a, b), _compare("ge")(a, b)
    return _logical("and")(low, high)


def _not(a: Interval) -> Interval:
    return ~(a[1] or TRUE), ~(a[0] or FALSE)


def _ne(a: Interval, b: Interval) -> Interval:
    return _not(_eq(a, b))


def _logical(op: str) -> Callable[[Interval, Interval], Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        return ew(op, a[0] or FALSE, b[0] or FALSE), ew(op, a[1] or TRUE, b[1] or TRUE)

    return rule


def _rising(op: str) -> Callable[[Interval], Interval]:
    return lambda a: _each(lambda x: ew(op, x), a)


def _rising_within(op: str, least: float, most: float) -> Callable[[Interval], Interval]:
    """A rising function with limits, which are what is known where nothing is of its argument."""

    def rule(a: Interval) -> Interval:
        low, high = _rising(op)(a)
        return const(least) if low is None else low, const(most) if high is None else high

    return rule


def _rising_from(op: str, least: float) -> Callable[[Interval], Interval]:
    """A rising function that is a number from `least` on: known only where the argument surely is."""
    return lambda a: _rising(op)(a) if is_at_least(a[0], least) else UNKNOWN


def _rsqrt(a: Interval) -> Interval:
    return _rising("rsqrt")((a[1], a[0])) if is_at_least(a[0], 0) else UNKNOWN


def _wave(_: Interval) -> Interval:
    return const(-1.0), const(1.0)


def _unknown(*_: Interval) -> Interval:
    return UNKNOWN


def is_positive(e: Expr) -> bool:
    """Whether `e` is certainly > 0: a positive number, or a size (every other name is an index)."""
    if e.value is not None:
        return e.value > 0
    return e.op == "name" and e.attr not in INDEX_NAMES


def is_at_least(e: Bound, least: float) -> bool:
    """Whether `e` is certainly >= `least`, which is not above 0."""
    match e:
        case None:
            return False
        case Expr("const"):
            return e.value is not None and e.value >= least
        case Expr("max", (a, b)):
            return is_at_least(a, least) or is_at_least(b, least)
        case Expr("add" | "mul" | "min", (a, b)):
            return is_at_least(a, 0) and is_at_least(b, 0)
        case Expr("bucket"):
            return True
        case Expr("cast" | "abs" | "sqrt", (a,)):
            return e.op != "cast" or is_at_least(a, 0)
        case Expr("div" | "floordiv", (a, b)):
            return is_at_least(a, 0) and is_positive(b)
        case _:
            return is_positive(e)


INDEX_NAMES: Final = frozenset({"b", "h", "hk", "i", "j", "row", "i0", "i1", "j0", "j1", "row0", "row1", "qk", "scale"})

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
    "log": _rising_from("log", 0),
    "log2": _rising_from("log2", 0),
    "log1p": _rising_from("log1p", -1),
    "sqrt": _rising_from("sqrt", 0),
    "rsqrt": _rsqrt,
    "sigmoid": _rising_within("sigmoid", 0.0, 1.0),
    "tanh": _rising_within("tanh", -1.0, 1.0),
    "sin": _wave,
    "cos": _wave,
    "erf": _rising_within("erf", -1.0, 1.0),
    "floor": _rising("floor"),
}


def interval(e: Expr, env: Mapping[str, Interval], rising: Mapping[str, Expr] | None = None) -> Interval:
    """The least and greatest value of `e` while the names of `env` run over their intervals.

    Other names stand for themselves. `rising` gives the row lengths of the sorted inputs. A tensor read is known
    where its index does not move, is sorted along the axis that moves, or moves with the query row alone (then
    it is a minimum or maximum over the tile's rows).
    """
    if e.op == "const" or e.op == "name":
        found = env.get(str(e.attr)) if e.op == "name" else None
        return found or (e, e)
    args = [interval(a, env, rising) for a in e.args]
    if e.op in INTERVALS:
        return INTERVALS[e.op](*args)
    if e.op == "cast":
        return _ne(args[0], ZERO) if e.dtype == "bool" else _each(lambda x: cast_to(x, e.dtype), args[0])
    if e.op in ("load", "bucket"):
        return _read(e, args, e.op == "bucket" or _rises(e, rising or {}))
    return UNKNOWN


ZERO: Final[Interval] = (const(0), const(0))


def _rises(e: Expr, rising: Mapping[str, Expr]) -> bool:
    """Whether a read of a sorted row never falls as its index rises: not outside the row, where it gives 0."""
    length = rising.get(str(e.attr))
    match e.args[-1] if e.args else None:
        case Expr("min", (index, last)) if length is not None:
            return last == length - 1 and is_at_least(index, 0)
        case Expr("max", (Expr("sub", (Expr("bucket", _, buffer), Expr("const", _, 1))), Expr("const", _, 0))):
            return length is not None and buffer == e.attr
        case _:
            return False


def _read(e: Expr, args: list[Interval], rises: bool) -> Interval:
    """A tensor read whose index runs over `args`; with `rises` it does not fall as its last index rises."""
    low = [a for a, _ in args if a is not None]
    high = [a for _, a in args if a is not None]
    known = len(low) == len(high) == len(args)
    if known and low[:-1] == high[:-1] and (low == high or rises):
        return Expr(e.op, tuple(low), e.attr, e.dtype), Expr(e.op, tuple(high), e.attr, e.dtype)
    if names(e) & {"j", "j0", "j1"}:
        return UNKNOWN
    if e.dtype == "bool":  # counted, for a reduction of flags is not a thing everywhere
        least, greatest = _rows(where(e, 1, 0))
        return least > 0, greatest > 0
    return _rows(e)


def _rows(e: Expr) -> tuple[Expr, Expr]:
    dtype = e.dtype if e.dtype in INTS else "f32"
    return Expr("rows_min", (e,), None, dtype), Expr("rows_max", (e,), None, dtype)
