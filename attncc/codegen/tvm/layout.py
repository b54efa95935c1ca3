"""How a tile's scores and output lie in a kernel's buffers, as vectors of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.isa import KEYS, Isa, Machine
from attncc.codegen.tvm.vector import Value, line


class Layout(Protocol):
    """What a normalizer asks: `p` by keys and `o` by columns hold vectors of rows; there are `isa.vectors` of them."""

    @property
    def isa(self) -> Machine: ...

    @property
    def scales_queries(self) -> bool:
        """Whether a factor of all scores is multiplied into the queries as they are loaded."""
        ...

    p: Any
    o: Any

    def at(self, n: Value, v: int) -> Value:
        """Where vector `v` is, of key n in `p` or of column n in `o`."""
        ...

    def each_key(self, what: Callable[[Value], None]) -> None: ...

    def each_column(self, what: Callable[[Value], None]) -> None: ...

    def across(self, pick: Callable[[Value, Value], Value], rows: Any) -> None:
        """Combines a value a row with those that other threads have of the same rows."""
        ...


class Transposed:
    """[keys, rows] and [columns, rows]: lanes are consecutive rows, all of them in one thread."""

    scales_queries = True

    def __init__(self, isa: Isa, columns: int, p: Any, o: Any) -> None:
        self.isa, self.columns, self.p, self.o = isa, columns, p, o

    def at(self, n: Value, v: int) -> Value:
        return line(n, v, self.isa)

    def each_key(self, what: Callable[[Value], None]) -> None:
        with T.serial(0, KEYS) as n:
            what(n)

    def each_column(self, what: Callable[[Value], None]) -> None:
        with T.serial(0, self.columns) as d:
            what(d)

    def across(self, pick: Callable[[Value, Value], Value], rows: Any) -> None:
        """A row is no other thread's."""
