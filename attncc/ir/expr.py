"""The one expression node of both IR levels, the OPS table, and the constructors.

An `Expr` is a scalar formula in `ir.attention` (its shape is empty) and a tile of values in `ir.tile`.
Elementwise operators are the rows of `OPS`; the few others are listed in `STRUCTURAL`. `intervals` and
`derivatives` hold what else is known of each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np

Dim = str | int
Shape = tuple[Dim, ...]
Dtype = Literal["bool", "i8", "u8", "i16", "i32", "i64", "f8e4m3", "f8e5m2", "f16", "bf16", "f32", "f64"]
Attr = bool | int | float | str | tuple["str | int", ...] | None

FLOATS: Final[tuple[Dtype, ...]] = ("f16", "bf16", "f32", "f64")
STORED: Final[tuple[Dtype, ...]] = ("f8e4m3", "f8e5m2")
"""Floats that memory holds and no operator takes: they are cast to one of `FLOATS` first."""
WORD: Final[Dtype] = "i16"
"""Two bytes of codes, which no operator takes: their fields are unpacked first."""
INTS: Final[tuple[Dtype, ...]] = ("i8", "u8", "i32", "i64")

STRUCTURAL: Final[dict[str, str]] = {
    # both levels
    "const": "attr: the number",
    "name": "attr: a variable, parameter, size or knob",
    "load": "attr: buffer; args: one index per axis (tile level: a mask behind them, if any)",
    "bucket": "attr: a buffer sorted along its last axis; args: leading indices, then x; "
    "value: how many entries of that row are <= x (tile level: the row's length behind them)",
    # scalar level
    "qdot": "attr: a buffer; args: one index per axis but the last; value: the query times that row",
    # scalar level, made by the mask solver
    "rows_min": "args: an expression of i; the least value over the rows of the query tile",
    "rows_max": "args: an expression of i; the greatest value over the rows of the query tile",
    # tile level
    "program": "attr: launch axis",
    "iota": "attr: dim; value: 0, 1, … dim - 1",
    "full": "args: the scalar that fills the shape",
    "expand": "attr: where the new axis of size 1 goes",
    "reshape": "the shape says it",
    "trans": "a matrix, transposed",
    "half": "attr: 0 or 1, or 'even' or 'odd'; args: a matrix of an even number of columns; value: half of them",
    "joined": "attr: None or 'in turn'; args: two matrices of one shape; value: one behind the other, or in turn",
    "cast": "the dtype says it",
    "unpack": "attr: (what, first bit) of a field of words; value: numbers, i8 and f8e4m3 as they are, u8 less 128, u4 "
    "less 8",
    "dot": "args: a [M, K], b [K, N] and, if any, the accumulator [M, N]; attr: 'few' where M may be less than tensor "
    "cores multiply",
    "reduce": "attr: (max | sum | min, axis), the axis 'all' leaves a scalar",
    "cumsum": "the running sum of a vector, inclusive",
    "tile": "attr: operand; args: b, h, first row, first column; shape: [rows, columns] of the tile",
}


@dataclass(frozen=True, slots=True)
class Expr:
    """An immutable typed value; `op` is a key of `OPS` or of `STRUCTURAL`."""

    op: str
    args: tuple[Expr, ...] = ()
    attr: Attr = None
    dtype: Dtype = "f32"
    shape: Shape = ()

    def __add__(self, other: Value) -> Expr:
        return ew("add", self, other)

    def __radd__(self, other: Value) -> Expr:
        return ew("add", other, self)

    def __sub__(self, other: Value) -> Expr:
        return ew("sub", self, other)

    def __rsub__(self, other: Value) -> Expr:
        return ew("sub", other, self)

    def __mul__(self, other: Value) -> Expr:
        return ew("mul", self, other)

    def __rmul__(self, other: Value) -> Expr:
        return ew("mul", other, self)

    def __truediv__(self, other: Value) -> Expr:
        return ew("div", self, other)

    def __rtruediv__(self, other: Value) -> Expr:
        return ew("div", other, self)

    def __floordiv__(self, other: Value) -> Expr:
        return ew("floordiv", self, other)

    def __mod__(self, other: Value) -> Expr:
        return ew("mod", self, other)

    def __pow__(self, other: Value) -> Expr:
        return ew("pow", self, other)

    def __neg__(self) -> Expr:
        return ew("neg", self)

    def __lt__(self, other: Value) -> Expr:
        return ew("lt", self, other)

    def __le__(self, other: Value) -> Expr:
        return ew("le", self, other)

    def __gt__(self, other: Value) -> Expr:
        return ew("gt", self, other)

    def __ge__(self, other: Value) -> Expr:
        return ew("ge", self, other)

    def __and__(self, other: Value) -> Expr:
        return ew("and", self, other)

    def __or__(self, other: Value) -> Expr:
        return ew("or", self, other)

    def __invert__(self) -> Expr:
        return ew("not", self)

    @property
    def value(self) -> bool | int | float | None:
        """The number of a `const`, else None."""
        return cast("bool | int | float", self.attr) if self.op == "const" else None


Value = Expr | bool | int | float


def const(value: bool | int | float, dtype: Dtype | None = None) -> Expr:
    """A number; Python's type picks the dtype unless one is given.

    Equal nodes must mean equal values, and Python's 0.0 and -0.0 are equal: the latter becomes a negation.
    """
    if isinstance(value, float) and value == 0.0 and math.copysign(1.0, value) < 0:
        return Expr("neg", (const(0.0, dtype),), None, dtype or "f32")
    if dtype is None:
        wide: Dtype = "i64" if abs(value) >= 2**31 else "i32"
        dtype = "bool" if isinstance(value, bool) else wide if isinstance(value, int) else "f32"
    return Expr("const", attr=value, dtype=dtype)


TRUE: Final = const(True)
FALSE: Final = const(False)


def lift(value: Value) -> Expr:
    return value if isinstance(value, Expr) else const(value)


def name(text: str, dtype: Dtype = "i32", shape: Shape = ()) -> Expr:
    """A variable, parameter, size or knob by its name."""
    return Expr("name", attr=text, dtype=dtype, shape=shape)


def load(buffer: str, *index: Value, dtype: Dtype = "f32") -> Expr:
    """A value of an input tensor: one index per axis."""
    return Expr("load", tuple(map(lift, index)), buffer, dtype)


def bucket(buffer: str, *index_and_x: Value) -> Expr:
    """How many entries of the sorted row `buffer[index…]` are <= x (the last argument)."""
    return Expr("bucket", tuple(map(lift, index_and_x)), buffer, "i32")


def qdot(buffer: str, *index: Value) -> Expr:
    """The dot product of the query with the row `buffer[index…]`, which has Dqk entries."""
    return Expr("qdot", tuple(map(lift, index)), buffer, "f32")


def broadcast(*shapes: Shape) -> Shape:
    """The common shape, by NumPy's rule; a size-1 axis is the int 1."""
    rank = max(map(len, shapes), default=0)
    out: list[Dim] = []
    for axis in range(-rank, 0):
        sizes = {s[axis] for s in shapes if len(s) >= -axis} - {1}
        if len(sizes) > 1:
            raise ValueError(f"shapes {shapes} do not broadcast")
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def ew(op: str, *args: Value) -> Expr:
    """An elementwise operator of `OPS`, folded where it keeps the exact value."""
    exprs = tuple(map(lift, args))
    row = OPS[op]
    if len(exprs) != row.arity:
        raise ValueError(f"'{op}' takes {row.arity} arguments, got {len(exprs)}")
    shape = broadcast(*(e.shape for e in exprs))
    node = Expr(op, exprs, None, row.dtype(tuple(e.dtype for e in exprs)), shape)
    return fold(node)


