"""Small selections, their rows and their blocks, for the tests of what scores them."""

from __future__ import annotations

import math
from typing import Any

import torch
from naive import i, j, plain
from torch import Tensor

from attncc.ir.attention import Attention, Call, Select
from attncc.ir.expr import Expr, const
from attncc.reference.operands import Sequence
from attncc.reference.rows import Numbers, Rows, rows_of, scope_of
from attncc.reference.select.blocks import Blocks, cut
from attncc.reference.select.scores import SCORES

CAUSAL = j <= i
SCALE = 1 / math.sqrt(8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def call(name: str, *words: str, **options: Any) -> Call:
    kwargs = {k: v if isinstance(v, str) else const(v) for k, v in options.items()}
    return Call(name, (), tuple(sorted(kwargs.items())), words)


def selecting(score: Call, block: Any, mask: Expr = CAUSAL, inputs: Any = (), **more: Any) -> Attention:
    fields = {"normalize": "softmax", "heads": "none", "rule": Call("topk", (const(2),)), "force": (), **more}
    select = Select(block=block, score=score, reuse=Call("every_call"), **fields)
    return plain(mask=mask, select=select, inputs=tuple(inputs))


def rows_for(attn: Attention, Sq: int, Sk: int, number: int = 0, seed: int = 0, **inputs: Tensor) -> Rows:
    """The rows of sequence `number` with drawn operands."""
    q, k = normal(attn.heads.q, Sq, 8, seed=seed + number), normal(attn.heads.kv, Sk, 8, seed=seed + number + 1)
    sequence = Sequence(number, q, k, normal(attn.heads.kv, Sk, 8, seed=seed + number + 2))
    sizes = {"B": 2, "Hq": 4, "Hk": 2, "Hv": 2, "Dqk": 8, "Dv": 8}
    numbers = Numbers(torch.float64, torch.float64, None, 7, sizes, inputs)
    return rows_of(attn, sequence, scope_of(attn, sequence, numbers), numbers)


def scored(attn: Attention, Sq: int, Sk: int, bq: int, bk: int, **more: Any) -> tuple[Tensor, Rows, Blocks]:
    rows = rows_for(attn, Sq, Sk, **more)
    blocks = cut(attn.part, rows, bq, bk)
    assert attn.part.select is not None
    score = attn.part.select.score
    return SCORES[score.name](score, attn.part, rows, blocks), rows, blocks


def cells(Sq: int, Sk: int, bq: int, bk: int) -> list[tuple[int, int, range, range]]:
    """Every pair of blocks with its members."""
    return [
        (a, c, range(a * bq, min(Sq, a * bq + bq)), range(c * bk, min(Sk, c * bk + bk)))
        for a in range(-(-Sq // bq))
        for c in range(-(-Sk // bk))
    ]


def close(got: Tensor, expected: Any, where: Any = None) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got if where is None else got[where], expected, rtol=1e-11, atol=1e-11)


def weights(rows: Rows) -> Tensor:
    """Causal softmax [H, Sq, Sk]."""
    heads, Sq, Sk = rows.shape
    p = torch.zeros(rows.shape, dtype=torch.float64)
    for h in range(heads):
        for row in range(Sq):
            seen = range(min(Sk, row + Sk - Sq + 1))
            e = [math.exp(float(rows.q[h, row] @ rows.k[h, key]) * SCALE) for key in seen]
            for key in seen:
                p[h, row, key] = e[key] / sum(e)
    return p
