"""Ribbons: what of an engine's scores moves with i - j alone, as two lines of numbers that a kernel writes.

A tile of `bias[h, i - j + N]` holds no more than rows + keys different numbers, of which threads read their own. The
second line is one off, so that two neighbours stand at an even place for every row.

Where a score is f * qk + t with one positive f for all pairs, it is f * (qk + t / f): the lines then hold t / f, and
products are added to that, which costs no instruction. Products of few bits are not, for their sums have few bits, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, iota, program, quotient, remainder
from attncc.ir.expr import Expr, cast_to, const, name
from attncc.ir.rewrite import names, rebuild, transform, walk
from attncc.ir.tile import Kernel, Param, Scratch
from attncc.passes.lower.grid import cdiv, size_parameters
from attncc.passes.lower.quantize import QK
from attncc.passes.lower.scores import input_param, own_name
from attncc.passes.lower.skew import CHUNK, Diagonal, moved, scope_of, split_diagonals, table_of, tables
from attncc.passes.lower.tidy import tidy

LINES: Final = 2
LINE: Final = 256
"""Numbers of a line that come with a key tile."""
ROWS: Final = 64
"""Of a query tile that they are for."""
STAGGER: Final = 16
"""So many columns the second line is behind: threads read both at once, out of different banks."""
QUERIES: Final = 384
"""What the rows of an engine's query tiles divide."""
KEYS: Final = 128
SCALE: Final = Param("scale", "scalar", "f32")


@dataclass(frozen=True, slots=True)
class Ribbon:
    """A term over `d`, which is i - j; `opens`: scores begin with it."""

    name: str
    term: Diagonal
    opens: bool

    @property
    def operand(self) -> Param:
        """As the engine reads it."""
        return Param(self.name, "operand", "f32", rank=4, tiles=((LINES, LINE),), doc="lines of what moves with i - j")

    @property
    def written(self) -> Param:
        return Param(self.name, "buffer", "f32", rank=4, doc="two lines, the second one off")


def split(attn: Attention) -> tuple[Attention, Ribbon | None]:
    """The variant without what its scores begin with, and that; or as it is, and what its formula reads besides."""
    score, diagonals = split_diagonals(attn)
    if not diagonals:
        return attn, None
    text, d = own_name("ribbon", attn), diagonals[0]
    found: list[Expr] = []

    def step(node: Expr) -> Expr | None:
        opened = _opened(node, d)
        if opened is None:
            return None
        found.append(opened[1])
        return opened[0]

    rest = transform(score, step)
    if attn.quantize or not found or _uses(score) > 1 or any(map(d.is_read_by, walk(rest))):
        return attn, Ribbon(text, d, opens=False)
    attn = replace(attn, parts=(replace(attn.part, score=rest),))
    return attn, Ribbon(text, replace(d, read=found[0]), opens=True)


def _uses(e: Expr) -> int:
    """How often a formula has qk."""
    return 1 if e == QK else sum(map(_uses, e.args))


def _opened(node: Expr, d: Diagonal) -> tuple[Expr, Expr] | None:
    """A sum's side that is f * qk, and the other one over f, where that moves with i - j alone."""
    if node.op not in ("add", "sub"):
        return None
    product, term = node.args if node.op == "sub" or _factor(node.args[0]) is not None else reversed(node.args)
    factor = _factor(product)
    term = transform(term, lambda x: d.read if d.is_read_by(x) else None)
    if factor is None or "d" not in names(term) or names(term) & {"i", "j", "row", "qk"}:
        return None
    term = term if factor.value == 1 else term / factor
    return product, term if node.op == "add" else -term


def _factor(e: Expr) -> Expr | None:
    """What multiplies qk, where that is positive; None where e is anything else."""
    if e == QK:
        return const(1.0)
    if e.op not in ("mul", "div"):
        return None
    a, b = e.args
    if e.op == "mul" and _factor(b) is not None:
        a, b = b, a
    factor = _factor(a)
    if factor is None or not (b.attr == "scale" or (b.value is not None and b.value > 0)):
        return None
    return rebuild(e, (factor, b)) if factor.value != 1 or e.op == "div" else b


def columns() -> Expr:
    """Numbers of a line."""
    return _padded() + cdiv(name("Sk"), KEYS) * KEYS + STAGGER


def _padded() -> Expr:
    """Rows of all query tiles of a head, whichever the engine's are."""
    return cdiv(name("Sq"), QUERIES) * QUERIES


def scratch(attn: Attention, r: Ribbon) -> Scratch:
    return Scratch(r.name, (const(1), tables(attn, r.term), const(LINES), columns()), "f32")


def place(attn: Attention, r: Ribbon) -> tuple[Expr, Expr]:
    """Table and first column of the lines that go with ROWS rows from row0 on and the keys from n on."""
    table = table_of(r.term, attn, name("b"), name("h"))
    return table, name("n") + (_padded() - ROWS - name("row0"))


def kernel(attn: Attention, r: Ribbon) -> Kernel:
    """One program per table, line and chunk of columns."""
    params = {p.name: p for p in (*map(input_param, attn.inputs), r.written, *size_parameters(attn), SCALE)}
    b = Builder(params)
    width = b.let("width", columns())
    chunks = b.let("chunks", cdiv(width, CHUNK))
    chunk, rest = remainder(program(), chunks), b.let("rest", quotient(program(), chunks))
    line, table = b.let("line", remainder(rest, LINES)), b.let("table", quotient(rest, LINES))
    x = b.let("x", chunk * CHUNK + iota(CHUNK), f"[{CHUNK}]")
    b.note("column x of line 0 is as far from the last row's position as x from the padded rows' number")
    distance = b.let("d", line * (STAGGER + 1) + (name("Sk") - name("Sq")) * moved(attn) + _padded() - x)
    value = b.let("value", scope_of(b, attn, r.term, table, distance).bind(r.term.read))
    b.store(r.written, (0, table, line, x), cast_to(value, "f32"), x < width)
    grid = tables(attn, r.term) * LINES * cdiv(columns(), CHUNK)
    doc = f"Writes {r.name}: what moves with query - key alone, as lines, the second one of the next row."
    return Kernel(f"{attn.name}_{r.name}", *tidy(params.values(), b.body), (), grid, doc)
