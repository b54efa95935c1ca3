"""Hidden values that are no numbers: query tiles into which they may have leaked are walked again, with care.

Values that a row does not see must not matter, even where they are NaN, yet 0 * NaN is NaN. Zeroing them would cost
every call registers, so a kernel is launched twice: the first pass marks tiles that hold NaN, the second, which ends
at once for all others, redoes those with care. Or each program looks at its own tile: one launch, of more registers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce as fold
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, program, read, reduce_all
from attncc.ir.expr import Expr, Value, cast_to, const, eq, ew, maximum, name
from attncc.ir.tile import Launch, Param
from attncc.passes.lower import cache
from attncc.passes.lower.fragments import FOR_ALL_ROWS, FOR_EACH_ROW, begin, may_hide_values
from attncc.passes.lower.knobs import ONE_PASS
from attncc.passes.lower.normalizers import Rule
from attncc.passes.lower.scores import own_name

PASS: Final = Param(
    "PASS",
    "constexpr",
    "i32",
    doc="0: all tiles; 1: those lost to NaN; 2: both at once; 3: all tiles, of rows that see the same keys",
)
NUMBER: Final = name("PASS")


def marks(text: str, attn: Attention) -> Param:
    """The tensor of marks, by the name it has where no input has that."""
    return Param(own_name(text, attn), "buffer", "i32", rank=1, doc="[programs] whether the first pass left NaN")


def passes(kernel: str, *, may_see_the_same: bool = False) -> tuple[Launch, ...]:
    """Two launches, or one for small calls, whose time is that of launching; or for one query, if its heads are alike:
    what none of a tile's rows sees is left out of it at once."""
    at_once, apart = (eq(name(ONE_PASS.name), n) for n in (1, 0))
    if may_see_the_same:
        one, several = eq(name("Sq"), 1), name("Sq") > 1
        rest = (replace(x, when=several if x.when is None else several & x.when) for x in passes(kernel))
        return (Launch(kernel, (("PASS", FOR_ALL_ROWS),), one), *rest)
    return (
        Launch(kernel, (("PASS", 2),), at_once),
        Launch(kernel, (("PASS", 0),), apart),
        Launch(kernel, (("PASS", 1),), apart, (("maxnreg", 0),)),  # care takes registers, and few tiles need it
    )


@contextmanager
def unless_done(b: Builder, attn: Attention, lost: Param) -> Generator[None]:
    """What a program does, in the second pass only if its tile is marked."""
    if not may_hide_values(attn):
        yield
        return
    b.let("work", const(1))
    with b.when(eq(NUMBER, 1)):
        b.let("work", read(lost, program()))
    with b.when(name("work") > 0):
        yield


def walk_twice(
    b: Builder, attn: Attention, rule: Rule, mark: Callable[[Expr], None], walk: Callable[[Value], None]
) -> None:
    """Binds the state of all keys that `walk` visits; it is told which care to take.

    `mark` notes whether the first pass left NaN.
    """
    begin(b, attn, rule)
    walk(NUMBER)
    if not may_hide_values(attn):
        return
    values = cache.value_pieces(attn)
    accumulators = [name("acc" + p.suffix(values), "f32", ("BM", p.width)) for p in values]
    spoilt = fold(maximum, [reduce_all("max", cast_to(ew("ne", acc, acc), "i32")) for acc in accumulators])
    with b.when(eq(NUMBER, 0)):
        mark(spoilt)
    with b.when(eq(NUMBER, 2)):
        b.let("lost_here", spoilt)
        with b.when(name("lost_here") > 0):
            begin(b, attn, rule)
            walk(FOR_EACH_ROW)
