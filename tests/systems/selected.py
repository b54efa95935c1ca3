"""What tests of selections head by head share: attention over sets of keys, calls over pages, ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention
from attncc.reference import Outputs

SCALE = 16**-0.5


def over(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse of one head, q [R, D], over the pairs of a bool [R, Sk]."""
    s = (q @ k.T * SCALE).masked_fill(~keys, -math.inf)
    lse = s.logsumexp(1)
    return torch.exp(s - lse[:, None]) @ v, lse


def agree(got: Outputs, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, b: int = 0) -> None:
    """Sequence b is attention over the pairs keys [H, R, Sk]; k and v are [Hk, Sk, D]."""
    group = len(q) // len(k)
    assert got.lse is not None
    for h in range(len(q)):
        o, lse = over(q[h], k[h // group], v[h // group], keys[h])
        torch.testing.assert_close(got.o[b, h], o, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.lse[b, h], lse, rtol=1e-9, atol=1e-9)


def blocks(got: Outputs, part: int = 0, b: int = 0) -> Tensor:
    """The blocks that a part selects, bool [H, nq, nk]."""
    found = got.selections[b][part]
    assert found is not None
    return found.classes == 1


def ranked(worth: Any, among: Any) -> list[int]:
    """The best first, the lower number at a tie."""
    return sorted(among, key=lambda c: (-float(worth[c]), c))


def paged(x: Tensor, size: int, lengths: list[int]) -> Tensor:
    """[B, H, S, D] as pages [B * n, size, H, D] in the order of the sequences; NaN behind the end of each."""
    pages: list[Tensor] = []
    for rows, length in zip(x.transpose(1, 2), lengths, strict=True):
        padded = torch.full((-(-x.shape[2] // size) * size, *rows.shape[1:]), math.nan, dtype=x.dtype)
        padded[:length] = rows[:length]
        pages += list(padded.unflatten(0, (-1, size)))
    return torch.stack(pages)


def decode(attn: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], **more: Any) -> Outputs:
    """A call over pages, the first `lengths` keys of each sequence."""
    size = attn.part.kv.page_size or 1
    count = -(-k.shape[2] // size)
    table = torch.arange(len(q) * count, dtype=torch.int32).view(len(q), count)
    pools = [paged(x, size, lengths) for x in (k, v)]
    return reference.outputs(attn, q, *pools, block_table=table, seqused_k=torch.tensor(lengths), **more)
