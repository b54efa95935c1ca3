"""Brings every formula of a variant to one form that later passes rely on; no value changes by a bit.

Sizes known when compiled are numbers, constants are folded, conversions from integer to float are nodes, and
numbers stand last in sums and products. Under softmax a term that no key moves falls away, if nothing shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attncc.ir.attention import Attention, Call, Part
from attncc.ir.expr import Expr
from attncc.ir.rewrite import buffers, names, substitute, transform
from attncc.passes.casts import Casts
from attncc.passes.facts import fixed_sizes
from attncc.passes.ieee import is_finite, simplify

SHOWS_ROW_TERMS = ("lse", "max_score")
STEPS = ("prologue", "epilogue")


def canonicalize(attn: Attention) -> Attention:
    """The same variant with its score, mask, scale and sink in canonical form."""
    casts, sizes = Casts.of(attn), fixed_sizes(attn)

    def canonical(e: Expr) -> Expr:
        return transform(transform(substitute(e, sizes), casts.explicit), simplify)

    drops = len(attn.parts) == 1 and not any(map(attn.wants, SHOWS_ROW_TERMS)) and not _compares_scores(attn.parts[0])
    parts = tuple(_canonical_part(part, canonical, drops) for part in attn.parts)
    steps = {key: tuple(_canonical_step(step, canonical) for step in getattr(attn, key)) for key in STEPS}
    return replace(attn, parts=parts, scale=canonical(attn.scale), **steps)


def _canonical_step(step: Call, canonical: Callable[[Expr], Expr]) -> Call:
    return replace(step, args=tuple(map(canonical, step.args)))


def _canonical_part(part: Part, canonical: Callable[[Expr], Expr], drops: bool) -> Part:
    normalizer = part.normalizer
    score = canonical(part.score)
    if drops and normalizer.kind == "softmax" and normalizer.sink is None:
        score = without_row_terms(score)
    sink = None if normalizer.sink is None else canonical(normalizer.sink)
    return replace(part, score=score, mask=canonical(part.mask), normalizer=replace(normalizer, sink=sink))


def _compares_scores(part: Part) -> bool:
    """Whether a selection holds the part's scores against a log-sum-exp from outside."""
    return part.select is not None and "lse" in dict(part.select.score.kwargs)


def without_row_terms(score: Expr) -> Expr:
    """The score less what it adds for a whole row, which softmax divides out."""
    match score:
        case Expr("add", (a, b)) if _is_row_term(b):
            return without_row_terms(a)
        case Expr("add", (a, b)) if _is_row_term(a):
            return without_row_terms(b)
        case Expr("sub", (a, b)) if _is_row_term(b):
            return without_row_terms(a)
        case _:
            return score


def _is_row_term(e: Expr) -> bool:
    """Neither moved by a key nor read from a tensor: that may be -inf or NaN, which does not divide out."""
    return not names(e) & {"qk", "j", "scale"} and not buffers(e) and is_finite(e)
