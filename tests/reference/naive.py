"""Attention once more, element by element in Python floats: no torch, no expressions, no chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from attncc.ir.attention import Attention, Dims, Heads, Normalizer, Part
from attncc.ir.expr import TRUE, Expr, ew, name

Rows = list[list[list[float]]]
"""[heads][rows][columns]"""
Formula = Callable[[SimpleNamespace], float]

b, h, hk, i, j, row = (name(n) for n in ("b", "h", "hk", "i", "j", "row"))
qk, scale = name("qk", "f32"), name("scale", "f32")


def plain(**changes: Any) -> Attention:
    """A small variant; keys of a part and keys of the whole may be given alike."""
    fields = ("score", "mask", "normalizer", "dropout", "kv", "select", "state")
    part = Part(**{"score": qk * scale, **{k: changes.pop(k) for k in fields if k in changes}})
    whole: dict[str, Any] = {
        "heads": Heads(4, 2, 2),
        "dims": Dims(8, 8),
        "parts": (part,),
        "scale": ew("rsqrt", name("Dqk")),
    }
    return Attention("t", **{**whole, **changes})


@dataclass(frozen=True)
class Twin:
    """A variant's formulas, as expressions and as Python."""

    score: Expr
    score_of: Formula
    mask: Expr = TRUE
    mask_of: Formula = lambda at: True


def attend(
    attn: Attention,
    twin: Twin,
    number: int,
    q: Rows,
    k: Rows,
    v: Rows,
    offset: int = 0,
    sink: Callable[[int], float] | None = None,
    allowed: Callable[[int, int, int], bool] = lambda hk, row, j: True,
) -> tuple[Rows, list[list[float]]]:
    """o [Hq][Sq][Dv] and lse [Hq][Sq] of sequence `number`; row 0 stands at position `offset`."""
    normalizer = attn.part.normalizer
    Sq, Sk, Dv = len(q[0]), len(k[0]), attn.dims.v
    scores: dict[tuple[int, int, int], float] = {}
    for head in range(attn.heads.q):
        key_head = serving(attn, head, attn.heads.kv)
        for r in range(Sq):
            for key in range(Sk):
                at = SimpleNamespace(
                    qk=sum(x * y for x, y in zip(q[head][r], k[key_head][key], strict=True)),
                    scale=1 / math.sqrt(attn.dims.qk), b=number, h=head, hk=key_head, i=r + offset, j=key, row=r,
                    Sq=Sq, Sk=Sk,
                )  # fmt: skip
                if allowed(key_head, r, key) and twin.mask_of(at):
                    scores[head, r, key] = twin.score_of(at)
    o: Rows = [[[0.0] * Dv for _ in range(Sq)] for _ in range(attn.heads.q)]
    lse = [[-math.inf] * Sq for _ in range(attn.heads.q)]
    for head in range(attn.heads.q):
        value_head = serving(attn, head, attn.heads.v)
        for r in range(Sq):
            seen = [key for key in range(Sk) if (head, r, key) in scores]
            total = sum(math.exp(scores[head, r, key]) for key in seen)
            lse[head][r] = math.log(total) if seen else -math.inf
            for key in seen:
                w = _weight(normalizer, scores, (head, r, key), seen, Sq, sink(head) if sink else None)
                for d in range(Dv):
                    o[head][r][d] += w * v[value_head][key][d]
    return o, lse


def serving(attn: Attention, head: int, count: int) -> int:
    return head % count if attn.heads.map == "tile" else head * count // attn.heads.q


def _weight(
    normalizer: Normalizer,
    scores: dict[tuple[int, int, int], float],
    at: tuple[int, int, int],
    seen: list[int],
    rows: int,
    sink: float | None,
) -> float:
    head, r, key = at
    s = scores[at]
    match normalizer.kind:
        case "softmax":
            total = sum(math.exp(scores[head, r, x]) for x in seen) + (math.exp(sink) if sink is not None else 0.0)
            return math.exp(s) / total
        case "sigmoid":
            return 1 / (1 + math.exp(-s))
        case "relu":
            return max(s, 0.0)
        case "none":
            return s
        case "linear":
            return s / (sum(scores[head, r, x] for x in seen) + normalizer.eps)
        case "column_softmax":
            column = (scores.get((head, x, key)) for x in range(rows))
            return math.exp(s) / sum(math.exp(x) for x in column if x is not None)
