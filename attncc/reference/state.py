"""A linear or recurrent part, by its definition: S <- exp(g_t) S, then k_t enters with v_t; o = c phi(q) S.

Letters: H query heads, R rows, K keys, F features, V value columns. Under `linear` the values have one more
column, of ones: what gathers there is the sum of the weights, faded and read like every other column, and
V is Dv + 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Part, State
from attncc.reference.evaluate import evaluate
from attncc.reference.features import FEATURES, POSITIVE
from attncc.reference.pairs import weighted
from attncc.reference.rows import Partial, Rows, served_by

Token = Callable[[Tensor, int], Tensor]
"""The state [H, F, V] behind the key before t, and t, in; the state behind key t out."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a state makes of its rows, and the state behind the last key [H, F, V]."""

    partial: Partial
    final: Tensor


def attend_state(attn: Attention, part: Part, rows: Rows) -> Stated:
    """All rows of a sequence through a state."""
    state = part.state
    assert state is not None
    if rows.row_term is not None or rows.key_term is not None:
        raise Unsupported("smoothing takes a mean off that features do not give back", key="quantize")
    linear = part.normalizer.kind == "linear"
    rows = replace(rows, q=_features(state, rows.q, rows), k=_features(state, rows.k, rows))
    if linear:
        rows = replace(rows, v=torch.cat([rows.v, torch.ones_like(rows.v[..., :1])], -1))
    first = _initial(attn, state, rows, linear)
    if state.update.name == "none":
        read, last = _product(rows.q, first, rows), first
    elif state.causal:
        read, last = _scan(_token(attn, part, state, rows), first, state.chunk, rows)
    else:
        read, last = _totals(first, rows)
    return Stated(_normalized(part, read * _factor(state, rows), attn.dims.v), last)


def has_lse(part: Part) -> bool:
    """Softmax has a log-sum-exp; so does a sum of weights that cannot be negative."""
    if part.state is None:
        return part.normalizer.kind == "softmax"
    return part.normalizer.kind == "linear" and part.state.feature in POSITIVE


# -- operands ----------------------------------------------------------------------------------------


def _features(state: State, x: Tensor, rows: Rows) -> Tensor:
    x = x.to(rows.numbers.elementwise)
    return FEATURES[state.feature](x if state.prescale is None else evaluate(state.prescale, rows.scope) * x)


def _factor(state: State, rows: Rows) -> Tensor:
    """What multiplies every product of features, [H, 1, 1] or a scalar."""
    return rows.scope.names["scale"] if state.scale is None else evaluate(state.scale, rows.scope)


def _by_head(attn: Attention, name: str, rows: Rows, *shape: int) -> Tensor:
    """The sequence's own part of an input [B, heads, …], as [H, …]; `shape` is what … must be."""
    x = rows.scope.inputs[name]
    count = x.shape[1]
    if tuple(x.shape[2:]) != shape or attn.heads.q % count:
        form = f"[B, heads, {', '.join(map(str, shape))}], heads a divisor of {attn.heads.q}"
        raise ValueError(f"{name}: expected {form}, got shape {list(x.shape)}")
    mine = x[rows.scope.names["b"] if len(x) > 1 else 0].to(rows.numbers.elementwise)
    return mine[served_by(attn, torch.arange(attn.heads.q, device=x.device), count)]


def _initial(attn: Attention, state: State, rows: Rows, linear: bool) -> Tensor:
    """The state before any key: the input's, beside the sum of features behind it, or zeros."""
    features, dv = rows.k.shape[-1], attn.dims.v
    zeros = rows.k.new_zeros((attn.heads.q, features, rows.v.shape[-1]))
    if not state.initial:
        return zeros
    first = _by_head(attn, state.initial, rows, features, dv)
    if not linear:
        return first
    mass = _by_head(attn, state.initial_mass, rows, features)[..., None] if state.initial_mass else zeros[..., dv:]
    return torch.cat([first, mass], -1)


