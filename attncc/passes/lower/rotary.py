"""Rotary positions in a kernel: angles are found in fp64, as turns, of which whole ones are left out.

fp32 would lose what is left of an angle of many turns: at position 2**17 half a percent of one.
"""

from __future__ import annotations

import math
from typing import Final

from attncc.ir.attention import Call
from attncc.ir.build import column, iota, row
from attncc.ir.expr import Expr, cast_to, const, ew
from attncc.passes.lower.chains import number, option
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.flow import Flow

BASE: Final = 10000.0


def rotated(f: Flow, step: Call, dims: int, pair: Columns, halves: tuple[Expr, Expr], back: int) -> tuple[Expr, Expr]:
    """Both halves of the pairs with these numbers, turned by the angles of their tokens.

    Method: RoFormer, arXiv 2104.09864.
    """
    find = _computed if option(step, "cos") is None else _looked_up
    first, second = halves
    cos, sin = find(f, step, dims, pair, f.tokens.position - back)
    note = f"[{f.rows}, {pair.width}]"
    text = f"{f.chain.operand}_turned"
    return f.let(text, first * cos - second * sin, note), f.let(text, second * cos + first * sin, note)


def _computed(f: Flow, step: Call, dims: int, pair: Columns, position: Expr) -> tuple[Expr, Expr]:
    """Pair t turns by position * base ** (-2 t / dims)."""
    slope = -2.0 * math.log2(number(step, "base", BASE)) / dims
    exponent = cast_to(pair.at, "f64") * const(slope, "f64") - const(math.log2(math.tau), "f64")
    speed = f.once("speed", ew("exp2", exponent), f"[{pair.width}] turns a token")
    turns = f.let("turns", column(cast_to(position, "f64")) * row(speed))
    part = cast_to(turns - ew("floor", turns + const(0.5, "f64")), "f32")
    angle = f.let("angle", part * math.tau, f"[{f.rows}, {pair.width}]")
    return f.let("cos", ew("cos", angle)), f.let("sin", ew("sin", angle))


def _looked_up(f: Flow, step: Call, dims: int, pair: Columns, position: Expr) -> tuple[Expr, Expr]:
    found: list[Expr] = []
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
