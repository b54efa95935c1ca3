"""The language's operators as TVM expressions: one row each, over arguments that were joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm import vector
from attncc.codegen.tvm.isa import Machine
from attncc.codegen.tvm.vector import Value, cast, lanes, let, real, select, widened
from attncc.errors import Unsupported
from attncc.ir.expr import FLOATS, INTS, Expr

Operator = Callable[[Machine, Expr, list[Value]], Value]


def _plain(f: Callable[..., Value]) -> Operator:
    """Over arguments of one dtype, the widest among them."""

    def apply(isa: Machine, e: Expr, args: list[Value]) -> Value:
        return f(*_alike(args))

    return apply


def _decision(f: Callable[..., Value]) -> Operator:
    """A condition, under a name."""
    return lambda isa, e, args: let(f(*_alike(args)))


def _alike(args: list[Value]) -> list[Value]:
    kinds = {vector.kind(a) for a in args}
    for dtype in ("float32", "int64", "int32"):
        if dtype in kinds:
            return [cast(a, dtype) for a in args]
    return args


def _real(f: Callable[..., Value]) -> Operator:
    """Over floats, with the instruction set at hand; nested ones would take TVM minutes, as integers do."""

    def apply(isa: Machine, e: Expr, args: list[Value]) -> Value:
        return f(*(vector.opaque(cast(a, "float32")) for a in args), isa)

    return apply


def _floordiv(isa: Machine, e: Expr, args: list[Value]) -> Value:
    a, b = _alike(args)
    return T.floor(a / b) if e.dtype in FLOATS else vector.quotient(a, b)


def _mod(isa: Machine, e: Expr, args: list[Value]) -> Value:
    a, b = _alike(args)
    if e.dtype not in FLOATS:
        return vector.remainder(a, b)
    a, b = let(a), let(b)
    return a - T.floor(a / b) * b


def _extreme(over: Callable[[Value, Value], Value]) -> Operator:
    """min or max, NaN if either is."""

    def apply(isa: Machine, e: Expr, args: list[Value]) -> Value:
        a, b = map(vector.opaque, _alike(args))
        if e.dtype not in INTS:
            return select(let(tirx.Or(over(a, b), vector.unequal(a, a))), a, b)
        chosen = let(cast(over(a, b), vector.kind(a)))  # 1 or 0
        return let(b + (a - b) * chosen)

    return apply


def _where(isa: Machine, e: Expr, args: list[Value]) -> Value:
    return select(args[0], *_alike(args[1:]))


def _magnitude(x: Value) -> Value:
    x = vector.opaque(x)
    return select(let(x < vector.none(x)), -x, x)


def _power(isa: Machine, e: Expr, args: list[Value]) -> Value:
    if e.dtype in INTS:
        raise Unsupported("whole numbers to a power that is not a small constant", "score")
    return T.pow(*(cast(a, "float32") for a in args))


OPERATORS: Final[dict[str, Operator]] = {
    "add": _plain(lambda a, b: a + b),
    "sub": _plain(lambda a, b: a - b),
    "mul": _plain(lambda a, b: a * b),
    "div": _real(lambda a, b, isa: a / b),
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _power,
    "neg": _plain(lambda a: -a),
    "abs": _plain(_magnitude),
    "min": _extreme(lambda a, b: a < b),
    "max": _extreme(lambda a, b: a > b),
    "where": _where,
    "lt": _decision(lambda a, b: a < b),
    "le": _decision(lambda a, b: a <= b),
    "gt": _decision(lambda a, b: a > b),
    "ge": _decision(lambda a, b: a >= b),
    "eq": _decision(vector.equal),
    "ne": _decision(vector.unequal),
    "and": _decision(tirx.And),
    "or": _decision(tirx.Or),
    "not": _decision(tirx.Not),
    "exp": _real(vector.exp),
    "exp2": _real(vector.exp2),
    "sigmoid": _real(vector.sigmoid),
    "tanh": _real(vector.tanh),
    "sqrt": _real(lambda x, isa: T.sqrt(x)),
    "rsqrt": _real(lambda x, isa: widened(real(1.0), lanes(x)) / T.sqrt(x)),
    "floor": _real(lambda x, isa: T.floor(x)),
    **{name: _real(vector.called(name)) for name in ("log", "log2", "log1p", "sin", "cos", "erf")},
}
