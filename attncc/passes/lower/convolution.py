"""Causal convolutions in a kernel: of each column alone, or matrices that mix the columns of a head.

Taps reach back to tokens of the tile before, so each tap takes what comes into it that many tokens earlier. Factors of
products are of the operands' dtype, as plain torch rounds what goes from one convolution to the next; a kernel of its
own writes the matrices so, once a call, in the order in which products read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Final

from attncc.ir.attention import Attention, Call
from attncc.ir.build import Builder, column, dot, full, iota, lanes, program, quotient, read, remainder, row
from attncc.ir.expr import Dtype, Expr, Value, cast_to, const, eq, name, where
from attncc.ir.primitives import on
from attncc.ir.tile import Kernel, Param, Scratch
from attncc.passes.lower.chains import Chain, channels, heads_and_taps, option
from attncc.passes.lower.columns import Columns, cut
from attncc.passes.lower.flow import Flow, Tiles
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.pieces import MIN_WIDTH
from attncc.passes.lower.scores import input_param, own_name
from attncc.passes.lower.tidy import tidy

AT_ONCE: Final = 128
"""Columns that one product goes over."""
ROWS: Final = 16
"""Rows of a matrix that a program writes."""
HALVES: Final[Mapping[Dtype, int]] = {"bf16": 1, "f16": 2, "f32": 1}
"""Numbers that add up to an entry of a matrix, by the operands' dtype. Shared memory has no room for two of bf16 beside
a second program: what one leaves is as much as plain torch loses where it rounds, and less than its steps together."""

Earlier = Callable[[int], Tiles]
"""What comes into a step, so many tokens further back."""


def mixes(step: Call) -> bool:
    """Whether a step makes each column of all of a head's: it multiplies by matrices."""
    return step.name == "absorb" or multiplies(step)


def multiplies(step: Call) -> bool:
    """Whether a convolution has a matrix for each tap of a head."""
    return step.name == "causal_conv" and option(step, "groups") == "heads"


def reach(attn: Attention, step: Call, width: int) -> int:
    """How many tokens back a step looks."""
    if step.name != "causal_conv":
        return int(step.name == "value_shift")
    found = channels(attn, step, width)
    return 0 if found is None else found[1] - 1


def runs_on(chain: Chain, n: int) -> bool:
    """Whether a step and the one before are convolutions without a step between them: zeros stand before both."""
    return n > 0 and chain.steps[n].name == "causal_conv" and chain.runs[n] == chain.runs[n - 1]


def convolved(f: Flow, n: int, before: Earlier, plus: Tiles | None = None) -> Tiles:
    """The operand behind a convolution, and `plus` added to it.

    Method: compressed convolutional attention, arXiv 2510.04476.
    """
    step, width = f.chain.steps[n], f.chain.widths[n]
    _, taps = heads_and_taps(f.attn, step, width)
    letters = on(step)
    heads = {"q": f.attn.heads.q, "k": f.attn.heads.kv, "v": f.attn.heads.v}
    head = f.head + sum(heads[x] for x in letters[: letters.index(f.chain.operand)])
    inputs = [before(taps - 1 - t) for t in range(taps)]
    make = _mixed if multiplies(step) else _depthwise
    text, made = f"{f.chain.operand}_convolved", partial(make, f, n, inputs, head)
    parts = f.parts[n + 1] if plus is None else plus
    return {c: f.let(text, made(c, None if plus is None else plus[c]), f"[{f.rows}, {c.width}]") for c in parts}


def _depthwise(f: Flow, n: int, inputs: list[Tiles], head: Expr, c: Columns, plus: Expr | None) -> Expr:
    step, width = f.chain.steps[n], f.chain.widths[n]
    total = _sum(_bound_bias(f, step, head, width, c), plus)
    x = f.attn.input(step.words[0])
    for t, tiles in enumerate(inputs):
        index = channel_index(x.shape[:-1], head, width, c.at)
        weight = f.once("tap", row(cast_to(read(input_param(x), *index, t, mask=c.inside), "f32")), f"[1, {c.width}]")
        total = _sum(total, cast_to(tiles[c], "f32") * weight)
    assert total is not None
    return total


