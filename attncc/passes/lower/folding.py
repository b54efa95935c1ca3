"""Convolutions that follow each other as one, by the matrices that do what all of them do.

A convolution of each column, and one that mixes columns behind it, are linear: products of their taps are the taps of
one that reaches further back. Its tiles are multiplied as they came, no step stands before the products, and its
matrices are rounded once where what goes from one convolution to the next would be rounded beside them. A kernel of
its own makes them, once a call.

Method: compressed convolutional attention, arXiv 2510.04476; that its two convolutions are one is our own remark.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

from attncc.ir.attention import Attention, Call
from attncc.ir.build import Builder, column, dot, full, iota, quotient, read, reduce, remainder, row, trans
from attncc.ir.expr import Expr, cast_to, const, eq, where
from attncc.ir.primitives import on
from attncc.ir.tile import Param, Scratch
from attncc.passes.lower.chains import Chain, heads_and_taps, option
from attncc.passes.lower.convolution import bias_at, channel_index, multiplies, runs_on
from attncc.passes.lower.flow import Flow, Tiles
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.scores import input_param, own_name

ROWS: Final = 16
"""Columns of a matrix that a program writes, and rows of a bias, which add up to it."""


def folds(chain: Chain) -> bool:
    """Whether an operand's first steps are one convolution that mixes columns, or that behind one that does not."""
    first = [n for n, step in enumerate(chain.steps) if multiplies(step)]
    return first == [0] or (first == [1] and runs_on(chain, 1))


def count(chain: Chain) -> int:
    """How many steps are one."""
    return 1 + next(n for n, step in enumerate(chain.steps) if multiplies(step))


def taps_of(attn: Attention, chain: Chain) -> int:
    """Tokens that one product goes over, together with that of the tile."""
    return 1 + sum(_taps(attn, step, chain.widths[0]) - 1 for step in chain.steps[: count(chain)])


def product(f: Flow, tiles: list[Tiles], plus: Tiles | None) -> Tiles:
    """Tiles of all columns, the earliest token first, behind what is one; and `plus`, with which the sum begins."""
    (c,) = f.parts[0]
    total = full((f.rows, c.width), 0.0) if plus is None else plus[c]
    factors = [tile[c] for tile in tiles]
    if _has_bias(f.chain):
        factors = [full((f.rows, ROWS), 1.0, f.dtype), *factors]
    for tile, matrix in zip(factors, f.matrices, strict=True):
        total = dot(tile, matrix, total)
    return {c: f.let("total", total, f"[{f.rows}, {c.width}]")}


def read_matrices(b: Builder, attn: Attention, chain: Chain, head: Expr) -> tuple[Expr, ...]:
    """Binds a head's matrices in the order of products: the bias, then the earliest token."""
    width, taps = chain.widths[0], taps_of(attn, chain)
    rows = [*([(taps, ROWS)] if _has_bias(chain) else ()), *((t, width) for t in range(taps))]
    made = b.params[name_of(attn, chain)]
    head = head + heads_before(attn, chain)
    return tuple(
        b.let(b.fresh("matrix"), read(made, head, t, column(iota(n)), row(iota(width))), f"[{n}, {width}]")
        for t, n in rows
    )


def heads_before(attn: Attention, chain: Chain) -> int:
    """Of operands that stand before this one in the weights."""
    letters = on(_mixing(chain))
    heads = {"q": attn.heads.q, "k": attn.heads.kv, "v": attn.heads.v}
    return sum(heads[x] for x in letters[: letters.index(chain.operand)])


def name_of(attn: Attention, chain: Chain) -> str:
    """The name of the matrices: [head, token, column in, column out] of the operands' dtype, the earliest token first.

    Behind the last token is the bias, as rows that add up to it.
    """
    return own_name("_".join([*(s.words[0] for s in chain.steps[: count(chain)]), "folded"]), attn)


def matrix_scratch(attn: Attention, chain: Chain) -> Scratch:
    heads, width = _heads(attn, chain), chain.widths[0]
    shape = heads, _matrices(attn, chain), width, width
    return Scratch(name_of(attn, chain), tuple(map(const, shape)), VALUE_DTYPE[attn.dtype])


def matrix_param(attn: Attention, chain: Chain) -> Param:
    doc = "matrices of convolutions that are one, of a token each"
    return Param(name_of(attn, chain), "operand", VALUE_DTYPE[attn.dtype], doc=doc)


def writers(attn: Attention, chain: Chain) -> int:
    """Programs that write the matrices: each some columns of one, or of a head's bias."""
    return _heads(attn, chain) * _each(attn, chain)


