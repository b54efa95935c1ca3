"""Where keys and values lie: in rows of the call's own tensors, or in pages that a table finds.

Pages are tensors [pages, page_size, heads, D]; entry [b, n] of the table is the page of sequence b's keys
[n * page_size, (n + 1) * page_size). Entries behind a sequence's last key may be anything, and pages may hold anything
behind it: nothing there matters.

Pages of whole tiles are looked up once a tile, and read as any operand is. Of others each key finds its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, iota, quotient, read, remainder, row, tile
from attncc.ir.expr import Dtype, Expr, Value, const, maximum, minimum, name
from attncc.ir.staircase import levels
from attncc.ir.tile import Param
from attncc.passes.lower.pieces import Piece

TABLE: Final = Param("block_table", "buffer", "i32", rank=2, doc="[B, pages of a sequence] where each page lies")
USED: Final = Param("seqused_k", "buffer", "i32", rank=1, doc="[B] how many keys each sequence has")
BYTES: Final[Mapping[str, Dtype]] = {"int8": "i8", "uint8": "u8"}
WHOLE: Final = 64
"""Pages of a multiple of so many keys are of whole tiles: narrower ones would keep tensor cores waiting."""
HELD: Final = name("held", "bool", ("BN",))


def has_whole_tiles(attn: Attention) -> bool:
    """Whether no tile of keys is in two pages."""
    return attn.page_size > 0 and attn.page_size % WHOLE == 0


def fits_tiles(attn: Attention, keys: int) -> bool:
    """Whether tiles of so many keys will do: each in a page, a segment and whole groups."""
    lengths = [attn.page_size] if has_whole_tiles(attn) else []
    steps = levels(attn, "k")
    groups = [x.group for x in steps if x.group]
    return all(n % keys == 0 for n in (*lengths, *(x.segment for x in steps))) and all(keys % n == 0 for n in groups)


def index_params(attn: Attention) -> tuple[Param, ...]:
    """What finds the pages."""
    return (TABLE, USED) if attn.page_size else ()


def keys_of(b: Builder, attn: Attention, sequence: Expr) -> Expr:
    """How many keys a sequence has; `Sk` is how many its row of the table has room for."""
    if not attn.page_size:
        return name("Sk")
    return b.let("keys", maximum(minimum(read(USED, sequence), name("Sk")), 0), "never more than the table has")


def find_pages(b: Builder, attn: Attention, sequence: Expr, n: Value, keys: Expr) -> None:
    """Binds where the keys from n on lie, for `read_tile`."""
    if has_whole_tiles(attn):
        b.let("page", read(TABLE, sequence, quotient(n, attn.page_size)))
        b.let("slot", remainder(n, attn.page_size))
        return
    at = b.let("at", n + iota("BN"), "[BN]")
    b.let("held", at < keys, "what lies behind the last key is not read")
    b.let("page", read(TABLE, sequence, quotient(at, attn.page_size), mask=HELD), "[BN]")
    b.let("slot", remainder(at, attn.page_size), "[BN]")


def read_tile(attn: Attention, p: Param, head: Expr, piece: Piece, dim: int) -> Expr:
    """The [BN, width] tile of keys or values whose pages were found."""
    if has_whole_tiles(attn):
        return tile(p, name("page"), head, name("slot"), piece.column, ("BN", piece.width))
    columns = piece.columns
    held = column(HELD)
    if piece.end > dim:
        held = held & row(columns < dim)
    page, slot = (column(name(text, "i32", ("BN",))) for text in ("page", "slot"))
    return read(p, page, head, slot, row(columns), mask=held)


def as_stored(attn: Attention, given: Param) -> Param:
    """The parameter of keys or values in pages, `given` being that of a tensor of rows."""
    if not attn.page_size:
        return given
    steps = levels(attn, given.name.lower())
    if steps:
        return replace(given, dtype=BYTES[steps[-1].codes], tiles=(), extent=None)
    if has_whole_tiles(attn):
        _, dim = given.extent or (None, 0)
        return replace(given, extent=(const(attn.page_size), dim))
    return replace(given, tiles=(), extent=None)  # neighbours in a tile need not be neighbours in memory
