"""What tests of selections share: a small spec whose scores are given, and its choices written out in loops."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from attncc import reference, spec
from attncc.ir.attention import Attention
from attncc.reference import Outputs

H, G = 4, 2
SPEC = """
attncc: 1
name: t
heads: {{q: 4, kv: 2}}
dims: 8
inputs:
  s: {{shape: [Hq, nq, nk]}}
  share: {{shape: [Hq]}}
mask: {mask}
kv: {kv}
select:
  block: {{q: {q}, k: {k}}}
  score: {score}
  normalize: {normalize}
  heads: {heads}
  rule: {rule}
  force: {force}
  charge: {charge}
  take: {take}
  reuse: {reuse}
outputs: [o, lse, indices]
"""
DEFAULTS = {
    "mask": "causal", "kv": "dense", "q": 4, "k": 3, "score": "given(s)", "normalize": "none", "heads": "none",
    "rule": "topk(2)", "force": [], "charge": "true", "take": "selected", "reuse": "every_call",
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def variant(**changes: Any) -> Attention:
    made = {**DEFAULTS, **changes}
    made["charge"] = str(made["charge"]).lower()
    made["force"] = str([str(word) for word in made["force"]])
    return spec.loads(SPEC.format(**made)).attention


def case(Sq: int = 13, Sk: int = 13, bq: int = 4, bk: int = 3, seed: int = 0) -> dict[str, Tensor]:
    nq, nk = -(-Sq // bq), -(-Sk // bk)
    scores = normal(H, nq, nk, seed=seed)
    scores[:, :, nk // 2] = scores[:, :, 0]  # ties
    return {
        "q": normal(1, H, Sq, 8, seed=seed + 1),
        "k": normal(1, G, Sk, 8, seed=seed + 2),
        "v": normal(1, G, Sk, 8, seed=seed + 3),
        "s": scores,
        "share": torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64),
    }


def run(attn: Attention, at: dict[str, Tensor], **more: Any) -> Outputs:
    inputs = {name: at[name] for name in ("s", "share")}
    return reference.outputs(attn, at["q"], at["k"], at["v"], inputs=inputs, **more)


def visible(at: dict[str, Tensor], bq: int = 4, bk: int = 3, sees: Any = lambda i, j: j <= i) -> list[list[bool]]:
    """Which blocks hold a pair that the mask shows."""
    Sq, Sk = at["q"].shape[2], at["k"].shape[2]
    rows, columns = range(-(-Sq // bq)), range(-(-Sk // bk))
    pairs = [[sees(r + Sk - Sq, j) for j in range(Sk)] for r in range(Sq)]
    block = lambda a, c: [x for row in pairs[a * bq : a * bq + bq] for x in row[c * bk : c * bk + bk]]
    return [[any(block(a, c)) for c in columns] for a in rows]


def selected(result: Outputs) -> list[list[set[int]]]:
    """The blocks of class 1, by head and query block."""
    classes = result.taps["indices"][0]
    return [[set((row == 1).nonzero().flatten().tolist()) for row in head] for head in classes]


def attend(at: dict[str, Tensor], allowed: Any, sees: Any = lambda i, j: j <= i) -> tuple[Tensor, Tensor]:
    """o and lse, a pair at a time: allowed(h, row, j) beside the mask."""
    q, k, v = (at[n][0] for n in "qkv")
    o, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for h in range(H):
        for r in range(q.shape[1]):
            i = r + k.shape[1] - q.shape[1]
            keys = [j for j in range(k.shape[1]) if sees(i, j) and allowed(h, r, j)]
            if keys:
                logits = k[h // (H // G), keys] @ q[h, r] / math.sqrt(8)
                lse[h, r] = logits.logsumexp(0)
                o[h, r] = logits.softmax(0) @ v[h // (H // G), keys]
    return o, lse


def check(result: Outputs, at: dict[str, Tensor], sets: Any, bq: int = 4, bk: int = 3, **more: Any) -> None:
    """The selection is `sets`, by head and query block, and o and lse are those over it."""
    assert selected(result) == sets
    o, lse = attend(at, lambda h, r, j: j // bk in sets[h][r // bq], **more)
    torch.testing.assert_close(result.o[0], o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.lse[0], lse, rtol=1e-9, atol=1e-9)  # type: ignore[index]


def order(scores: list[float], among: list[int], first: AbstractSet[int] = frozenset()) -> list[int]:
    """Blocks from the best on: forced ones, then by score, the lower number at a tie."""
    return sorted(among, key=lambda c: (c not in first, -scores[c], c))


def each(at: dict[str, Tensor], choose: Any, **blocks: Any) -> list[list[set[int]]]:
    """choose(head, query block, scores, visible blocks) for all of them."""
    seen = visible(at, **blocks)
    rows = [[c for c, yes in enumerate(row) if yes] for row in seen]
    return [[choose(h, a, at["s"][h, a].tolist(), row) for a, row in enumerate(rows)] for h in range(H)]


def softmax(s: list[float], among: list[int]) -> dict[int, float]:
    e = {c: math.exp(s[c]) for c in among}
    return {c: x / sum(e.values()) for c, x in e.items()}


def begin(a: int, at: dict[str, Tensor]) -> int:
    return a * 4 + at["k"].shape[2] - at["q"].shape[2]


def end(a: int, at: dict[str, Tensor]) -> int:
    return min(a * 4 + 4, at["q"].shape[2]) - 1 + at["k"].shape[2] - at["q"].shape[2]
