"""Integer formulas as linear forms: sums are collected, ends compared, and bounds come out short.

Only the solver uses this, on positions and sizes; float formulas are never reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from attncc.ir.expr import FALSE, INTS, OPS, TRUE, Expr, const, ew, maximum, minimum, where
from attncc.ir.intervals import is_positive
from attncc.ir.rewrite import transform

ORDERED: Final = {"i1": "i0", "row1": "row0", "j1": "j0"}
"""The last and the first position of a tile."""


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + the sum of coefficient * atom, atoms in the order they were met."""

    terms: dict[Expr, int]
    constant: int = 0

    def __add__(self, other: Linear) -> Linear:
        total = dict(self.terms)
        for atom, factor in other.terms.items():
            total[atom] = total.get(atom, 0) + factor
        return Linear({a: c for a, c in total.items() if c}, self.constant + other.constant)

    def __mul__(self, factor: int) -> Linear:
        return Linear({a: c * factor for a, c in self.terms.items() if factor}, self.constant * factor)

    def __sub__(self, other: Linear) -> Linear:
        return self + other * -1

    def without(self, atom: Expr) -> Linear:
        return Linear({a: c for a, c in self.terms.items() if a != atom}, self.constant)


def linear(e: Expr) -> Linear:
    """The linear form of an integer formula."""
    match e:
        case Expr("const") if e.value is not None:
            return Linear({}, int(e.value))
        case Expr("add", (a, b)):
            return linear(a) + linear(b)
        case Expr("sub", (a, b)):
            return linear(a) - linear(b)
        case Expr("neg", (a,)):
            return linear(a) * -1
        case Expr("mul", (a, b)):
            left, right = linear(a), linear(b)
            if not right.terms:
                return left * right.constant
            return right * left.constant if not left.terms else Linear({e: 1})
        case _:
            return Linear({e: 1})


def formula(form: Linear) -> Expr:
    """The shortest way to write a linear form: what is added, what is taken off, then the number."""
    pieces = [(c > 0, atom * abs(c)) for atom, c in sorted(form.terms.items(), key=lambda term: term[1] < 0)]
    number = (form.constant > 0, const(abs(form.constant)))
    if form.constant > 0 and not any(plus for plus, _ in pieces):
        pieces.insert(0, number)
    elif form.constant or not pieces:
        pieces.append(number)
    (plus, first), *rest = pieces
    total = first if plus or first.value == 0 else -first
    for plus, piece in rest:
        total = total + piece if plus else total - piece
    return total


def tidy(e: Expr) -> Expr:
    """The same integer or boolean formula, collected: sums, divisions, nested minima, decided comparisons."""
    return transform(e, _tidy_node)


def _tidy_node(e: Expr) -> Expr | None:
    if e.op in RULES and all(a.dtype in INTS for a in e.args[-2:]):
        return RULES[e.op](*e.args)
    return _tidy_logical(e.op, *e.args) if e.op in ("and", "or") else None


def _tidy_sum(op: str) -> Callable[..., Expr]:
    """Collects a sum; a number added to a choice or an extreme goes to both sides of it."""

    def rule(*args: Expr) -> Expr:
        form = linear(Expr(op, args, None, OPS[op].dtype(tuple(a.dtype for a in args))))
        if form.constant and list(form.terms.values()) == [1]:
            (atom,) = form.terms
            if atom.op in ("min", "max", "where"):
                a, b = (formula(linear(x) + Linear({}, form.constant)) for x in atom.args[-2:])
                return ew(atom.op, *atom.args[:-2], a, b)
        return formula(form)

    return rule


