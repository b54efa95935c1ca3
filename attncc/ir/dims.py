"""Integer facts about sizes: bounds and divisibility of formulas, proven with sympy.

Sums, products and quotients of sizes become sympy integers, in which equal terms cancel; every other integer
(a tensor read, a minimum) is a symbol with a range. Only integers go this way, never values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from importlib import import_module
from typing import Any, Final

from attncc.ir.expr import INTS, Expr, Value, lift
from attncc.ir.intervals import Interval, interval

sympy: Any = import_module("sympy")  # it has no types: this says so once

Range = tuple[int | None, int | None]
"""The least and the greatest value; None where there is no bound."""

UNBOUNDED: Final[Range] = (None, None)

LIMITS: Final[Mapping[str, tuple[int, int]]] = {
    "bool": (0, 1),
    "i8": (-(2**7), 2**7 - 1),
    "u8": (0, 2**8 - 1),
    "i16": (-(2**15), 2**15 - 1),
    "i32": (-(2**31), 2**31 - 1),
    "i64": (-(2**63), 2**63 - 1),
}


def cdiv(a: Expr, b: Value) -> Expr:
    """a / b, rounded up, for b > 0."""
    b = lift(b)
    return a if b.value == 1 else (a + (b - 1)) // b


def bounds(e: Expr, sizes: Mapping[str, Range], positions: Mapping[str, Interval] | None = None) -> Range:
    """The numbers an integer formula lies between, from those of its names.

    `positions` run over intervals whose ends are formulas of the sizes, so that i <= Sk - 1 and j >= 0 meet
    before any number is put in.
    """
    low, high = interval(e, positions or {})
    translator = _Translator(sizes)
    least = None if low is None else translator.range(low)[0]
    greatest = None if high is None else translator.range(high)[1]
    return least, greatest


def fits(range_: Range, dtype: str) -> bool:
    """Whether all of a range are numbers of an integer dtype."""
    (least, greatest), (first, last) = range_, LIMITS[dtype]
    return least is not None and greatest is not None and first <= least and greatest <= last


def is_multiple(e: Expr, n: int, multiples: Mapping[str, int]) -> bool:
    """Whether `n` divides an integer formula, given numbers that divide its names."""
    formula = _Translator({}).of(e)
    for text, step in multiples.items():
        formula = formula.subs(_symbol(text), step * _symbol(f"{text} by {step}"))
    return all(term.as_coeff_Mul()[0] % n == 0 for term in sympy.Add.make_args(sympy.expand(formula)))


def _symbol(text: str) -> Any:
    return sympy.Symbol(text, integer=True)


class _Translator:
    """Turns formulas into sympy integers, and remembers the range of every symbol."""

    def __init__(self, sizes: Mapping[str, Range]) -> None:
        self._sizes = sizes
        self._ranges: dict[Any, Range] = {}
        self._symbols: dict[Expr, Any] = {}

    def range(self, e: Expr) -> Range:
        return self._range(sympy.expand(self.of(e)))

    def of(self, e: Expr) -> Any:
        """The formula in sympy's terms."""
        if e.value is not None:
            return sympy.Integer(int(e.value))
        if e.op in SYMPY and all(a.dtype in INTS for a in e.args):
            return SYMPY[e.op](*map(self.of, e.args))
        if e.op == "cast" and e.dtype in INTS and e.args[0].dtype in INTS:
            return self.of(e.args[0])
        if e not in self._symbols:
            symbol = _symbol(str(e.attr) if e.op == "name" else f"@{len(self._symbols)}")
            self._symbols[e] = symbol
            self._ranges[symbol] = self._range_of_symbol(e)
        return self._symbols[e]

    def _range_of_symbol(self, e: Expr) -> Range:
        match e:
            case Expr("name"):
                return self._sizes.get(str(e.attr), UNBOUNDED)
            case Expr("bucket"):
                return 0, LIMITS["i32"][1]
            case Expr("rows_min" | "rows_max", (a,)):
                return self._range_of_symbol(a)
            case Expr("where", (_, a, b)) if e.dtype in INTS:
                return _hull([*self.range(a), *self.range(b)])
            case Expr("min" | "max", (a, b)) if e.dtype in INTS:
                return _pick(e.op, self.range(a), self.range(b))
            case Expr("mod", (_, n)) if n.value is not None and n.value > 0:
                return 0, int(n.value) - 1
            case _:
                return LIMITS.get(e.dtype, UNBOUNDED)

    def _range(self, s: Any) -> Range:
        """Interval arithmetic on the expanded formula."""
        if s.is_Integer:
            return int(s), int(s)
        if s.is_Symbol:
            return self._ranges[s]
        if isinstance(s, sympy.floor):
            numerator, n = s.args[0].as_numer_denom()
            least, greatest = self._range(sympy.expand(numerator))
            if not (n.is_Integer and n > 0):
                return UNBOUNDED
            return None if least is None else least // int(n), None if greatest is None else greatest // int(n)
        if isinstance(s, sympy.Pow) and s.exp.is_Integer and s.exp > 0:
            return reduce(_product, [self._range(s.base)] * int(s.exp))
        parts = [self._range(a) for a in s.args]
        if isinstance(s, sympy.Add):
            return reduce(_sum, parts)
        return reduce(_product, parts) if isinstance(s, sympy.Mul) else UNBOUNDED


def _floor_div(a: Any, b: Any) -> Any:
    return sympy.floor(a / b)


SYMPY: Final[Mapping[str, Callable[..., Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "floordiv": _floor_div,
}


def _sum(a: Range, b: Range) -> Range:
    (a0, a1), (b0, b1) = a, b
    return None if a0 is None or b0 is None else a0 + b0, None if a1 is None or b1 is None else a1 + b1


def _product(a: Range, b: Range) -> Range:
    """Exact where all ends are known; an open end stays one under factors that are not negative."""
    (a0, a1), (b0, b1) = a, b
    if a0 is not None and b0 is not None and a0 >= 0 and b0 >= 0:
        return a0 * b0, None if a1 is None or b1 is None else a1 * b1
    return _hull([None if x is None or y is None else x * y for x in a for y in b])


def _hull(ends: list[int | None]) -> Range:
    known = [x for x in ends if x is not None]
    return (min(known), max(known)) if len(known) == len(ends) else UNBOUNDED


def _pick(op: str, a: Range, b: Range) -> Range:
    pick = min if op == "min" else max
    ends = [None if x is None or y is None else pick(x, y) for x, y in zip(a, b, strict=True)]
    known = [[x for x in pair if x is not None] for pair in zip(a, b, strict=True)]
    if op == "min":
        return ends[0], min(known[1], default=None)
    return max(known[0], default=None), ends[1]
