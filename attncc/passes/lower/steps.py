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
from attncc.passes.lower import folding
from attncc.passes.lower.chains import Chain, number, option, rope_of
from attncc.passes.lower.columns import Columns, Parts, cut, pairs
from attncc.passes.lower.convolution import AT_ONCE, convolved, mixes, multiplies, runs_on
from attncc.passes.lower.flow import Before, Flow, Tiles
from attncc.passes.lower.hadamard import transformed
from attncc.passes.lower.pieces import MIN_WIDTH
from attncc.passes.lower.rotary import rotated, within
from attncc.passes.lower.scores import input_param

EPS: Final = 1e-6

Step = Callable[[Flow, int, int, Before], Tiles]


def behind(f: Flow, level: int, back: int = 0) -> Tiles:
    """The operand behind so many of its steps, so many tokens before those of the tile."""
    at = level, back
    if at not in f.found:
        f.found[at] = _rounded(f, level, _taken(f, level - 1, back)) if level else _entered(f, back)
    return f.found[at]


def _entered(f: Flow, back: int) -> Tiles:
    """As they come where they are carried or multiplied so, else in fp32."""
    text, operand = f.chain.operand + (f"_{back}_back" if back else ""), f.chain.operand
    read_ = f.entered if f.line or multiplies(f.chain.steps[0]) else f.load
    return {c: f.let(text, read_(operand, c, back), f"[{f.rows}, {c.width}]") for c in f.parts[0]}


def _rounded(f: Flow, level: int, x: Tiles) -> Tiles:
    """What is multiplied next is a product's factor."""
    if level == len(f.chain.steps) or not multiplies(f.chain.steps[level]):
        return x
    return {c: f.let("factor", cast_to(t, f.dtype), f"[{f.rows}, {c.width}]") for c, t in x.items()}


def _taken(f: Flow, n: int, back: int, plus: Tiles | None = None) -> Tiles:
    """One step, and `plus`. Before its first token a sequence has zeros; convolutions that follow each other make of
    them what they make of any token."""
    step = f.chain.steps[n]
    if f.matrices and n == folding.count(f.chain) - 1:
        taps = folding.taps_of(f.attn, f.chain)
        return folding.product(f, [behind(f, 0, back + taps - 1 - t) for t in range(taps)], plus)

    def before(more: int, plus: Tiles | None = None) -> Tiles:
        tiles = behind(f, n, back + more) if plus is None or not n else _taken(f, n - 1, back + more, plus)
        if n and back + more and not runs_on(f.chain, n):
            seen = column(f.tokens.own >= back + more)
            tiles = {c: where(seen, x, const(0.0, x.dtype)) for c, x in tiles.items()}
        if multiplies(step):
            return tiles
        tiles = {c: cast_to(x, "f32") for c, x in tiles.items()}
        return tiles if plus is None or n else {c: x + plus[c] for c, x in tiles.items()}

    if step.name == "causal_conv":
        return convolved(f, n, before, plus)
    made = STEPS[step.name](f, n, back, before)
    return made if plus is None else {c: x + plus[c] for c, x in made.items()}


def parts_of(attn: Attention, chain: Chain) -> tuple[Parts, ...]:
    """Columns as tiles before each step and behind the last: those that a rope turns lie in tiles of their own.

    A step that mixes columns takes them as they come, and makes those that are asked for. Of what products make, whole
    tiles are turned, as far as those halve; and where pairs are neighbours, which memory has in one piece.
    """
    found: list[Parts] = []
    ends = [n for n, step in enumerate(chain.steps) if mixes(step) or step.name == "hadamard"]
    start = 0
    for end in (*ends, len(chain.steps)):
        width = chain.widths[end]
        ropes = [rope_of(attn, step, width) for step in chain.steps[start:end] if step.name == "rope"]
        mixed = end < len(chain.steps) and mixes(chain.steps[end])
        behind_products = start > 0 and multiplies(chain.steps[start - 1])
        if ropes and halves(width, ropes[0][0]) and (behind_products or ropes[0][1]):
            parts = cut(0, width, AT_ONCE if mixed else width)
        elif ropes:
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


def halves(width: int, dims: int | None) -> bool:
    """Whether a rope turns whole tiles, or halves of halves of them."""
    turned = dims or width
    return width & (width - 1) == 0 == turned & (turned - 1) and MIN_WIDTH < turned <= width


