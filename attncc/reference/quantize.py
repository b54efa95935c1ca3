"""Operands as few bits hold them: what a quantizer stores, read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call, Quantizer
from attncc.reference.formats import read_back
from attncc.reference.operands import Sequence, memory
from attncc.reference.rows import served_by


@dataclass(frozen=True, slots=True)
class Quantized:
    """A sequence read back from its bits, and what smoothing took off: terms of the products.

    q k^T = (q' + qm) (k' + km)^T: `row_term` is q km^T [Hq, Sq], `key_term` is qm k'^T [Hq, Sk].
    """

    sequence: Sequence
    row_term: Tensor | None = None
    key_term: Tensor | None = None


def quantized(attn: Attention, sequence: Sequence) -> Quantized:
    """The operands as their quantizers leave them; `cache` holds keys and values, but no rope columns of a latent."""
    if not attn.quantize:
        return Quantized(sequence)
    held = {z.operand: z for z in attn.quantize}
    cache = held.get("cache")
    by = {"q": held.get("q"), "k": held.get("k", cache), "v": held.get("v", cache)}
    query_mean, key_mean = _mean(sequence.q, by["q"]), _mean(sequence.k, by["k"])
    if query_mean is not None or key_mean is not None:
        _check_smoothing(attn)
    q, k, v = _less(sequence.q, query_mean), _less(sequence.k, key_mean), sequence.v
    storage = memory(attn)
    exact = storage.rope or 0 if storage.kind == "latent" and by["k"] is cache else 0
    plain = k.shape[-1] - exact
    stored_k = torch.cat([_stored(k[..., :plain], by["k"], "k"), k[..., plain:]], -1)
    if storage.kind == "latent":
        stored_v = (stored_k if key_mean is None else stored_k + key_mean)[..., : v.shape[-1]] if by["k"] else v
    else:
        stored_v = _stored(v, by["v"], "v")
    serving = served_by(attn, torch.arange(q.shape[0], device=q.device), k.shape[0])
    return Quantized(
        replace(sequence, q=_stored(q, by["q"], "q"), k=stored_k, v=stored_v),
        None if key_mean is None else (sequence.q * key_mean[serving]).sum(-1),
        None if query_mean is None else (k[serving] * query_mean).sum(-1),
    )


def _check_smoothing(attn: Attention) -> None:
    """Means come back as terms of the products of whole queries with the sequence's own keys."""
    for part in attn.parts:
        if part.columns or part.state or part.kv.kind in ("given", "pooled"):
            raise Unsupported("the oracle smooths keys that every part multiplies whole", key="quantize")


def _mean(x: Tensor, quantizer: Quantizer | None) -> Tensor | None:
    """What smoothing takes off: the mean token of each head [H, 1, D]."""
    return x.mean(1, keepdim=True) if quantizer is not None and quantizer.smooth and x.shape[1] else None


def _less(x: Tensor, mean: Tensor | None) -> Tensor:
    return x if mean is None else x - mean


def _stored(x: Tensor, quantizer: Quantizer | None, operand: str) -> Tensor:
    """An operand [H, S, D] as its quantizer holds it."""
    if quantizer is None:
        return x
    if quantizer.staircase:
        return _staircase(x, quantizer, operand)
    return _held(x, quantizer.dtype, quantizer, operand)


def _held(x: Tensor, dtype: str, quantizer: Quantizer, operand: str) -> Tensor:
    """All tokens in one format.

    Groups are columns of a token, which may be stored alone; those of a staircase's keys, stored by the segment, are
    tokens of a column, as in KIVI (arXiv 2402.02750).
    """
    per = quantizer.per
    turned = bool(quantizer.staircase) and operand == "k" and per is not None and per.name == "group"
    kept = read_back(x.mT if turned else x, dtype, per, quantizer.symmetric, operand)
    return kept.mT if turned else kept


def _staircase(x: Tensor, quantizer: Quantizer, operand: str) -> Tensor:
    """Tokens in fewer bits the older they are, each format reading what the one before it has left.

    The first age limit is the length of a segment. The newest tokens, too few for one, are held in the first format;
    a segment goes down one step after the other as newer ones fill up (SAQ, arXiv 2410.18441).
    """
    first = quantizer.staircase[0]
    length = first[0] or max(1, x.shape[1])
    full = x.shape[1] // length if first[0] else 0
    pieces: list[Tensor] = []
    for n in range(full + 1):
        piece = x[:, n * length : (n + 1) * length]
        for dtype in _history(quantizer, length, full - n):
            piece = _held(piece, dtype, quantizer, operand)
        pieces.append(piece)
    return torch.cat(pieces, 1)


def _history(quantizer: Quantizer, length: int, age: int) -> Iterator[str]:
    """The formats that a segment has gone through; an age of 0 is that of the newest tokens."""
    passed = (
        next(dtype for limit, dtype in quantizer.staircase if limit is None or limit >= (a + 1) * length)
        for a in range(age + 1)
    )
    return (dtype for dtype, _ in groupby(passed))


PER_ROW: Final = Call("token")


def quantized_weights(attn: Attention, p: Tensor) -> Tensor:
    """The weights [H, R, K], relative to the greatest of their row, as quantize.p holds them."""
    held = next((z for z in attn.quantize if z.operand == "p"), None)
    if held is None:
        return p
    per = held.per or (None if held.dtype == "nvfp4" else PER_ROW)
    return read_back(pad(p, (0, 1)), held.dtype, per, held.symmetric, "p")[..., :-1]  # 0, a hidden key, stays 0
