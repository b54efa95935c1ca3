"""Tensors read by pair, such as a bias or a mask [queries, keys]: a tile of them is transposed before it is used.

Lanes are rows, so that such a read gathers for each key. Along the keys of one row it is a vector, and a square of
those changes places in registers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm import vector
from attncc.codegen.tvm.formulas import KEY_NAMES, ROW_NAMES, Array, Formulas, first_axes, kept, stored, widen
from attncc.codegen.tvm.isa import KEYS, Isa
from attncc.codegen.tvm.transposing import transposed, unaligned
from attncc.codegen.tvm.vector import Value, cast, elementwise, let, line, over_lanes, registers, whole, widened
from attncc.ir.expr import Expr
from attncc.ir.rewrite import names, walk

LINE: Final = 64
"""Bytes that memory gives at once."""
BYTES: Final = {"bool": 1, "int8": 1, "uint8": 1, "fp16": 2, "bf16": 2, "int64": 8}
"""Of an element; 4 of others."""


@dataclass(frozen=True, slots=True)
class Line:
    """An index that moves with the key by one: j, or -j, plus what no key moves."""

    falls: bool
    terms: tuple[tuple[int, Expr], ...]
    """Each with its sign."""


def line_of(e: Expr, sign: int = 1) -> Line | None:
    """The index as a line, if it is one."""
    match e.op:
        case "name" if e.attr == "j":
            return Line(sign < 0, ())
        case "cast":
            return line_of(e.args[0], sign)
        case "neg":
            return line_of(e.args[0], -sign)
        case "add" | "sub":
            signs = (sign, sign if e.op == "add" else -sign)
            moving = [n for n, a in enumerate(e.args) if names(a) & KEY_NAMES]
            if len(moving) != 1:
                return None
            (at,) = moving
            found = line_of(e.args[at], signs[at])
            rest = (signs[1 - at], e.args[1 - at])
            return None if found is None else Line(found.falls, (*found.terms, rest))
        case _:
            return None


def pair_loads(formulas: Iterable[Expr], arrays: Mapping[str, Array]) -> dict[Expr, Line]:
    """The reads whose last index is a line of keys, of rows that differ from query to query."""
    found: dict[Expr, Line] = {}
    for e in (node for formula in formulas for node in walk(formula) if node.op == "load"):
        if arrays[str(e.attr)].broadcasts[-1:] != (False,):
            continue
        *first, last = e.args
        line = line_of(last)
        by_row = any(names(a) & ROW_NAMES for a in e.args)
        if line is not None and by_row and not any(names(a) & KEY_NAMES for a in first):
            found[e] = line
    return found


class Pairs:
    """One read: where each row of the query tile begins, and the tile of keys that was read last, [KEYS, rows]."""

    def __init__(self, isa: Isa, formulas: Formulas, load: Expr, line: Line) -> None:
        self.isa, self.formulas, self.load, self.line = isa, formulas, load, line
        self.array = formulas.arrays[str(load.attr)]
        self.n0: Value = whole(0)
        self.starts = registers(isa.rows, "int64")
        self.outside = registers(isa.rows, "int32")
        self.may_be_outside = False
        least: Value | None = None
        most: Value | None = None
        for v in range(isa.vectors):
            first = [formulas.value(a, v) for a in load.args[:-1]]
            flat, outside = formulas.place(first_axes(self.array), first)
            place = T.ramp(whole(v * isa.lanes), 1, isa.lanes)
            if outside is not None:
                self.may_be_outside = True
                T.buffer_store(self.outside, widened(cast(outside, "int32"), isa.lanes), [place])
            offset: Value = whole(0, "int64")
            for sign, e in line.terms:
                term = cast(formulas.value(e, v), "int64")
                offset = elementwise(operator.add if sign > 0 else operator.sub, offset, term)
            offset = let(widened(offset, isa.lanes))
            start = elementwise(operator.add, flat, offset)
            T.buffer_store(self.starts, start, [place])
            least = offset if least is None else let(T.min(least, offset))
            most = offset if most is None else let(T.max(most, offset))
        self.least, self.most = let(over_lanes(T.min, least)), let(over_lanes(T.max, most))
        self.dtype = vector.kind(widen(self.array.flat[whole(0, "int64")], self.array.dtype))
        self.tile: Any = T.alloc_buffer((KEYS * isa.rows,), self.dtype, scope="local")

    def read(self, j: Value, v: int) -> Value:
        """What vector `v` of rows read for key j of the tile."""
        return self.tile[line(j - self.n0, v, self.isa)]

    def fill(self, n0: Value) -> None:
        """Reads the tile of keys that begins at `n0`."""
        self.n0, isa = n0, self.isa
        with T.If(self._is_run(n0, KEYS)):
            with T.Then(), T.serial(0, isa.vectors) as v, T.serial(0, KEYS // isa.lanes) as chunk:
                self._square(n0, let(chunk * isa.lanes), v)
            with T.Else(), T.serial(0, KEYS // isa.lanes) as chunk:
                n = let(chunk * isa.lanes)
                with T.If(self._is_run(n0 + n, isa.lanes)):
                    with T.Then(), T.serial(0, isa.vectors) as v:
                        self._square(n0, n, v)
                    with T.Else():
                        self._gather(n0, n)

    def expect(self, n0: Value, part: Value, parts: int) -> None:
        """Asks memory for one part of the rows that `fill` will read from `n0` on, while there is other work."""
        bytes_each, x = BYTES.get(self.array.dtype, 4), self.array
        a_line, a_part = LINE // bytes_each, -(-self.isa.rows // parts)
        first = let(cast(n0, "int64"))
        first = let(-(first + (KEYS - 1)) if self.line.falls else first)
        for r in range(a_part):
            start = let(self.starts[T.min(part * a_part + r, whole(self.isa.rows - 1))] + first)
            for n in range(0, KEYS, a_line):
                place = T.address_of(x.flat[start + n])
                T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", place, whole(0), whole(3), whole(1)))

    def _is_run(self, first: Value, count: int) -> Value:
        """Whether `count` keys are inside of the tensor for every row, and side by side in memory."""
        first = let(cast(first, "int64"))
        last = first + (count - 1)
        low, high = (last, first) if self.line.falls else (first, last)
        low, high = (self.least - low, self.most - high) if self.line.falls else (self.least + low, self.most + high)
        one = tirx.EQ(self.array.strides[-1], whole(1, "int64"))
        return let(tirx.And(one, tirx.And(low >= 0, high < self.array.shape[-1])))

    def _square(self, n0: Value, n: Value, v: Value) -> None:
        """As many keys as there are lanes, from the n-th of the tile on, for a vector of rows."""
        lanes, x = self.isa.lanes, self.array
        first = cast(n0 + n, "int64")
        first = let(-(first + (lanes - 1)) if self.line.falls else first)
        rows: list[Value] = []
        for r in range(lanes):
            at = let(self.starts[v * lanes + r] + first)
            rows.append(widen(let(unaligned(x.flat, at, lanes, stored(x.dtype))), x.dtype))
        columns = transposed(rows)
        outside = self.outside[T.ramp(v * lanes, 1, lanes)] if self.may_be_outside else None
        for c, column in enumerate(reversed(columns) if self.line.falls else columns):
            column = column if outside is None else kept(column, outside)
            T.buffer_store(self.tile, column, [line(n + c, v, self.isa)])

    def _gather(self, n0: Value, n: Value) -> None:
        """The same where the tensor ends, or a row of it is no run of memory."""
        f = self.formulas
        with T.serial(0, self.isa.lanes) as c:
            f.at_key(let(n0 + n + c))
            for v in range(self.isa.vectors):
                value = f.stored_value(self.array, [f.value(a, v) for a in self.load.args])
                T.buffer_store(self.tile, widened(value, self.isa.lanes), [line(n + c, v, self.isa)])