def _tidy_floordiv(a: Expr, b: Expr) -> Expr:
    """Multiples of the divisor leave the division, and a division of a division is one."""
    n = b.value
    if n is None or n <= 0:
        return a // b
    form = linear(a)
    whole = Linear({t: c // int(n) for t, c in form.terms.items() if c % n == 0}, form.constant // int(n))
    rest = form - whole * int(n)
    if not rest.terms:
        return formula(whole)
    inner = formula(rest)
    if inner.op == "floordiv" and is_positive(inner.args[1]) and inner.args[1].value is not None:
        inner, b = inner.args[0], inner.args[1] * b
    return formula(whole + Linear({inner // b: 1}))


def _tidy_mod(a: Expr, b: Expr) -> Expr:
    n = b.value
    if n is None or n <= 0:
        return a % b
    form = linear(a)
    return formula(Linear({t: c for t, c in form.terms.items() if c % n}, form.constant % int(n))) % b


def _tidy_extreme(op: str) -> Callable[[Expr, Expr], Expr]:
    """The least or greatest of all leaves that no other leaf makes idle."""
    pick = minimum if op == "min" else maximum

    def idle(leaf: Expr, by: Expr) -> bool:
        return at_most(by, leaf) if op == "min" else at_most(leaf, by)

    def rule(a: Expr, b: Expr) -> Expr:
        kept: list[Expr] = []
        for leaf in (*_leaves(op, a), *_leaves(op, b)):
            if any(idle(leaf, other) for other in kept):
                continue
            kept = [other for other in kept if not idle(other, leaf)] + [leaf]
        total = kept[0]
        for leaf in kept[1:]:
            total = pick(total, leaf)
        return total

    return rule


def _leaves(op: str, e: Expr) -> tuple[Expr, ...]:
    return tuple(x for a in e.args for x in _leaves(op, a)) if e.op == op else (e,)


def _tidy_compare(op: str) -> Callable[[Expr, Expr], Expr]:
    """A comparison that holds for all positions, or for none, is a constant."""

    def rule(a: Expr, b: Expr) -> Expr:
        if op in ("gt", "ge"):
            a, b = b, a
        yes = at_most(a + 1, b) if op in ("lt", "gt") else at_most(a, b)
        no = at_most(b, a) if op in ("lt", "gt") else at_most(b + 1, a)
        if op in ("gt", "ge"):
            a, b = b, a
        return TRUE if yes else FALSE if no else ew(op, a, b)

    return rule


def _tidy_logical(op: str, a: Expr, b: Expr) -> Expr:
    """A condition that the other one implies adds nothing to it."""
    if implies(a, b):
        return a if op == "and" else b
    if implies(b, a):
        return b if op == "and" else a
    return ew(op, a, b)


def implies(a: Expr, b: Expr) -> bool:
    """Whether `b` certainly holds where `a` does."""
    match a, b:
        case Expr("le" | "lt", (a0, a1)), Expr("le" | "lt", (b0, b1)) if a.op == b.op:
            return at_most(b0, a0) and at_most(a1, b1)
        case Expr("ge" | "gt", (a0, a1)), Expr("ge" | "gt", (b0, b1)) if a.op == b.op:
            return at_most(a0, b0) and at_most(b1, a1)
        case _:
            return a == b


def choose(c: Expr, a: Expr, b: Expr) -> Expr:
    """where(c, a, b), less what c already decides in either branch."""
    if a.op == "where" and a.args[0] == c:
        a = a.args[1]
    if b.op == "where" and b.args[0] == c:
        b = b.args[2]
    if a.op == "where" and a.args[2] == b:
        return choose(_tidy_logical("and", c, a.args[0]), a.args[1], b)
    if b.op == "where" and b.args[1] == a:
        return choose(_tidy_logical("or", c, b.args[0]), a, b.args[2])
    return where(c, a, b)


RULES: Final[dict[str, Callable[..., Expr]]] = {
    "add": _tidy_sum("add"),
    "sub": _tidy_sum("sub"),
    "mul": _tidy_sum("mul"),
    "neg": _tidy_sum("neg"),
    "floordiv": _tidy_floordiv,
    "mod": _tidy_mod,
    "min": _tidy_extreme("min"),
    "max": _tidy_extreme("max"),
    "where": choose,
    "lt": _tidy_compare("lt"),
    "le": _tidy_compare("le"),
    "gt": _tidy_compare("gt"),
    "ge": _tidy_compare("ge"),
}


def at_most(a: Expr, b: Expr) -> bool:
    """Whether a <= b is certain, whatever the positions (i0 <= i1) and sizes (>= 0)."""
    match a:
        case Expr("min", (x, y)):
            return at_most(x, b) or at_most(y, b)
        case Expr("max", (x, y)) | Expr("where", (_, x, y)):
            return at_most(x, b) and at_most(y, b)
        case _:
            pass
    match b:
        case Expr("max", (x, y)):
            return at_most(a, x) or at_most(a, y)
        case Expr("min", (x, y)) | Expr("where", (_, x, y)):
            return at_most(a, x) and at_most(a, y)
        case Expr("bucket", (*index, x)) if a.op == "bucket" and a.attr == b.attr and [*a.args[:-1]] == index:
            return at_most(a.args[-1], x)
        case _:
            return _never_negative(linear(b) - linear(a))


def _never_negative(form: Linear) -> bool:
    """Replaces quotients, remainders and sizes by their nearest bounds until numbers or ends are left."""
    for atom, factor in form.terms.items():
        rest = form.without(atom)
        match atom:
            case Expr("floordiv", (x, n)) if n.value is not None and n.value > 0:
                # x - n + 1 <= n * (x // n) <= x
                nearest = linear(x - (n - 1) if factor > 0 else x)
                return _never_negative(rest * int(n.value) + nearest * factor)
            case Expr("mod", (_, n)) if n.value is not None and n.value > 0:
                nearest = 0 if factor > 0 else int(n.value) - 1
                return _never_negative(rest + Linear({}, nearest * factor))
            case _ if factor > 0 and (atom.op == "bucket" or is_positive(atom)):
                return _never_negative(rest)
            case _:
                continue
    return _ends_rise(form)


def _ends_rise(form: Linear) -> bool:
    """Whether the form is a number >= 0 plus multiples >= 0 of (last - first) position."""
    if form.constant < 0 or any(atom.op != "name" for atom in form.terms):
        return False
    factors = {str(atom.attr): factor for atom, factor in form.terms.items()}
    lasts = [factors.pop(last, 0) for last in ORDERED]
    firsts = [factors.pop(first, 0) for first in ORDERED.values()]
    return not factors and all(last == -first and last >= 0 for last, first in zip(lasts, firsts, strict=True))
