"""Size formulas as Python text for the host side of an emitted package, over a mapping `n` of sizes and knobs."""

from __future__ import annotations

from typing import Final

from attncc.codegen.triton import INFIX, MACHINE_DIVISION, number
from attncc.errors import CompilerBug
from attncc.ir.expr import Expr

CALL: Final[dict[str, str]] = {
    "min": "min", "max": "max", "abs": "abs", "sqrt": "math.sqrt", "exp": "math.exp", "log": "math.log",
    "log2": "math.log2", "floor": "math.floor",
}  # fmt: skip


def host_expr(e: Expr, outer: int = 0) -> str:
    """A scalar formula; `n["Sq"]` is the size Sq."""
    table = INFIX | MACHINE_DIVISION
    if e.op in table:
        sign, strength = table[e.op]
        text = f"{host_expr(e.args[0], strength)} {sign} {host_expr(e.args[1], strength + 1)}"
        return f"({text})" if strength < outer else text
    if e.op in CALL:
        return f"{CALL[e.op]}({', '.join(map(host_expr, e.args))})"
    match e.op:
        case "const" if e.value is not None:
            return number(e.value)
        case "name":
            return f'n["{e.attr}"]'
        case "cast":
            return host_expr(e.args[0], outer)
        case "rsqrt":
            text = f"{host_expr(e.args[0], 11)} ** -0.5"
            return f"({text})" if outer > 8 else text
        case "exp2":
            return f"2.0 ** {host_expr(e.args[0], 11)}"
        case "neg":
            return f"-{host_expr(e.args[0], 9)}"
        case "pow":
            return f"({host_expr(e.args[0], 11)} ** {host_expr(e.args[1], 11)})"
        case "where":
            c, a, b = (host_expr(x, 1) for x in e.args)
            return f"({a} if {c} else {b})"
        case _:
            raise CompilerBug(f"the host has no text for '{e.op}'")


def host_function(e: Expr) -> str:
    """A formula as a lambda over the sizes."""
    return f"lambda n: {host_expr(e)}"
