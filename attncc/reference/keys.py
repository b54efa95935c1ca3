"""The keys that a part attends to: its own or the sequence's, some columns of them, pooled or selected."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Part
from attncc.reference.rows import Rows, served_by
from attncc.reference.select import Selection, select


@dataclass(frozen=True, slots=True)
class View:
    """A part's rows with its keys, and the selection that left them."""

    rows: Rows
    selection: Selection | None = None


def view(attn: Attention, part: Part, whole: Rows, before: Selection | None = None) -> View:
    """All rows of a sequence as one part sees them; `before` is the part's selection in an earlier call."""
    rows = whole
    if part.columns is not None:
        lo, hi = part.columns
        rows = replace(rows, q=rows.q[..., lo:hi], k=rows.k[..., lo:hi])
    if part.kv.kind == "given":
        rows = _given(attn, part, rows)
    selection = None if part.select is None else select(part, rows, before)
    if part.kv.kind == "pooled":
        return View(_pooled(part, rows, selection), selection)
    return View(rows if selection is None else replace(rows, chosen=_chosen(part, selection)), selection)


def _given(attn: Attention, part: Part, rows: Rows) -> Rows:
    """The part's own keys and values: inputs [B, H, N, D], the axes B and H as many as declared, or 1."""
    heads = torch.arange(attn.heads.q, device=rows.q.device)
    k = _own(attn, part.kv.index, rows.q.shape[-1], heads, rows)
    v = _own(attn, part.kv.values, attn.dims.v, heads, rows)
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"{part.kv.values}: expected {k.shape[1]} keys as {part.kv.index} has, got {v.shape[1]}")
    at = torch.arange(k.shape[1], device=k.device)[None, None, :]
    names = {**rows.scope.names, "j": at, "Sk": torch.tensor(k.shape[1], device=k.device)}
    return replace(rows, k=k, v=v, scope=replace(rows.scope, names=names))


def _own(attn: Attention, word: str, width: int, heads: Tensor, rows: Rows) -> Tensor:
    """[H, N, D] of the sequence, one head per query head."""
    x, batch = rows.scope.inputs[word], rows.numbers.sizes["B"]
    if len(x) not in (1, batch) or attn.heads.q % x.shape[1] or x.shape[-1] != width:
        expected = f"[1 or {batch}, a divisor of {attn.heads.q}, keys, {width}]"
        raise ValueError(f"{word}: expected shape {expected}, got {list(x.shape)}")
    mine = x[rows.scope.names["b"] if len(x) > 1 else 0]
    return mine[served_by(attn, heads, mine.shape[0])]


def _chosen(part: Part, selection: Selection) -> Tensor:
    """bool [H, Sq, Sk]: the pairs in blocks of the class that the part takes."""
    raise Unsupported("the oracle does not evaluate 'select'", key="select")


def _pooled(part: Part, rows: Rows, selection: Selection | None) -> Rows:
    """Keys and values as means over blocks; `j` then counts blocks."""
    raise Unsupported("the oracle does not pool keys", key="kv")
