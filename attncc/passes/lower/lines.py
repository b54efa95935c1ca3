"""Tiles whose rows go along lines of tokens, as convolutions that multiply want it.

A line is some tokens of a sequence, one after the other. A program has a tile of lines of one head of one operand, and
goes along all of them at once, token by token: matrices are read once for all tokens of the lines, and what
convolutions ask of the tokens before is what the last turns made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, iota, quotient, remainder
from attncc.ir.expr import Expr, const, maximum, minimum, name
from attncc.passes.lower import folding, tokens
from attncc.passes.lower.chains import Chain
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.convolution import matrices, reach
from attncc.passes.lower.flow import Flow, Tiles
from attncc.passes.lower.grid import cdiv, is_varlen
from attncc.passes.lower.steps import behind, parts_of

ROWS: Final = 64
"""Lines of a tile: two tiles and their matrices fit a multiprocessor."""
LOOSE: Final = 16
"""Those of tiles of fp32, whose matrices are read for each token."""
LONGEST: Final = 32
"""Tokens of a line."""
LONGEST_FOLDED: Final = 256
"""Of convolutions that are one: all programs run at once, up to where fp32 would lose something of angles."""
PROGRAMS: Final = 132
"""One a multiprocessor."""
PAIR: Final = 2
"""Tiles of a head that go along their lines at once, each by warps of its own: they share its matrices."""
ALONE: Final = 4
"""What a turn takes with one head's reads beside its own, of which the next turn's are under way."""
FURTHER: Final = 2
"""What each head more adds, whose reads are waited for: as times of CCGQA and of CCA on an H200 let one reckon."""
TILES: Final = 32
"""So many tiles of a head fill the machine; more tokens make lines longer."""
OPTIONS: Final = ("num_warps", 4), ("num_stages", 1), ("maxnreg", 0)
"""Of the compiler, for tiles of 16 bits. Measured on an H200: 8 warps with 128 lines take a tenth longer."""
PLACED: Final = ("slot", "part", "line", "tiles", "b", "h", "hk", "start", "step")
"""Names by which a program knows where it is."""


def goes_along(attn: Attention) -> bool:
    """Whether the prologue's tiles do: those of packed sequences, which begin anywhere, do not."""
    return bool(matrices(attn)) and not is_varlen(attn)


def rows_of(attn: Attention) -> int:
    return LOOSE if attn.dtype == "fp32" else ROWS


@dataclass(frozen=True, slots=True)
class Share:
    """Of the programs that run at once: what a head of an operand has, and all heads together."""

    own: int
    whole: int


def shares(attn: Attention, found: Sequence[Chain]) -> dict[str, Share]:
    """Of each operand: as much as a turn of its tiles takes. Key heads may read several query heads."""
    more = attn.heads.q // attn.heads.kv - 1
    takes = {c.operand: ALONE + FURTHER * more * (c.operand == "k" and _joins(c)) for c in found}
    whole = sum(takes[c.operand] * c.heads for c in found)
    return {operand: Share(own, whole) for operand, own in takes.items()}


def _joins(c: Chain) -> bool:
    return any(step.name == "mean_residual" for step in c.steps)


def tiles_of(attn: Attention, operand: str, line: Expr) -> Expr:
    """Tiles of a sequence of a head, of lines of so many tokens."""
    return cdiv(cdiv(name("Sq" if operand == "q" else "Sk"), line), rows_of(attn))


def line_of(attn: Attention, operand: str, share: Share | None = None) -> Expr:
    """Tokens of a line: one each, until a head has tiles enough; where convolutions are one, so many that all programs
    run at once."""
    length = name("Sq" if operand == "q" else "Sk")
    if share is None:
        return minimum(maximum(quotient(name("B") * length, rows_of(attn) * TILES), 1), LONGEST)
    at_once = maximum(quotient(const(PAIR * PROGRAMS * share.own), name("B") * share.whole), 1)
    return minimum(cdiv(length, at_once * rows_of(attn)), LONGEST_FOLDED)


def go(b: Builder, attn: Attention, c: Chain, heads: tuple[Expr, Expr], store: Callable[[Flow], None]) -> None:
    """What is done with a tile of lines, the `part`th: `store` writes what becomes of a token of each.

    Args:
        heads: the operand's head, and the key head that goes with it.
    """
    b.let("line", line_of(attn, c.operand), "tokens of a line")
    b.let("tiles", tiles_of(attn, c.operand, name("line")))
    with b.when(name("part") < name("B") * name("tiles")):
        b.let("b", quotient(name("part"), name("tiles")))
        _along(b, attn, c, heads, store, remainder(name("part"), name("tiles")), ())


