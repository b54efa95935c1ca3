"""One sequence through all parts of a variant, some query rows at a time.

Rows and keys that take no part are zeroed before they are multiplied, and scores count only where the mask
is true, so what lies in memory there can be anything: neither outputs nor gradients see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attncc.ir.attention import Attention, Input, Part
from attncc.ir.expr import Expr
from attncc.reference.evaluate import Scope, evaluate, read
from attncc.reference.normalize import column_weights, logaddexp, softmax, weights
from attncc.reference.operands import Sequence
from attncc.reference.philox import kept

CHUNK_ELEMENTS: Final = 2**23
"""Scores held at once: query rows are taken in chunks of about this many."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a call has once: the dtypes it computes in, scale, dropout's seed, sizes and inputs."""

    matmul: torch.dtype
    elementwise: torch.dtype
    scale: float | Tensor | None
    seed: int
    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some query rows of a sequence, one key and value head per query head: [Hq, rows | Sk, D].

    The scope's positions broadcast to [Hq, rows, Sk].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scope: Scope
    numbers: Numbers

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]

    def per_row(self, e: Expr) -> Tensor:
        """An expression that does not read `j`, as [Hq, rows]."""
        heads, rows, _ = self.shape
        return evaluate(e, self.scope).to(self.numbers.elementwise).expand(heads, rows, 1)[..., 0]


@dataclass(frozen=True, slots=True)
class Partial:
    """What a part makes of its keys: o [Hq, rows, Dv], its greatest score, lse and sink [Hq, rows].

    The sink's share is not taken off `o` yet.
    """

    o: Tensor
    top: Tensor
    lse: Tensor | None = None
    sink: Tensor | None = None


