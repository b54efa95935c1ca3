"""The end of the keys as a part of the mask: where one comparison can say both, it does."""

from __future__ import annotations

from functools import reduce
from typing import Final

from attncc.ir.expr import TRUE, Expr, minimum, name
from attncc.ir.rewrite import conjuncts, names

MIRRORED: Final = {"ge": "le", "gt": "lt"}


def with_end(mask: Expr) -> Expr:
    """`mask & (j < Sk)`. The first upper bound that the mask itself sets on j, of what no key moves, becomes the lesser
    of both: a comparison for each pair is what a cut tile costs most."""
    told = list(dict.fromkeys(c for c in conjuncts(mask) if c != TRUE))
    for at, condition in enumerate(told):
        if (ended := _with_lesser(condition)) is not None:
            told[at] = ended
            break
    else:
        told.append(name("j") < name("Sk"))
    return reduce(Expr.__and__, told)


def _with_lesser(condition: Expr) -> Expr | None:
    """`j <= bound` or `j < bound`, however it is written, with a bound that keys behind the last exceed, too."""
    j, keys = name("j"), name("Sk")
    match condition.op, condition.args:
        case ("le" | "lt") as op, (low, high):
            pass
        case ("ge" | "gt") as op, (high, low):
            op = MIRRORED[op]
        case _:
            return None
    if low != j or high.dtype != "i32" or "j" in names(high):
        return None
    return j <= minimum(high, keys - 1) if op == "le" else j < minimum(high, keys)
