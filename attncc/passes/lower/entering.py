"""New tokens on their way through steps into a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attncc.ir.appending import count, writes_queries
from attncc.ir.attention import Attention, Call
from attncc.ir.build import Builder
from attncc.ir.expr import maximum, minimum, name
from attncc.ir.keeping import recalled, writing
from attncc.ir.rewrite import names
from attncc.passes.lower import recall
from attncc.passes.lower.chains import Chain, chain
from attncc.passes.lower.flow import Flow, Tiles
from attncc.passes.lower.grid import fixed_sizes, key_head
from attncc.passes.lower.place import Place, kept, position_of
from attncc.passes.lower.scores import KERNEL_SIZES, Scope
from attncc.passes.lower.steps import behind, parts_of
from attncc.passes.lower.tokens import Tokens

NEW: Final = "_NEW"
"""Behind the names of operands as they come."""
WORDS: Final = frozenset({"q_new", "k_new", "v_new", "q", "k", "v", "q_state", "k_state", "v_state"})
TOKEN_SIZES: Final = KERNEL_SIZES - {"B"}


def steps_of(attn: Attention, operand: str) -> Chain | None:
    """What new tokens of q, k or v go through on their way; None where they are written as they come."""
    return chain(writing(attn), operand)


def through(b: Builder, attn: Attention, c: Chain, place: Place) -> Tiles:
    """What becomes of the program's tokens: fp32 tiles [rows, width] of all columns."""
    written, rows = writing(attn), place.rows
    new = {name.removesuffix(NEW): p for name, p in b.params.items() if name.endswith(NEW)}
    ahead, inner = Builder({**b.params, **new}), Builder({**b.params, **new})
    position = position_of(ahead, attn, place)
    known = ahead.let("known", minimum(name("at", "i32", (rows,)), name(count(attn)) - 1), "past the end, the last")
    sequence, head = place.sequence, place.head
    if sequence.shape:
        sequence = ahead.let("own_seq", maximum(minimum(sequence, name("B") - 1), 0), f"[{rows}]")
    served = key_head(head, attn, attn.heads.kv) if c.operand == "q" else head
    served = served if served.op in ("const", "name") else ahead.let("hk", served)
    scope = Scope({"b": sequence, **fixed_sizes(attn)}, {x.name: x for x in written.inputs})
    tokens = Tokens(rows, kept(rows), place.batch, known, position, position, scope)
    before = recall.earlier(ahead, attn, place, position, known, sequence) if recalled(attn) else None
    taken, parts = {*b.bound, *ahead.bound}, parts_of(written, c)
    tiles = behind(Flow(written, c, ahead, inner, tokens, head, served, parts, taken, earlier=before), len(c.steps))
    b.extend(ahead.body)
    b.extend(inner.body)
    return tiles


# -- what is not carried -------------------------------------------------------------------------


def _any(holds: Callable[[Attention, Call], bool]) -> Callable[[Attention], bool]:
    return lambda a: a.kept is not None and any(holds(a, step) for step in a.kept.steps)


def _uses(*words: str) -> Callable[[Attention], bool]:
    return _any(lambda a, step: step.name in words)


def _counts_tokens(a: Attention, step: Call) -> bool:
    """Whether a step reads how many tokens a call has, or an input that has an axis of them."""
    assert a.kept is not None
    words = {*step.words, *(str(word) for word in dict(step.kwargs).values())}
    read = [x for x in a.kept.inputs if x.name in words]
    sizes = {size for e in step.args for size in names(e)} | {size for x in read for size in x.shape}
    return bool(sizes & TOKEN_SIZES)


LIMITS: Final[tuple[tuple[Callable[[Attention], bool], str], ...]] = (
    (_uses("absorb"), "steps but absorb on the way into a cache: multiply new keys by the matrix before append"),
    (_uses("smooth"), "steps of a token alone on the way into a cache: its mean over all tokens is not known yet"),
    (
        _any(_counts_tokens),
        "steps on the way into a cache that read no numbers of tokens: inputs with axes of their own",
    ),
    (
        lambda a: writes_queries(a) and a.align.kind != "bottom_right",
        "steps that look at other tokens, on the way into a cache whose last keys go with the queries (align)",
    ),
    (
        lambda a: writes_queries(a) and bool(WORDS & {x.name for p in (a.kept,) if p for x in p.inputs}),
        "inputs of other names: q_state and the like are what sequences carry",
    ),
)
"""What is not carried yet of the steps that a cache has behind it, and what is instead."""
