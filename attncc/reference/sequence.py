"""One sequence through a whole variant: prologue, quantizers, parts, combine, epilogue, taps."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attncc.ir.attention import Attention, Part
from attncc.reference import taps
from attncc.reference.combine import combine
from attncc.reference.epilogue import epilogue
from attncc.reference.keys import View, view
from attncc.reference.operands import Sequence
from attncc.reference.pairs import attend_pairs, column_lse
from attncc.reference.prologue import prologue
from attncc.reference.quantize import quantized
from attncc.reference.rows import Numbers, Partial, rows_of, scope_of
from attncc.reference.select import Selection
from attncc.reference.state import Stated, attend_state

CHUNK_ELEMENTS: Final = 2**23
"""Scores held at once: query rows are taken in chunks of about this many."""

Selections = tuple[Selection | None, ...]
"""One a part; None where a part selects nothing."""


@dataclass(frozen=True, slots=True)
class Attended:
    """What became of a sequence: o [H, Sq, D], top and lse [H, Sq], taps, final states, and selections."""

    o: Tensor
    top: Tensor
    lse: Tensor | None
    taps: tuple[Tensor, ...] = ()
    states: tuple[Tensor, ...] = ()
    selections: Selections = ()


def attend(attn: Attention, sequence: Sequence, numbers: Numbers, before: Selections = ()) -> Attended:
    """One sequence whole; `before` are the selections of an earlier call, for parts that reuse them."""
    scope = scope_of(attn, sequence, numbers)
    entered = _rounded(attn, prologue(attn, sequence, scope), numbers.operands)
    stored = quantized(attn, entered)
    whole = rows_of(attn, stored.sequence, scope, numbers)
    whole = replace(whole, row_term=stored.row_term, key_term=stored.key_term)
    selecting = attn.quantize and any(part.select for part in attn.parts)
    exact = rows_of(attn, entered, scope, numbers) if selecting else None
    earlier = before or (None,) * len(attn.parts)
    views = [view(attn, part, whole, some, exact) for part, some in zip(attn.parts, earlier, strict=True)]
    states = [attend_state(attn, p, v.rows) if p.state else None for p, v in zip(attn.parts, views, strict=True)]
    heads, total, keys = whole.shape
    step = max(1, CHUNK_ELEMENTS // max(1, heads * keys))
    starts = range(0, total, step) if total else range(1)
    columns = [column_lse(part, v.rows, starts) for part, v in zip(attn.parts, views, strict=True)]

    def chunk(start: int) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        rows = whole.cut(start, step)
        made = [
            _partial(attn, part, v, state, column, start, step)
            for part, v, state, column in zip(attn.parts, views, states, columns, strict=True)
        ]
        one = combine(attn, made, rows)
        return epilogue(attn, one.o, rows), one.top, one.lse, taps.tap(attn, made, rows)

    done = [_recomputed(chunk, start) if len(starts) > 1 else chunk(start) for start in starts]
    return Attended(
        torch.cat([o for o, _, _, _ in done], 1),
        torch.cat([top for _, top, _, _ in done], 1),
        _cat([lse for _, _, lse, _ in done]),
        tuple(taps.join(attn, [some for _, _, _, some in done])),
        tuple(s.final for s in states if s is not None),
        tuple(v.selection for v in views),
    )


def _rounded(attn: Attention, entered: Sequence, dtype: torch.dtype | None) -> Sequence:
    """The sequence behind a prologue as kernels store it."""
    if dtype is None or not attn.prologue:
        return entered
    q, k, v = (x.to(dtype).to(x.dtype) for x in (entered.q, entered.k, entered.v))
    return replace(entered, q=q, k=k, v=v)


def _partial(
    attn: Attention, part: Part, v: View, state: Stated | None, column: Tensor | None, start: int, step: int
) -> Partial:
    """A part on some rows."""
    if state is None:
        return attend_pairs(attn, part, v.rows.cut(start, step), column)
    return state.partial.cut(start, step)


def _recomputed(
    chunk: Callable[[int], tuple[Tensor, Tensor, Tensor | None, list[Tensor]]], start: int
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """A chunk whose scores are computed again in the backward instead of being kept."""
    return checkpoint(chunk, start, use_reentrant=False, preserve_rng_state=False)


def _cat(pieces: Listed[Tensor | None]) -> Tensor | None:
    known = [p for p in pieces if p is not None]
    return torch.cat(known, 1) if len(known) == len(pieces) else None
