"""Everyday models, each beside scores and masks written plainly over positions: outputs, log-sums and gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace as At

import pytest
import torch
from agree import agree
from golden import TESTS
from smaller import close, normal
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention
from attncc.spec import loads

HEADS, KV, D, BATCH = 4, 2, 16, 2


def small(name: str, dims: str) -> Attention:
    """The example's own text but for head counts and head sizes."""
    text = (TESTS.parent / "examples" / f"{name}.yaml").read_text()
    for key, value in (("heads", f"{{q: {HEADS}, kv: {KV}}}"), ("dims", dims)):
        text, found = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.M)
        assert found == 1
    return loads(text).attention


Score = Callable[[At], Tensor]


def scaled(at: At) -> Tensor:
    return at.qk * D**-0.5


def everything(at: At) -> Tensor:
    return at.j >= 0


def causal(at: At) -> Tensor:
    return at.j <= at.i


def window(left: int) -> Score:
    return lambda at: (at.j <= at.i) & (at.i - at.j < left)


@dataclass(frozen=True)
class Case:
    """Scores and masks over qk [B, H, Sq, Sk], b, h, i, j and the inputs; the lengths at which they bite."""

    score: Score = scaled
    seen: Score = everything
    lengths: tuple[tuple[int, int], ...] = ((5, 5), (3, 11), (1, 7))
    inputs: Callable[[int, int], Mapping[str, Tensor]] = lambda sq, sk: {}
    sink: str = ""
    dims: tuple[int, int] = (D, D)
    trained: tuple[str, ...] = ()


def attend(
    case: Case, fixed: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, **floats: Tensor
) -> tuple[Tensor, Tensor]:
    """o and lse; every pair has a score, those not seen are -inf, a sink is a column without a value."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    sq, sk = q.shape[2], k.shape[2]
    axes = torch.arange(BATCH)[:, None, None, None], torch.arange(q.shape[1])[:, None, None]
    row, j = torch.arange(sq)[:, None], torch.arange(sk)
    at = At(qk=q @ k.mT, b=axes[0], h=axes[1], row=row, i=row + sk - sq, j=j, sq=sq, sk=sk, **fixed, **floats)
    s = torch.where(case.seen(at), case.score(at), -math.inf)
    lse = s.logsumexp(-1)
    if case.sink:
        column = floats[case.sink][None, :, None, None].expand(*s.shape[:3], 1)
        s = torch.cat([s, column], -1)
    return torch.softmax(s, -1)[..., :sk] @ v, lse


def ragged_ids(sq: int, sk: int) -> dict[str, Tensor]:
    return {"ids": torch.stack([torch.arange(sk) // 3, torch.arange(sk) // 4]).int()}


def starts(sq: int, sk: int) -> dict[str, Tensor]:
    rows = [sorted({0, min(2, sk), min(5, sk)}), sorted({0, min(4, sk), sk})]
    return {"offsets": torch.tensor([row + [sk] * (3 - len(row)) for row in rows], dtype=torch.int32)}


def same_document(at: At) -> Tensor:
    segment = torch.stack([(row[None, :] <= torch.arange(at.sk)[:, None]).sum(1) for row in at.offsets])
    return (segment[at.b, at.i] == segment[at.b, at.j]) & causal(at)


def t5_bucket(distance: int) -> int:
    """T5's bidirectional buckets: 16 each way, 8 of them single distances, the others logarithmic up to 128."""
    n, base = abs(distance), 16 if distance > 0 else 0
    return base + (n if n < 8 else min(15, 8 + int(math.log(n / 8) / math.log(128 / 8) * 8)))


def t5_inputs(sq: int, sk: int) -> dict[str, Tensor]:
    """Its own order of buckets, by distance: where the bucket's number changes, and which it is there."""
    distances = range(-200, 201)
    edges = [d for d in distances[1:] if t5_bucket(d) != t5_bucket(d - 1)]
    order = [t5_bucket(d) for d in (-200, *edges)]
    table = normal(HEADS, 32)
    return {"edges": torch.tensor(edges, dtype=torch.int32), "bias": table[:, order], "table": table}


def t5_score(at: At) -> Tensor:
    buckets = torch.tensor([[t5_bucket(int(j - i)) for j in at.j] for i in at.i[:, 0]])
    return at.qk + at.table[at.h, buckets]


OWN = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
"""Of four draft tokens: the first is the root, the next two its children, the last a child of the second."""
ANCESTORS = torch.tensor([0b1, 0b11, 0b101, 0b1011], dtype=torch.int32)[None, :, None].repeat(BATCH, 1, 1)


def tree(at: At) -> Tensor:
    return torch.cat([torch.ones(4, at.sk - 4, dtype=torch.bool), OWN], 1)


def either_window(sq: int, sk: int) -> dict[str, Tensor]:
    """A narrow one in the longer call, a wide one in the other."""
    return {"sinks": normal(HEADS), "left": torch.tensor([6 if sk == 40 else sk], dtype=torch.int32)}


def block_table(sq: int, sk: int) -> dict[str, Tensor]:
    return {"blocks": torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)}


