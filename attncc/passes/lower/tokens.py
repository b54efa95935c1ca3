"""Rows of q, k or v as kernels of steps have them: some tokens of a head, counted over all sequences of a call.

A tile of tokens may span sequences, so where each token lies is a vector. Tokens behind the last are the last again:
reads stay inside, and only stores look at `inside`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, iota, quotient, read, remainder
from attncc.ir.expr import Expr, cast_to, const, minimum, name
from attncc.ir.tile import Param
from attncc.passes.lower import storage
from attncc.passes.lower.grid import CU_K, CU_Q, fixed_sizes, is_varlen, key_rows
from attncc.passes.lower.scores import Scope


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tile of tokens: all are [rows] vectors, or numbers where all tokens share them."""

    rows: int
    inside: Expr
    """[rows] whether the token is one, and not the last again."""
    batch: Expr
    row: Expr
    """Where operands have it: batch entry and row."""
    own: Expr
    """Its number in its sequence."""
    position: Expr
    scope: Scope
    """What expressions of the token read, but for heads."""


def rows_of(attn: Attention, operand: str) -> Expr:
    """Rows of an operand's tensor."""
    if operand == "q":
        return name("Tq" if is_varlen(attn) else "Sq")
    return key_rows(attn)


def count(attn: Attention, operand: str) -> Expr:
    """Tokens of an operand in all sequences."""
    rows = rows_of(attn, operand)
    return rows if is_varlen(attn) else name("B") * rows


def place(b: Builder, attn: Attention, operand: str, first: Expr, rows: int) -> Tokens:
    """Binds where `rows` tokens from `first` on are; there is one at least."""
    find = _packed if is_varlen(attn) else _dense
    return find(b, attn, operand, first, rows)


def _dense(b: Builder, attn: Attention, operand: str, first: Expr, rows: int) -> Tokens:
    length = name("Sq" if operand == "q" else "Sk")
    tokens = b.let("tokens", first + iota(rows), f"[{rows}] counted over the batch")
    known = b.let("known", minimum(tokens, name("count") - 1), "past the end, the last one again")
    batch, own = b.let("b", quotient(known, length)), b.let("own", remainder(known, length))
    keys = storage.keys_of(b, attn, batch)
    values = {"b": batch, "Sq": name("Sq"), "Sk": keys}
    return _tokens(b, attn, operand, rows, tokens < name("count"), (batch, own, own), values)


def along(b: Builder, attn: Attention, operand: str, own: Expr, rows: int) -> Tokens:
    """Tokens with these numbers [rows] of the sequence `b`; those behind the last are the last again."""
    length = name("Sq" if operand == "q" else "Sk")
    known = b.let("own", minimum(own, length - 1), "past the end, the last one again")
    batch = name("b")
    values = {"b": batch, "Sq": name("Sq"), "Sk": storage.keys_of(b, attn, batch)}
    return _tokens(b, attn, operand, rows, own < length, (batch, known, known), values)


def _packed(b: Builder, attn: Attention, operand: str, first: Expr, rows: int) -> Tokens:
    """Of packed sequences, each token finds its own."""
    cu = CU_Q if operand == "q" else CU_K
    tokens = b.let("tokens", first + iota(rows), f"[{rows}] of all sequences")
    known = b.let("known", minimum(tokens, name("count") - 1), "past the end, the last one again")
    found = Expr("bucket", (known, name("B") + 1), cu.name, "i32", (rows,))
    seq = b.let("seq", found - 1, f"[{rows}] the sequence of each")
    start = b.let("start", read(cu, seq))
    queries = b.let("queries", read(CU_Q, seq + 1) - read(CU_Q, seq))
    keys = storage.keys_of(b, attn, seq) if attn.page_size else b.let("keys", read(CU_K, seq + 1) - read(CU_K, seq))
    values = {"b": seq, "Sq": queries, "Sk": keys}
    own = b.let("own", known - start)
    return _tokens(b, attn, operand, rows, tokens < name("count"), (const(0), known, own), values)


def _tokens(
    b: Builder,
    attn: Attention,
    operand: str,
    rows: int,
    inside: Expr,
    at: tuple[Expr, Expr, Expr],
    values: Mapping[str, Expr],
) -> Tokens:
    batch, row, own = at
    scope = Scope({**values, **fixed_sizes(attn)}, {x.name: x for x in attn.inputs})
    position = own
    if operand == "q":
        offset = _offset(attn, scope)
        position = own if offset is None else b.let("i", own + offset, f"[{rows}] positions")
        scope = scope.with_(row=own, i=position)
    return Tokens(rows, b.let("inside", inside), batch, row, own, position, scope)


def _offset(attn: Attention, scope: Scope) -> Expr | None:
    """Position of row 0, None for 0."""
    match attn.align.kind:
        case "bottom_right":
            return scope.values["Sk"] - scope.values["Sq"]
        case "top_left":
            return None
        case "input":
            x = attn.input(attn.align.input)
            at = const(0) if x.shape == (1,) else scope.values["b"]
            return cast_to(scope.bind(Expr("load", (at,), x.name, "i32", at.shape)), "i32")


def bound(attn: Attention, operand: str) -> Expr:
    """How many tokens there are to do, of packed ones known to the device alone."""
    if not is_varlen(attn):
        return count(attn, operand)
    return read(CU_Q if operand == "q" else CU_K, name("B"))


def index_params(attn: Attention) -> tuple[Param, ...]:
    """What says where packed sequences lie, or how long those in pages are."""
    packed = (CU_Q, *(() if attn.page_size else (CU_K,))) if is_varlen(attn) else ()
    return (*packed, *storage.index_params(attn))
