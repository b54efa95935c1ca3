"""A part over pairs of queries and keys: scores, weights, and the values weighted by them.

Rows and keys that take no part are zeroed before they are multiplied, and scores count only where the mask
is true, so what lies in memory there can be anything: neither outputs nor gradients see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Attention, Part
from attncc.ir.expr import Expr
from attncc.reference.evaluate import evaluate, read
from attncc.reference.normalize import column_weights, logaddexp, softmax, weights
from attncc.reference.philox import kept
from attncc.reference.quantize import quantized_weights
from attncc.reference.rows import Partial, Rows

LOG_MEMBERS: Final = "log_members"
"""The name in a scope that a score gains where keys are means: how many keys each stands for, as a logarithm."""


def attend_pairs(attn: Attention, part: Part, rows: Rows, columns: Tensor | None) -> Partial:
    """Some rows of a sequence through a part; `columns` is the log-sum-exp of each column, where it counts."""
    seen = seen_keys(part, rows)
    kind = part.normalizer.kind
    fill = -math.inf if kind in ("softmax", "column_softmax") else 0.0
    s = scores(part, rows, seen, fill)
    top = softmax(torch.where(seen, s, -math.inf))[2]
    lse = sink = None
    if kind == "softmax":
        p, lse, _ = softmax(s)
        sink = None if part.normalizer.sink is None else rows.per_row(part.normalizer.sink)
    elif columns is not None:
        p = column_weights(s, columns[:, None])
    else:
        p = weights(part.normalizer, s, seen)
    if part.dropout:
        names = rows.scope.names
        keep = kept(part.dropout, rows.numbers.seed, *(names[n] for n in ("b", "h", "i", "j")))
        p = torch.where(keep, p / (1 - part.dropout), 0.0)
    return Partial(weighted(quantized_weights(attn, p), seen, rows), top, lse, sink, p if kind == "softmax" else None)


def weighted(p: Tensor, seen: Tensor, rows: Rows) -> Tensor:
    """The values weighted by p; where some rows see a value that is not finite, those alone become NaN."""
    matmul = rows.numbers.matmul
    v = _zero_unused(rows.v, seen.any(1))
    bad = ~v.isfinite()
    if bool(seen.all()) or not bool(bad.any()):
        return (p.to(matmul) @ v.to(matmul)).to(p.dtype)
    o = p.to(matmul) @ torch.where(bad, 0.0, v).to(matmul)
    hit = seen.to(p.dtype) @ bad.to(p.dtype) > 0
    return torch.where(hit, math.nan, o.to(p.dtype))


def seen_keys(part: Part, rows: Rows) -> Tensor:
    """Which keys each row takes part with: [Hq, rows, Sk]."""
    if rows.chosen is not None and part.kv.kind == "pooled" and part.kv.block is None:
        return rows.chosen  # means over a selection's blocks: the mask spoke of their members
    seen = evaluate(part.mask, rows.scope).expand(rows.shape)
    seen = seen if rows.chosen is None else seen & rows.chosen
    return seen & _listed(part, rows) if part.kv.kind == "gathered" else seen


def _listed(part: Part, rows: Rows) -> Tensor:
    """The keys whose positions stand in the rows' lists `index[b, hk, row]`.

    Entries outside of [0, Sk) are padding; a key that a list repeats counts once.
    """
    table, names = rows.scope.inputs[part.kv.index], rows.scope.names
    entry = torch.arange(table.shape[-1], device=table.device)
    listed = read(table, [names["b"], names["hk"], names["row"], entry]).long()
    heads, count, keys = rows.shape
    listed = torch.where((listed >= 0) & (listed < keys), listed, keys).expand(heads, count, -1)
    found = torch.zeros((heads, count, keys + 1), dtype=torch.bool, device=table.device)
    return found.scatter(-1, listed, True)[..., :keys]


def scores(part: Part, rows: Rows, seen: Tensor, fill: float) -> Tensor:
    """The scores [Hq, rows, Sk], `fill` where a key is not seen."""
    matmul = rows.numbers.matmul
    q = _zero_unused(rows.q, seen.any(2)).to(matmul)
    k = _zero_unused(rows.k, seen.any(1)).to(matmul)
    qk = (q @ k.transpose(1, 2)).to(rows.numbers.elementwise)
    if rows.row_term is not None:
        qk = qk + rows.row_term[:, :, None]
    if rows.key_term is not None:
        qk = qk + rows.key_term[:, None, :]
    names = {**rows.scope.names, "qk": qk}
    if bool(seen.all()):
        return _formula(part.score, rows, names, rows.shape)
    if not _tracked(rows, qk):
        return torch.where(seen, _formula(part.score, rows, names, rows.shape), fill)
    # a formula may be no number where a key is hidden, and 0 * NaN would enter the gradient: leave those out
    at = seen.nonzero(as_tuple=True)
    visible = {name: x.expand(rows.shape)[at] if x.ndim else x for name, x in names.items()}
    s = _formula(part.score, rows, visible, at[0].shape)
    return s.new_full(rows.shape, fill).index_put(at, s)


def _formula(e: Expr, rows: Rows, names: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    value = evaluate(e, replace(rows.scope, names=names))
    value = value + names[LOG_MEMBERS] if LOG_MEMBERS in names else value
    return value.to(rows.numbers.elementwise).expand(shape)


def _tracked(rows: Rows, qk: Tensor) -> bool:
    """Whether a gradient will flow through the scores."""
    leaves = (qk, rows.scope.names["scale"], *rows.scope.inputs.values())
    return torch.is_grad_enabled() and any(x.requires_grad for x in leaves)


def _zero_unused(x: Tensor, used: Tensor) -> Tensor:
    return torch.where(used[..., None], x, 0.0)


def column_lse(part: Part, whole: Rows, starts: range) -> Tensor | None:
    """column_softmax: the log-sum-exp over all rows of each column [Hq, Sk]."""
    if part.normalizer.kind != "column_softmax":
        return None
    total: Tensor | None = None
    for start in starts:
        rows = whole.cut(start, starts.step)
        s = scores(part, rows, seen_keys(part, rows), -math.inf)
        lse = softmax(s.transpose(1, 2))[1]
        total = lse if total is None else logaddexp(total, lse)
    return total
