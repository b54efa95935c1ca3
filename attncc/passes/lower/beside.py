"""The kernel in which warps of their own do different things at once: go along lines with products, or move rows.

Two tiles of a head go along their lines beside each other: what one makes of its products goes on under those of the
other, and both read the head's matrices in shared memory. Operands that steps only move, as a value shift does, are
copied under all that by further warps, which need few registers: memory has time for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, function, iota, program, quotient, remainder
from attncc.ir.expr import Expr, const, name
from attncc.ir.tile import Function, Kernel, Param
from attncc.passes.lower import folding, lines, tokens
from attncc.passes.lower.chains import Chain
from attncc.passes.lower.columns import cut
from attncc.passes.lower.flow import Flow
from attncc.passes.lower.folded import WIDTHS
from attncc.passes.lower.grid import cdiv, heads_of
from attncc.passes.lower.lines import PAIR
from attncc.passes.lower.steps import stays
from attncc.passes.lower.tidy import tidy

NARROW: Final = 64
"""Columns of a tile that is moved: of more, threads would need more registers."""
PARTS: Final[Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]] = {0: ((4,), (240,)), 1: ((4, 4), (232, 40))}
"""Warps of the second tile of lines and of what moves rows, and registers of their threads, by how many of these there
are: the first tile has as many as the second."""


def only_moves(c: Chain) -> bool:
    """Whether rows of an operand are written as they came, all of a head to the same place."""
    shifted = [step.name for step in c.steps] == ["value_shift"]
    width = c.widths[0]
    return shifted and stays(c, 0) % width == 0 and width == c.stored and width in WIDTHS


def kernel(
    attn: Attention,
    mixed: Sequence[Chain],
    moved: Sequence[Chain],
    params: Mapping[str, Param],
    store: Callable[[Flow], None],
) -> Kernel:
    """Takes operands through convolutions that are one and the steps behind them, and moves others."""
    shares = lines.shares(attn, mixed)
    line = {c.operand: lines.line_of(attn, c.operand, shares[c.operand]) for c in mixed}
    b = Builder(params)
    known = {x: b.let(f"{x}_line", e, f"tokens of a line of {x}") for x, e in line.items()}
    ends = [b.let(f"{c.operand}_end", e) for c, e in zip(mixed, _ends(attn, mixed, known), strict=True)]
    movers = [(_mover(attn, c, params, store), {"number": program(), "programs": ends[-1]}) for c in moved]
    functions = [f for f, _ in movers]
    for c, begin, end in zip(mixed, [const(0), *ends[:-1]], ends, strict=True):
        with b.when((program() >= begin) & (program() < end) if begin.op == "name" else program() < end):
            number = b.let("number", program() - begin)
            heads = heads_of(b, attn, c.operand, b.let("h", remainder(number, c.heads)))
            pair = b.let("pair", quotient(number, c.heads))
            matrices = folding.read_matrices(b, attn, c, heads[0])
            going = _going(attn, c, params, heads, store, matrices)
            functions.append(going)
            given = [{"line": known[c.operand], "part": pair * PAIR + n, "TURN": n} for n in range(PAIR)]
            b.at_once([*((going, some) for some in given), *movers], *PARTS[len(movers)])
    through = ", ".join(c.operand for c in (*mixed, *moved))
    doc = f"Takes {through} through the steps before attention: two tiles of a head a program."
    body, grid = tidy(params.values(), b.body), _ends(attn, mixed, line)[-1]
    return Kernel(f"{attn.name}_prologue_folded", *body, tuple(functions), grid, doc, "gluon")


def _ends(attn: Attention, mixed: Sequence[Chain], line: Mapping[str, Expr]) -> list[Expr]:
    """The numbers of the programs behind those of each operand, whose lines have so many tokens."""
    found: list[Expr] = []
    for c in mixed:
        own = cdiv(name("B") * lines.tiles_of(attn, c.operand, line[c.operand]), PAIR) * c.heads
        found.append(found[-1] + own if found else own)
    return found


def _going(
    attn: Attention,
    c: Chain,
    params: Mapping[str, Param],
    heads: tuple[Expr, Expr],
    store: Callable[[Flow], None],
    matrices: tuple[Expr, ...],
) -> Function:
    b = Builder(params)
    lines.go_folded(b, attn, c, heads, store, matrices)
    steps = ", ".join(step.name for step in c.steps)
    doc = f"Takes a tile of lines of {c.operand} through {steps}."
    return _tidied(f"{attn.name}_{c.operand}_lines", b, ("TURN",), doc)


def _mover(attn: Attention, c: Chain, params: Mapping[str, Param], store: Callable[[Flow], None]) -> Function:
    """Moves tiles of rows of all heads, every so manyth."""
    rows, length = lines.rows_of(attn), name("Sq" if c.operand == "q" else "Sk")
    b = Builder(params)
    b.let("tiles", cdiv(length, rows))
    with b.loop("n", name("number"), name("B") * name("tiles") * c.heads, name("programs")) as n:
        h, tile = b.let("h", remainder(n, c.heads)), b.let("tile", quotient(n, c.heads))
        b.let("b", quotient(tile, name("tiles")))
        first = b.let("first", remainder(tile, name("tiles")) * rows)
        inner = Builder(params)
        at = tokens.along(inner, attn, c.operand, first + iota(rows), rows)
        taken = {"tiles", "n", "h", "tile", "b", "first", *inner.bound}
        for part in cut(0, c.widths[0], NARROW):
            store(Flow(attn, c, b, inner, at, h, h, ((part,),) * (len(c.steps) + 1), taken))
        b.extend(inner.body)
    return _tidied(f"{attn.name}_{c.operand}_moved", b, (), f"Moves rows of {c.operand}.")


def _tidied(text: str, b: Builder, constexprs: tuple[str, ...], doc: str) -> Function:
    _, body = tidy(b.params.values(), b.body)
    return function(text, Builder(b.params, [[*body]]), (), constexprs, doc)
