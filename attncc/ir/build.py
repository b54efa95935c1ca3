"""The builder that skeletons write tile IR with: statements in order, loops and branches as `with` blocks."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from attncc.ir.expr import Dim, Dtype, Expr, Shape, Value, broadcast, const, lift, name
from attncc.ir.rewrite import buffers, names
from attncc.ir.rules import HALVES, IN_TURN
from attncc.ir.tile import (
    AtOnce,
    Barrier,
    CallFn,
    For,
    Function,
    If,
    Let,
    Note,
    Param,
    Statement,
    Store,
    StoreTile,
    binds,
    block,
    every,
    reads,
    writes,
)


def program(axis: int = 0) -> Expr:
    """The number of this program along a launch axis."""
    return Expr("program", attr=axis, dtype="i32")


def iota(dim: Dim) -> Expr:
    """0, 1, … dim - 1."""
    return Expr("iota", attr=dim, dtype="i32", shape=(dim,))


def full(shape: Shape, value: float, dtype: Dtype = "f32") -> Expr:
    return Expr("full", (const(value, dtype),), None, dtype, shape)


def expand(x: Expr, axis: int) -> Expr:
    """`x` with a new axis of size 1."""
    return Expr("expand", (x,), axis, x.dtype, (*x.shape[:axis], 1, *x.shape[axis:]))


def column(x: Expr) -> Expr:
    """[M] -> [M, 1]."""
    return expand(x, 1)


def row(x: Expr) -> Expr:
    """[N] -> [1, N]."""
    return expand(x, 0)


def lanes(rows: Expr | None, columns: Expr | None) -> Expr | None:
    """The mask of a tile from those of its axes; None where all lanes count."""
    if rows is None or columns is None:
        return column(rows) if rows is not None else row(columns) if columns is not None else None
    return column(rows) & row(columns)


def reshape(x: Expr, shape: Shape) -> Expr:
    return Expr("reshape", (x,), None, x.dtype, shape)


def trans(x: Expr) -> Expr:
    return Expr("trans", (x,), None, x.dtype, x.shape[::-1])


def half(x: Expr, which: int, *, in_turn: bool = False) -> Expr:
    """The first (0) or the second (1) half of a matrix's columns; `in_turn`: every other one, from the first or the
    second on."""
    rows, columns = x.shape
    assert isinstance(columns, int), "its columns are counted"
    return Expr("half", (x,), HALVES[which + 2 * in_turn], x.dtype, (rows, columns // 2))


def joined(a: Expr, b: Expr, *, in_turn: bool = False) -> Expr:
    """The columns of `a`, then those of `b`, which has as many; or one of `a` and one of `b` in turn."""
    rows, columns = a.shape
    assert isinstance(columns, int), "its columns are counted"
    return Expr("joined", (a, b), IN_TURN if in_turn else None, a.dtype, (rows, 2 * columns))


def dot(a: Expr, b: Expr, acc: Expr | None = None, *, few: bool = False) -> Expr:
    """a [M, K] @ b [K, N] (+ acc), accumulated in fp32; `few`: M may be less than tensor cores multiply."""
    args = (a, b) if acc is None else (a, b, acc)
    return Expr("dot", args, "few" if few else None, "f32", (a.shape[0], b.shape[1]))


def unpack(words: Expr, what: str, bit: int, dtype: Dtype) -> Expr:
    """The fields of words from this bit on as numbers of a dtype; `what` they are: a key of `FIELDS`."""
    return Expr("unpack", (words,), (what, bit), dtype, words.shape)


def quotient(a: Value, b: Value) -> Expr:
    """a // b of integers known to be non-negative: the plain machine division."""
    e = lift(a) // b
    return Expr(e.op, e.args, "nonneg", e.dtype, e.shape) if e.op == "floordiv" else e


def remainder(a: Value, b: Value) -> Expr:
    """a % b of integers known to be non-negative."""
    e = lift(a) % b
    return Expr(e.op, e.args, "nonneg", e.dtype, e.shape) if e.op == "mod" else e


def reduce(op: str, x: Expr, axis: int) -> Expr:
    """max, min or sum over one axis."""
    return Expr("reduce", (x,), (op, axis), x.dtype, (*x.shape[:axis], *x.shape[axis + 1 :]))


def reduce_all(op: str, x: Expr) -> Expr:
    """max, min or sum over all of a tile."""
    return Expr("reduce", (x,), (op, "all"), x.dtype)


def read(buffer: Param, *index: Value, mask: Expr | None = None) -> Expr:
    """Elements of a buffer, one index per axis; 0 where the mask is false."""
    at = tuple(map(lift, index))
    shape = broadcast(*(i.shape for i in at), *(() if mask is None else (mask.shape,)))
    return Expr("load", at if mask is None else (*at, mask), buffer.name, buffer.dtype, shape)


def tile(operand: Param, b: Value, h: Value, row0: Value, column0: int, shape: tuple[Dim, Dim]) -> Expr:
    """A [rows, columns] tile of an operand, zero beyond its extent."""
    args = (lift(b), lift(h), lift(row0), const(column0))
    return Expr("tile", args, operand.name, operand.dtype, shape)


def fresh(text: str, taken: Collection[str]) -> str:
    """`text`, or with a number behind it the first that is not taken."""
    return next(word for word in (text, *(f"{text}_{n}" for n in range(2, len(taken) + 3))) if word not in taken)


def _bound(body: Iterable[Statement]) -> Iterator[str]:
    return (str(e.attr) for s in every(body) for e in binds(s))


