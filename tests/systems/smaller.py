"""Published examples at a size for tests: the file's own text but for its head counts and sizes."""

from __future__ import annotations

import math

import torch
from golden import TESTS
from torch import Tensor

from attncc.ir.attention import Attention
from attncc.spec import loads


def example(name: str, *changes: tuple[str, str]) -> Attention:
    """`examples/<name>.yaml` with some text for other text, each of which stands there once."""
    text = (TESTS.parent / "examples" / f"{name}.yaml").read_text()
    for old, new in changes:
        assert text.count(old) == 1, (name, old)
        text = text.replace(old, new)
    return loads(text).attention


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the weights of plain softmax attention; k and v [.., Hk, Sk, D] serve groups of query heads."""
    group = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    s = q @ k.mT / math.sqrt(q.shape[-1])
    s = s if seen is None else torch.where(seen, s, -math.inf)
    p = torch.softmax(s, -1)
    return p @ v, torch.logsumexp(s, -1), p