def _mixed(f: Flow, n: int, inputs: list[Tiles], head: Expr, c: Columns, plus: Expr | None) -> Expr:
    """Products of all columns at all taps by the matrices of some; what is added is what their sum begins with."""
    step, width = f.chain.steps[n], f.chain.widths[n]
    each = range(HALVES[f.dtype])
    factors = [(t * len(each) + h, *item) for t, tiles in enumerate(inputs) for item in tiles.items() for h in each]
    if bias_word(f.attn, step):  # a sum would hold a register a column in each thread
        last = len(inputs) * len(each)
        factors = [(last, Columns(0, ROWS), full((f.rows, ROWS), 1.0, f.dtype)), *factors]
        total = plus
    else:
        total = _sum(plus or full((f.rows, c.width), 0.0), _bound_bias(f, step, head, width, c))
    bind = f.once if f.holds_matrices else f.let
    for t, source, tile in factors:
        at = head, t, column(source.at), row(c.at)
        matrix = read(f.b.params[taps_name(f.attn, step)], *at, mask=lanes(source.inside, c.inside))
        matrix = bind("matrix", matrix, f"[{source.width}, {c.width}]")
        total = f.let("total", dot(tile, matrix, total), f"[{f.rows}, {c.width}]")
    assert total is not None
    return total


def _sum(a: Expr | None, b: Expr | None) -> Expr | None:
    return b if a is None else a if b is None else a + b


def channel_index(shape: tuple[int | str, ...], head: Expr, width: int, columns: Expr) -> list[Value]:
    """Indices of a channel on an input's leading axes: [H, D], or [H * D]; torch has an axis of 1 behind it."""
    if len(shape) > 1 and shape[-1] == 1:
        return [*channel_index(shape[:-1], head, width, columns), const(0)]
    return [head, columns] if len(shape) == 2 else [head * width + columns]


def bias_of(attn: Attention, step: Call, head: Expr, width: int, c: Columns) -> Expr | None:
    value = bias_at(attn, step, head, width, c.at, c.inside)
    return None if value is None else row(value)


def bias_at(attn: Attention, step: Call, head: Expr, width: int, at: Expr, inside: Expr | None = None) -> Expr | None:
    """Of these columns of a head, fp32; None where a convolution has none."""
    word = option(step, "bias")
    if word is None:
        return None
    x = attn.input(str(word))
    index = [head, at] if len(x.shape) == 2 else [head * width + at]
    return cast_to(read(input_param(x), *index, mask=inside), "f32")


def _bound_bias(f: Flow, step: Call, head: Expr, width: int, c: Columns) -> Expr | None:
    value = bias_of(f.attn, step, head, width, c)
    return None if value is None else f.once("bias", value, f"[1, {c.width}]")


# -- matrices as products read them ----------------------------------------------------------------


def taps_name(attn: Attention, step: Call) -> str:
    """The name of the matrices of a convolution: [head, tap, column in, column out], in the operands' dtype.

    Behind the last tap is the bias where it is a factor too, as rows that add up to it.
    """
    return own_name("_".join([*step.words[:1], *bias_word(attn, step), "by_taps"]), attn)


def bias_word(attn: Attention, step: Call) -> list[str]:
    """The bias that is a factor, if any: fp32 adds it as it is."""
    word = option(step, "bias")
    return [] if word is None or attn.dtype == "fp32" else [str(word)]


def matrices(attn: Attention) -> dict[str, Call]:
    """The convolutions that multiply, by the names of their matrices."""
    return {taps_name(attn, step): step for step in attn.prologue if multiplies(step)}


