"""`qdot` in the oracle: the query times rows of a table, pair by pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import h, hk, i, j, plain, qk, row, scale
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention, Call, Dims, Input
from attncc.ir.expr import TRUE, Expr, qdot, where
from attncc.reference import sequence

SQ, SK = 5, 7
TABLES = (
    Input("far", ("N", "Dqk"), grad=True),
    Input("own", ("Hq", "Sk", "Dqk"), grad=True),
    Input("shared", ("Hk", "Dqk")),
    Input("rows", ("Sq", "Dqk")),
    Input("one", ("Dqk",), grad=True),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + seed))


def close(got: Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def variant(score: Expr, mask: Expr = TRUE, **more: Any) -> Attention:
    return plain(score=score, mask=mask, dims=Dims(8, 6), inputs=TABLES, **more)


def tables() -> dict[str, Tensor]:
    return {
        "far": normal(4, 8),
        "own": normal(4, SK, 8),
        "shared": normal(2, 8),
        "rows": normal(SQ, 8),
        "one": normal(8),
    }


def loop(q: Tensor, k: Tensor, v: Tensor, added: Any, seen: Any = lambda i, j: True) -> Tensor:
    """`added(q_row, h, row, i, j)` beside the scaled product, one pair after the other."""
    o: list[Tensor] = []
    for head in range(4):
        for r in range(SQ):
            at = r + SK - SQ
            keys = [n for n in range(SK) if seen(at, n)]
            s = [q[head, r] @ k[head // 2, n] * 8**-0.5 + added(q[head, r], head, r, at, n) for n in keys]
            p = torch.stack(s).softmax(0) if s else torch.zeros(0, dtype=q.dtype)
            o.append(p @ v[head // 2, keys])
    return torch.stack(o).unflatten(0, (4, SQ))


def none_outside(x: Tensor, n: int) -> Tensor:
    return x[n] if 0 <= n < len(x) else torch.zeros_like(x[0])


CASES: dict[str, tuple[Expr, Any]] = {
    "distance, outside of the table 0": (
        qdot("far", i - j), lambda x, q, h, row, i, j: q @ none_outside(x["far"], i - j),
    ),
    "heads and keys": (qdot("own", h, j), lambda x, q, h, row, i, j: q @ x["own"][h, j]),
    "key heads": (qdot("shared", hk), lambda x, q, h, row, i, j: q @ x["shared"][h // 2]),
    "rows": (qdot("rows", row), lambda x, q, h, row, i, j: q @ x["rows"][row]),
    "no index": (qdot("one") * j, lambda x, q, h, row, i, j: q @ x["one"] * j),
    "twice, and chosen": (
        where(j < 3, qdot("own", h, i), qdot("far", j % 4)) * 0.5,
        lambda x, q, h, row, i, j: 0.5 * (q @ (x["own"][h, i] if j < 3 else x["far"][j % 4])),
    ),
}  # fmt: skip
MASKS = {
    "all": (TRUE, lambda i, j: True),
    "causal": (j <= i, lambda i, j: j <= i),
    "few": (j < i - 3, lambda i, j: j < i - 3),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_loop(case: str, mask: str) -> None:
    (term, added), (seen, sees) = CASES[case], MASKS[mask]
    attn = variant(qk * scale + term, seen)
    x = {"q": normal(2, 4, SQ, 8), "k": normal(2, 2, SK, 8), "v": normal(2, 2, SK, 6), **tables()}
    ours, theirs = ({n: t.clone().requires_grad_() for n, t in x.items()} for _ in range(2))
    inputs = {n: t for n, t in ours.items() if n not in "qkv"}
    got = reference.attention(attn, ours["q"], ours["k"], ours["v"], inputs=inputs)
    rows = [
        loop(theirs["q"][b], theirs["k"][b], theirs["v"][b], lambda *at: added(theirs, *at), sees) for b in range(2)
    ]
    want = torch.stack(rows)
    close(got, want)
    along = normal(*got.shape)
    for mine, other in zip(gradients(got, ours, along), gradients(want, theirs, along), strict=True):
        close(mine, other)


def gradients(o: Tensor, tensors: dict[str, Tensor], along: Tensor) -> list[Tensor]:
    """0 for a tensor that the output does not depend on."""
    found = torch.autograd.grad(o, list(tensors.values()), along, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors.values(), found, strict=True)]


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    attn = variant(qk * scale + qdot("own", h, j) + qdot("rows", row), j <= i)
    q, k, v = normal(1, 4, SQ, 8), normal(1, 2, SK, 8), normal(1, 2, SK, 6)
    whole = reference.attention(attn, q, k, v, inputs=tables())
    monkeypatch.setattr(sequence, "CHUNK_ELEMENTS", 2 * 4 * SK)
    close(reference.attention(attn, q, k, v, inputs=tables()), whole)


def test_it_sees_the_query_behind_the_prologue() -> None:
    doubled = replace(
        variant(qk * scale + qdot("one") * j), prologue=(Call("temperature", (2.0 + 0 * h,), (("on", "q"),)),)
    )
    q, k, v = normal(1, 4, SQ, 8), normal(1, 2, SK, 8), normal(1, 2, SK, 6)
    want = reference.attention(replace(doubled, prologue=()), 2 * q, k, v, inputs=tables())
    close(reference.attention(doubled, q, k, v, inputs=tables()), want)
