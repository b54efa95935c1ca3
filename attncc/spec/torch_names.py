"""What torch's functions and methods mean on traced values, by their names; torch itself is not imported.

A row takes expressions and Python numbers as expressions, and gives an expression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attncc.ir.expr import FALSE, TRUE, Expr, const
from attncc.spec import operators
from attncc.spec.operators import Fault, apply, clamp, is_float, is_int, truth_as_int

Meaning = Callable[..., Expr]


def _arithmetic(op: str) -> Meaning:
    """torch counts a bool as 0 or 1 in arithmetic."""
    return lambda *args: apply(op, *map(truth_as_int, args))


def _plain(op: str) -> Meaning:
    return lambda *args: apply(op, *args)


def compare(op: str) -> Meaning:
    def build(a: Expr, b: Expr) -> Expr:
        if a.dtype == b.dtype == "bool":
            return apply(op, a, b)
        return apply(op, truth_as_int(a), truth_as_int(b))

    return build


def scaled(op: str) -> Meaning:
    """add and sub, with torch's `alpha`."""

    def build(a: Expr, b: Expr, alpha: Expr | None = None) -> Expr:
        b = truth_as_int(b)
        return apply(op, truth_as_int(a), b if alpha is None else apply("mul", alpha, b))

    return build


def reverse_sub(a: Expr, b: Expr) -> Expr:
    return scaled("sub")(b, a)


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    if (a.dtype == "bool") != (b.dtype == "bool"):
        a, b = truth_as_int(a), truth_as_int(b)
    return apply("where", condition, a, b)


def masked_fill(x: Expr, mask: Expr, value: Expr) -> Expr:
    return where(mask, value, x)


def clamp_between(x: Expr, min: Expr | None = None, max: Expr | None = None) -> Expr:
    if min is not None and max is not None:
        return clamp(x, min, max)
    if min is None and max is None:
        raise Fault("clamp without a bound")
    return apply("max", x, min) if min is not None else apply("min", x, max or x)


def to_float(x: Expr) -> Expr:
    return apply("where", x, const(1.0), const(0.0)) if x.dtype == "bool" else operators.to_float(x)


def to_int(x: Expr) -> Expr:
    if is_float(x):
        raise Fault("a float cannot become an int", "compute it from the positions in ints, with // and %")
    return truth_as_int(x)


def to_bool(x: Expr) -> Expr:
    return x if x.dtype == "bool" else apply("ne", x, const(0) if is_int(x) else const(0.0))


def exclusive_or(a: Expr, b: Expr) -> Expr:
    if not a.dtype == b.dtype == "bool":
        raise Fault("^ on numbers", "only bools are joined by ^")
    return apply("ne", a, b)


def _logical(op: str) -> Meaning:
    return lambda *args: apply(op, *map(to_bool, args))


def relu(x: Expr) -> Expr:
    return apply("max", x, const(0.0) if is_float(x) else const(0))


def silu(x: Expr) -> Expr:
    return apply("mul", x, apply("sigmoid", x))


def square(x: Expr) -> Expr:
    return apply("mul", x, x)


def reciprocal(x: Expr) -> Expr:
    return apply("div", const(1.0), x)


def like(number: float) -> Meaning:
    """zeros_like and its kind: a constant of the argument's type."""

    def build(x: Expr) -> Expr:
        if x.dtype == "bool":
            return TRUE if number else FALSE
        return const(number) if is_float(x) else const(int(number))

    return build


UNARY: Final = (
    *("exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "abs", "sigmoid"),
    *("tanh", "sin", "cos", "erf", "floor", "neg"),
)
ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "mul": ("mul", "multiply"),
    "div": ("div", "divide", "true_divide"),
    "floordiv": ("floordiv", "floor_divide"),
    "mod": ("mod", "remainder"),
    "pow": ("pow",),
    "min": ("min", "minimum"),
    "max": ("max", "maximum"),
    "abs": ("absolute",),
    "neg": ("negative",),
}

MEANINGS: Final[Mapping[str, Meaning]] = {
    **{op: _arithmetic(op) for op in UNARY},
    **{word: _arithmetic(op) for op, words in ALIASES.items() for word in words},
    "add": scaled("add"),
    "sub": scaled("sub"),
    "subtract": scaled("sub"),
    **{op: compare(op) for op in ("lt", "le", "gt", "ge", "eq", "ne")},
    "less": compare("lt"),
    "less_equal": compare("le"),
    "greater": compare("gt"),
    "greater_equal": compare("ge"),
    "not_equal": compare("ne"),
    "bitwise_and": _plain("and"),
    "bitwise_or": _plain("or"),
    "bitwise_not": _plain("not"),
    "bitwise_xor": exclusive_or,
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_not": _logical("not"),
    "rsub": reverse_sub,
    "where": where,
    "masked_fill": masked_fill,
    "clamp": clamp_between,
    "clip": clamp_between,
    "clamp_min": lambda x, low: clamp_between(x, min=low),
    "clamp_max": lambda x, high: clamp_between(x, max=high),
    "relu": relu,
    "silu": silu,
    "square": square,
    "reciprocal": reciprocal,
    "float": to_float,
    "int": to_int,
    "long": to_int,
    "bool": to_bool,
    "zeros_like": like(0.0),
    "ones_like": like(1.0),
}

CASTS: Final[Mapping[str, Meaning]] = {
    **dict.fromkeys(("float32", "float64"), to_float),
    **dict.fromkeys(("int32", "int64"), to_int),
    "bool": to_bool,
}
"""What `.to(dtype)` means, by the dtype's name."""
