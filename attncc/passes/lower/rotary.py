"""Rotary positions in a kernel: angles are found in fp64, as turns, of which whole ones are left out.

fp32 would lose what is left of an angle of many turns: at position 2**17 half a percent of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from attncc.ir.attention import Call
from attncc.ir.build import column, half, iota, joined, row
from attncc.ir.expr import Expr, cast_to, const, ew
from attncc.passes.lower.chains import number, option
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.flow import Flow

BASE: Final = 10000.0
EVEN_BEYOND: Final = 1.5 * 2.0**24
"""Numbers of fp32 are even beyond half of it: a sum with it is rounded to the nearest even number."""
SINE: Final = (
    3.1415914092383352, -5.167677674087566, 2.54988074181923, -0.5982820256884329, 0.08047927714141556,
    -0.005991823780788996,
)  # fmt: skip
"""sin(pi x) for x in [-1, 1] as x times a polynomial in x**2: off by at most 1e-7."""
COSINE: Final = (
    0.9999999891719271, -4.934801132998095, 4.058694936194381, -1.3351588354443211, 0.2350305902278078,
    -0.025359678757258974, 0.001594142432914003,
)  # fmt: skip
"""cos(pi x) as a polynomial in x**2: off by at most 2e-8."""


def rotated(f: Flow, step: Call, dims: int, pair: Columns, halves: tuple[Expr, Expr], back: int) -> tuple[Expr, Expr]:
    """Both halves of the pairs with these numbers, turned by the angles of their tokens.

    Method: RoFormer, arXiv 2104.09864.
    """
    find = _computed if option(step, "cos") is None else _looked_up
    first, second = halves
    cos, sin = find(f, step, dims, pair, back)
    note = f"[{f.rows}, {pair.width}]"
    text = f"{f.chain.operand}_turned"
    return f.let(text, first * cos - second * sin, note), f.let(text, second * cos + first * sin, note)


def within(f: Flow, step: Call, dims: int, x: Expr, back: int, *, neighbours: bool) -> Expr:
    """A tile of all columns, whose first `dims` are turned: both halves of these are halves of a tile, or every other
    column of it."""
    rest: list[Expr] = []
    for _ in range(int(x.shape[1]).bit_length() - dims.bit_length()):
        rest.append(f.let("rest", half(x, 1)))
        x = f.let("turning", half(x, 0))
    first = f.let("first", half(x, 0, in_turn=neighbours))
    second = f.let("second", half(x, 1, in_turn=neighbours))
    made = joined(*rotated(f, step, dims, Columns(0, dims // 2), (first, second), back), in_turn=neighbours)
    for columns in reversed(rest):
        made = joined(made, columns)
    return f.let(f"{f.chain.operand}_whole", made, f"[{f.rows}, {made.shape[1]}]")


def _computed(f: Flow, step: Call, dims: int, pair: Columns, back: int) -> tuple[Expr, Expr]:
    """Pair t turns by position * base ** (-2 t / dims). Along a line fp32 will do: it is short."""
    slope = -2.0 * math.log2(number(step, "base", BASE)) / dims
    exponent = cast_to(pair.at, "f64") * const(slope, "f64") - const(math.log2(math.tau), "f64")
    speed = f.once("speed", ew("exp2", exponent), f"[{pair.width}] turns a token")
    shape = f"[{f.rows}, {pair.width}]"
    if f.matrices and f.line and not back and f.attn.numerics.exp != "exact":
        begin, further = f.line
        begun = f.once("begun", _part(f.once, begin, speed) * math.tau, f"{shape} angles where lines begin")
        angle = f.let("angle", begun + further * row(f.once("slow", cast_to(speed, "f32") * math.tau)), shape)
        return f.let("cos", ew("cos", angle)), f.let("sin", ew("sin", angle))
    if f.dtype != "f32":
        if f.line and not back:
            begin, further = f.line
            begun = f.once("begun", _part(f.once, begin, speed) * 2.0, f"{shape} half turns where lines begin")
            all_turns = f.let("turns", begun + further * row(f.once("slow", cast_to(speed, "f32") * 2.0)))
            half_turns = all_turns - ((all_turns + EVEN_BEYOND) - EVEN_BEYOND)
        else:
            half_turns = _part(f.let, f.tokens.position - back, speed) * 2.0
        half_turns = f.let("half_turns", half_turns, f"{shape} from -1 to 1")
        square = f.let("square", half_turns * half_turns)
        return f.let("cos", _polynomial(square, COSINE)), f.let("sin", half_turns * _polynomial(square, SINE))
    angle = f.let("angle", _part(f.let, f.tokens.position - back, speed) * math.tau, shape)
    return f.let("cos", ew("cos", angle)), f.let("sin", ew("sin", angle))


def _part(bind: Callable[[str, Expr], Expr], position: Expr, speed: Expr) -> Expr:
    """What is left of turns without the whole ones."""
    turns = bind("turns", column(cast_to(position, "f64")) * row(speed))
    return cast_to(turns - ew("floor", turns + const(0.5, "f64")), "f32")


def _polynomial(x: Expr, factors: Sequence[float]) -> Expr:
    """By Horner's rule: a tenth of the instructions of a function that takes angles of any size."""
    total: Expr = const(factors[-1])
    for factor in reversed(factors[:-1]):
        total = total * x + factor if factor > 0 else total * x - abs(factor)
    return total


def _looked_up(f: Flow, step: Call, dims: int, pair: Columns, back: int) -> tuple[Expr, Expr]:
    found: list[Expr] = []
    position = f.tokens.position - back
    for text in ("cos", "sin"):
        word = str(option(step, text))
        table = f.attn.input(word)
        at = [column(position), row(_within(pair))]
        batch = f.tokens.scope.values["b"]
        at = [column(batch) if batch.shape else batch, *at] if len(table.shape) == 3 else at
        shape = (f.rows, pair.width)
        value = f.scope.bind(Expr("load", tuple(at), word, "f32", shape))
        found.append(f.let(text, value, f"[{f.rows}, {pair.width}]"))
    return found[0], found[1]


def _within(pair: Columns) -> Expr:
    """Numbers of pairs; lanes behind the last read what is inside, of which they make nothing."""
    at = iota(pair.width) + pair.first
    return at if pair.inside is None else ew("min", at, pair.first + pair.count - 1)
