"""Causal convolutions in a kernel: of each column alone, or matrices that mix the columns of a head.

Taps reach back to tokens of the tile before, so each tap takes what comes into it that many tokens earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from attncc.ir.attention import Attention, Call
from attncc.ir.build import column, lanes, read, row
from attncc.ir.expr import Expr, Value, cast_to, const
from attncc.ir.primitives import on
from attncc.passes.lower.chains import HELD, Chain, channels, matrix_bytes, option
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.flow import Before, Flow, Tiles
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.product import HALVES, Factor, of_matrix, summed
from attncc.passes.lower.scores import input_param

AT_ONCE: Final = 128
"""Columns that one product goes over."""


def mixes(step: Call) -> bool:
    """Whether a step makes each column of all of a head's: it multiplies by matrices."""
    return step.name == "absorb" or (step.name == "causal_conv" and option(step, "groups") == "heads")


def stays(attn: Attention, step: Call, width: int) -> bool:
    """Whether shared memory holds all halves of a head's matrices at once, so that they are read once."""
    return HALVES[VALUE_DTYPE[attn.dtype]] * matrix_bytes(attn, step, width) in range(1, HELD + 1)


def runs_on(chain: Chain, n: int) -> bool:
    """Whether a step and the one before are convolutions without a step between them: zeros stand before both."""
    return n > 0 and chain.steps[n].name == "causal_conv" and chain.runs[n] == chain.runs[n - 1]


def convolved(f: Flow, n: int, back: int, before: Before) -> Tiles:
    """Method: compressed convolutional attention, arXiv 2510.04476."""
    step, width = f.chain.steps[n], f.chain.widths[n]
    found = channels(f.attn, step, width)
    assert found is not None, "an odd shape has no lowering"
    _, taps = found
    letters = on(step)
    heads = {"q": f.attn.heads.q, "k": f.attn.heads.kv, "v": f.attn.heads.v}
    head = f.head + sum(heads[x] for x in letters[: letters.index(f.chain.operand)])
    inputs = [before(taps - 1 - t) for t in range(taps)]
    make = _mixed(f, n, inputs) if mixes(step) else partial(_depthwise, f, n, inputs)
    return {c: f.let(f"{f.chain.operand}_convolved", make(head, c), f"[{f.rows}, {c.width}]") for c in f.parts[n + 1]}


def _depthwise(f: Flow, n: int, inputs: list[Tiles], head: Expr, c: Columns) -> Expr:
    step, width = f.chain.steps[n], f.chain.widths[n]
    total: Expr | None = _bias(f, step, head, width, c)
    x = f.attn.input(step.words[0])
    for t, tiles in enumerate(inputs):
        index = _channel(x.shape[:-1], head, width, c.at)
        weight = f.once("tap", row(cast_to(read(input_param(x), *index, t, mask=c.inside), "f32")), f"[1, {c.width}]")
        total = tiles[c] * weight if total is None else total + tiles[c] * weight
    assert total is not None
    return total


def _mixed(f: Flow, n: int, inputs: list[Tiles]) -> Callable[[Expr, Columns], Expr]:
    """Products of all columns at all taps by the matrices of some."""
    step, width = f.chain.steps[n], f.chain.widths[n]
    x = f.attn.input(step.words[0])
    sources = [(t, source) for t, tiles in enumerate(inputs) for source in tiles]
    left = f.multiplied([tile for tiles in inputs for tile in tiles.values()], exact=n == 0)

    bind = f.once if stays(f.attn, step, width) else f.let

    def make(head: Expr, c: Columns) -> Expr:
        out = _channel(x.shape[:-2], head, width, row(c.at))
        right: list[Factor] = []
        for t, source in sources:
            at = (*out, column(source.at), t)
            matrix = read(input_param(x), *at, mask=lanes(source.inside, c.inside))
            matrix = bind("matrix", matrix, f"[{source.width}, {c.width}]")
            right.append(of_matrix(bind, matrix, f.dtype))
        total = summed(f.let, left, right, f"[{f.rows}, {c.width}]")
        bias = _bias(f, step, head, width, c)
        return total if bias is None else total + bias

    return make


def _channel(shape: tuple[int | str, ...], head: Expr, width: int, columns: Expr) -> list[Value]:
    """Indices of a channel on an input's leading axes: [H, D], or [H * D]; torch has an axis of 1 behind it."""
    if len(shape) > 1 and shape[-1] == 1:
        return [*_channel(shape[:-1], head, width, columns), const(0)]
    return [head, columns] if len(shape) == 2 else [head * width + columns]


def _bias(f: Flow, step: Call, head: Expr, width: int, c: Columns) -> Expr | None:
    word = option(step, "bias")
    if word is None:
        return None
    x = f.attn.input(str(word))
    index = [head, c.at] if len(x.shape) == 2 else [head * width + c.at]
    return f.once("bias", row(cast_to(read(input_param(x), *index, mask=c.inside), "f32")), f"[1, {c.width}]")