@dataclass
class Builder:
    """Collects statements; knows the parameters that names of tensors stand for."""

    params: Mapping[str, Param]
    stack: list[list[Statement]] = field(default_factory=lambda: [[]])

    @property
    def body(self) -> tuple[Statement, ...]:
        (top,) = self.stack
        return tuple(top)

    def note(self, text: str) -> None:
        self.stack[-1].append(Note(text))

    def barrier(self) -> None:
        self.stack[-1].append(Barrier())

    def let(self, text: str, value: Value, note: str = "", *, ahead: bool = False) -> Expr:
        """Binds (or rebinds) a name and returns it."""
        value = lift(value)
        var = name(text, value.dtype, value.shape)
        self.stack[-1].append(Let(var, value, note, ahead))
        return var

    def store(self, buffer: Param, index: Sequence[Value], value: Expr, mask: Expr | None = None) -> None:
        self.stack[-1].append(Store(buffer.name, tuple(map(lift, index)), value, mask))

    def store_tile(self, operand: Param, b: Value, h: Value, row0: Value, column0: int, value: Expr) -> None:
        index = (lift(b), lift(h), lift(row0), const(column0))
        self.stack[-1].append(StoreTile(operand.name, index, value))

    @property
    def bound(self) -> set[str]:
        """The names that are bound so far, those of inner blocks among them."""
        return {name for level in self.stack for name in _bound(level)}

    def fresh(self, text: str) -> str:
        """`text`, or with a number behind it a name that is not bound yet."""
        return fresh(text, self.bound)

    def extend(self, body: Iterable[Statement]) -> None:
        """Statements made elsewhere."""
        self.stack[-1].extend(body)

    @contextmanager
    def loop(self, text: str, lo: Value, hi: Value, step: Value = 1) -> Generator[Expr]:
        var = name(text)
        self.stack.append([])
        yield var
        body = tuple(self.stack.pop())
        self.stack[-1].append(For(var, lift(lo), lift(hi), lift(step), body))

    @contextmanager
    def when(self, condition: Expr) -> Generator[None]:
        self.stack.append([])
        yield
        body = tuple(self.stack.pop())
        self.stack[-1].append(If(condition, body))

    def call(self, function: Function, targets: Iterable[Expr], **given: Value) -> None:
        """Calls a device function: an argument is `given`, or has the parameter's own name."""
        self.stack[-1].append(CallFn(tuple(targets), function.name, _arguments(function, given)))

    def at_once(
        self, calls: Iterable[tuple[Function, Mapping[str, Value]]], warps: tuple[int, ...], registers: tuple[int, ...]
    ) -> None:
        """Calls of device functions, with what is given, by warps of their own."""
        made = tuple(CallFn((), f.name, _arguments(f, given)) for f, given in calls)
        self.stack[-1].append(AtOnce(made, warps, registers))


def _arguments(function: Function, given: Mapping[str, Value]) -> tuple[Expr, ...]:
    """What is given, and the names of the other parameters."""
    return tuple(lift(given[p.name]) if p.name in given else name(p.name, p.dtype, p.shape) for p in function.params)


def function(
    text: str, body: Builder, results: Sequence[Expr], constexprs: Sequence[str] = (), doc: str = ""
) -> Function:
    """A device function around `body`; its parameters are the names the body reads and does not bind.

    Args:
        constexprs: which of them are fixed at compile time (knobs and flags), in the order they take.
    """
    free: dict[str, Expr] = {}
    tensors: dict[str, None] = {}
    _scan(body.body, set(), free, tensors)
    for e in results:
        if str(e.attr) not in free and str(e.attr) not in _bound(body.body):
            free[str(e.attr)] = e
    for tensor in tensors:  # a tile of an operand is bounded by its extent
        extent = body.params[tensor].extent
        for text_ in sorted(names(extent[0])) if extent else ():
            free.setdefault(text_, name(text_))
    first = [r for r in results if str(r.attr) in free]
    rest = [e for key, e in free.items() if e not in first and key not in constexprs]
    params = [
        *(Param(str(e.attr), "value", e.dtype, shape=e.shape) for e in first),
        *(body.params[t] for t in tensors),
        *(_value_param(e) for e in rest),
        *(Param(c, "constexpr", "i32") for c in constexprs),
    ]
    return Function(text, tuple(params), body.body, tuple(results), doc)


def needed(params: Iterable[Param], body: Iterable[Statement]) -> tuple[Param, ...]:
    """Those parameters that a kernel's body has a use for; constexprs are all kept."""
    free: dict[str, Expr] = {}
    tensors: dict[str, None] = {}
    _scan(body, set(), free, tensors)
    used = {*free, *tensors}
    params = tuple(params)
    for p in params:
        if p.name in used and p.extent:
            used |= names(p.extent[0])
    return tuple(p for p in params if p.role == "constexpr" or p.name in used)


def _value_param(e: Expr) -> Param:
    role = "value" if e.shape else "scalar"
    return Param(str(e.attr), role, e.dtype, shape=e.shape)


def _scan(body: Iterable[Statement], bound: set[str], free: dict[str, Expr], tensors: dict[str, None]) -> None:
    """Collects, in order of first use, the names read before they are bound, and the tensors touched."""
    for s in body:
        for e in reads(s):
            for node in _names(e):
                if str(node.attr) not in bound:
                    free.setdefault(str(node.attr), node)
            tensors.update(dict.fromkeys(sorted(buffers(e))))
        tensors.update(dict.fromkeys(writes(s)))
        bound.update(str(e.attr) for e in binds(s))
        _scan(block(s), bound, free, tensors)


def _names(e: Expr) -> Iterator[Expr]:
    """Name nodes of `e`, in reading order."""
    if e.op == "name":
        yield e
    for a in e.args:
        yield from _names(a)
