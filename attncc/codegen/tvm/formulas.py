"""Formulas of the language as TVM expressions: `i` and `row` are vectors of query rows, `j` a scalar.

What no key moves is computed before the keys are walked; what no row moves, once a key. A read outside of its
tensor gives 0, as the language has it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm import vector
from attncc.codegen.tvm.isa import Machine
from attncc.codegen.tvm.operators import OPERATORS
from attncc.codegen.tvm.vector import (
    Value,
    cast,
    elementwise,
    joined,
    lanes,
    let,
    real,
    registers,
    select,
    signs,
    whole,
    widened,
)
from attncc.ir.expr import FLOATS, Expr
from attncc.ir.rewrite import names, walk

ROW_NAMES: Final = frozenset({"i", "row"})
KEY_NAMES: Final = frozenset({"j", "qk"})
DTYPES: Final = {"f32": "float32", "i32": "int32", "i64": "int64", "bool": "bool"}


@dataclass(frozen=True, slots=True)
class Array:
    """An extra tensor: its flat buffer, and extents and strides in elements (int64)."""

    flat: Any
    shape: tuple[Value, ...]
    strides: tuple[Value, ...]
    broadcasts: tuple[bool, ...]
    dtype: str
    """As the spec has it: fp32 fp16 bf16 int32 int64 int8 uint8 bool."""


OverRows = Callable[[Callable[[Value, Value], Value], Value], Value]
"""`pick` over all rows of the tile, given those of a vector."""


class Tile(Protocol):
    """A tensor that is read by pair, for a tile of keys at once."""

    def fill(self, n0: Value) -> None:
        """Reads the tile that begins at `n0`."""
        ...

    def read(self, j: Value, v: int) -> Value:
        """An entry a row of the vector `v`, not yet of the language's dtype."""
        ...


class Formulas:
    """Values of names at one place of a kernel, and what was computed there so far."""

    def __init__(
        self,
        isa: Machine,
        arrays: Mapping[str, Array],
        task: Mapping[str, Value],
        rows: list[dict[str, Value]],
        over_rows: OverRows = vector.over_lanes,
    ) -> None:
        self.isa, self.arrays, self.over_rows = isa, arrays, over_rows
        self.task = task
        """Scalars: b h hk scale and sizes."""
        self.rows = rows
        """i and row of each vector of rows."""
        self.key: dict[str, Value] = {}
        """j, while a key is looked at."""
        self.tiles: dict[Expr, Tile] = {}
        """What is read by pair, a tile of keys at a time."""
        self._kept: dict[tuple[Expr, int], Value] = {}
        """What does not move with keys, as long as it is kept."""
        self._of_key: dict[Expr, Value] = {}
        self._keeps = True

    def prepare(self, formulas: Iterable[Expr]) -> None:
        """Computes, here, every part of the formulas that no key moves."""
        for e in formulas:
            for part in _still_parts(e):
                for v in range(len(self.rows)) if names(part) & ROW_NAMES else (0,):
                    self.value(part, v)

    def seal(self) -> None:
        """From here on nothing more is kept: it would be of a branch or a loop that not every user of it is in."""
        self._keeps = False

    def read_tile(self, formulas: Iterable[Expr], n0: Value) -> None:
        """Reads, here, what the formulas read by pair of the tile of keys that begins at `n0`."""
        read = {node for e in formulas for node in walk(e)} if self.tiles else set[Expr]()
        for load, tile in self.tiles.items():
            if load in read:
                tile.fill(n0)

    def at_key(self, j: Value) -> None:
        """From here on `j` is this key."""
        self.key, self._of_key = {"j": j}, {}

    def value(self, e: Expr, v: int, qk: Value = None) -> Value:
        """The formula for the vector `v` of rows."""
        if e.op in ("const", "name"):  # has its place already
            return self._node(e, v, qk)
        reads = names(e)
        if not reads & KEY_NAMES:
            at = (e, v if reads & ROW_NAMES else 0)
            found = self._kept.get(at)
            if found is None:
                found = let(self._node(e, v, qk))
                if self._keeps:
                    self._kept[at] = found
            return found
        if not reads & ROW_NAMES and "qk" not in reads:
            if e not in self._of_key:
                self._of_key[e] = let(self._node(e, v, qk))
            return self._of_key[e]
        return self._node(e, v, qk)

    def _node(self, e: Expr, v: int, qk: Value) -> Value:
        match e.op:
            case "const":
                return _constant(e)
            case "name":
                return self._name(str(e.attr), v, qk)
            case "load":
                return self._load(e, v, qk)
            case "bucket":
                array = self.arrays[str(e.attr)]
                return self._bucket(array, [self.value(a, v, qk) for a in e.args])
            case "cast":
                return cast(self.value(e.args[0], v, qk), DTYPES[e.dtype])
            case "rows_min" | "rows_max":
                return self._over_rows(e)
            case op:
                args = joined(*(self.value(a, v, qk) for a in e.args))
                return OPERATORS[op](self.isa, e, args)

    def _name(self, text: str, v: int, qk: Value) -> Value:
        if text == "qk":
            return qk
        if text in ROW_NAMES:
            return self.rows[v][text]
        return self.key[text] if text in self.key else self.task[text]

    def _load(self, e: Expr, v: int, qk: Value) -> Value:
        if e in self.tiles:
            value = self.tiles[e].read(self.key["j"], v)
        else:
            value = self.stored_value(self.arrays[str(e.attr)], [self.value(a, v, qk) for a in e.args])
        if e.dtype == "bool":
            return tirx.NE(value, vector.none(value))
        return cast(value, DTYPES[e.dtype])

    def stored_value(self, x: Array, index: list[Value]) -> Value:
        """An entry, 0 outside; a condition is a number still."""
        flat, outside = self.place(x, index)
        value = widen(x.flat[flat], x.dtype)
        return value if outside is None else kept(value, outside)

    def place(self, x: Array, index: list[Value]) -> tuple[Value, Value | None]:
        """The flat address of an entry; and -1 where the index is outside, and the address another's, else 0."""
        flat: Value = whole(0, "int64")
        outside: Value | None = None
        for at, size, stride, broadcasts in zip(index, x.shape, x.strides, x.broadcasts, strict=True):
            if broadcasts:
                continue
            at = let(cast(at, "int64"))
            out = let(signs(at | elementwise(operator.sub, size - 1, at)))
            outside = out if outside is None else let(elementwise(operator.or_, outside, out))
            flat = let(elementwise(operator.add, flat, elementwise(operator.mul, at & ~out, stride)))
        return flat, outside

    def _bucket(self, x: Array, args: list[Value]) -> Value:
        """How many entries of a sorted row are <= the value: by bisection, lane by lane."""
        *row, value = args
        flat, outside = self.place(first_axes(x), row)
        flat, outside, value = joined(flat, whole(0, "int64") if outside is None else outside, cast(value, "int32"))
        count = lanes(value)
        starts, hidden = registers(count, "int64"), registers(count, "int64")
        given, found = registers(count, "int32"), registers(count, "int32")
        ends = registers(2, "int32")
        every = T.ramp(whole(0), 1, count) if count > 1 else whole(0)
        T.buffer_store(starts, flat, [every])
        T.buffer_store(hidden, outside, [every])
        T.buffer_store(given, value, [every])
        with T.serial(0, count) as lane:
            T.buffer_store(ends, whole(0), [0])
            T.buffer_store(ends, cast(x.shape[-1], "int32"), [1])
            with T.While(ends[0] < ends[1]):
                middle = let((ends[0] + ends[1]) >> whole(1))
                entry = widen(x.flat[starts[lane] + cast(middle, "int64") * x.strides[-1]], x.dtype)
                entry = kept(cast(entry, "int64"), hidden[lane])
                with T.If(entry <= cast(given[lane], "int64")):
                    with T.Then():
                        T.buffer_store(ends, middle + 1, [0])
                    with T.Else():
                        T.buffer_store(ends, middle, [1])
            T.buffer_store(found, ends[0], [lane])
        return found[every]

    def _over_rows(self, e: Expr) -> Value:
        """The least or greatest value over all rows of the tile."""
        pick: Callable[..., Value] = T.min if e.op == "rows_min" else T.max
        best: Value | None = None
        for v in range(len(self.rows)):
            some = let(widened(self.value(e.args[0], v), self.isa.lanes))
            best = some if best is None else let(pick(best, some))
        assert best is not None
        return self.over_rows(pick, best)


