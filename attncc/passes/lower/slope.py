"""What of a score is linear in the key, as ALiBi's penalty is: a column a tile, and a number a row.

Of `qk - m * (i - j)` with j = n + u, keys from n on, `-m * (i - n)` is the same for a row of a tile and moves its
maximum alone, and `m * u` is the same for all rows and tiles: one addition a pair is left, and no conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attncc.ir.expr import Expr, cast_to, const, name
from attncc.ir.rewrite import names, rebuild

ZERO: Final = const(0.0)
FIXED: Final = frozenset({"qk", "i", "row"})
"""What a slope must not move with: it is one of a tile's, not of its rows."""


@dataclass(frozen=True, slots=True)
class Sloped:
    """score = rest + line, where line moves by `slope` from key to key."""

    rest: Expr
    line: Expr
    slope: Expr


def split(score: Expr) -> Sloped | None:
    """The linear terms of a sum told apart; None where none moves with the key alone, or nothing else is left."""
    rest, line, slope = _parted(score)
    if rest is None or line is None or slope == ZERO or not names(line) & {"j"}:
        return None
    return Sloped(rest, line, slope)


def _parted(e: Expr) -> tuple[Expr | None, Expr | None, Expr]:
    """What is not linear of a sum, what is, and by how much that moves from key to key."""
    if (slope := slope_of(e)) is not None:
        return None, e, slope
    if e.op not in ("add", "sub"):
        return e, None, ZERO
    (x, a, m), (y, b, n) = map(_parted, e.args)
    return _joined(e, x, y), _joined(e, a, b), _sum(e, m, n)


def _joined(e: Expr, x: Expr | None, y: Expr | None) -> Expr | None:
    """A sum or difference of which either side may be left out."""
    if x is None or y is None:
        return x if y is None else y if e.op == "add" else -y
    return rebuild(e, (x, y))


def _sum(e: Expr, m: Expr, n: Expr) -> Expr:
    """Of slopes, as `e` adds or subtracts."""
    n = n if e.op == "add" else const(-n.value) if n.value is not None else -n
    return n if m == ZERO else m if n == ZERO else m + n


def slope_of(e: Expr) -> Expr | None:
    """By how much a formula grows from a key to the next, in f32; None where that is not the same for all pairs."""
    if "qk" in names(e):
        return None
    if "j" not in names(e):
        return ZERO
    if e == name("j"):
        return const(1.0)
    slopes = [slope_of(a) for a in e.args]
    match e.op, slopes:
        case "cast", [Expr() as m] if e.dtype == "f32":
            return m
        case "neg", [Expr() as m]:
            return -m
        case (("add" | "sub"), [Expr() as m, Expr() as n]):
            return _sum(e, m, n)
        case "mul", [Expr() as m, Expr()] if _is_factor(e.args[1]):
            return m * cast_to(e.args[1], "f32")
        case "mul", [Expr(), Expr() as n] if _is_factor(e.args[0]):
            return cast_to(e.args[0], "f32") * n
        case "div", [Expr() as m, Expr()] if e.dtype == "f32" and _is_factor(e.args[1]):
            return m / e.args[1]
        case _:
            return None


def _is_factor(e: Expr) -> bool:
    """Whether this is one number of a tile."""
    return not names(e) & (FIXED | {"j"})
