"""Mask macros: names for ordinary boolean expressions, one table row each and no case in the compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from attncc.ir.attention import Input
from attncc.ir.expr import TRUE, Dtype, Expr, bucket, const, eq, load, maximum, minimum, name, qdot, where
from attncc.spec.operators import Fault

b, i, j, row = (name(word) for word in ("b", "i", "j", "row"))
sq, sk = name("Sq"), name("Sk")

TREE_WORD_BITS: Final = 31
MAX_IMAGE_AXES: Final = 4

LOAD_DTYPES: Final[dict[str, Dtype]] = {
    "fp32": "f32",
    "fp16": "f32",
    "bf16": "f32",
    "int32": "i32",
    "int8": "i32",
    "uint8": "i32",
    "int64": "i64",
    "bool": "bool",
}

Kind = Literal["int", "count", "input", "shape"]


@dataclass(frozen=True, slots=True)
class Param:
    """An argument of a macro: an int expression, an int >= 1 where constant, an input, or a shape."""

    name: str
    kind: Kind
    default: int | None = None


@dataclass(frozen=True, slots=True)
class Macro:
    params: tuple[Param, ...]
    build: Callable[..., Expr]


def read(x: Input, *index: Expr) -> Expr:
    """The read of an input at one index an axis; an axis of size 1 is broadcast."""
    if len(index) != len(x.shape):
        axes = ", ".join(map(str, x.shape))
        plural = "axis" if len(x.shape) == 1 else "axes"
        raise Fault(f"input '{x.name}' has {len(x.shape)} {plural} [{axes}], got {len(index)} indices")
    where_from = [const(0) if size == 1 else at for size, at in zip(x.shape, index, strict=True)]
    return load(x.name, *where_from, dtype=LOAD_DTYPES[x.dtype])


def rank(x: Input, macro: str, *allowed: int) -> int:
    if len(x.shape) not in allowed:
        axes = " or ".join(map(str, allowed))
        raise Fault(f"{macro}({x.name}) needs an input of {axes} axes, '{x.name}' has {len(x.shape)}")
    return len(x.shape)


def count_up_to(x: Input, *index_and_x: Expr) -> Expr:
    """`bucket`: how many entries of the sorted row of `x` are <= the last argument."""
    if not x.sorted:
        raise Fault(f"bucket needs a sorted input, '{x.name}' is not", f"declare {x.name}: {{…, sorted: true}}")
    if len(index_and_x) != len(x.shape):
        raise Fault(f"bucket over '{x.name}' takes {len(x.shape) - 1} row indices and a value")
    return bucket(x.name, *index_and_x)


def rows_of(x: Input, *index: Expr) -> Expr:
    """`qdot`: the query times the row of `x` at these indices; its last axis has the query's entries."""
    if LOAD_DTYPES[x.dtype] != "f32":
        raise Fault(f"qdot multiplies floats, input '{x.name}' is {x.dtype}")
    if len(index) != len(x.shape) - 1:
        raise Fault(f"qdot over '{x.name}' takes {len(x.shape) - 1} indices, got {len(index)}")
    where_from = [const(0) if size == 1 else at for size, at in zip(x.shape, index, strict=False)]
    return qdot(x.name, *where_from)


def _causal() -> Expr:
    return j <= i


def _window(left: Expr, right: Expr) -> Expr:
    return (i - j < left) & (j - i <= right)


def _sink(n: Expr) -> Expr:
    return j < n


def _prefix(end: Expr) -> Expr:
    return j < end


def _integers(x: Input, macro: str) -> None:
    if LOAD_DTYPES[x.dtype] not in ("i32", "i64"):
        raise Fault(f"{macro} takes ints, input '{x.name}' is {x.dtype}")


def _document(x: Input) -> Expr:
    _integers(x, "document")
    if rank(x, "document", 1, 2) == 1:
        return eq(read(x, i), read(x, j))
    return eq(read(x, b, i), read(x, b, j))


def _segments(x: Input) -> Expr:
    if rank(x, "segments", 1, 2) == 1:
        return eq(count_up_to(x, i), count_up_to(x, j))
    return eq(count_up_to(x, b, i), count_up_to(x, b, j))