CASES: dict[str, Case] = {
    "dense": Case(lengths=((5, 5), (3, 11), (11, 3))),
    "d72": Case(),
    "causal_gqa": Case(seen=causal),
    "mistral": Case(seen=window(4096), lengths=((5, 5), (2, 4100))),
    "sliding_window": Case(seen=window(1024), lengths=((5, 5), (3, 1030))),
    "gemma3_local": Case(seen=window(1024), lengths=((5, 5), (3, 1030))),
    "chunked_local": Case(
        seen=lambda at: causal(at) & (at.i // 8192 == at.j // 8192), lengths=((5, 5), (4, 8194))
    ),
    "dilated": Case(
        seen=lambda at: window(4096)(at) & ((at.i - at.j) % 4 == 0), lengths=((9, 9), (2, 4103))
    ),
    "sink_window": Case(seen=lambda at: causal(at) & ((at.j < 4) | (at.i - at.j < 1024)), lengths=((6, 6), (3, 1034))),
    "global_local": Case(
        seen=lambda at: ((at.i - at.j).abs() <= 256) | (at.i < 64) | (at.j < 64), lengths=((400, 400), (3, 9))
    ),
    "softcap": Case(score=lambda at: 30 * torch.tanh(scaled(at) / 30), seen=causal),
    "gemma2_local": Case(
        score=lambda at: 50 * torch.tanh(scaled(at) / 50), seen=window(4096), lengths=((5, 5), (2, 4100))
    ),
    "gemma2_global": Case(score=lambda at: 50 * torch.tanh(at.qk / 12 / 50), seen=causal),
    "alibi": Case(
        score=lambda at: scaled(at) - torch.tensor([2.0 ** (-8 * (n + 1) / HEADS) for n in range(HEADS)])[at.h].double()
        * (at.i - at.j),
        seen=causal,
    ),
    "relative_bias": Case(
        score=lambda at: scaled(at) + at.bias[at.h, (at.i - at.j).clamp(-3, 3) + 3],
        inputs=lambda sq, sk: {"bias": normal(HEADS, 7)},
        trained=("bias",),
    ),
    "t5_bias": Case(score=t5_score, inputs=t5_inputs, lengths=((5, 5), (40, 40), (2, 300))),
    "attention_sinks": Case(
        seen=window(128), inputs=lambda sq, sk: {"sinks": normal(HEADS)}, sink="sinks", trained=("sinks",),
        lengths=((5, 5), (3, 140)),
    ),
    "gpt_oss_sinks": Case(
        seen=lambda at: window(int(at.left))(at), inputs=either_window, sink="sinks", trained=("sinks",),
        lengths=((5, 5), (3, 40)),
    ),
    "prefix_lm": Case(
        seen=lambda at: causal(at) | (at.j < at.lengths[at.b]),
        inputs=lambda sq, sk: {"lengths": torch.tensor([2, 4], dtype=torch.int32)},
    ),
    "gemma3_global": Case(
        seen=lambda at: causal(at) | ((at.image[at.b, at.i] > 0) & (at.image[at.b, at.i] == at.image[at.b, at.j])),
        inputs=lambda sq, sk: {"image": torch.tensor([[0, 1, 1, 1, 0, 2, 2], [3, 3, 0, 0, 4, 4, 4]]).int()},
        lengths=((7, 7), (3, 7), (1, 7)),
    ),
    "document_ids": Case(
        seen=lambda at: causal(at) & (at.ids[at.b, at.i] == at.ids[at.b, at.j]), inputs=ragged_ids
    ),
    "packed_documents": Case(seen=same_document, inputs=starts),
    "block_mask": Case(
        seen=lambda at: at.blocks[at.i // 128, at.j // 128], inputs=block_table, lengths=((300, 300), (2, 384))
    ),
    "tree_speculation": Case(seen=tree, inputs=lambda sq, sk: {"ancestors": ANCESTORS}, lengths=((4, 4), (4, 11))),
    "d192_128": Case(seen=causal, dims=(24, 16), score=lambda at: at.qk * 24**-0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_model(name: str) -> None:
    case = CASES[name]
    qk, v = case.dims
    attn = small(name, str(qk) if qk == v else f"{{qk: {qk}, v: {v}}}")
    for sq, sk in case.lengths:
        given = case.inputs(sq, sk)
        tensors = {"q": normal(BATCH, HEADS, sq, qk), "k": normal(BATCH, KV, sk, qk), "v": normal(BATCH, KV, sk, v)}
        declared = {x.name for x in attn.inputs}
        fixed = {n: x for n, x in given.items() if n in declared and n not in case.trained}
        helping = {n: x for n, x in given.items() if n not in case.trained}
        trained = {n: given[n] for n in case.trained}
        agree(
            attn, lambda case=case, helping=helping, **x: attend(case, helping, **x)[0], {**tensors, **trained}, fixed
        )
        got = reference.outputs(attn, *tensors.values(), inputs={**fixed, **trained}).lse
        assert got is not None
        close(got, attend(case, helping, **tensors, **trained)[1])