def eq(a: Value, b: Value) -> Expr:
    """`a == b` as an expression (Python's `==` on nodes compares their structure)."""
    return ew("eq", a, b)


def where(condition: Value, a: Value, b: Value) -> Expr:
    return ew("where", condition, a, b)


def minimum(a: Value, b: Value) -> Expr:
    return ew("min", a, b)


def maximum(a: Value, b: Value) -> Expr:
    return ew("max", a, b)


def divide_exactly(a: Value, b: Value) -> Expr:
    """a / b as IEEE rounds it, where the plain division of a GPU may be off by an ulp or two."""
    e = lift(a) / b
    return Expr(e.op, e.args, "rounded", e.dtype, e.shape)


def cast_to(e: Expr, dtype: Dtype) -> Expr:
    """`e` in another dtype; nothing where it has it already, a constant stays one."""
    if e.dtype == dtype:
        return e
    if e.value is not None:
        number = float(e.value) if dtype in FLOATS else bool(e.value) if dtype == "bool" else int(e.value)
        return const(number, dtype)
    return Expr("cast", (e,), None, dtype, e.shape)


# -- the operators -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Op:
    """One row: how many arguments, the dtype of the result, and what it means."""

    arity: int
    dtype: Callable[[tuple[Dtype, ...]], Dtype]
    numpy: Callable[..., Any]


def _join(dtypes: tuple[Dtype, ...]) -> Dtype:
    floats: list[Dtype] = [d for d in dtypes if d in FLOATS]
    if floats:
        return max(floats, key=FLOATS.index) if set(floats) != {"f16", "bf16"} else "f32"
    return "i64" if "i64" in dtypes else "i32"


def _real(dtypes: tuple[Dtype, ...]) -> Dtype:
    joined = _join(dtypes)
    return joined if joined in FLOATS else "f32"


def _bool(_: tuple[Dtype, ...]) -> Dtype:
    return "bool"


def _select(dtypes: tuple[Dtype, ...]) -> Dtype:
    return "bool" if dtypes[1:] == ("bool", "bool") else _join(dtypes[1:])


