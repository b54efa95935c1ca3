"""Tile IR to Gluon source, for kernels of steps: the Triton printer's formulas, and a layout wherever a tile begins.

What is [64, columns] is spread over threads as `_fragments.py` says; of 16 bits, it is words. A vector is of rows or of
columns by the axis along which it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attncc.codegen.source import Writer, called, definitions, filled
from attncc.codegen.triton import ATOM, CALL, DTYPE, Printer, dim, signature, strides
from attncc.errors import CompilerBug
from attncc.ir.expr import INTS, Dim, Expr, const
from attncc.ir.rewrite import names, walk
from attncc.ir.tile import AtOnce, For, Function, Kernel, Let, Param, Statement, Store, every, reads

MODULE: Final = "_fragments"
TURN: Final = "TURN"
"""The constexpr by which two functions that multiply at once know which is the first to: then they take turns."""
CALLS: Final = CALL | {"sin": "sine", "cos": "cosine", "sigmoid": "sigmoid"}
"""Functions that Gluon has otherwise."""


def print_kernel(kernel: Kernel) -> list[str]:
    """The texts of a kernel's functions, and its own."""
    functions = {f.name: f for f in kernel.functions}
    return [_print(what, functions) for what in (*kernel.functions, kernel)]


def _print(what: Function | Kernel, functions: Mapping[str, Function]) -> str:
    is_entry = isinstance(what, Kernel)
    printer, inner = GluonPrinter(what.params, what.body, functions), Writer()
    with inner.indented():
        inner.line(f'"""{what.doc}"""')
        inner.block(printer.rooms())
        inner.block([f"begin_turns({TURN})"] * printer.takes_turns)
        for s in what.body:
            printer.statement(inner, s)
        inner.block([f"end_turns({TURN})"] * printer.takes_turns)
    dynamic = ", ".join(f'"{p.name}"' for p in what.params if p.role == "scalar" and p.dtype in INTS)
    head = Writer()
    head.line(f"@gluon.jit(do_not_specialize=[{dynamic}])" if is_entry else "@gluon.jit")
    signature(head, what.name, what.params, (), entry=is_entry)
    return as_gluon(head.text() + inner.text().rstrip())


def helpers_of(texts: Sequence[str]) -> list[str]:
    """Formulas that Triton's kernels call, too, as Gluon."""
    return [as_gluon(t) for t in definitions("helpers", called("helpers", texts) - fragments_in(texts))]


def fragments_in(texts: Sequence[str]) -> frozenset[str]:
    """The functions of `_fragments.py` that texts call themselves."""
    return frozenset(n for n in called(MODULE, texts) if any(re.search(rf"\b{n}\(", t) for t in texts))


def as_gluon(text: str) -> str:
    """Triton's words under Gluon's names."""
    return re.sub(r"\btl\.", "gl.", text.replace("@triton.jit", "@gluon.jit")).replace("BF16", "gl.bfloat16")