def go_folded(
    b: Builder,
    attn: Attention,
    c: Chain,
    heads: tuple[Expr, Expr],
    store: Callable[[Flow], None],
    matrices: tuple[Expr, ...],
) -> None:
    """The same where convolutions are one, of these matrices; what comes in is read a token ahead.

    `line` is known. Behind the last tile are lines behind the last sequence's end, of as many turns: another tile may
    wait for them.
    """
    b.let("tiles", tiles_of(attn, c.operand, name("line")))
    b.let("b", minimum(quotient(name("part"), name("tiles")), name("B") - 1))
    _along(b, attn, c, heads, store, name("part") - name("b") * name("tiles"), matrices)


def _along(
    b: Builder,
    attn: Attention,
    c: Chain,
    heads: tuple[Expr, Expr],
    store: Callable[[Flow], None],
    tile: Expr,
    matrices: tuple[Expr, ...],
) -> None:
    """All turns of a tile of the sequence `b`."""
    rows, length = rows_of(attn), name("Sq" if c.operand == "q" else "Sk")
    start = b.let("start", (tile * rows + iota(rows)) * name("line"), f"[{rows}] where each line begins")
    before, inner = Builder(b.params), Builder(b.params)
    at = tokens.along(before, attn, c.operand, start, rows)
    begin = before.let("begin", at.position + (start - at.own), "where it is in the sequence")
    taken = {*PLACED, *before.bound}
    line = begin, name("step")
    flow = Flow(attn, c, before, before, at, *heads, parts_of(attn, c), taken, line=line, matrices=matrices)
    names = {place: _named(flow, place, behind(flow, *place)) for place in _asked(flow)}
    coming = _coming(flow) if matrices else {}
    fetched = {key: inner.let(key[0], tile, f"[{rows}, {key[1].width}]") for key, tile in coming.items()}
    if coming:
        following = inner.let("following", minimum(start + (name("step") + 1), length - 1), "the last again behind it")
        there = replace(flow, tokens=replace(at, row=following, own=following))
        for (operand, columns, head), tile in coming.items():
            inner.let(str(tile.attr), there.entered(operand, columns, 0, head), ahead=True)
    at = tokens.along(inner, attn, c.operand, start + name("step"), rows)
    turn = replace(flow, b=inner, tokens=at, taken=flow.taken | inner.bound, found=dict(names), fetched=fetched)
    store(turn)
    for (level, back), tiles in sorted(names.items(), reverse=True):
        made = behind(turn, level, back - 1)
        for columns, tile in tiles.items():
            inner.let(str(tile.attr), made[columns])
    b.extend(before.body)
    with b.loop("step", 0, minimum(name("line"), length)):
        b.extend(inner.body)


def _coming(f: Flow) -> dict[tuple[str, Columns, Expr], Expr]:
    """What the first turn begins with, under names by which each has the next one's: its own tokens, and those of the
    other operand that go with them, if they are one head's."""
    other = [("k", f.served)] if f.chain.operand == "q" else [("q", f.head)]
    pairs = [(f.chain.operand, f.head), *(other if _joins(f.chain) and (f.chain.operand == "q" or _is_one(f)) else ())]
    return {
        (operand, c, head): f.b.let(
            f.reserve(f"next_{operand}"), f.entered(operand, c, 0, head), f"[{f.rows}, {c.width}]", ahead=True
        )
        for operand, head in pairs
        for c in f.parts[0]
    }


def _is_one(f: Flow) -> bool:
    """Whether a key head serves one query head."""
    return f.attn.heads.q == f.attn.heads.kv


def _named(f: Flow, place: tuple[int, int], tiles: Tiles) -> dict[Columns, Expr]:
    """Names by which turns know what the last ones made."""
    level, back = place
    text = f"{f.chain.operand}_behind_{level}_{back}_ago"
    return {columns: f.b.let(f.reserve(text), tile, f"[{f.rows}, {columns.width}]") for columns, tile in tiles.items()}


def _asked(f: Flow) -> list[tuple[int, int]]:
    """What steps ask of earlier tokens: behind how many steps, and how many tokens back."""
    attn, c = f.attn, f.chain
    if f.matrices:
        return [(0, back) for back in range(1, folding.taps_of(attn, c))]
    return [(n, back) for n, step in enumerate(c.steps) for back in range(1, reach(attn, step, c.widths[n]) + 1)]
