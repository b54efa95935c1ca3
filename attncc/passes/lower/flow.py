"""A tile of tokens on its way through steps, in a kernel under construction.

Its columns are in one or several tiles in registers, fp32 from the first step to the store. What a step makes of the
tokens before these, as convolutions ask for, is found by taking the same steps `back` tokens earlier, or carried
from there where tiles go along lines of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, fresh, lanes, read, row
from attncc.ir.expr import Dtype, Expr, Value, cast_to, lift
from attncc.passes.lower.chains import Chain
from attncc.passes.lower.columns import Columns, Parts
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.product import Factor, of_rows
from attncc.passes.lower.scores import Scope
from attncc.passes.lower.tokens import Tokens

LANES: Final = 4096
"""Entries of a tile of tokens."""
MIXED: Final = 64
"""Tokens of a tile that is multiplied by matrices, but for wide ones, which shared memory must hold."""
NARROW: Final = 256
"""Up to so many columns they are not wide."""
WARPS: Final[Mapping[bool, int]] = {True: 8, False: 4}
"""Of a program, by whether it multiplies by matrices."""

Tiles = Mapping[Columns, Expr]
"""[rows, width] for each part of the columns."""


class Before(Protocol):
    """What comes into a step, so many tokens further back, and `plus` added to it."""

    def __call__(self, more: int, plus: Tiles | None = None) -> Tiles: ...


def tokens_of(columns: int, *, multiplied: bool) -> int:
    """Of a tile with so many columns."""
    if multiplied:
        return MIXED if columns <= NARROW else MIXED // 2
    return max(1, min(MIXED, 1 << (LANES // columns).bit_length() - 1))


def options(multiplies: bool) -> tuple[tuple[str, int], ...]:
    """Of the compiler, for kernels of steps: no config speaks of their tiles."""
    return ("num_warps", WARPS[multiplies]), ("num_stages", 1), ("maxnreg", 0)


class Earlier(Protocol):
    """Columns [rows, width] of an operand and a head as they came so many tokens back, where that is no row before."""

    def __call__(self, operand: str, columns: Columns, back: int, head: Expr) -> Expr: ...


@dataclass(frozen=True, slots=True)
class Flow:
    """One operand in one kernel."""

    attn: Attention
    chain: Chain
    ahead: Builder
    """What all tiles of a program share is bound here, once."""
    b: Builder
    tokens: Tokens
    head: Expr
    served: Expr
    """The key head that goes with it."""
    parts: tuple[Parts, ...]
    """Columns as tiles before each step, and behind the last."""
    taken: set[str]
    """Names that are bound somewhere."""
    found: dict[tuple[int, int], Tiles] = field(default_factory=dict[tuple[int, int], Tiles])
    """What steps have made so far, by their number and how many tokens back."""
    shared: dict[Expr, Expr] = field(default_factory=dict[Expr, Expr])
    """What is bound once for all tiles."""
    line: tuple[Expr, Expr] | None = None
    """The position [rows] where the lines begin along which tiles go, and how many tokens those are on."""
    matrices: tuple[Expr, ...] = ()
    """Of convolutions that follow each other and are one, in the order of products."""
    fetched: Mapping[tuple[str, Columns, Expr], Expr] = field(default_factory=dict[tuple[str, Columns, Expr], Expr])
    """Columns of an operand and a head that were read for this turn."""
    earlier: Earlier | None = None
    """Where earlier tokens are that a call does not have."""

    @property
    def rows(self) -> int:
        return self.tokens.rows

    @property
    def dtype(self) -> Dtype:
        """In which operands come and go, and products are of."""
        return VALUE_DTYPE[self.attn.dtype]

    @property
    def holds_matrices(self) -> bool:
        """Whether shared memory holds all matrices of a head at once, so that they are read once."""
        return self.dtype != "f32"

    @property
    def scope(self) -> Scope:
        """What a step's expressions read."""
        return self.tokens.scope.with_(h=self.head, hk=self.served)

    def let(self, text: str, value: Value, note: str = "") -> Expr:
        """Binds what has no name yet."""
        value = lift(value)
        return value if value.op == "name" else self.b.let(self.reserve(text), value, note)

    def once(self, text: str, value: Value, note: str = "") -> Expr:
        """Binds before all tiles what none of them moves, a value only once."""
        value = lift(value)
        if value not in self.shared:
            self.shared[value] = self.ahead.let(self.reserve(text), value, note)
        return self.shared[value]

    def load(self, operand: str, columns: Columns, back: int = 0, head: Expr | None = None) -> Expr:
        """Columns of the call's own q, k or v, so many tokens back; 0 before the first."""
        return cast_to(self.entered(operand, columns, back, head), "f32")

    def entered(self, operand: str, columns: Columns, back: int | Expr = 0, head: Expr | None = None) -> Expr:
        """The same in the dtype in which they come."""
        if isinstance(back, int) and back and self.earlier is not None:
            return self.earlier(operand, columns, back, self.head if head is None else head)
        t = self.tokens
        known = self.fetched.get((operand, columns, self.head if head is None else head))
        if known is not None and back == 0:
            return known
        mask = lanes(t.own >= back if back else None, columns.inside)
        at = (t.batch, self.head if head is None else head, t.row - back if back else t.row)
        b_, h, s = (column(e) if e.shape else e for e in at)
        return read(self.b.params[operand.upper()], b_, h, s, row(columns.at), mask=mask)

    def per_head(self, e: Expr) -> Expr:
        """An expression over heads and batch entries, to be multiplied with a tile."""
        value = cast_to(self.scope.bind(e), "f32")
        return column(value) if value.shape else value

    def multiplied(self, tiles: Sequence[Expr], *, exact: bool) -> tuple[Factor, ...]:
        """Tiles as they are multiplied by matrices; `exact`: their numbers are the operands' own."""
        return of_rows(self.let, tiles, self.dtype, exact=exact)

    def reserve(self, text: str) -> str:
        """A name of its own."""
        word = fresh(text, self.taken)
        self.taken.add(word)
        return word