class GluonPrinter(Printer):
    """Prints a kernel or a function of one, whose tiles have 64 rows."""

    def __init__(
        self, params: Iterable[Param], body: tuple[Statement, ...], functions: Mapping[str, Function] = {}
    ) -> None:
        super().__init__(params, functions, {text: [] for text in functions}, CALLS)
        self.columns = _column_names(body)
        self.widest = max((int(s.value.shape[1]) for s in every(body) if isinstance(s, Store)), default=0)
        """Columns of the tiles like whose rows vectors of rows are spread."""
        self.width: Dim = self.widest
        """Those of the tile that is being printed."""
        self.along_columns = False
        """Whether what is counted are columns."""
        self.has_new_matrices = False
        self.kept = _kept(body)
        self.takes_turns = TURN in self.params
        self.coming = {str(s.var.attr): s.var for s in every(body) if isinstance(s, Let) and s.ahead}
        """Tiles that are on their way to shared memory until they are read."""

    def rooms(self) -> list[str]:
        """Where tiles come to."""
        return [f"{text} = room({dim(var.shape[1])})" for text, var in self.coming.items()]

    def statement(self, w: Writer, s: Statement) -> None:
        match s:
            case Let(var, value) if str(var.attr) in self.kept:
                note = f"  # {s.note}" if s.note else ""
                self.along_columns = len(var.shape) == 1
                w.line(f"{var.attr} = kept({self.expr(value)}){note}")
                return
            case Let(var, value, note, True):
                if value.op != "load" or value.args[4:]:
                    raise CompilerBug(f"Gluon has no text for what comes ahead as {value}")
                base, row, _ = self._place(self.params[str(value.attr)], value.args, None)
                w.line(f"bring({var.attr}, {base}, {row})" + (f"  # {note}" if note else ""))
                return
            case Let(_, value) if _is_matrix(value):
                self.has_new_matrices = True
            case Let(var) if len(var.shape) == 1:
                self.along_columns = str(var.attr) in self.columns
            case For() | AtOnce() if self.has_new_matrices:
                w.line("settle()")
                self.has_new_matrices = False
            case Store(tensor, index, value, mask):
                base, row, keep = self._place(self.params[tensor], index, mask)
                w.line(f"write_rows({base}, {row}, {self.expr(_uncast(value))}, {keep})")
                return
            case _:
                pass
        if isinstance(s, AtOnce):
            self._at_once(w, s)
        else:
            super().statement(w, s)

    def _at_once(self, w: Writer, s: AtOnce) -> None:
        w.line("gl.warp_specialize(")
        with w.indented():
            w.line("[")
            for call in s.calls:
                with w.indented():
                    w.line(f"({call.function}, (")
                    with w.indented():
                        w.block(filled(self.arguments(call.function, call.args)))
                    w.line(")),")
            w.line("],")
            w.line(f"{[*s.warps]}, {[*s.registers]},")
        w.line(")")

    def expr(self, e: Expr, outer: int = 0) -> str:
        before = self.width
        if len(e.shape) == 2 and e.shape[1] != 1:
            self.width = e.shape[1]
        text = super().expr(e, outer)
        self.width = before
        return text

    def structural(self, e: Expr, outer: int) -> str:
        match e.op:
            case "cast" if len(e.shape) == 2 and e.args[0].dtype == "bf16":
                return f"unpacked({self.expr(e.args[0])})"
            case "expand":
                return self._expanded(e)
            case "dot":
                return self._products(e)
            case "name" if str(e.attr) in self.coming:
                return f"arrived({e.attr}, {dim(e.shape[1])})"
            case "name" if str(e.attr) in self.kept:
                layout = "tile_of" if len(e.shape) == 2 else "columns_of"
                return f"{e.attr}.load({layout}({dim(e.shape[-1])}))"
            case _:
                return super().structural(e, outer)

    def shaped(self, e: Expr) -> str:
        match e.op:
            case "iota":
                count = dim(e.shape[0])
                layout = f"columns_of({count})" if self.along_columns else f"rows_of({self.widest})"
                return f"gl.arange(0, {count}, {layout})"
            case "full":
                rows, columns = e.shape
                value = self.expr(e.args[0])
                return f"gl.full([{dim(rows)}, {dim(columns)}], {value}, {DTYPE[e.dtype]}, tile_of({dim(columns)}))"
            case _:
                return super().shaped(e)

    def access(self, e: Expr) -> str:
        p = self.params[str(e.attr)]
        if p.role != "operand":
            return super().access(e)
        mask = e.args[4] if e.args[4:] else None
        base, row, keep = self._place(p, e.args[:4], mask)
        if _is_matrix(e):
            return f"held({base}, {strides(p)[2]}, {dim(e.shape[0])}, {dim(e.shape[1])})"
        return f"read_rows({', '.join([base, row, dim(e.shape[1]), *([keep] if keep else [])])})"

    def _expanded(self, e: Expr) -> str:
        """A vector as a tile of one row or column, spread like the tile around it."""
        before, self.along_columns = self.along_columns, e.attr == 0
        if e.attr == 0:
            text = f"{self.expr(e.args[0], ATOM)}[None, :]"
        elif self.width == self.widest:
            text = f"{self.expr(e.args[0], ATOM)}[:, None]"
        else:
            text = f"as_column({self.expr(e.args[0])}, {dim(self.width)})"
        self.along_columns = before
        return text

    def _place(self, p: Param, index: tuple[Expr, ...], mask: Expr | None) -> tuple[str, str, str]:
        """Where the head of an operand begins; its rows and how far they are apart; which are meant."""
        batch, head, rows, columns = index
        first = _first(columns)
        if batch.shape or head.shape or first is None or not _is_vector(rows, 1):
            raise CompilerBug(f"Gluon has no text for an access to {p.name} at {index}")
        if mask is not None and not _is_vector(mask, 1):
            raise CompilerBug(f"Gluon has no text for an access to {p.name} where {mask}")
        self.along_columns = False
        base = self.pointer(p, (batch, head, const(0), first))
        keep = "" if mask is None else self.expr(mask.args[0])
        return base, f"{self.expr(rows.args[0])}, {strides(p)[2]}", keep

    def _products(self, e: Expr) -> str:
        """Products that add up to one sum."""
        tiles: list[str] = []
        matrices: list[str] = []
        while e.op == "dot":
            tile, matrix, e = e.args
            tiles.insert(0, f"ones({self.widest})" if tile.op == "full" else self.expr(tile))
            matrices.insert(0, self.expr(matrix))
        turn = f", {TURN}" if self.takes_turns else ""
        return f"products({_tuple(tiles)}, {_tuple(matrices)}, {self.expr(e)}{turn})"