def _decay(attn: Attention, part: Part, state: State, rows: Rows) -> Tensor:
    """exp of the log decays [H, K, F]; axes on which they do not vary may be expanded ones."""
    heads, _, keys = rows.shape
    features = rows.k.shape[-1]
    match state.decay.name:
        case "const":
            log = evaluate(state.decay.args[0], rows.scope).to(rows.numbers.elementwise)
        case "scalar":
            log = _by_head(attn, state.decay.words[0], rows, keys)[..., None]
        case "vector":
            log = _by_head(attn, state.decay.words[0], rows, keys, attn.dims.qk)
            log = log if part.columns is None else log[..., slice(*part.columns)]
        case _:
            log = torch.zeros((), device=rows.k.device, dtype=rows.numbers.elementwise)
    return torch.exp(log).expand(heads, keys, features)


# -- what keys do to a state -------------------------------------------------------------------------


def _token(attn: Attention, part: Part, state: State, rows: Rows) -> Token:
    """One key's work on the state: fade, then add k v^T, or correct what the state answers to k by beta."""
    decay = _decay(attn, part, state, rows)
    k, v = rows.k, rows.v.to(rows.numbers.elementwise)
    delta = state.update.name == "delta"
    beta = _by_head(attn, state.update.words[0], rows, k.shape[1]) if delta else None

    def token(S: Tensor, t: int) -> Tensor:
        key, value = k[:, t, None], v[:, t, None]
        S = decay[:, t, :, None] * S
        if beta is not None:
            value = beta[:, t, None, None] * (value - _product(key, S, rows))
        return S + _product(key.transpose(1, 2), value, rows)

    return token


def _scan(token: Token, S: Tensor, chunk: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """What each row reads behind the last key it may see [H, R, V], and the last state.

    Row r stands at `offset + r`: rows before key 0 read the initial state, rows behind the last key the last.
    Where there are several chunks, the backward walks them again instead of keeping every state.
    """
    _, count, keys = rows.shape
    offset = int(rows.scope.names["i"][0, 0, 0]) if count else 0
    begins = [min(max(t - offset, 0), count) for t in range(keys)] + [count]

    def walk(S: Tensor, start: int) -> tuple[Tensor, Tensor]:
        reads: list[Tensor] = []
        for t in range(start, min(start + chunk, keys)):
            S = token(S, t)
            reads.append(_product(rows.q[:, begins[t] : begins[t + 1]], S, rows))
        return torch.cat(reads, 1), S

    reads = [_product(rows.q[:, : begins[0]], S, rows)]
    again = functools.partial(checkpoint, walk, use_reentrant=False, preserve_rng_state=False)
    for start in range(0, keys, chunk):
        read, S = again(S, start) if keys > chunk else walk(S, start)
        reads.append(read)
    return torch.cat(reads, 1), S


def _totals(first: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """What each row reads of all keys, or of the keys that a selection leaves it; and the state of all keys."""
    v = rows.v.to(rows.numbers.elementwise)
    last = first + _product(rows.k.transpose(1, 2), v, rows)
    if rows.chosen is None:
        return _product(rows.q, last, rows), last
    used = rows.chosen.any(1)
    k = torch.where(used[..., None], rows.k, 0.0)
    p = torch.where(rows.chosen, _product(rows.q, k.transpose(1, 2), rows), 0.0)
    return _product(rows.q, first, rows) + weighted(p, rows.chosen, replace(rows, v=v)), last


def _normalized(part: Part, read: Tensor, dv: int) -> Partial:
    """Under `linear` the sums divided by the weights' sum plus eps, itself a weight without a value."""
    top = read.new_full(read.shape[:-1], -math.inf)
    if part.normalizer.kind != "linear":
        return Partial(read, top)
    total = read[..., dv] + part.normalizer.eps
    safe = torch.where(total == 0, 1.0, total)
    o = read[..., :dv] / safe[..., None]
    lse = torch.where(total > 0, torch.log(torch.where(total > 0, total, 1.0)), top) if has_lse(part) else None
    return Partial(o, top, lse, mass=total)


def _product(a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """a b, its factors in the dtype of matrix products."""
    return (a.to(rows.numbers.matmul) @ b.to(rows.numbers.matmul)).to(rows.numbers.elementwise)