def _dilated(n: Expr) -> Expr:
    return eq((i - j) % n, 0)


def _chunked(n: Expr) -> Expr:
    return eq(i // n, j // n)


def _global_tokens(n: Expr) -> Expr:
    return (i < n) | (j < n)


def _neighborhood(shape: tuple[int, ...], kernel: tuple[int, ...]) -> Expr:
    """Along each axis a query sees the `kernel` keys nearest to it, the window kept inside the image.

    Tokens are the cells of `shape` in row-major order.
    """
    if len(shape) > MAX_IMAGE_AXES:
        raise Fault(f"neighborhood: at most {MAX_IMAGE_AXES} axes")
    if len(kernel) == 1:
        kernel = kernel * len(shape)
    if len(kernel) != len(shape):
        raise Fault(f"neighborhood: a shape of {len(shape)} axes and a kernel of {len(kernel)}")
    result, stride = TRUE, 1
    for axis in reversed(range(len(shape))):
        size, width = shape[axis], kernel[axis]
        if width > size:
            raise Fault(f"neighborhood: a kernel of {width} does not fit an axis of {size}")
        query, key = i // stride, j // stride
        if axis > 0:
            query, key = query % size, key % size
        first = minimum(maximum(query - width // 2, 0), size - width)
        inside = TRUE if width == size else (first <= key) & (key < first + width)
        result, stride = inside & result, stride * size
    return result


def _tree(x: Input) -> Expr:
    """Draft tokens of a speculation tree: each sees all that came before the tree, and its ancestors.

    The queries of this call are the tree, its tokens the last Sq keys. Bit t of `x[b, row]` (or `x[row]`)
    is set where token t is an ancestor of the row's token, or is it. A word holds 31 tokens; a further last
    axis holds further words.
    """
    _integers(x, "tree")
    axes = rank(x, "tree", 1, 2, 3)
    token = maximum(j - (sk - sq), 0)
    if axes == 3:
        word, bit, held = read(x, b, row, token // TREE_WORD_BITS), token % TREE_WORD_BITS, TRUE
    else:
        word = read(x, row) if axes == 1 else read(x, b, row)
        bit, held = token, token < TREE_WORD_BITS
    ancestor = held & eq(word // _power_of_two(bit) % 2, 1)
    return (j < sk - sq) | ancestor


def _power_of_two(bit: Expr) -> Expr:
    """2 ** bit for 0 <= bit < 31 in int32, where `**` has no int meaning for an exponent that varies."""
    result = where(eq(bit % 2, 1), 2, 1)
    for step in (2, 4, 8, 16):
        result = result * where(eq(bit // step % 2, 1), 2**step, 1)
    return result


MACROS: Final[dict[str, Macro]] = {
    "causal": Macro((), _causal),
    "window": Macro((Param("left", "int"), Param("right", "int", 0)), _window),
    "sink": Macro((Param("n", "int"),), _sink),
    "prefix": Macro((Param("end", "int"),), _prefix),
    "document": Macro((Param("x", "input"),), _document),
    "segments": Macro((Param("x", "input"),), _segments),
    "dilated": Macro((Param("n", "count"),), _dilated),
    "chunked": Macro((Param("n", "count"),), _chunked),
    "global_tokens": Macro((Param("n", "int"),), _global_tokens),
    "neighborhood": Macro((Param("shape", "shape"), Param("kernel", "shape")), _neighborhood),
    "tree": Macro((Param("x", "input"),), _tree),
}


def signature(macro: str) -> str:
    """`window(left, right=0)`, for messages."""
    params = MACROS[macro].params
    shown = [p.name if p.default is None else f"{p.name}={p.default}" for p in params]
    return f"{macro}({', '.join(shown)})" if shown else macro


def check_count(n: Expr, what: str) -> Expr:
    """Refuses a constant below 1 where the macro divides by it."""
    if n.value is not None and n.value < 1:
        raise Fault(f"{what} must be at least 1, this is {n.value}")
    return n