def _tuple(texts: Sequence[str]) -> str:
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"


def _uncast(e: Expr) -> Expr:
    """What is rounded when it is written."""
    return e.args[0] if e.op == "cast" else e


def _is_vector(e: Expr, axis: int) -> bool:
    return e.op == "expand" and e.attr == axis


def _first(columns: Expr) -> Expr | None:
    """The first of columns that follow each other, if they do."""
    at = columns.args[0] if _is_vector(columns, 0) else columns
    if at.op == "add" and at.args[1].op == "const":
        at, first = at.args
        return first if at.op == "iota" else None
    return const(0) if at.op == "iota" else None


def _is_matrix(e: Expr) -> bool:
    """Whether all rows of an operand are read, too."""
    return e.op == "load" and len(e.args) == 4 and _is_vector(e.args[2], 1) and e.args[2].args[0].op == "iota"


def _kept(body: tuple[Statement, ...]) -> frozenset[str]:
    """Tiles and columns of fp32 that loops read as they were bound before: they wait in shared memory."""
    found: set[str] = set()
    columns = _column_names(body)
    for loop in every(body):
        if isinstance(loop, For):
            inner = [*every(loop.body)]
            bound = {str(s.var.attr) for s in inner if isinstance(s, Let)}
            read = {n for s in inner for e in reads(s) for n in walk(e) if n.op == "name" and n.dtype == "f32"}
            found |= {str(n.attr) for n in read if len(n.shape) == 2 or str(n.attr) in columns} - bound
    return frozenset(found)


def _column_names(body: tuple[Statement, ...]) -> frozenset[str]:
    """Vectors that stand beside columns somewhere, and those that these are made of."""
    expressions = [e for s in every(body) for e in reads(s)]
    found = {text for e in expressions for node in walk(e) if _is_vector(node, 0) for text in names(node)}
    vectors = [s for s in every(body) if isinstance(s, Let) and len(s.var.shape) == 1]
    for s in reversed(vectors):
        if str(s.var.attr) in found:
            found |= names(s.value)
    return frozenset(found)
