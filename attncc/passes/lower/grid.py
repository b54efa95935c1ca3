"""Which query tile a program works on: program numbers to (batch, head, first row), dense or varlen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attncc.ir.attention import Attention, Input
from attncc.ir.build import Builder, iota, program, quotient, read, remainder
from attncc.ir.expr import Expr, Value, const, lift, minimum, name, where
from attncc.ir.tile import Param
from attncc.passes.lower import storage
from attncc.passes.lower.scores import KERNEL_SIZES, Scope, length

BM = name("BM")

CU_Q = Param("cu_seqlens_q", "buffer", "i32", rank=1, doc="[B + 1] where each sequence's queries begin")
CU_K = Param("cu_seqlens_k", "buffer", "i32", rank=1, doc="[B + 1] where each sequence's keys begin")


@dataclass(frozen=True, slots=True)
class QueryTile:
    """One query tile of one head; positions are logical, rows and keys count inside the sequence."""

    batch: Expr
    """Index on the batch axis of the operands: 0 where sequences are packed."""
    h: Expr
    number: Expr
    """Of this tile among all query tiles of its head (varlen: of all sequences)."""
    row0: Expr
    rows: Expr
    """[BM]"""
    queries: Expr
    keys: Expr
    """Lengths of the sequence."""
    first_query: Expr
    first_key: Expr
    """Rows of the operands at which the sequence begins."""
    scope: Scope

    def key_head(self, attn: Attention, heads: int) -> Expr:
        """The key (or value) head that serves this query head."""
        return key_head(self.h, attn, heads)


def key_head(h: Expr, attn: Attention, heads: int) -> Expr:
    if heads == attn.heads.q:
        return h
    if heads == 1:
        return const(0)
    if attn.heads.map == "tile":
        return remainder(h, heads)
    return quotient(h, attn.heads.q // heads)


def heads_of(b: Builder, attn: Attention, operand: str, head: Expr) -> tuple[Expr, Expr]:
    """Binds an operand's head, and the key head that goes with it."""
    head = head if head.op == "name" else b.let("h", head)
    if operand != "q" or attn.heads.kv == attn.heads.q:
        return head, head
    served = key_head(head, attn, attn.heads.kv)
    return head, served if served.op == "const" else b.let("hk", served)


def cdiv(a: Value, b: Value) -> Expr:
    """a / b rounded up; a is not negative."""
    return quotient(lift(a) + (lift(b) - 1), b)


def is_varlen(attn: Attention) -> bool:
    return attn.layout == "varlen"


def key_rows(attn: Attention) -> Expr:
    """How many keys the call's tensors have: of all sequences where they are packed, of each at most elsewhere."""
    return name("Tk" if is_varlen(attn) and not attn.page_size else "Sk")


def query_tiles(attn: Attention) -> Expr:
    """How many query tiles a head has; where sequences are packed, an upper bound known without reading them."""
    if is_varlen(attn):
        return quotient(name("Tq"), BM) + name("B")
    return cdiv(name("Sq"), BM)


def programs(attn: Attention) -> Expr:
    """The launch's size."""
    heads = const(attn.heads.q) if is_varlen(attn) else name("B") * attn.heads.q
    return query_tiles(attn) * heads


def query_tile(b: Builder, attn: Attention) -> QueryTile:
    """Binds the tile of this program."""
    head, number = order(b, attn, program())
    if is_varlen(attn):
        return place_packed(b, attn, b.let("h", head), number)
    batch, h = split_head(b, attn, head)
    return place_dense(b, attn, batch, h, number)


def order(b: Builder, attn: Attention, count: Expr) -> tuple[Expr, Expr]:
    """Head, counted over the batch, and query tile of a number: heads in groups, longest rows first inside one."""
    b.note("groups of GROUP heads share the L2 cache; inside one, the tiles with the most keys come first")
    tiles = b.let("tiles", query_tiles(attn))
    heads = const(attn.heads.q) if is_varlen(attn) else name("B") * attn.heads.q
    group = b.let("group", quotient(count, tiles * name("GROUP")))
    inside = b.let("inside", remainder(count, tiles * name("GROUP")))
    width = b.let("width", minimum(heads - group * name("GROUP"), name("GROUP")))
    head = group * name("GROUP") + remainder(inside, width)
    return head, b.let("number", tiles - 1 - quotient(inside, width))


def split_head(b: Builder, attn: Attention, head: Expr) -> tuple[Expr, Expr]:
    """Batch entry and head of a head counted over the batch."""
    flat = b.let("head", head)
    return b.let("b", quotient(flat, attn.heads.q)), b.let("h", remainder(flat, attn.heads.q))


def place_dense(b: Builder, attn: Attention, batch: Expr, h: Expr, number: Expr) -> QueryTile:
    return at_row(b, attn, batch, h, number, b.let("row0", number * BM))