# -- rows --------------------------------------------------------------------------------------------


def _rope(f: Flow, n: int, back: int, before: Before) -> Tiles:
    step, x = f.chain.steps[n], before(0)
    dims, neighbours = rope_of(f.attn, step, f.chain.widths[n])
    if len(x) == 1 and halves(f.chain.widths[n], dims):
        width = f.chain.widths[n]
        return {c: within(f, step, dims or width, t, back, neighbours=neighbours) for c, t in x.items()}
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
    factor = f.let("factor", _tempered(f, n, ew("rsqrt", mean + number(step, "eps", EPS))), f"[{f.rows}]")
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
    factor = f.let("factor", _tempered(f, n, number(step, "to", 1.0) / length), f"[{f.rows}]")
    return _bound(f, "normed", {c: t * column(factor) for c, t in x.items()})


def _silu(f: Flow, n: int, back: int, before: Before) -> Tiles:
    return _bound(f, "gated", {c: t * ew("sigmoid", t) for c, t in before(0).items()})


def _temperature(f: Flow, n: int, back: int, before: Before) -> Tiles:
    if n and _is_tempered(f, n - 1):
        return before(0)
    value = _temperature_of(f, n)
    return _bound(f, "tempered", {c: t * value for c, t in before(0).items()})


def _temperature_of(f: Flow, n: int) -> Expr:
    value = f.per_head(f.chain.steps[n].args[0])
    return (f.let if value.shape or not f.line else f.once)("temperature", value)


def _is_tempered(f: Flow, n: int) -> bool:
    """Whether the factor of a norm is multiplied by the temperature that follows, which all rows share."""
    steps = f.chain.steps
    follows = steps[n].name in ("l2_norm", "rms_norm") and n + 1 < len(steps) and steps[n + 1].name == "temperature"
    return follows and not f.per_head(steps[n + 1].args[0]).shape


def _tempered(f: Flow, n: int, factor: Expr) -> Expr:
    return factor * _temperature_of(f, n + 1) if _is_tempered(f, n) else factor


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
    scale, parts = number(f.chain.steps[n], "scale", 0.5), f.parts[n]
    behind(f, 0, back)
    if f.chain.operand == "q":
        other = {c: f.load("k", c, back, f.served) for c in parts}
    else:
        other = _served_queries(f, parts, back)
    pair = {c: f.let("pair", _own(f, c, back) + other[c]) * scale for c in parts}
    return _bound(f, "joined", before(0, pair))


def _own(f: Flow, c: Columns, back: int) -> Expr:
    """Columns of the operand as it came, which may be at hand."""
    x = f.found.get((0, back), {}).get(c)
    return f.load(f.chain.operand, c, back) if x is None else cast_to(x, "f32")


def _served_queries(f: Flow, x: Parts, back: int) -> Tiles:
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
    width, kept = f.chain.widths[n], stays(f.chain, n)
    if not n and not f.line and f.earlier is None and kept % width == 0:
        late = f.let("late", where(f.head >= kept // width, back + 1, back))
        return _bound(f, "shifted", {c: f.entered(f.chain.operand, c, late) for c in f.parts[0]})
    if not n and not f.line and f.earlier is None:
        return _bound(f, "shifted", {c: _entered_late(f, c, f.head * width + c.at >= kept, back) for c in f.parts[0]})
    now, earlier = before(0), before(1)
    made = {c: where(row(f.head * width + c.at >= kept), earlier[c], x) for c, x in now.items()}
    return _bound(f, "shifted", made)


def stays(chain: Chain, n: int) -> int:
    """How many columns of all heads a value shift leaves where they are: the first ones."""
    columns = chain.heads * chain.widths[n]
    return columns - int(columns * number(chain.steps[n], "fraction", 0.5))


def _entered_late(f: Flow, c: Columns, late: Expr, back: int) -> Expr:
    """Columns as they come, some of them from the token before."""
    t = f.tokens
    steps = back + where(late, 1, 0)
    batch = column(t.batch) if t.batch.shape else t.batch
    places = batch, f.head, column(t.row) - row(steps), row(c.at)
    seen = column(t.own) >= row(steps)
    mask = seen if c.inside is None else seen & row(c.inside)
    return cast_to(read(f.b.params[f.chain.operand.upper()], *places, mask=mask), "f32")


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
    "mean_residual": _mean_residual,
    "value_shift": _value_shift,
    "hadamard": transformed,
}
