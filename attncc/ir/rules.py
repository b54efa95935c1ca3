"""The type rules of expressions: which arguments a node may have, and the dtype and shape that follow.

`faults` says, in words, what is wrong with a node over well-typed arguments; both levels share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

from attncc.ir.expr import FLOATS, INTS, OPS, STORED, WORD, Dim, Dtype, Expr, Shape, broadcast
from attncc.ir.fields import FIELDS, NUMBERS

Level = Literal["scalar", "tile"]
Type = tuple[Dtype, Shape]

REDUCTIONS: Final = ("max", "min", "sum")
HALVES: Final = (0, 1, "even", "odd")
"""Of a matrix's columns."""
IN_TURN: Final = "in turn"
"""How columns of two matrices are joined, if not one matrix behind the other."""


ATTRIBUTES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "const": (bool, int, float),
    "expand": int,
    "reduce": tuple,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """What formulas may know of a tensor: an input, a buffer or an operand."""

    dtype: Dtype
    rank: int
    tiles: tuple[tuple[Dim, Dim], ...] = ()
    """operand: the shapes in which it may be read; any where it names none."""
    is_operand: bool = False


class Mistyped(Exception):
    """A node breaks a rule; the message says which."""


def faults(e: Expr, tensors: Mapping[str, Tensor], level: Level) -> str:
    """What is wrong with this node, its arguments taken for granted; empty if nothing is."""
    try:
        dtype, shape = _type(e, tensors, level)
    except Mistyped as fault:
        return str(fault)
    if (e.dtype, e.shape) != (dtype, shape):
        return f"'{e.op}' is {show(e.dtype, e.shape)}, its arguments make it {show(dtype, shape)}"
    return ""


def show(dtype: Dtype, shape: Shape) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]" if shape else dtype


def malformed(e: Expr) -> bool:
    """Whether a node cannot even be printed: an unknown operator, a wrong number of arguments or kind of attribute."""
    if e.op in OPS:
        return len(e.args) != OPS[e.op].arity
    return e.op not in RULES or not _counts(e) or not isinstance(e.attr, ATTRIBUTES.get(e.op, object))


def require(holds: bool, message: str) -> None:
    if not holds:
        raise Mistyped(message)


def _type(e: Expr, tensors: Mapping[str, Tensor], level: Level) -> Type:
    if e.op in OPS:
        return _elementwise(e)
    require(e.op in RULES, f"'{e.op}' is no operator")
    rule = RULES[e.op]
    require(level in rule.levels, f"'{e.op}' does not exist at the {level} level")
    require(_counts(e), f"'{e.op}' takes {rule.arity} arguments, got {len(e.args)}")
    return rule.type(e, tensors)


KINDS: Final[Mapping[str, tuple[str, tuple[Dtype, ...]]]] = {
    "floordiv": ("nonneg", INTS),
    "mod": ("nonneg", INTS),
    "div": ("rounded", FLOATS),
    "tanh": ("fast", ("f32",)),
}
"""Operators that have a second kind, the attribute that says so, and the dtypes it is for."""


def _elementwise(e: Expr) -> Type:
    row = OPS[e.op]
    require(len(e.args) == row.arity, f"'{e.op}' takes {row.arity} arguments, got {len(e.args)}")
    dtypes: tuple[Dtype, ...] = tuple(a.dtype for a in e.args)
    if e.op in ("and", "or", "not"):
        require(set(dtypes) == {"bool"}, f"'{e.op}' takes booleans, got {', '.join(dtypes)}")
    if e.op == "where":
        require(dtypes[0] == "bool", f"'where' chooses by a boolean, got {dtypes[0]}")
        require((dtypes[1] == "bool") == (dtypes[2] == "bool"), f"'where' chooses {dtypes[1]} or {dtypes[2]}")
    if e.attr is not None:
        word, kind = KINDS.get(e.op, ("", ()))
        require(e.attr == word and set(dtypes) <= set(kind), f"'{e.op}' has no attribute {e.attr!r}")
    for dtype in (*STORED, WORD):
        require(dtype not in dtypes, f"'{e.op}' takes no {dtype}: cast it first")
    return row.dtype(dtypes), _joined(e.args)


def _joined(args: tuple[Expr, ...]) -> Shape:
    try:
        return broadcast(*(a.shape for a in args)) if args else ()
    except ValueError as error:
        raise Mistyped(str(error)) from None


def _index(name: str, index: tuple[Expr, ...]) -> None:
    for a in index:
        require(a.dtype in INTS, f"'{name}' is indexed by a {a.dtype}")


# -- one rule each -------------------------------------------------------------------------------


