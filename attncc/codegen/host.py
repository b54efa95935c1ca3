"""Size formulas as Python text for the host side of an emitted package, over a mapping `n` of sizes and knobs."""

from __future__ import annotations

from typing import Final

from attncc.codegen.triton import INFIX, MACHINE_DIVISION, number
from attncc.errors import CompilerBug
from attncc.ir.expr import Expr

CALL: Final[dict[str, str]] = {
    "min": "min", "max": "max", "abs": "abs", "sqrt": "math.sqrt", "exp": "math.exp", "exp2": "math.exp2",
    "log": "math.log", "log2": "math.log2", "log1p": "math.log1p", "sin": "math.sin", "cos": "math.cos",
    "tanh": "math.tanh", "erf": "math.erf", "floor": "math.floor",
}  # fmt: skip
COMPARISON: Final = 4
PRODUCT, UNARY, POWER, ATOM = 8, 9, 10, 11
"""How tightly Python's operators bind, as in `INFIX`."""


def host_expr(e: Expr, outer: int = 0) -> str:
    """A scalar formula; `n["Sq"]` is the size Sq."""
    text, strength = _text(e)
    return f"({text})" if strength < outer else text


def _text(e: Expr) -> tuple[str, int]:
    """A formula and how tightly its outermost operator binds."""
    table = INFIX | MACHINE_DIVISION
    if e.op in table:
        sign, strength = table[e.op]
        left = host_expr(e.args[0], strength + (strength == COMPARISON))  # a < b < c is another thing
        return f"{left} {sign} {host_expr(e.args[1], strength + 1)}", strength
    if e.op in CALL:
        return f"{CALL[e.op]}({', '.join(map(host_expr, e.args))})", ATOM
    match e.op:
        case "const" if e.value is not None:
            text = number(e.value)
            return text, UNARY if text.startswith("-") else ATOM
        case "name":
            return f'n["{e.attr}"]', ATOM
        case "cast":
            return _text(e.args[0])
        case "neg":
            return f"-{host_expr(e.args[0], UNARY)}", UNARY
        case "not":
            return f"not {host_expr(e.args[0], COMPARISON)}", COMPARISON - 1
        case "pow":
            return f"{host_expr(e.args[0], ATOM)} ** {host_expr(e.args[1], UNARY)}", POWER
        case "rsqrt":
            return f"{host_expr(e.args[0], ATOM)} ** -0.5", POWER
        case "sigmoid":
            return f"1.0 / (1.0 + math.exp({host_expr(-e.args[0])}))", PRODUCT
        case "where":
            c, a, b = (host_expr(x, 1) for x in e.args)
            return f"{a} if {c} else {b}", 0
        case _:
            raise CompilerBug(f"the host has no text for '{e.op}'")


def host_function(e: Expr) -> str:
    """A formula as a lambda over the sizes."""
    return f"lambda n: {host_expr(e)}"