def _each(attn: Attention, chain: Chain) -> int:
    return (taps_of(attn, chain) + _has_bias(chain)) * (chain.widths[0] // ROWS)


def write(b: Builder, attn: Attention, chain: Chain, which: Expr) -> None:
    """What one of these programs does: it reads rows of weights, which are columns of the matrices."""
    width, into = chain.widths[0], b.params[name_of(attn, chain)]
    blocks = width // ROWS
    number = b.let("number", remainder(which, _each(attn, chain)))
    head = b.let("head", quotient(which, _each(attn, chain)))
    at = b.let("at", remainder(number, blocks) * ROWS + iota(ROWS), f"[{ROWS}] columns out")
    tap = b.let("tap", quotient(number, blocks), "the bias behind the last")
    with b.when(tap < taps_of(attn, chain)) if _has_bias(chain) else nullcontext():
        value = b.let("value", cast_to(_folded(b, attn, chain, head, tap, at), into.dtype), f"[{ROWS}, {width}]")
        b.store(into, (head, tap, column(iota(width)), row(at)), trans(value))
    if _has_bias(chain):
        with b.when(tap >= taps_of(attn, chain)):
            _write_bias(b, attn, chain, head, at)


def _folded(b: Builder, attn: Attention, chain: Chain, head: Expr, tap: Expr, at: Expr) -> Expr:
    """[rows, width] what each column adds of a token to the columns `at`."""
    mixing, width = _mixing(chain), chain.widths[0]
    if count(chain) == 1:
        return _matrix(attn, mixing, head, width, at, tap)
    first = chain.steps[0]
    x, taps = attn.input(first.words[0]), _taps(attn, first, width)
    index = channel_index(x.shape[:-1], head, width, row(iota(width)))
    total: Expr = full((ROWS, width), 0.0)
    for t in range(_taps(attn, mixing, width)):
        seen = (tap >= t) & (tap < t + taps)
        weight = cast_to(read(input_param(x), *index, tap - t, mask=seen), "f32")
        total = b.let("total", total + _matrix(attn, mixing, head, width, at, const(t)) * weight)
    return total


def _matrix(attn: Attention, step: Call, head: Expr, width: int, at: Expr, tap: Expr) -> Expr:
    x = attn.input(step.words[0])
    out = channel_index(x.shape[:-2], head, width, column(at))
    return cast_to(read(input_param(x), *out, row(iota(width)), tap), "f32")


def _write_bias(b: Builder, attn: Attention, chain: Chain, head: Expr, at: Expr) -> None:
    """The bias of the last and what it makes of the first's: as the dtype has it, what that leaves, and zeros."""
    width, mixing, first, into = chain.widths[0], _mixing(chain), chain.steps[0], b.params[name_of(attn, chain)]
    own = bias_at(attn, mixing, head, width, at)
    total: Expr = full((ROWS,), 0.0) if own is None else own
    before = bias_at(attn, first, head, width, iota(width)) if count(chain) == 2 else None
    if before is not None:
        for t in range(_taps(attn, mixing, width)):
            made = _matrix(attn, mixing, head, width, at, const(t)) * row(before)
            total = b.let("total", total + reduce("sum", made, 1), f"[{ROWS}]")
    whole = total if total.op == "name" else b.let("total", total, f"[{ROWS}]")
    most = b.let("most", cast_to(whole, into.dtype))
    parts = where(column(eq(iota(ROWS), 0)), row(cast_to(most, "f32")), 0.0)
    parts = where(column(eq(iota(ROWS), 1)), row(whole - cast_to(most, "f32")), parts)
    b.store(into, (head, const(taps_of(attn, chain)), column(iota(ROWS)), row(at)), cast_to(parts, into.dtype))


# -- weights --------------------------------------------------------------------------------------


def _mixing(chain: Chain) -> Call:
    return chain.steps[count(chain) - 1]


def _taps(attn: Attention, step: Call, width: int) -> int:
    return heads_and_taps(attn, step, width)[1]


def _heads(attn: Attention, chain: Chain) -> int:
    """That the weights have: of all operands of the step."""
    return heads_and_taps(attn, _mixing(chain), chain.widths[0])[0]


def _has_bias(chain: Chain) -> bool:
    return any(option(step, "bias") is not None for step in chain.steps[: count(chain)])


def _matrices(attn: Attention, chain: Chain) -> int:
    return taps_of(attn, chain) + _has_bias(chain)