def attend(attn: Attention, sequence: Sequence, numbers: Numbers) -> Partial:
    """One sequence whole; `lse` and `top` only where the variant has them."""
    whole = _rows(attn, sequence, numbers)
    heads, total, keys = whole.shape
    step = max(1, CHUNK_ELEMENTS // max(1, heads * keys))
    starts = range(0, total, step) if total else range(1)
    columns = [_column_lse(part, whole, starts) for part in attn.parts]

    def chunk(start: int) -> Partial:
        rows = _slice(whole, start, step)
        return _combine(attn, [_part(p, rows, c) for p, c in zip(attn.parts, columns, strict=True)], rows)

    done = [_recomputed(chunk, start) if len(starts) > 1 else chunk(start) for start in starts]
    return Partial(
        torch.cat([p.o for p in done], 1),
        torch.cat([p.top for p in done], 1),
        _cat([p.lse for p in done]),
    )


def _recomputed(chunk: Callable[[int], Partial], start: int) -> Partial:
    """A chunk whose scores are computed again in the backward instead of being kept."""
    return checkpoint(chunk, start, use_reentrant=False, preserve_rng_state=False)


def _cat(pieces: list[Tensor | None]) -> Tensor | None:
    known = [p for p in pieces if p is not None]
    return torch.cat(known, 1) if len(known) == len(pieces) else None


# -- rows and what expressions read there --------------------------------------------------------


def _rows(attn: Attention, sequence: Sequence, numbers: Numbers) -> Rows:
    device = sequence.q.device
    heads = torch.arange(attn.heads.q, device=device)
    hk = _served_by(attn, heads, attn.heads.kv)
    hv = _served_by(attn, heads, sequence.v.shape[0])
    row = torch.arange(sequence.q.shape[1], device=device)
    sizes = {**numbers.sizes, "Sq": sequence.q.shape[1], "Sk": sequence.k.shape[1]}
    names = {name: torch.tensor(n, device=device) for name, n in sizes.items()}
    names["b"] = torch.tensor(sequence.number, device=device)
    match attn.align.kind:
        case "bottom_right":
            offset = names["Sk"] - names["Sq"]
        case "top_left":
            offset = torch.zeros_like(names["b"])
        case "input":
            offset = read(numbers.inputs[attn.align.input], [names["b"]]).long()
    names["h"], names["hk"] = heads[:, None, None], hk[:, None, None]
    names["row"], names["i"] = row[None, :, None], (row + offset)[None, :, None]
    names["j"] = torch.arange(sequence.k.shape[1], device=device)[None, None, :]
    inputs = {x.name: _of_sequence(x, numbers.inputs[x.name], sizes) for x in attn.inputs}
    scope = Scope(names, inputs, numbers.elementwise, device, {x.name: x.shape for x in attn.inputs})
    scale = evaluate(attn.scale, scope) if numbers.scale is None else numbers.scale
    names["scale"] = torch.as_tensor(scale, dtype=numbers.elementwise, device=device)
    return Rows(sequence.q, sequence.k[hk], sequence.v[hv], scope, numbers)


def _of_sequence(declared: Input, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """An input as a sequence sees it: its rows and keys end where the sequence does, whatever pads them."""
    for axis, entry in enumerate(declared.shape):
        if entry in ("Sq", "Sk"):
            x = x.narrow(axis, 0, min(sizes[entry], x.shape[axis]))
    return x


def _served_by(attn: Attention, heads: Tensor, count: int) -> Tensor:
    """The key (or value) head of each query head."""
    return heads % count if attn.heads.map == "tile" else heads // (attn.heads.q // count)


def _slice(rows: Rows, start: int, step: int) -> Rows:
    names = dict(rows.scope.names)
    for name in ("row", "i"):
        names[name] = names[name][:, start : start + step]
    return replace(rows, q=rows.q[:, start : start + step], scope=replace(rows.scope, names=names))


# -- parts ---------------------------------------------------------------------------------------


def _part(part: Part, rows: Rows, column_lse: Tensor | None) -> Partial:
    seen = _seen(part, rows)
    kind = part.normalizer.kind
    fill = -math.inf if kind in ("softmax", "column_softmax") else 0.0
    s = _scores(part, rows, seen, fill)
    top = softmax(torch.where(seen, s, -math.inf))[2]
    lse = sink = None
    if kind == "softmax":
        p, lse, _ = softmax(s)
        sink = None if part.normalizer.sink is None else rows.per_row(part.normalizer.sink)
    elif column_lse is not None:
        p = column_weights(s, column_lse[:, None])
    else:
        p = weights(part.normalizer, s, seen)
    if part.dropout:
        names = rows.scope.names
        keep = kept(part.dropout, rows.numbers.seed, *(names[n] for n in ("b", "h", "i", "j")))
        p = torch.where(keep, p / (1 - part.dropout), 0.0)
    return Partial(_weighted(p, seen, rows), top, lse, sink)


def _weighted(p: Tensor, seen: Tensor, rows: Rows) -> Tensor:
    """The values weighted by p; where some rows see a value that is not finite, those alone become NaN."""
    matmul = rows.numbers.matmul
    v = _zero_unused(rows.v, seen.any(1))
    bad = ~v.isfinite()
    if bool(seen.all()) or not bool(bad.any()):
        return (p.to(matmul) @ v.to(matmul)).to(p.dtype)
    o = p.to(matmul) @ torch.where(bad, 0.0, v).to(matmul)
    hit = seen.to(p.dtype) @ bad.to(p.dtype) > 0
    return torch.where(hit, math.nan, o.to(p.dtype))


def _seen(part: Part, rows: Rows) -> Tensor:
    """Which keys each row takes part with: [Hq, rows, Sk]."""
    seen = evaluate(part.mask, rows.scope).expand(rows.shape)
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


def _scores(part: Part, rows: Rows, seen: Tensor, fill: float) -> Tensor:
    """The scores [Hq, rows, Sk], `fill` where a key is not seen."""
    matmul = rows.numbers.matmul
    q = _zero_unused(rows.q, seen.any(2)).to(matmul)
    k = _zero_unused(rows.k, seen.any(1)).to(matmul)
    qk = (q @ k.transpose(1, 2)).to(rows.numbers.elementwise)
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
    return value.to(rows.numbers.elementwise).expand(shape)


def _tracked(rows: Rows, qk: Tensor) -> bool:
    """Whether a gradient will flow through the scores."""
    leaves = (qk, rows.scope.names["scale"], *rows.scope.inputs.values())
    return torch.is_grad_enabled() and any(x.requires_grad for x in leaves)


def _zero_unused(x: Tensor, used: Tensor) -> Tensor:
    return torch.where(used[..., None], x, 0.0)


def _column_lse(part: Part, whole: Rows, starts: range) -> Tensor | None:
    """column_softmax: the log-sum-exp over all rows of each column [Hq, Sk]."""
    if part.normalizer.kind != "column_softmax":
        return None
    total: Tensor | None = None
    for start in starts:
        rows = _slice(whole, start, starts.step)
        s = _scores(part, rows, _seen(part, rows), -math.inf)
        lse = softmax(s.transpose(1, 2))[1]
        total = lse if total is None else logaddexp(total, lse)
    return total


# -- combining parts -----------------------------------------------------------------------------


def _combine(attn: Attention, parts: list[Partial], rows: Rows) -> Partial:
    if len(parts) == 1 or attn.combine.name == "lse":
        return _merge(parts)
    outputs = [_merge([p]).o for p in parts]
    factors = [rows.per_row(e)[..., None] for e in attn.combine.args]
    match attn.combine.name:
        case "lerp":
            first, second = outputs
            outputs = [first, factors[0] * (second - first)]
        case "gate":
            ungated = len(outputs) - len(factors)
            outputs[ungated:] = [g * o for g, o in zip(factors, outputs[ungated:], strict=True)]
        case _:
            pass
    return Partial(torch.stack(outputs).sum(0), _greatest(parts))


def _greatest(parts: list[Partial]) -> Tensor:
    return torch.stack([p.top for p in parts]).amax(0)


def _merge(parts: list[Partial]) -> Partial:
    """The parts as one softmax over all their keys, then the sinks' share taken off."""
    first = parts[0]
    if len(parts) > 1:
        lses = torch.stack([p.lse for p in parts if p.lse is not None], -1)
        share, lse, _ = softmax(lses)
        o = (share[..., None] * torch.stack([p.o for p in parts], -2)).sum(-2)
        first = Partial(o, _greatest(parts), lse)
    sinks = [p.sink for p in parts if p.sink is not None]
    if first.lse is None or not sinks:
        return first
    sink = sinks[0] if len(sinks) == 1 else logaddexp(*sinks)
    empty = first.lse == -math.inf
    share = torch.sigmoid(torch.where(empty, 0.0, first.lse) - sink)
    return replace(first, o=torch.where(empty, 0.0, share)[..., None] * first.o, sink=None)
