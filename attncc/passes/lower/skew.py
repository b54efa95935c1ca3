"""Reads along diagonals, as relative-position tables are read: a skewed copy turns them into plain tiles.

`bias[h, i - j + N]` over a [BM, BN] tile is one gather per element. Where an index moves with i - j alone, a small
kernel first writes skew[u, x] = bias[h, u - x + …] for u < BM: then the tile of rows i0 + u and keys n + v is the
block of skew at column x = n - i0 + …, one aligned tile load. The copy has BM rows per table and
about Sq + Sk columns, half the size of the keys and values at head size 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, iota, program, quotient, remainder, tile
from attncc.ir.expr import Dtype, Expr, Value, cast_to, const, load, name
from attncc.ir.rewrite import names, transform
from attncc.ir.tile import Kernel, Param, Scratch
from attncc.passes.lower.grid import (
    BM,
    QueryTile,
    cdiv,
    is_varlen,
    key_head,
    size_parameters,
)
from attncc.passes.lower.knobs import KNOBS
from attncc.passes.lower.scores import INPUT_DTYPE, Scope, input_param, own_name
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.walk import BN

CHUNK: Final = 1024
"""Columns one program of the copy writes."""
D: Final = name("d")
"""i - j."""


@dataclass(frozen=True, slots=True)
class Diagonal:
    """One read that moves with i - j alone: `read` is the load over `d`, `name` its skewed copy."""

    name: str
    read: Expr
    dtype: Dtype

    @property
    def operand(self) -> Param:
        return Param(self.name, "operand", self.dtype, tiles=(("BM", "BN"),), doc=f"skewed copy of {self.read.attr}")

    def is_read_by(self, node: Expr) -> bool:
        return node.op == "load" and node.attr == self.name

    def by(self, *indices: str) -> bool:
        return bool(names(self.read) & set(indices))


def split_diagonals(attn: Attention) -> tuple[Expr, tuple[Diagonal, ...]]:
    """The score with each such read replaced by one of its copy, at (i, j).

    Packed sequences and those in pages, whose rows have no common offset to their keys, keep the gathers.
    """
    score = attn.part.score
    if is_varlen(attn) or attn.page_size or attn.align.kind == "input":
        return score, ()
    found: dict[Expr, Diagonal] = {}

    def step(node: Expr) -> Expr | None:
        if node.op != "load" or not {"i", "j"} <= names(node):
            return None
        over = transform(node, _difference)
        if names(over) & {"i", "j", "row", "qk"}:
            return None
        text = own_name(f"skew_{len(found)}", attn)
        diagonal = found.setdefault(over, Diagonal(text, over, INPUT_DTYPE[attn.input(str(node.attr)).dtype]))
        return load(diagonal.name, name("i"), name("j"), dtype=node.dtype)

    return transform(score, step), tuple(found.values())


def _difference(node: Expr) -> Expr | None:
    """i - j and j - i, also with a term that moves with neither, over d."""
    match node:
        case Expr("sub", (Expr("name", (), "i"), Expr("name", (), "j"))):
            return D
        case Expr("sub", (Expr("name", (), "j"), Expr("name", (), "i"))):
            return -D
        case Expr("sub", (Expr("add", (Expr("name", (), "i"), c)), Expr("name", (), "j"))):
            return D + c
        case Expr("sub", (Expr("add", (c, Expr("name", (), "i"))), Expr("name", (), "j"))):
            return D + c
        case Expr("sub", (Expr("sub", (Expr("name", (), "i"), c)), Expr("name", (), "j"))):
            return D - c
        case _:
            return None


def columns() -> Expr:
    """Width of a skewed copy."""
    return padded_queries() + cdiv(name("Sk"), BN) * BN


def padded_queries(rows: Value = BM) -> Expr:
    """Rows of all query tiles of a head."""
    return cdiv(name("Sq"), rows) * rows


def tables(attn: Attention, d: Diagonal) -> Expr:
    """How many tables a copy holds: one for each batch entry and head that its read tells apart."""
    heads = const(attn.heads.q if d.by("h", "hk") else 1)
    return name("B") * heads if d.by("b") else heads


def scratch(attn: Attention, diagonals: tuple[Diagonal, ...]) -> tuple[Scratch, ...]:
    return tuple(Scratch(d.name, (const(1), tables(attn, d), BM, columns()), d.dtype) for d in diagonals)


def read_tile(d: Diagonal, attn: Attention, t: QueryTile, n: Expr) -> Expr:
    """[BM, BN] of a copy, for the keys from n on."""
    table, at = place(d, attn, t.scope.values["b"], t.h, t.row0, n)
    e = tile(d.operand, 0, table, 0, 0, ("BM", "BN"))
    return Expr(e.op, (*e.args[:3], at), e.attr, e.dtype, e.shape)


def place(d: Diagonal, attn: Attention, b: Expr, h: Expr, row0: Expr, n: Expr) -> tuple[Expr, Expr]:
    """Table and column of a copy for the query tile from row0 on, and the keys from n on."""
    return table_of(d, attn, b, h), n + (padded_queries() - BM - row0)


def table_of(d: Diagonal, attn: Attention, b: Expr, h: Expr) -> Expr:
    """The number of the table of a batch entry and head."""
    if d.by("b"):
        return b * attn.heads.q + h if d.by("h", "hk") else b
    return h if d.by("h", "hk") else const(0)


def kernel(attn: Attention, d: Diagonal) -> Kernel:
    """The copy: one program per table, row and chunk of columns."""
    params = {p.name: p for p in (*map(input_param, attn.inputs), _written(d), *size_parameters(attn))}
    params |= {k.name: Param(k.name, "constexpr", "i32", doc=k.doc) for k in KNOBS if k.name in ("BM", "BN")}
    b = Builder(params)
    width = b.let("width", columns())
    chunks = b.let("chunks", cdiv(width, CHUNK))
    chunk, rest = remainder(program(), chunks), b.let("rest", quotient(program(), chunks))
    u, table = b.let("u", remainder(rest, BM)), b.let("table", quotient(rest, BM))
    x = b.let("x", chunk * CHUNK + iota(CHUNK), f"[{CHUNK}]")
    b.note("row u of the last query tile and column x are this far apart")
    distance = b.let("d", u + (name("Sk") - name("Sq")) * moved(attn) + (padded_queries() - BM) - x)
    value = b.let("value", scope_of(b, attn, d, table, distance).bind(d.read))
    b.store(_written(d), (0, table, u, x), cast_to(value, d.dtype), x < width)
    grid = tables(attn, d) * BM * cdiv(columns(), CHUNK)
    doc = f"Writes {d.name}: input {d.read.attr} as its diagonals, each row shifted against the one above it."
    return Kernel(f"{attn.name}_{d.name}", *tidy(params.values(), b.body), (), grid, doc)


def _written(d: Diagonal) -> Param:
    return Param(d.name, "buffer", d.dtype, rank=4, doc="the skewed copy")


def moved(attn: Attention) -> int:
    """How many times Sk - Sq positions of queries are behind their rows."""
    return 1 if attn.align.kind == "bottom_right" else 0


def scope_of(b: Builder, attn: Attention, d: Diagonal, table: Expr, distance: Expr) -> Scope:
    """What the names of a table's formula stand for, at so many i - j."""
    values: dict[str, Expr] = {"d": distance, "Sq": name("Sq"), "Sk": name("Sk")}
    heads, dims = attn.heads, attn.dims
    fixed: Mapping[str, int] = {"Hq": heads.q, "Hk": heads.kv, "Hv": heads.v, "Dqk": dims.qk, "Dv": dims.v}
    values |= {text: const(size) for text, size in fixed.items()}
    if d.by("h", "hk"):
        h = remainder(table, heads.q) if d.by("b") else table
        values |= {"h": h, "hk": key_head(h, attn, heads.kv)}
    if d.by("b"):
        values["b"] = quotient(table, heads.q) if d.by("h", "hk") else table
    return Scope(values, {x.name: x for x in attn.inputs})