def _sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def _rsqrt(x: Any) -> Any:
    return 1.0 / np.sqrt(x)


_erf = np.vectorize(math.erf, otypes=[np.float64])

OPS: Final[dict[str, Op]] = {
    "add": Op(2, _join, np.add),
    "sub": Op(2, _join, np.subtract),
    "mul": Op(2, _join, np.multiply),
    "div": Op(2, _real, np.true_divide),
    "floordiv": Op(2, _join, np.floor_divide),
    "mod": Op(2, _join, np.mod),
    "pow": Op(2, _join, np.power),
    "neg": Op(1, _join, np.negative),
    "abs": Op(1, _join, np.abs),
    "min": Op(2, _join, np.minimum),
    "max": Op(2, _join, np.maximum),
    "where": Op(3, _select, np.where),
    "lt": Op(2, _bool, np.less),
    "le": Op(2, _bool, np.less_equal),
    "gt": Op(2, _bool, np.greater),
    "ge": Op(2, _bool, np.greater_equal),
    "eq": Op(2, _bool, np.equal),
    "ne": Op(2, _bool, np.not_equal),
    "and": Op(2, _bool, np.logical_and),
    "or": Op(2, _bool, np.logical_or),
    "not": Op(1, _bool, np.logical_not),
    "exp": Op(1, _real, np.exp),
    "exp2": Op(1, _real, np.exp2),
    "log": Op(1, _real, np.log),
    "log2": Op(1, _real, np.log2),
    "log1p": Op(1, _real, np.log1p),
    "sqrt": Op(1, _real, np.sqrt),
    "rsqrt": Op(1, _real, _rsqrt),
    "sigmoid": Op(1, _real, _sigmoid),
    "tanh": Op(1, _real, np.tanh),
    "sin": Op(1, _real, np.sin),
    "cos": Op(1, _real, np.cos),
    "erf": Op(1, _real, _erf),
    "floor": Op(1, _real, np.floor),
}


def fold(e: Expr) -> Expr:
    """Exact folding: integer and boolean constants, and neutral elements of either."""
    values = [a.value for a in e.args]
    floats = any(a.dtype in FLOATS for a in (e, *e.args))  # their constants are still to be rounded
    if not floats and None not in values and e.op != "pow":
        return _fold_constants(e, values)
    rule = NEUTRAL.get(e.op)
    new = rule(*e.args) if rule else None
    return cast_to(new, e.dtype) if new is not None and new.shape == e.shape else e


def _fold_constants(e: Expr, values: list[bool | int | float | None]) -> Expr:
    if e.op in ("floordiv", "mod") and values[1] == 0:
        return e
    result = OPS[e.op].numpy(*(np.array(v, dtype=object) for v in values))  # Python's own integers: no overflow
    if e.dtype == "bool":
        return const(bool(result))
    if abs(result) >= 2**63:
        return e
    return const(int(result), "i64" if abs(result) >= 2**31 else e.dtype)


def _drop(unit: int) -> Rule:
    """Drops a neutral right or left operand; integers only, for -0.0 + 0 is not -0.0."""

    def rule(a: Expr, b: Expr) -> Expr | None:
        if a.dtype not in INTS or b.dtype not in INTS:
            return None
        return a if b.value == unit else b if a.value == unit else None

    return rule


def _fold_sub(a: Expr, b: Expr) -> Expr | None:
    if a.dtype not in INTS or b.dtype not in INTS:
        return None
    if a == b:
        return const(0)
    if b.value == 0:
        return a
    if a.op == "add":  # (x + c) - x and (x + c) - d, which solved bounds are full of
        x, c = a.args
        return c if x == b else x if c == b else None
    return None


def _fold_floordiv(a: Expr, b: Expr) -> Expr | None:
    return a if b.value == 1 and a.dtype in INTS else None


def _fold_same(a: Expr, b: Expr) -> Expr | None:
    return a if a == b else None


def _fold_bool(unit: Expr, zero: Expr) -> Rule:
    def rule(a: Expr, b: Expr) -> Expr | None:
        if zero in (a, b):
            return zero
        return a if b == unit or a == b else b if a == unit else None

    return rule


def _fold_not(a: Expr) -> Expr | None:
    return a.args[0] if a.op == "not" else None


def _fold_where(c: Expr, a: Expr, b: Expr) -> Expr | None:
    return a if c == TRUE or a == b else b if c == FALSE else None


Rule = Callable[..., Expr | None]

NEUTRAL: Final[Mapping[str, Rule]] = {
    "add": _drop(0),
    "mul": _drop(1),
    "sub": _fold_sub,
    "floordiv": _fold_floordiv,
    "min": _fold_same,
    "max": _fold_same,
    "and": _fold_bool(TRUE, FALSE),
    "or": _fold_bool(FALSE, TRUE),
    "not": _fold_not,
    "where": _fold_where,
}
