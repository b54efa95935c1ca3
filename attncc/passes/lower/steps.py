"""The steps of a prologue as fragments of a kernel: one row of `STEPS` each.

A step is given its flow, its number among the steps of the operand, how many tokens back it is taken, and `before`:
what comes into it, so many tokens further back. It makes tiles of the columns that the next one asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce as fold
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import column, full, lanes, read, reduce, row
from attncc.ir.expr import Expr, cast_to, const, ew, where
from attncc.ir.widths import matrix
from attncc.passes.lower.chains import Chain, number, option, rope_of
from attncc.passes.lower.columns import Columns, Parts, cut, pairs
from attncc.passes.lower.convolution import AT_ONCE, convolved, mixes, runs_on
from attncc.passes.lower.flow import Before, Flow, Tiles
from attncc.passes.lower.hadamard import transformed
from attncc.passes.lower.rotary import rotated
from attncc.passes.lower.scores import input_param

EPS: Final = 1e-6

Step = Callable[[Flow, int, int, Before], Tiles]


def behind(f: Flow, level: int, back: int = 0) -> Tiles:
    """The operand behind so many of its steps, so many tokens before those of the tile."""
    at = level, back
    if at not in f.found:
        f.found[at] = _taken(f, level - 1, back) if level else _entered(f, back)
    return f.found[at]


def _entered(f: Flow, back: int) -> Tiles:
    text = f.chain.operand + (f"_{back}_back" if back else "")
    return {c: f.let(text, f.load(f.chain.operand, c, back), f"[{f.rows}, {c.width}]") for c in f.parts[0]}


def _taken(f: Flow, n: int, back: int) -> Tiles:
    """One step. Before its first token a sequence has zeros; convolutions that follow each other make of them what they
    make of any token."""

    def before(more: int) -> Tiles:
        tiles = behind(f, n, back + more)
        if n == 0 or not back + more or runs_on(f.chain, n):
            return tiles
        seen = column(f.tokens.own >= back + more)
        return {c: where(seen, x, 0.0) for c, x in tiles.items()}

    return STEPS[f.chain.steps[n].name](f, n, back, before)


def parts_of(attn: Attention, chain: Chain) -> tuple[Parts, ...]:
    """Columns as tiles before each step and behind the last: those that a rope turns lie in tiles of their own.

    A step that mixes columns takes them as they come, and makes those that are asked for.
    """
    found: list[Parts] = []
    ends = [n for n, step in enumerate(chain.steps) if mixes(step) or step.name == "hadamard"]
    start = 0
    for end in (*ends, len(chain.steps)):
        width = chain.widths[end]
        ropes = [rope_of(attn, step, width) for step in chain.steps[start:end] if step.name == "rope"]
        mixed = end < len(chain.steps) and mixes(chain.steps[end])
        if ropes:
            dims, neighbours = ropes[0]
            turned, rest = pairs(width, dims or width, neighbours)
            parts = (*(c for pair in turned for c in pair[1:]), *rest)
        elif mixed and chain.steps[end].name == "absorb":
            n, _ = matrix(attn, chain.steps[end])
            parts = (*cut(0, n, AT_ONCE), *(cut(n, width - n) if width > n else ()))
        else:
            parts = cut(0, width, AT_ONCE if mixed else width)
        found += [parts] * (end + 1 - start)
        start = end + 1
    return tuple(found)


# -- rows --------------------------------------------------------------------------------------------


def _rope(f: Flow, n: int, back: int, before: Before) -> Tiles:
    step, x = f.chain.steps[n], before(0)
    dims, neighbours = rope_of(f.attn, step, f.chain.widths[n])
    turned, _ = pairs(f.chain.widths[n], dims or f.chain.widths[n], neighbours)
    made = {c: x[c] for c in f.parts[n + 1]}
    for pair, first, second in turned:
        made[first], made[second] = rotated(f, step, dims or f.chain.widths[n], pair, (x[first], x[second]), back)
    return made


def _square_sum(f: Flow, x: Tiles) -> Expr:
    return f.let("squares", fold(lambda a, b: a + b, (reduce("sum", t * t, 1) for t in x.values())), f"[{f.rows}]")


def _rms_norm(f: Flow, n: int, back: int, before: Before) -> Tiles:
    step, x = f.chain.steps[n], before(0)
    mean = _square_sum(f, x) / float(f.chain.widths[n])
    factor = f.let("factor", ew("rsqrt", mean + number(step, "eps", EPS)), f"[{f.rows}]")
    word = option(step, "weight")
    made = {c: t * column(factor) for c, t in x.items()}
    if word is not None:
        made = {c: t * _scales(f, str(word), c) for c, t in made.items()}
    return _bound(f, "normed", made)


def _scales(f: Flow, word: str, c: Columns) -> Expr:
    """Weights of columns, of each head where there are two axes; an axis of 1 is shared."""
    x = f.attn.input(word)
    heads = x.shape[:-1]
    index = [const(0) if size == 1 else f.head for size in heads]
    last = const(0) if x.shape[-1] == 1 else c.at
    value = cast_to(read(input_param(x), *index, last, mask=c.inside if last.shape else None), "f32")
    return f.once("weight", row(value) if value.shape else value)


def _l2_norm(f: Flow, n: int, back: int, before: Before) -> Tiles:
    step, x = f.chain.steps[n], before(0)
    eps = number(step, "eps", EPS)
    length = f.let("length", ew("sqrt", _square_sum(f, x)), f"[{f.rows}]")
    length = where(length < eps, eps, length)  # of two numbers a maximum may leave NaN out
    factor = f.let("factor", number(step, "to", 1.0) / length, f"[{f.rows}]")
    return _bound(f, "normed", {c: t * column(factor) for c, t in x.items()})


def _silu(f: Flow, n: int, back: int, before: Before) -> Tiles:
    return _bound(f, "gated", {c: t * ew("sigmoid", t) for c, t in before(0).items()})


def _temperature(f: Flow, n: int, back: int, before: Before) -> Tiles:
    factor = f.let("temperature", f.per_head(f.chain.steps[n].args[0]))
    return _bound(f, "tempered", {c: t * factor for c, t in before(0).items()})


def _lerp(f: Flow, n: int, back: int, before: Before) -> Tiles:
    step = f.chain.steps[n]
    share = f.let("share", f.per_head(step.args[0]))
    made = {c: x + share * (f.let("other", _other(f, step.words[0], c, back)) - x) for c, x in before(0).items()}
    return _bound(f, "drawn", made)


def _other(f: Flow, word: str, c: Columns, back: int) -> Expr:
    """[rows, width] of an input [B, H, S, D], whose axes of 1 are shared."""
    x, t = f.attn.input(word), f.tokens
    places = (t.scope.values["b"], f.head, t.own - back, row(c.at))
    shared = [size == 1 for size in x.shape]
    at = [const(0) if one else column(e) if len(e.shape) == 1 else e for one, e in zip(shared, places, strict=True)]
    seen = t.own >= back if back and not shared[2] else None
    mask = lanes(seen, None if shared[3] else c.inside)
    value = cast_to(read(input_param(x), *at, mask=mask), "f32")
    return full((f.rows, c.width), 0.0) + value


# -- heads and tokens --------------------------------------------------------------------------------


def _mean_residual(f: Flow, n: int, back: int, before: Before) -> Tiles:
    """Sums of a query and its key, before all steps; a key head takes the mean over the queries that it serves."""
    scale, x = number(f.chain.steps[n], "scale", 0.5), before(0)
    if f.chain.operand == "q":
        pairs_ = {c: f.load("q", c, back) + f.load("k", c, back, f.served) for c in x}
        return _bound(f, "joined", {c: t + f.let("pair", pairs_[c]) * scale for c, t in x.items()})
    sums = _served_queries(f, x, back)
    pair = {c: f.let("pair", f.load("k", c, back) + sums[c]) for c in x}
    return _bound(f, "joined", {c: t + pair[c] * scale for c, t in x.items()})


def _served_queries(f: Flow, x: Tiles, back: int) -> Tiles:
    """The mean of the queries that a key head serves, as they came."""
    heads = f.attn.heads
    served = heads.q // heads.kv
    if served == 1:
        return {c: f.load("q", c, back) for c in x}
    sums = {c: f.let("queries", full((f.rows, c.width), 0.0), f"[{f.rows}, {c.width}]") for c in x}
    with f.b.loop(f.reserve("member"), 0, served) as member:
        head = member * heads.kv + f.head if heads.map == "tile" else f.head * served + member
        for c, total in sums.items():
            f.b.let(str(total.attr), total + f.load("q", c, back, head))
    return {c: total * (1.0 / served) for c, total in sums.items()}


def _value_shift(f: Flow, n: int, back: int, before: Before) -> Tiles:
    """The last columns of all heads, one head behind the other, come from the token before."""
    width = f.chain.widths[n]
    columns = f.chain.heads * width
    kept = columns - int(columns * number(f.chain.steps[n], "fraction", 0.5))
    now, earlier = before(0), before(1)
    made = {c: where(row(f.head * width + c.at >= kept), earlier[c], x) for c, x in now.items()}
    return _bound(f, "shifted", made)


def _bound(f: Flow, text: str, made: Tiles) -> Tiles:
    name = f"{f.chain.operand}_{text}"
    return {c: f.let(name, x, f"[{f.rows}, {c.width}]") for c, x in made.items()}


STEPS: Final[Mapping[str, Step]] = {
    "rope": _rope,
    "rms_norm": _rms_norm,
    "silu": _silu,
    "l2_norm": _l2_norm,
    "temperature": _temperature,
    "lerp": _lerp,
    "causal_conv": convolved,
    "mean_residual": _mean_residual,
    "value_shift": _value_shift,
    "hadamard": transformed,
}