def _shape(attn: Attention, step: Call) -> tuple[int, int, int]:
    """Heads, matrices of a head (halves of taps, and the bias) and columns."""
    width = attn.dims.v if "v" in on(step) else attn.dims.qk
    heads, taps = heads_and_taps(attn, step, width)
    return heads, taps * HALVES[VALUE_DTYPE[attn.dtype]] + len(bias_word(attn, step)), width


def matrix_scratch(attn: Attention) -> Iterator[Scratch]:
    for text, step in matrices(attn).items():
        heads, taps, width = _shape(attn, step)
        rows, stored = max(width, ROWS), -(-width // MIN_WIDTH) * MIN_WIDTH
        yield Scratch(text, (const(heads), const(taps), const(rows), const(stored)), VALUE_DTYPE[attn.dtype])


def matrix_params(attn: Attention) -> list[Param]:
    dtype = VALUE_DTYPE[attn.dtype]
    return [Param(text, "operand", dtype, doc="matrices of a convolution, a tap each") for text in matrices(attn)]


def matrix_kernel(attn: Attention) -> Kernel:
    """Writes matrices so: some rows of one a program."""
    params = [*matrix_params(attn), *map(input_param, attn.inputs)]
    b = Builder({p.name: p for p in params})
    first, several = 0, len(matrices(attn)) > 1
    for text, step in matrices(attn).items():
        heads, taps, width = _shape(attn, step)
        count = heads * taps * -(-width // ROWS)
        with b.when((program() >= first) & (program() < first + count)) if several else nullcontext():
            b.let("number", program() - first if first else program())
            _write_rows(b, attn, step, b.params[text])
        first += count
    doc = "Writes the matrices of convolutions as products read them: some rows of one a program."
    return Kernel(f"{attn.name}_prologue_matrices", *tidy(b.params.values(), b.body), (), const(first), doc)


def _write_rows(b: Builder, attn: Attention, step: Call, into: Param) -> None:
    """Rows of the matrix of a tap, or of a bias: what it is as the dtype has it, what that leaves, and 0."""
    _, taps, width = _shape(attn, step)
    blocks, bias = -(-width // ROWS), bias_word(attn, step)
    block = b.let("block", remainder(name("number"), blocks))
    tap = b.let("tap", remainder(quotient(name("number"), blocks), taps))
    head = b.let("head", quotient(name("number"), blocks * taps))
    at = b.let("at", block * ROWS + iota(ROWS), f"[{ROWS}] columns in")
    x, halves = attn.input(step.words[0]), HALVES[into.dtype]
    known = at < width if width % ROWS else None
    for c in cut(0, width):
        places = head, tap, column(at), row(c.at)
        mask = lanes(known, c.inside)
        seen = None if not bias else tap < taps - 1 if mask is None else mask & (tap < taps - 1)
        out = channel_index(x.shape[:-2], head, width, row(c.at))
        value = read(input_param(x), *out, column(at), quotient(tap, halves), mask=seen)
        if halves > 1:
            whole = b.let("entry", cast_to(value, "f32"), f"[{ROWS}, {c.width}]")
            value = whole - where(eq(remainder(tap, 2), 1), cast_to(cast_to(whole, into.dtype), "f32"), 0.0)
        b.let("value", cast_to(value, into.dtype), f"[{ROWS}, {c.width}]")
        if bias:
            with b.when(eq(tap, taps - 1)):
                whole = bias_of(attn, step, head, width, c)
                assert whole is not None
                b.let("whole", whole, f"[1, {c.width}]")
                b.let("most", cast_to(whole, into.dtype))
                rest = name("whole", "f32", whole.shape) - cast_to(name("most", into.dtype, whole.shape), "f32")
                parts = where(column(eq(at, 0)), cast_to(name("most", into.dtype, whole.shape), "f32"), 0.0)
                parts = where(column(eq(at, 1)), rest, parts)
                b.let("value", cast_to(parts, into.dtype))
        b.store(into, places, name("value", into.dtype, (ROWS, c.width)), mask if known is None or not bias else None)