def at_row(b: Builder, attn: Attention, batch: Expr, h: Expr, number: Expr, row0: Expr) -> QueryTile:
    """The dense query tile that begins at row0."""
    zero = const(0)
    lengths = (name("Sq"), storage.keys_of(b, attn, batch))
    return _positions(b, attn, batch, batch, h, number, row0, lengths, (zero, zero))


PACKED_AT: Final = ("seq", "h", "number", "row0", "Sq", "Sk", "begin", "key_begin")
"""What tells where a query tile of packed sequences is."""


def at_packed_row(b: Builder, attn: Attention) -> QueryTile:
    """The query tile that `place_packed` found, by the names it gave."""
    seq, h, number, row0, queries, keys, begin, key_begin = map(name, PACKED_AT)
    return _positions(b, attn, seq, const(0), h, number, row0, (queries, keys), (begin, key_begin))


def place_packed(b: Builder, attn: Attention, h: Expr, number: Expr) -> QueryTile:
    """Finds the tile's sequence on the device: sequence `seq` owns tiles from cu_q[seq] // BM + seq on."""
    b.note("the last sequence whose first tile, cu_seqlens_q[seq] // BM + seq, is not behind this one")
    low = b.let("seq", const(0))
    high = b.let("end", name("B"))
    with b.loop("_", const(0), const(32)):
        middle = b.let("middle", quotient(low + high, 2))
        owner = b.let("owner", quotient(read(CU_Q, middle), BM) + middle <= number)
        b.let("seq", where(owner, middle, low))
        b.let("end", where(owner, high, middle))
    begin = b.let("begin", read(CU_Q, low))
    row0 = b.let("row0", (number - quotient(begin, BM) - low) * BM)
    queries = b.let("Sq", read(CU_Q, low + 1) - begin)
    if attn.page_size:
        key_begin, keys = const(0), storage.keys_of(b, attn, low)
    else:
        key_begin = b.let("key_begin", read(CU_K, low))
        keys = b.let("Sk", read(CU_K, low + 1) - key_begin)
    return _positions(b, attn, low, const(0), h, number, row0, (queries, keys), (begin, key_begin))


def _positions(
    b: Builder,
    attn: Attention,
    sequence: Expr,
    batch: Expr,
    h: Expr,
    number: Expr,
    row0: Expr,
    lengths: tuple[Expr, Expr],
    begins: tuple[Expr, Expr],
) -> QueryTile:
    queries, keys = lengths
    inputs = {x.name: x for x in attn.inputs}
    rows = b.let("rows", row0 + iota("BM"), "[BM]")
    last = b.let("last_row", minimum(row0 + BM, queries) - 1)
    hk = key_head(h, attn, attn.heads.kv)
    values = {
        "b": sequence, "h": h, "hk": hk if hk in (h, const(0)) else b.let("hk", hk), "Sq": queries, "Sk": keys,
        "row0": row0, "row1": last,
    }  # fmt: skip
    values |= fixed_sizes(attn)
    scope = Scope(values, inputs)
    offset = offset_of(b, attn, scope)
    values["i0"] = row0 if offset is None else b.let("i0", row0 + offset)
    values["i1"] = last if offset is None else b.let("i1", last + offset)
    values["row"] = minimum(rows, last)
    position = values["row"] if offset is None else values["row"] + offset
    values["i"] = b.let("i", position, "[BM] positions; past the end, the last one again")
    return QueryTile(batch, h, number, row0, rows, queries, keys, *begins, scope)


def fixed_sizes(attn: Attention) -> dict[str, Expr]:
    """The sizes that are known when compiled, as a scope has them."""
    heads, dims = attn.heads, attn.dims
    fixed = {"Hq": heads.q, "Hk": heads.kv, "Hv": heads.v, "Dqk": dims.qk, "Dv": dims.v}
    return {text: const(size) for text, size in fixed.items()}


def offset_of(b: Builder, attn: Attention, scope: Scope) -> Expr | None:
    """Position of row 0, None for 0."""
    match attn.align.kind:
        case "bottom_right":
            return b.let("offset", scope.values["Sk"] - scope.values["Sq"])
        case "top_left":
            return None
        case "input":
            x: Input = attn.input(attn.align.input)
            at = const(0) if x.shape == (1,) else scope.values["b"]
            return b.let("offset", scope.bind(Expr("load", (at,), x.name, "i32")))


def size_parameters(attn: Attention) -> list[Param]:
    """The sizes that are run-time arguments, those of the inputs' own axes last."""
    sizes = ("B", "Tq" if is_varlen(attn) else "Sq", str(key_rows(attn).attr))
    known = KERNEL_SIZES | {"Hq", "Hk", "Hv", "Dqk", "Dv"}
    own = {s for x in attn.inputs for s in x.shape if isinstance(s, str)} - known
    return [Param(s, "scalar", "i32") for s in (*sizes, *map(length, sorted(own)))]
