"""Where the new tokens of a call go in a cache: each finds its sequence, its position there and its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce as fold
from typing import Final

from attncc.ir.appending import count, finds_sequences, is_packed, room
from attncc.ir.attention import Attention
from attncc.ir.build import Builder, iota, program, quotient, read, remainder
from attncc.ir.expr import Expr, const, maximum, name, where
from attncc.ir.keeping import RING, states
from attncc.ir.tile import Param
from attncc.passes.lower import storage
from attncc.passes.lower.grid import CU_K, cdiv

POSITIONS: Final = "positions"
SEQUENCES: Final = Param("cu_seqlens_new", "buffer", "i32", rank=1, doc="[B + 1] where each sequence's tokens begin")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens of a program are, and where they go."""

    batch: Expr
    """Index on the batch axis of the new tokens: 0 where they are packed."""
    sequence: Expr
    """Of each token, or of all."""
    head: Expr
    index: tuple[Expr, ...]
    """Batch entry or page, and row, of each token in the cache; the head stands between them."""
    rows: int


def params(attn: Attention) -> list[Param]:
    """What says where tokens go, and how many there are."""
    out = [Param(POSITIONS, "buffer", "i32", rank=1 if is_packed(attn) else 2, doc="where each token goes")]
    out += [SEQUENCES] if finds_sequences(attn) else []
    out += [CU_K] if _begins_in_rows(attn) else []
    out += [storage.TABLE] if attn.page_size else []
    recalled = [RING] if states(attn) else []
    return [*out, *(Param(text, "scalar", "i32") for text in ("B", count(attn), room(attn), *recalled))]


def by_heads(
    b: Builder, attn: Attention, rows: int, operands: str, work: Callable[[Builder, Attention, str, Place], None]
) -> Expr:
    """Gives each program some tokens of a head of an operand, to `work` on; returns how many programs there are."""
    spans = b.let("spans", cdiv(name(count(attn)), rows))
    rest, batch = program(), const(0)
    if not is_packed(attn):
        rest, batch = b.let("rest", quotient(program(), name("B"))), b.let("b", remainder(program(), name("B")))
    begin, number = b.let("begin", remainder(rest, spans) * rows), b.let("number", quotient(rest, spans))
    there = place(b, attn, batch, b.let("at", begin + iota(rows), f"[{rows}] tokens"), rows)
    heads, first = {"q": attn.heads.q, "k": attn.heads.kv, "v": attn.heads.v}, 0
    for text in operands:
        end = first + heads[text]
        inside = [number >= first] * (first > 0) + [number < end] * (first == 0 or text != operands[-1])
        with b.when(fold(lambda x, y: x & y, inside)):
            work(b, attn, text, replace(there, head=b.let("h", number - first)))
        first = end
    sequences = const(1) if is_packed(attn) else name("B")
    return sequences * first * cdiv(name(count(attn)), rows)


def _begins_in_rows(attn: Attention) -> bool:
    """Whether the positions of tokens count from where their sequence begins in packed rows of keys."""
    return is_packed(attn) and not attn.page_size and attn.kept is not None


def place(b: Builder, attn: Attention, batch: Expr, at: Expr, rows: int) -> Place:
    """Binds the sequence of each token, its position, and whether it is stored at all."""
    packed, there, sequence = is_packed(attn), at < name(count(attn)), batch
    if finds_sequences(attn):
        begun = Expr("bucket", (at, name("B") + 1), SEQUENCES.name, "i32", (rows,))
        sequence = b.let("seq", begun - 1, f"[{rows}] the last that begins at a token or before it")
        there = there & (sequence >= 0) & (sequence < name("B"))
    there = b.let("there", there)
    given = position_at(b.params[POSITIONS], attn, batch, at, there)
    position = b.let("position", where(there, given, -1), f"[{rows}]")
    b.let("kept", (position >= 0) & (position < name(room(attn))), "tokens without a place are left out")
    position = b.let("position", maximum(position, 0))
    zero = const(0)
    if not attn.page_size:
        return Place(zero if packed else batch, sequence, zero, (zero if packed else batch, position), rows)
    page = read(storage.TABLE, sequence, quotient(position, attn.page_size), mask=kept(rows))
    page = b.let("page", page, f"[{rows}]")
    slot = b.let("slot", remainder(position, attn.page_size), f"[{rows}]")
    return Place(zero if packed else batch, sequence, zero, (page, slot), rows)


def position_at(positions: Param, attn: Attention, batch: Expr, at: Expr, mask: Expr) -> Expr:
    """What the call gives as the places of these tokens."""
    return read(positions, at, mask=mask) if is_packed(attn) else read(positions, batch, at, mask=mask)


def kept(rows: int) -> Expr:
    """[rows] which tokens have a place."""
    return name("kept", "bool", (rows,))


def position_of(b: Builder, attn: Attention, where_: Place) -> Expr:
    """Binds the positions [rows] of tokens in their sequences, by which steps know them; 0 of those without a place."""
    position = name("position", "i32", (where_.rows,))
    if not _begins_in_rows(attn):
        return position
    begin = read(CU_K, where_.sequence, mask=kept(where_.rows))
    return b.let("own", where(kept(where_.rows), maximum(position - begin, 0), 0), f"[{where_.rows}] in its sequence")
