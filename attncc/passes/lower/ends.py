"""A mask's bounds on the keys of a row, the end of the keys among them: a comparison for each pair is what a cut tile
costs most, so each side is to have one."""

from __future__ import annotations

from functools import reduce
from typing import Final

from attncc.ir.expr import TRUE, Expr, maximum, minimum, name
from attncc.ir.rewrite import conjuncts, names

MIRRORED: Final = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}
KEYS: Final = name("Sk")


def with_end(mask: Expr) -> Expr:
    """`mask & (j < Sk)`. The upper bounds that the mask sets on j become one, and so do the lower ones."""
    least, most, others = _bounds(mask)
    j = name("j")
    ended = j < KEYS if most is None else j <= minimum(most, KEYS - 1)
    return reduce(Expr.__and__, [ended, *([j >= least] if least is not None else []), *others])


def ends(mask: Expr) -> tuple[Expr, Expr] | None:
    """The first and the last key that count of a row, where these are all that a mask says, and both are its own."""
    least, most, others = _bounds(mask)
    return None if least is None or most is None or others else (least, most)


def _bounds(mask: Expr) -> tuple[Expr | None, Expr | None, list[Expr]]:
    """The greatest lower bound on j and the least upper one, of what no key moves, and other conditions."""
    low: list[Expr] = []
    high: list[Expr] = []
    others: list[Expr] = []
    for condition in dict.fromkeys(c for c in conjuncts(mask) if c != TRUE):
        match _of_j(condition):
            case "le", bound:
                high.append(bound)
            case "lt", bound:
                high.append(maximum(bound, 0) - 1)  # of the least number of all, too
            case "ge", bound:
                low.append(bound)
            case "gt", bound:
                low.append(minimum(bound, KEYS) + 1)
            case _:
                others.append(condition)
    return reduce(maximum, low) if low else None, reduce(minimum, high) if high else None, others


def _of_j(condition: Expr) -> tuple[str, Expr] | None:
    """A comparison of j with what no key moves, however it is written, j first."""
    if condition.op not in MIRRORED:
        return None
    op, (left, right) = condition.op, condition.args
    if right == name("j"):
        op, left, right = MIRRORED[op], right, left
    return (op, right) if left == name("j") and right.dtype == "i32" and "j" not in names(right) else None
