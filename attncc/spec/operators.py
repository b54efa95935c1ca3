"""The operators of the spec language on expressions, each refusing operands it has no meaning for.

The expression parser and the tracer both build through here, so a formula means the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from attncc.ir.expr import FLOATS, INTS, OPS, Expr, cast_to, const, ew

MAX_EXPONENT: Final = 1024
INT_BITS: Final = 63


class Fault(ValueError):
    """An operand an operator cannot take; whoever knows the place turns it into a SpecError."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


SYMBOLS: Final[dict[str, str]] = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "and": "&",
    "or": "|",
    "not": "~",
    "neg": "-",
}
LOGICAL: Final = frozenset({"and", "or", "not"})
EQUALITY: Final = frozenset({"eq", "ne"})

_EXACT: Final[dict[str, Callable[[int, int], int]]] = {
    "add": int.__add__,
    "sub": int.__sub__,
    "mul": int.__mul__,
    "floordiv": int.__floordiv__,
    "mod": int.__mod__,
    "pow": int.__pow__,
}


def is_int(e: Expr) -> bool:
    return e.dtype in INTS


def is_float(e: Expr) -> bool:
    return e.dtype in FLOATS


def kind(e: Expr) -> str:
    """What a user calls the type of `e`."""
    return "bool" if e.dtype == "bool" else "float" if is_float(e) else "int"


def apply(op: str, *args: Expr) -> Expr:
    """The operator `op` of OPS on checked operands."""
    symbol = SYMBOLS.get(op, op)
    if op in LOGICAL:
        _want_bools(symbol, args)
    elif op == "where":
        _want_branches(args)
    elif not (op in EQUALITY and all(a.dtype == "bool" for a in args)):
        _want_numbers(symbol, args)
    if op == "pow":
        return _pow(*args)
    if op in _EXACT and all(is_int(a) for a in args):
        return _int_arithmetic(op, *args)
    if op == "neg" and is_float(args[0]) and args[0].value is not None:
        return const(-args[0].value, args[0].dtype)
    return _tidy(ew(op, *_meet(args)))


def _tidy(e: Expr) -> Expr:
    """Folding may leave an int in a wider type than its value needs; the language has no such int."""
    if e.op == "cast" and is_int(e) and is_int(e.args[0]):
        return e.args[0]
    return integer(e.value) if is_int(e) and isinstance(e.value, int) else e


def _meet(args: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Int literals beside floats become floats; a condition stays what it is."""
    if not any(is_float(a) for a in args):
        return args
    return tuple(const(float(a.value)) if is_int(a) and a.value is not None else a for a in args)


def integer(value: int) -> Expr:
    """An int literal, refused where 64 bits do not hold it."""
    if abs(value) >= 2**INT_BITS:
        raise Fault("an integer beyond 64 bits")
    return const(value)


def as_float(e: Expr, what: str) -> Expr:
    """`e` where a float is wanted: an int literal becomes one, anything else must be one."""
    if is_int(e) and e.value is not None:
        return const(float(e.value))
    if not is_float(e):
        hint = "write float(…)" if is_int(e) else "write where(…, 1.0, 0.0)"
        raise Fault(f"{what} must be a float, this is {'an int' if is_int(e) else 'a bool'}", hint)
    return e


def as_bool(e: Expr, what: str) -> Expr:
    if e.dtype != "bool":
        raise Fault(f"{what} must be a bool, this is {_a(kind(e))}", "compare it, as in … != 0")
    return e


def as_int(e: Expr, what: str) -> Expr:
    if not is_int(e):
        raise Fault(f"{what} must be an int, this is {_a(kind(e))}")
    return e


def truth_as_int(e: Expr) -> Expr:
    """A bool as 0 or 1, which is how torch counts with it."""
    return ew("where", e, 1, 0) if e.dtype == "bool" else e


def to_float(x: Expr) -> Expr:
    """The float of an int; floats stay what they are."""
    _want_numbers("float", (x,))
    return x if is_float(x) else cast_to(x, "f32")


def softcap(x: Expr, c: Expr) -> Expr:
    return apply("mul", c, apply("tanh", apply("div", x, c)))


def clamp(x: Expr, low: Expr, high: Expr) -> Expr:
    return apply("min", apply("max", x, low), high)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _want_bools(symbol: str, args: tuple[Expr, ...]) -> None:
    for a in args:
        if a.dtype != "bool":
            hint = "comparisons bind weaker than & and |: write (a < b) & (c < d)" if symbol in "&|" else ""
            raise Fault(f"'{symbol}' joins bools, this is {_a(kind(a))}", hint)


def _want_numbers(symbol: str, args: tuple[Expr, ...]) -> None:
    if any(a.dtype == "bool" for a in args):
        raise Fault(f"'{symbol}' takes numbers, not a bool", "write where(condition, a, b)")


def _want_branches(args: tuple[Expr, ...]) -> None:
    condition, a, b = args
    as_bool(condition, "the condition of where")
    if (a.dtype == "bool") != (b.dtype == "bool"):
        raise Fault(f"where chooses between {_a(kind(a))} and {_a(kind(b))}")


def _int_arithmetic(op: str, a: Expr, b: Expr) -> Expr:
    x, y = a.value, b.value
    if op in ("floordiv", "mod") and y == 0:
        raise Fault(f"'{SYMBOLS[op]}' by zero")
    if isinstance(x, int) and isinstance(y, int):
        return integer(_EXACT[op](x, y))
    return ew(op, a, b)


def _pow(base: Expr, exponent: Expr) -> Expr:
    n = exponent.value
    if n is not None and abs(n) > MAX_EXPONENT:
        raise Fault(f"the exponent {n} is out of bounds; at most {MAX_EXPONENT}")
    if not (is_int(base) and is_int(exponent)):
        return ew("pow", base, exponent)
    if not isinstance(n, int) or n < 0:
        raise Fault("an int to the power of an int that may be negative", "write a float base, as in 2.0 ** n")
    if isinstance(base.value, int):
        if abs(base.value) > 1 and n > INT_BITS:
            raise Fault("an integer beyond 64 bits")
        return integer(base.value**n)
    return ew("pow", base, exponent)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the language: its least and most arguments, and what builds it."""

    least: int
    most: int
    build: Callable[..., Expr]


def _op(op: str) -> Callable[..., Expr]:
    return lambda *args: apply(op, *args)


def _variadic(op: str) -> Callable[..., Expr]:
    def build(*args: Expr) -> Expr:
        result = args[0]
        for a in args[1:]:
            result = apply(op, result, a)
        return result

    return build


FUNCTIONS: Final[dict[str, Function]] = {
    **{
        op: Function(OPS[op].arity, OPS[op].arity, _op(op))
        for op in (
            *("exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "abs", "sigmoid"),
            *("tanh", "sin", "cos", "erf", "floor", "where"),
        )
    },
    "min": Function(2, 16, _variadic("min")),
    "max": Function(2, 16, _variadic("max")),
    "float": Function(1, 1, to_float),
    "softcap": Function(2, 2, softcap),
    "clamp": Function(3, 3, clamp),
}
