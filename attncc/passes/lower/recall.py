"""What steps ask of tokens before those of a call: rows that each sequence carries from call to call.

Such rows are operands as they were before all steps, a ring of the last ones: token t is in row t modulo its length.
A token finds an earlier one in the call, if that stands before it there and its place is so many before, and else in
the ring; before the first of a sequence there is none, whatever the ring holds. A launch of its own behind the others
writes the rings: all of them have read by then.
"""

from __future__ import annotations

from typing import Final

from attncc.ir.appending import count, is_packed, tokens
from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, iota, lanes, read, remainder, row
from attncc.ir.expr import Expr, const, eq, ew, maximum, minimum, name, where
from attncc.ir.keeping import RING, recalled, states
from attncc.ir.tile import Kernel, Param
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.flow import Earlier
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.place import POSITIONS, SEQUENCES, Place, by_heads, kept, params, position_at, position_of
from attncc.passes.lower.tidy import tidy

STATE: Final = "_STATE"
"""Behind the names of operands that sequences carry."""


def earlier(b: Builder, attn: Attention, place: Place, own: Expr, known: Expr, sequence: Expr) -> Earlier:
    """How a program's tokens find those before them.

    Args:
        own: positions [rows] in their sequences.
        known: where the tokens stand in the call; those behind the last are the last again.
        sequence: of each, or of all.
    """
    rows, position = place.rows, name("position", "i32", (place.rows,))
    first = read(SEQUENCES, sequence) if is_packed(attn) else const(0)
    first = b.let("first", first) if first.shape else first
    linked: dict[int, Expr] = {}
    for back in range(1, max(recalled(attn).values(), default=0) + 1):
        before = b.let(f"before_{back}", known - back >= first)
        given = position_at(b.params[POSITIONS], attn, place.batch, known - back, before)
        note = f"[{rows}] whether the token {back} back is in the call"
        there = before & eq(given, position - back) & (own >= back)
        linked[back] = b.let(f"linked_{back}", there, note)

    def find(operand: str, columns: Columns, back: int, head: Expr) -> Expr:
        new, state = b.params[operand.upper()], b.params[operand.upper() + STATE]
        here = linked[back]
        mine = read(new, place.batch, head, column(known - back), row(columns.at), mask=lanes(here, columns.inside))
        at = remainder(maximum(own - back, 0), name(RING))
        batch = column(sequence) if sequence.shape else sequence
        mask = lanes(ew("not", here) & (own >= back), columns.inside)
        return where(column(here), mine, read(state, batch, head, column(at), row(columns.at), mask=mask))

    return find


# -- the launch behind the others ----------------------------------------------------------------


def kernel(attn: Attention, rows: int) -> Kernel:
    """Writes the last tokens of each sequence of a call, as they came, into its rings."""
    dtype = VALUE_DTYPE[attn.dtype]
    found = [Param(x.name.upper(), "operand", dtype, doc=x.doc) for x in (*tokens(attn), *states(attn))]
    b = Builder({p.name: p for p in (*found, *params(attn))})
    grid = by_heads(b, attn, rows, "".join(recalled(attn)), _write)
    doc = "Carries the last rows of each sequence to its next call, as they were before their steps."
    return Kernel(f"{attn.name}_append_state", *tidy(b.params.values(), b.body), (), grid, doc)


def _write(b: Builder, attn: Attention, text: str, place: Place) -> None:
    """The tokens whose rows no later one of the call takes."""
    at, position = (name(word, "i32", (place.rows,)) for word in ("at", "position"))
    own, sequence = position_of(b, attn, place), place.sequence
    further = b.let("further", at + name(RING))
    end = name(count(attn))
    if is_packed(attn):
        end = minimum(read(SEQUENCES, sequence + 1, mask=kept(place.rows)), end)
    inside = b.let("inside", kept(place.rows) & (further < end))
    given = position_at(b.params[POSITIONS], attn, place.batch, further, inside)
    taken = inside & eq(given, position + name(RING))
    last = b.let("last", kept(place.rows) & ew("not", taken), "no later token of the call has its row")
    dim = attn.dims.v if text == "v" else attn.dims.qk
    columns = iota(1 << (dim - 1).bit_length())
    mask = column(last) & row(columns < dim)
    x = read(b.params[f"{text.upper()}_NEW"], place.batch, place.head, column(at), row(columns), mask=mask)
    batch = column(sequence) if sequence.shape else sequence
    into = (batch, place.head, column(remainder(own, name(RING))), row(columns))
    b.store(b.params[f"{text.upper()}{STATE}"], into, x, mask)
