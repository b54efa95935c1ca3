"""Rewrites a mask so that `j` stands alone: comparisons become `j <= g` or `j >= g` with g free of j.

Every rewrite is exact for all integers i and all keys 0 <= j < Sk; what no rule can solve stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from attncc.ir.attention import Input
from attncc.ir.expr import FLOATS, Expr, bucket, const, ew, load, maximum, minimum, name, where
from attncc.ir.intervals import interval, is_positive
from attncc.ir.rewrite import names, walk
from attncc.passes.linear import formula, linear, tidy

Direction = Literal["le", "ge"]
Solved = Expr | None

J: Final = name("j")
LAST_KEY: Final = name("Sk") - 1

MAX_CHOICES: Final = 6

OPPOSITE: Final[Mapping[str, str]] = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
TURNED: Final[Mapping[Direction, Direction]] = {"le": "ge", "ge": "le"}


def moves_with_key(e: Expr) -> bool:
    return "j" in names(e)


def compares_conditions(e: Expr) -> bool:
    """Whether `e` is == or != of two conditions."""
    return e.op in ("eq", "ne") and e.args[0].dtype == e.args[1].dtype == "bool"


def is_simple(e: Expr) -> bool:
    """Whether `e` has few choices: spelling one out, or its interval, doubles what is inside."""
    choices = [n for n in walk(e) if n.op in ("where", "abs", "mod") or compares_conditions(n)]
    return len(choices) <= MAX_CHOICES


def push_not(e: Expr, positive: bool = True) -> Expr:
    """`e` (or its negation) with `~` only at atoms: De Morgan, flipped comparisons, conditionals spelled out.

    A comparison of floats is not flipped: both it and its opposite are false for NaN.
    """
    match e:
        case Expr("not", (a,)):
            return push_not(a, not positive)
        case Expr("and" | "or", (a, b)):
            op = e.op if positive else {"and": "or", "or": "and"}[e.op]
            return ew(op, push_not(a, positive), push_not(b, positive))
        case Expr("where", (c, a, b)) if is_simple(e):
            chosen = push_not(c) & push_not(a, positive)
            return chosen | (push_not(c, False) & push_not(b, positive))
        case Expr("eq" | "ne", (a, b)) if compares_conditions(e) and is_simple(e):
            same = (e.op == "eq") == positive
            return (push_not(a) & push_not(b, same)) | (push_not(a, False) & push_not(b, not same))
        case Expr(op, (a, b)) if op in OPPOSITE and not positive and not _is_float(e):
            return ew(OPPOSITE[op], a, b)
        case _:
            return e if positive else ~e


def _is_float(comparison: Expr) -> bool:
    return any(a.dtype in FLOATS for a in comparison.args)


@dataclass(frozen=True, slots=True)
class Solver:
    """Isolates j; knows which inputs are sorted, for those are inverted by binary search."""

    sorted_inputs: Mapping[str, Input]

    def solve(self, e: Expr) -> Expr:
        """A mask with `~` at its atoms, with every comparison that can be solved for j solved."""
        if e.op in ("and", "or"):
            return ew(e.op, *map(self.solve, e.args))
        if e.op not in OPPOSITE or _is_float(e) or not moves_with_key(e) or not is_simple(e):
            return e
        return self.compare(e.op, *e.args) or e

    def compare(self, op: str, a: Expr, b: Expr) -> Solved:
        match op:
            case "le":
                return self._at_most_zero(a - b)
            case "lt":
                return self._at_most_zero(a - b + 1)
            case "ge" | "gt":
                return self.compare({"ge": "le", "gt": "lt"}[op], b, a)
            case "eq":
                return _both(Expr.__and__, self.compare("le", a, b), self.compare("le", b, a))
            case _:
                return _both(Expr.__or__, self.compare("lt", a, b), self.compare("lt", b, a))

    def _at_most_zero(self, e: Expr) -> Solved:
        """`e <= 0`, where one atom of its linear form may move with j."""
        form = linear(tidy(e))
        moving = [atom for atom in form.terms if moves_with_key(atom)]
        if not moving:
            return tidy(formula(form) <= 0)
        if len(moving) > 1:
            return None
        atom, factor = moving[0], form.terms[moving[0]]
        rest = form.without(atom)
        if factor > 0:
            return self.isolate(atom, "le", formula(rest * -1) // factor)
        return self.isolate(atom, "ge", (formula(rest) + (-factor - 1)) // -factor)

    def isolate(self, f: Expr, direction: Direction, g: Expr) -> Solved:
        """`f <= g` or `f >= g`, solved for j; None where no rule knows how."""
        g = tidy(g)
        if f == J or not moves_with_key(f):
            return ew(direction, f, g)
        rule = ISOLATE.get(f.op)
        return rule(self, f, direction, g) if rule else None


def _both(join: Callable[[Expr, Expr], Expr], a: Solved, b: Solved) -> Solved:
    return None if a is None or b is None else join(a, b)


def _linear(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    return solver.compare(direction, f, g)


def _mul(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    """f * n <= g  <=>  f <= g // n;  f * n >= g  <=>  f >= cdiv(g, n), for a size n."""
    for x, n in (f.args, f.args[::-1]):
        if is_positive(n):
            return solver.isolate(x, direction, g // n if direction == "le" else (g + (n - 1)) // n)
    return None


def _floordiv(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    """f // n <= g  <=>  f <= g * n + n - 1;  f // n >= g  <=>  f >= g * n."""
    x, n = f.args
    if not is_positive(n):
        return None
    return solver.compare(direction, x, g * n + (n - 1) if direction == "le" else g * n)


def _extreme(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    """The least is <= g where one is, and >= g where both are; the greatest the other way round."""
    join = Expr.__or__ if (f.op == "min") == (direction == "le") else Expr.__and__
    a, b = (solver.compare(direction, x, g) for x in f.args)
    return _both(join, a, b)


def _abs(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    (x,) = f.args
    join = Expr.__and__ if direction == "le" else Expr.__or__
    return _both(join, solver.compare(direction, x, g), solver.compare(direction, -x, g))


def _where(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    c, a, b = f.args
    yes, no = solver.compare(direction, a, g), solver.compare(direction, b, g)
    if yes is None or no is None:
        return None
    return (solver.solve(push_not(c)) & yes) | (solver.solve(push_not(c, False)) & no)


def _load(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    """x[k] <= g  <=>  k < bucket(x, g);  x[k] >= g  <=>  k >= bucket(x, g - 1), for a sorted x; 0 outside of x."""
    *leading, k = f.args
    array = solver.sorted_inputs.get(str(f.attr))
    if array is None or any(map(moves_with_key, leading)):
        return None
    count = bucket(array.name, *leading, g if direction == "le" else tidy(g - 1))
    inside = solver.compare("lt" if direction == "le" else "ge", k, count)
    if inside is None or (k == J and array.shape[-1] == "Sk"):
        return inside
    below, above = solver.compare("lt", k, const(0)), solver.compare("ge", k, length(array))
    within = solver.compare("ge", k, const(0)), solver.compare("lt", k, length(array))
    if below is None or above is None or within[0] is None or within[1] is None:
        return None
    return (within[0] & within[1] & inside) | ((below | above) & ew(direction, 0, g))


def length(array: Input) -> Expr:
    """How many entries a row of the input has."""
    entries = array.shape[-1]
    return const(entries) if isinstance(entries, int) else name(entries)


def _bucket(solver: Solver, f: Expr, direction: Direction, g: Expr) -> Solved:
    """bucket(x, k) <= g  <=>  k < x[g];  bucket(x, k) >= g  <=>  k >= x[g - 1]; past the ends always or never.

    "Always" and "never" are the ends of what k can be, so that the bound is one formula that rises with g.
    """
    *leading, k = f.args
    if any(map(moves_with_key, leading)):
        return None
    least, greatest = interval(k, {"j": (const(0), LAST_KEY)})
    if least is None or greatest is None:
        return None
    array = solver.sorted_inputs[str(f.attr)]
    count = length(array)
    counts = g.op == "bucket" and g.attr == f.attr  # then 0 <= g <= count
    at = maximum(g if direction == "le" else g - 1, 0)
    at = at if counts and direction == "ge" else minimum(at, count - 1)
    entry = load(array.name, *leading, tidy(at), dtype=_dtype(array))
    if direction == "le":
        bound = maximum(entry - 1, where(g >= count, greatest, least - 1))
        bound = bound if counts else minimum(bound, where(g < 0, least - 1, greatest))
    else:
        bound = minimum(entry, where(g <= 0, least, greatest + 1))
        bound = bound if counts else maximum(bound, where(g > count, greatest + 1, least))
    return solver.compare(direction, k, tidy(bound))


def _dtype(array: Input) -> Literal["i32", "i64"]:
    return "i64" if array.dtype == "int64" else "i32"


ISOLATE: Final[dict[str, Callable[[Solver, Expr, Direction, Expr], Solved]]] = {
    "add": _linear,
    "sub": _linear,
    "neg": _linear,
    "mul": _mul,
    "floordiv": _floordiv,
    "min": _extreme,
    "max": _extreme,
    "abs": _abs,
    "where": _where,
    "load": _load,
    "bucket": _bucket,
}
