"""Rewrites of float formulas that keep every bit: NaN, infinities and the sign of zero included."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import frexp, isfinite
from operator import mul
from typing import Final

import numpy as np

from attncc.ir.expr import FLOATS, INTS, OPS, Expr, const, ew, where
from attncc.ir.intervals import is_positive
from attncc.ir.rewrite import walk

Rule = Callable[[Expr], Expr | None]

MOST_FACTORS: Final = 17
FLIPPED: Final[dict[str, str]] = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


ARITHMETIC: Final = frozenset({"name", "cast", "add", "sub", "mul", "neg", "abs", "min", "max", "where", "floor"})
FINITE: Final = ARITHMETIC | {"sigmoid", "tanh", "erf", "sin", "cos"}
"""Float operators that give a number for numbers (of the size that positions have)."""


def is_finite(e: Expr) -> bool:
    """Whether no float inside a formula of positions and sizes can be NaN or infinite."""
    return all(_gives_number(node) for node in walk(e) if node.dtype in FLOATS)


def _gives_number(e: Expr) -> bool:
    if e.value is not None:
        return isfinite(e.value)
    return e.op in FINITE or (e.op in ("div", "floordiv") and is_positive(e.args[1]))


def simplify(e: Expr) -> Expr:
    """An operator over simplified arguments, in its simplest form."""
    while True:
        new = fold_floats(e) or next((n for n in (rule(e) for rule in RULES.get(e.op, ())) if n is not None), None)
        if new is None or new == e:
            return e
        e = new


def fold_floats(e: Expr) -> Expr | None:
    """A number for an operator over numbers, as fp32 gives it; no number for NaN and infinities."""
    values = [a.value for a in e.args]
    if e.op not in OPS or not e.args or None in values or not any(a.dtype == "f32" for a in (e, *e.args)):
        return None
    with np.errstate(all="ignore"):
        result = OPS[e.op].numpy(*(v if isinstance(v, bool) else np.float32(v) for v in values if v is not None))
    if e.dtype == "bool":
        return const(bool(result))
    number = float(str(np.float32(result)))  # the shortest of the numbers that fp32 rounds to this one
    return const(number, "f32") if e.dtype == "f32" and isfinite(number) else None


def _is_float(e: Expr) -> bool:
    return e.dtype in FLOATS


def _unit(position: int, unit: float) -> Rule:
    """x * 1 and its like are x."""

    def rule(e: Expr) -> Expr | None:
        other = e.args[1 - position]
        return other if e.args[position].value == unit and _is_float(other) and other.shape == e.shape else None

    return rule


def _add_negated(e: Expr) -> Expr | None:
    """a + -b is a - b; x + -0 is x, whereas x + 0 is not: it turns -0 into 0."""
    a, b = e.args
    if not _is_float(e):
        return None
    for x, y in ((a, b), (b, a)):
        if y.op == "neg" and y.args[0].value == 0 and x.shape == e.shape:
            return x
        if y.op == "neg" and _is_float(y):
            return x - y.args[0]
    return None


def _sub_negated(e: Expr) -> Expr | None:
    a, b = e.args
    if b.value == 0 and _is_float(a) and a.shape == e.shape:
        return a
    return a + b.args[0] if b.op == "neg" and _is_float(e) and _is_float(b) else None


def _neg_neg(e: Expr) -> Expr | None:
    (a,) = e.args
    return a.args[0] if a.op == "neg" and _is_float(a) else None


def _signs(e: Expr) -> Expr | None:
    """-a * -b is a * b, and -a * c is a * -c for a number c; the same for quotients."""
    a, b = e.args
    if a.op != "neg" or not _is_float(a):
        return None
    if b.op == "neg" and _is_float(b):
        return ew(e.op, a.args[0], b.args[0])
    return ew(e.op, a.args[0], const(-float(b.value), b.dtype)) if b.value and _is_float(b) else None


def _number_last(e: Expr) -> Expr | None:
    """Products and sums name their number last."""
    a, b = e.args
    return ew(e.op, b, a) if a.value is not None and b.value is None and _is_float(e) else None


def _by_power_of_two(e: Expr) -> Expr | None:
    """x / 2**k is x * 2**-k; any other reciprocal is rounded."""
    x, n = e.args
    if not n.value or not _is_float(x) or not _is_float(n):
        return None
    fraction, exponent = frexp(abs(n.value))
    return x * const(1.0 / n.value, n.dtype) if fraction == 0.5 and abs(exponent) < 120 else None


def _small_power(e: Expr) -> Expr | None:
    """x ** 2 is x * x; an integer to any small constant power is a product, which is exact."""
    x, n = e.args
    if e.dtype in INTS and n.value in range(MOST_FACTORS):
        return reduce(mul, [x] * int(n.value or 0), const(1, e.dtype))
    if n.value == 1 and x.dtype == e.dtype:
        return x
    return x * x if n.value == 2 else None


def _not_compare(e: Expr) -> Expr | None:
    """~(a < b) is a >= b for integers alone: with NaN both are false."""
    (a,) = e.args
    integers = all(x.dtype in INTS for x in a.args)
    return ew(FLIPPED[a.op], *a.args) if a.op in FLIPPED and integers else None


def _where_not(e: Expr) -> Expr | None:
    c, a, b = e.args
    return where(c.args[0], b, a) if c.op == "not" else None


RULES: Final[dict[str, tuple[Rule, ...]]] = {
    "add": (_number_last, _add_negated),
    "sub": (_sub_negated,),
    "mul": (_number_last, _unit(1, 1.0), _signs),
    "div": (_unit(1, 1.0), _by_power_of_two, _signs),
    "neg": (_neg_neg,),
    "pow": (_small_power,),
    "not": (_not_compare,),
    "where": (_where_not,),
}