def _const(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    kinds: dict[type, bool] = {bool: e.dtype == "bool", int: e.dtype != "bool", float: e.dtype in FLOATS}
    require(kinds.get(type(e.attr), False), f"a constant {e.dtype} cannot be {e.attr!r}")
    return e.dtype, ()


def _load(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    tensor = _tensor(e, tensors)
    index = e.args[:-1] if e.args and e.args[-1].dtype == "bool" else e.args
    require(len(index) == tensor.rank, f"'{e.attr}' has {tensor.rank} axes, got {len(index)} indices")
    _index(str(e.attr), index)
    return tensor.dtype, _joined(e.args)


def _bucket(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    tensor = _tensor(e, tensors)
    rank = tensor.rank
    require(tensor.dtype in INTS, f"'bucket' searches integers, '{e.attr}' is {tensor.dtype}")
    require(len(e.args) in (rank, rank + 1), f"'{e.attr}' has {rank} axes, 'bucket' got {len(e.args)} arguments")
    _index(str(e.attr), e.args)
    return "i32", _joined(e.args)


def _qdot(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    tensor = _tensor(e, tensors)
    require(tensor.dtype in FLOATS, f"'qdot' multiplies floats, '{e.attr}' is {tensor.dtype}")
    require(len(e.args) == tensor.rank - 1, f"'{e.attr}' has {tensor.rank} axes, 'qdot' got {len(e.args)} indices")
    _index(str(e.attr), e.args)
    return "f32", _joined(e.args)


def _tile(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    tensor = _tensor(e, tensors)
    require(tensor.is_operand, f"'{e.attr}' is no operand, so it has no tiles")
    require(len(e.shape) == 2, f"a tile has rows and columns, got {show(e.dtype, e.shape)}")
    require(
        not tensor.tiles or e.shape in tensor.tiles,
        f"'{e.attr}' is declared with tiles {list(tensor.tiles)}, got {e.shape}",
    )
    _index(str(e.attr), e.args)
    require(_joined(e.args) == (), f"a tile of '{e.attr}' starts at scalars")
    return tensor.dtype, e.shape


def _tensor(e: Expr, tensors: Mapping[str, Tensor]) -> Tensor:
    require(str(e.attr) in tensors, f"tensor '{e.attr}' is not known")
    return tensors[str(e.attr)]


def _program(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    require(e.attr == 0, f"programs are numbered along axis 0, got {e.attr!r}")
    return "i32", ()


def _iota(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    require(isinstance(e.attr, (int, str)), f"'iota' counts a dim, got {e.attr!r}")
    return "i32", (e.attr,)  # type: ignore[return-value]


def _full(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    require(e.args[0].shape == (), f"'full' repeats a scalar, got {show(e.args[0].dtype, e.args[0].shape)}")
    return e.args[0].dtype, e.shape


def _expand(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    shape = e.args[0].shape
    require(type(e.attr) is int and 0 <= e.attr <= len(shape), f"no new axis {e.attr!r} in {list(shape)}")
    at = e.attr if isinstance(e.attr, int) else 0
    return e.args[0].dtype, (*shape[:at], 1, *shape[at:])


def _reshape(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    before = e.args[0].shape
    require(_size(before) == _size(e.shape), f"{list(before)} and {list(e.shape)} differ in size")
    return e.args[0].dtype, e.shape


def _size(shape: Shape) -> tuple[Fraction, Counter[str]]:
    """The product of dims: a number, and how often each knob is a factor."""
    number, knobs = Fraction(1), Counter[str]()
    for dim in shape:
        if isinstance(dim, int):
            number *= dim
        else:
            knob, _, divisor = dim.partition("/")
            knobs[knob] += 1
            number /= int(divisor or 1)
    return number, knobs


def _trans(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    shape = e.args[0].shape
    require(len(shape) == 2, f"'trans' takes a matrix, got {list(shape)}")
    return e.args[0].dtype, shape[::-1]


def _unpack(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    require(e.args[0].dtype == WORD, f"'unpack' takes words, got {e.args[0].dtype}")
    require(isinstance(e.attr, tuple) and len(e.attr) == 2, f"'unpack' has (what, first bit), got {e.attr!r}")
    what, bit = e.attr if isinstance(e.attr, tuple) else ("", 0)
    require(what in FIELDS and bit in range(0, 16, FIELDS[str(what)]), f"words have no {what} at bit {bit}")
    require(e.dtype in NUMBERS, f"'unpack' makes {' or '.join(NUMBERS)}, not {e.dtype}")
    return e.dtype, e.args[0].shape


def _half(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    rows, columns = _columns(e)
    require(e.attr in HALVES, f"a matrix has the halves {', '.join(map(str, HALVES))}, got {e.attr!r}")
    require(columns % 2 == 0, f"'half' takes an even number of columns, got {columns}")
    return e.args[0].dtype, (rows, columns // 2)


def _joined_columns(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    rows, columns = _columns(e)
    a, b = e.args
    require(e.attr in (None, IN_TURN), f"'joined' has no attribute {e.attr!r}")
    require((a.dtype, a.shape) == (b.dtype, b.shape), f"'joined' takes two of one type, got {show(b.dtype, b.shape)}")
    return a.dtype, (rows, 2 * columns)


def _columns(e: Expr) -> tuple[Dim, int]:
    """Rows and columns of a first argument that is a matrix whose columns are counted."""
    shape = e.args[0].shape
    require(len(shape) == 2 and isinstance(shape[1], int), f"'{e.op}' takes a matrix of so many columns, got {shape}")
    rows, columns = shape
    return rows, columns if isinstance(columns, int) else 0


def _dot(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    a, b = e.args[:2]
    require(len(a.shape) == len(b.shape) == 2, f"'dot' takes matrices, got {list(a.shape)} and {list(b.shape)}")
    require(a.shape[1] == b.shape[0], f"'dot' of {list(a.shape)} and {list(b.shape)}: inner dims differ")
    require(e.attr in (None, "few"), f"'dot' has no attribute {e.attr!r}")
    require(a.dtype == b.dtype and a.dtype not in (*STORED, WORD), f"'dot' of {a.dtype} and {b.dtype}")
    out: Type = ("f32" if a.dtype in FLOATS else "i32", (a.shape[0], b.shape[1]))
    for acc in e.args[2:]:
        require((acc.dtype, acc.shape) == out, f"'dot' adds to {show(*out)}, got {show(acc.dtype, acc.shape)}")
    return out


def _reduce(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    shape = e.args[0].shape
    require(isinstance(e.attr, tuple) and len(e.attr) == 2, f"'reduce' has (kind, axis), got {e.attr!r}")
    kind, axis = e.attr if isinstance(e.attr, tuple) else ("", -1)
    require(kind in REDUCTIONS, f"no reduction '{kind}'")
    if axis == "all":
        return e.args[0].dtype, ()
    require(isinstance(axis, int) and 0 <= axis < len(shape), f"no axis {axis!r} in {list(shape)}")
    at = int(axis)
    return e.args[0].dtype, (*shape[:at], *shape[at + 1 :])


def _cumsum(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    require(len(e.args[0].shape) == 1, f"'cumsum' takes one axis, got {list(e.args[0].shape)}")
    return e.args[0].dtype, e.args[0].shape


def _same(e: Expr, tensors: Mapping[str, Tensor]) -> Type:
    return e.args[0].dtype, e.args[0].shape


@dataclass(frozen=True, slots=True)
class Rule:
    """Where a structural operator exists, how many arguments it takes, and its type."""

    levels: tuple[Level, ...]
    arity: tuple[int, ...]
    """The possible counts; empty where the tensor decides."""
    type: Callable[[Expr, Mapping[str, Tensor]], Type]


BOTH: Final[tuple[Level, ...]] = ("scalar", "tile")
TILE: Final[tuple[Level, ...]] = ("tile",)

RULES: Final[dict[str, Rule]] = {
    "const": Rule(BOTH, (0,), _const),
    "name": Rule(BOTH, (0,), lambda e, tensors: (e.dtype, e.shape)),
    "load": Rule(BOTH, (), _load),
    "bucket": Rule(BOTH, (), _bucket),
    "qdot": Rule(("scalar",), (), _qdot),
    "rows_min": Rule(("scalar",), (1,), _same),
    "rows_max": Rule(("scalar",), (1,), _same),
    "cast": Rule(BOTH, (1,), lambda e, tensors: (e.dtype, e.args[0].shape)),
    "program": Rule(TILE, (0,), _program),
    "iota": Rule(TILE, (0,), _iota),
    "full": Rule(TILE, (1,), _full),
    "expand": Rule(TILE, (1,), _expand),
    "reshape": Rule(TILE, (1,), _reshape),
    "trans": Rule(TILE, (1,), _trans),
    "unpack": Rule(TILE, (1,), _unpack),
    "half": Rule(TILE, (1,), _half),
    "joined": Rule(TILE, (2,), _joined_columns),
    "dot": Rule(TILE, (2, 3), _dot),
    "reduce": Rule(TILE, (1,), _reduce),
    "cumsum": Rule(TILE, (1,), _cumsum),
    "tile": Rule(TILE, (4,), _tile),
}


def _counts(e: Expr) -> bool:
    arity = RULES[e.op].arity
    return not arity or len(e.args) in arity


def leaves_first(e: Expr) -> Iterable[Expr]:
    """Every distinct node of `e`, arguments before what uses them."""
    found: dict[int, Expr] = {}

    def go(node: Expr) -> None:
        if id(node) not in found:
            for a in node.args:
                go(a)
            found[id(node)] = node

    go(e)
    return found.values()
