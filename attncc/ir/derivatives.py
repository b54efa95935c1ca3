"""Partial derivatives of the operators, as expressions of their arguments and their value.

`PARTIALS[op](*args, y)` gives d y / d arg for each argument; booleans and integers get 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from attncc.ir.expr import Expr, const, eq, ew, where

Partials = Callable[..., tuple[Expr, ...]]


def _zero(*args: Expr) -> tuple[Expr, ...]:
    return tuple(const(0.0) for _ in args[:-1])


def _pow_partials(x: Expr, n: Expr, y: Expr) -> tuple[Expr, ...]:
    """d/dn is 0 where x is 0, as autograd has it."""
    log_x = ew("log", where(x > 0.0, x, 1.0))
    return n * ew("pow", x, n - 1), y * log_x


def _share(a: Expr, b: Expr, first: Expr) -> tuple[Expr, Expr]:
    """Gradient of min and max: all of it to the chosen side, half to each of two equals."""
    tie = eq(a, b)
    return where(tie, 0.5, where(first, 1.0, 0.0)), where(tie, 0.5, where(first, 0.0, 1.0))


def _where(c: Expr, a: Expr, b: Expr, y: Expr) -> tuple[Expr, ...]:
    return const(0.0), where(c, 1.0, 0.0), where(c, 0.0, 1.0)


def _one(f: Callable[[Expr, Expr], Expr]) -> Partials:
    """From `x, y` to d y / d x."""

    def partials(x: Expr, y: Expr) -> tuple[Expr, ...]:
        return (f(x, y),)

    return partials


def _two(f: Callable[[Expr, Expr, Expr], tuple[Expr, Expr]]) -> Partials:
    """From `a, b, y` to d y / d a and d y / d b."""
    return f


PARTIALS: Final[dict[str, Partials]] = {
    "add": _two(lambda a, b, y: (const(1.0), const(1.0))),
    "sub": _two(lambda a, b, y: (const(1.0), const(-1.0))),
    "mul": _two(lambda a, b, y: (b, a)),
    "div": _two(lambda a, b, y: (1.0 / b, -y / b)),
    "floordiv": _zero,
    "mod": _two(lambda a, b, y: (const(1.0), -ew("floor", a / b))),
    "pow": _pow_partials,
    "neg": _one(lambda x, y: const(-1.0)),
    "abs": _one(lambda x, y: where(x > 0.0, 1.0, where(x < 0.0, -1.0, 0.0))),
    "min": _two(lambda a, b, y: _share(a, b, a < b)),
    "max": _two(lambda a, b, y: _share(a, b, a > b)),
    "where": _where,
    "lt": _zero,
    "le": _zero,
    "gt": _zero,
    "ge": _zero,
    "eq": _zero,
    "ne": _zero,
    "and": _zero,
    "or": _zero,
    "not": _zero,
    "exp": _one(lambda x, y: y),
    "exp2": _one(lambda x, y: y * math.log(2)),
    "log": _one(lambda x, y: 1.0 / x),
    "log2": _one(lambda x, y: (1 / math.log(2)) / x),
    "log1p": _one(lambda x, y: 1.0 / (1.0 + x)),
    "sqrt": _one(lambda x, y: 0.5 / y),
    "rsqrt": _one(lambda x, y: -0.5 * y / x),
    "sigmoid": _one(lambda x, y: y * (1.0 - y)),
    "tanh": _one(lambda x, y: 1.0 - y * y),
    "sin": _one(lambda x, y: ew("cos", x)),
    "cos": _one(lambda x, y: -ew("sin", x)),
    "erf": _one(lambda x, y: (2 / math.sqrt(math.pi)) * ew("exp", -(x * x))),
    "floor": _zero,
}