def _still_parts(e: Expr) -> Iterable[Expr]:
    """The largest parts that no key moves."""
    if not names(e) & KEY_NAMES:
        return () if e.op in ("const", "name") else (e,)
    return [part for a in e.args for part in _still_parts(a)]


def first_axes(x: Array) -> Array:
    return Array(x.flat, x.shape[:-1], x.strides[:-1], x.broadcasts[:-1], x.dtype)


def widen(x: Value, dtype: str) -> Value:
    """A stored value as fp32 or an integer: bf16 is kept as its bits, for TVM's own cast of a bound one is wrong."""
    if dtype == "bf16":
        count = lanes(x)
        shift = widened(whole(16, "uint32"), count)
        return T.reinterpret("float32" if count == 1 else f"float32x{count}", cast(x, "uint32") << shift)
    if dtype == "fp16" and vector.kind(x) == "uint16":
        return vector.converted("cvt.f32.f16", x, "float32")
    return cast(x, "float32") if dtype == "fp16" else cast(x, "int32") if dtype in ("int8", "uint8", "bool") else x


def narrow(x: Value, dtype: str) -> Value:
    """fp32 as it is stored, rounded to nearest even."""
    if dtype != "bf16":
        return cast(x, "float16") if dtype == "fp16" else x
    count = lanes(x)
    x = let(x)
    bits = let(T.reinterpret("uint32" if count == 1 else f"uint32x{count}", x))
    one, shift, half = (widened(whole(n, "uint32"), count) for n in (1, 16, 0x7FFF))
    rounded = (bits + (half + ((bits >> shift) & one))) >> shift
    return cast(select(vector.unequal(x, x), widened(whole(0x7FC0, "uint32"), count), rounded), "uint16")


STORED: Final = {"bf16": "uint16", "fp16": "float16", "fp32": "float32", "bool": "uint8"}


def stored(dtype: str) -> str:
    """What TVM calls an element of a tensor."""
    return STORED.get(dtype, dtype)


def kept(x: Value, outside: Value) -> Value:
    """A value, its bits cleared where `outside` has all of them set."""
    x, outside = joined(x, outside)
    dtype = str(x.ty)
    if vector.kind(x) == "float32":
        bits = T.reinterpret(dtype.replace("float", "int"), x)
        return T.reinterpret(dtype, bits & ~cast(outside, "int32"))
    return x & ~cast(outside, vector.kind(x))


def _constant(e: Expr) -> Value:
    match e.dtype:
        case "bool":
            return tirx.const(bool(e.attr), "bool")
        case dtype if dtype in FLOATS:
            return real(float(e.attr))  # type: ignore[arg-type]
        case dtype:
            return whole(int(e.attr), DTYPES[dtype])  # type: ignore[arg-type]


def unknown_operators(e: Expr) -> set[str]:
    """Operators of a formula that CPU kernels have no instruction for."""
    structural = {"const", "name", "load", "bucket", "cast", "rows_min", "rows_max"}
    return {node.op for node in walk(e)} - set(OPERATORS) - structural
