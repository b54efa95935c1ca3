"""Steps that a cache has behind it: which those are, and the variant as the call sees it that writes new tokens.

A cache holds keys and values as attention multiplies them. So new ones go through their steps once, on their way into
it, each at the position of its place; what is left for attention are the steps of queries. Steps that look at other
tokens, or join queries and keys, ask for what is not in the cache: then queries take theirs where keys do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from attncc.ir.appending import AROUND, appends, writes_queries
from attncc.ir.attention import Align, Attention, Call, Kept
from attncc.ir.expr import Expr
from attncc.ir.given import Given
from attncc.ir.primitives import calls, on, pairs_tokens
from attncc.ir.rewrite import buffers
from attncc.ir.staircase import staircase
from attncc.ir.widths import axis_size

RING: Final = "Sr"
"""The size that says how many rows a sequence carries from call to call."""


def keep(attn: Attention) -> Attention:
    """The variant as attention over its cache sees it: steps that this has behind it are set aside.

    Variants without such steps stay as they are, and so do those whose keys hold the values, lose bits as they age, or
    are turned by where a selection puts them.
    """
    if not appends(attn) or attn.is_latent or staircase(attn) or any(map(_follows_selection, attn.prologue)):
        return attn
    around = any(step.name in AROUND for step in attn.prologue)
    steps = attn.prologue if around else tuple(_of(attn.prologue, "kv"))
    if not steps:
        return attn
    rest = replace(attn, prologue=() if around else tuple(_of(attn.prologue, "q")))
    own, other = set(_read_by(steps)), set(_reads(rest))
    return replace(
        rest,
        inputs=tuple(x for x in attn.inputs if x.name in other or x.name not in own),
        kept=Kept(steps, tuple(x for x in attn.inputs if x.name in own)),
    )


def writing(attn: Attention) -> Attention:
    """The variant as the call that writes new tokens sees it: its prologue is what these go through."""
    if attn.kept is None:
        return replace(attn, prologue=())
    return replace(attn, prologue=attn.kept.steps, inputs=attn.kept.inputs, kept=None, align=Align())


def _follows_selection(step: Call) -> bool:
    return dict(step.kwargs).get("positions") == "packed"


def _of(steps: Iterable[Call], letters: str) -> Iterator[Call]:
    """The steps of these operands, and of no others."""
    for step in steps:
        mine = "".join(letter for letter in on(step) if letter in letters)
        if mine == on(step):
            yield step
        elif mine:
            yield replace(step, kwargs=tuple(sorted({**dict(step.kwargs), "on": mine}.items())))


# -- what steps ask of earlier tokens ------------------------------------------------------------


def reach(attn: Attention, step: Call) -> int:
    """How many tokens back a step looks; 0 where only a call tells how many taps its weights have."""
    if step.name != "causal_conv":
        return int(step.name == "value_shift")
    return (axis_size(attn, attn.input(step.words[0]).shape[-1]) or 1) - 1


def recalled(attn: Attention) -> dict[str, int]:
    """How many earlier tokens each operand is asked for on the way into a cache, of those that are."""
    if not writes_queries(attn):
        return {}
    written = writing(attn)
    each = {x: sum(reach(written, step) for step in written.prologue if x in on(step)) for x in "qkv"}
    if pairs_tokens(written):
        each |= dict.fromkeys("qk", max(each["q"], each["k"]))
    return {x: n for x, n in each.items() if n}


def states(attn: Attention) -> tuple[Given, ...]:
    """What a sequence carries from call to call: rows as they were before all steps, token t in row t modulo `Sr`."""
    heads = {"q": attn.heads.q, "k": attn.heads.kv, "v": attn.heads.v}
    width = {"q": attn.dims.qk, "k": attn.dims.qk, "v": attn.dims.v}
    what = {"q": "queries", "k": "keys", "v": "values"}
    return tuple(
        Given(
            f"{x}_state",
            ("B", heads[x], RING, width[x]),
            attn.dtype,
            f"the last {what[x]} of each sequence before their steps, token t in row t % Sr, written",
        )
        for x in recalled(attn)
    )


# -- inputs --------------------------------------------------------------------------------------


def _read_by(found: Iterable[Call]) -> Iterator[str]:
    for call in found:
        yield from call.words
        for value in (*call.args, *dict(call.kwargs).values()):
            yield from buffers(value) if isinstance(value, Expr) else (value,)


def _reads(attn: Attention) -> Iterator[str]:
    """Names of all inputs that the variant reads, and words beside them."""
    yield from _read_by(call for _, _, call in calls(attn))
    yield attn.align.input
    yield from buffers(attn.scale)
    for part in attn.parts:
        for e in (part.score, part.mask, part.normalizer.sink):
            yield from () if e is None else buffers(e)
        yield from (part.kv.index, part.kv.values)
        yield from (part.state.initial, part.state.initial_mass) if part.state else ()
