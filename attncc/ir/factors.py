"""Constant factors of a formula: what multiplies every score alike, told apart from the rest."""

from __future__ import annotations

from typing import Final

from attncc.ir.expr import Expr, const
from attncc.ir.rewrite import names, rebuild, transform


def split_multiplier(score: Expr) -> tuple[Expr, Expr]:
    """`score` as x * c with a positive c that no row, key or head moves; c joins log2(e) in the exponent's FMA.

    Of a sum, qk * scale + slope * (j - i), c leaves where the other term has a factor that takes it up before the loop.
    """
    c: Expr = const(1.0)
    while True:
        match score:
            case Expr("mul", (x, y)) if _positive(y):
                score, c = x, c * y
            case Expr("mul", (y, x)) if _positive(y):
                score, c = x, c * y
            case Expr("div", (x, y)) if _positive(y):
                score, c = x, c / y
            case Expr("add" | "sub", (Expr("mul", (x, y)), Expr("mul", (a, b)))) if _positive(y) and (
                _is_still(a) or _is_still(b)
            ):
                score, c = rebuild(score, (x, (a / y) * b if _is_still(a) else a * (b / y))), c * y
            case _:
                return score, fold_constants(c)


def fold_constants(e: Expr) -> Expr:
    """Products and quotients of float constants as one constant."""

    def step(node: Expr) -> Expr | None:
        if node.op not in ("mul", "div"):
            return None
        a, b = node.args
        if a.value is not None and b.value is not None and (node.op == "mul" or b.value != 0):
            number = a.value * b.value if node.op == "mul" else a.value / b.value
            return const(float(number))
        if a.value == 1 and node.op == "mul":
            return b
        if b.value == 1:
            return a
        if node.op == "mul" and a.op == "mul" and b.value is not None and a.args[1].value is not None:
            return a.args[0] * const(float(a.args[1].value * b.value))
        return None

    return transform(e, step)


MOVING: Final = frozenset({"qk", "i", "j", "row"})


def _is_still(e: Expr) -> bool:
    """Whether `e` is the same for all pairs of a head."""
    return not names(e) & MOVING


def _positive(e: Expr) -> bool:
    if e.value is not None:
        return e.value > 0
    return e.op == "name" and e.attr == "scale"
