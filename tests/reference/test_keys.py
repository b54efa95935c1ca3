"""The keys of a part: some columns of them, and keys and values of the part's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import i, j, plain, qk, scale
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention, Call, Dims, Heads, Input, Normalizer, Part, Storage
from attncc.ir.expr import TRUE, Expr, const, load, name
from attncc.reference import sequence

GIVEN = Storage("given", index="ck", values="cv")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def attend(q: Tensor, k: Tensor, v: Tensor, factor: float, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o and lse of one sequence, every query head with key head h // group."""
    o = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.zeros(q.shape[:2], dtype=q.dtype)
    for h in range(len(q)):
        s = factor * q[h] @ k[h * len(k) // len(q)].T
        s = s if seen is None else s.masked_fill(~seen, -torch.inf)
        lse[h] = s.logsumexp(-1)
        o[h] = (s - lse[h][:, None]).exp() @ v[h * len(v) // len(q)]
    return o, lse


def two(first: Part, second: Part, combine: Call, **more: Any) -> Attention:
    return replace(plain(dims=Dims(8, 6), **more), parts=(first, second), combine=combine)


@pytest.mark.parametrize(("lo", "hi"), [(0, 8), (0, 3), (3, 8), (7, 8)])
@pytest.mark.parametrize("mask", [TRUE, j <= i], ids=["all", "causal"])
def test_columns_are_cut_from_queries_and_keys_alone(lo: int, hi: int, mask: Expr) -> None:
    attn = replace(plain(dims=Dims(8, 6)), parts=(Part(qk * scale, mask, columns=(lo, hi)),))
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 6)
    got = reference.outputs(attn, q, k, v)
    seen = None if mask is TRUE else torch.arange(9) <= torch.arange(5)[:, None] + 4
    for b in range(2):
        o, lse = attend(q[b, ..., lo:hi], k[b, ..., lo:hi], v[b], 8**-0.5, seen)  # the scale is that of the whole
        close(got.o[b], o)
        assert got.lse is not None
        close(got.lse[b], lse)


def test_columns_part_by_part_add_up_to_the_whole_product() -> None:
    none = Normalizer("none")
    first, second = (Part(qk * scale, normalizer=none, columns=c) for c in ((0, 3), (3, 8)))
    q, k, v = normal(1, 4, 5, 8), normal(1, 2, 9, 8), normal(1, 2, 9, 6)
    whole = plain(dims=Dims(8, 6), normalizer=none)
    close(reference.attention(two(first, second, Call("add")), q, k, v), reference.attention(whole, q, k, v))


CK, CV = Input("ck", ("C", "Hc", "N", 8), grad=True), Input("cv", ("C", "Hc", "N", 6), grad=True)


@pytest.mark.parametrize(("batch", "heads", "count"), [(1, 1, 3), (2, 1, 1), (1, 2, 3), (2, 4, 13), (2, 2, 0)])
def test_given_keys_replace_those_of_the_sequence(batch: int, heads: int, count: int) -> None:
    attn = plain(dims=Dims(8, 6), kv=GIVEN, inputs=(CK, CV))
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 6)
    ck, cv = normal(batch, heads, count, 8), normal(batch, heads, count, 6)
    got = reference.attention(attn, q, k, v, inputs={"ck": ck, "cv": cv})
    for b in range(2):
        o = attend(q[b], ck[b % batch], cv[b % batch], 8**-0.5)[0] if count else torch.zeros(4, 5, 6).double()
        close(got[b], o)


def test_heads_of_given_keys_follow_the_map() -> None:
    attn = plain(dims=Dims(8, 6), kv=GIVEN, inputs=(CK, CV), heads=Heads(4, 4, 4, "tile"))
    q, k, v, ck, cv = (normal(1, h, n, d) for h, n, d in ((4, 5, 8), (4, 9, 8), (4, 9, 6), (2, 3, 8), (2, 3, 6)))
    got = reference.attention(attn, q, k, v, inputs={"ck": ck, "cv": cv})[0]
    for h in range(4):
        close(got[h], attend(q[0, h : h + 1], ck[0, h % 2 : h % 2 + 1], cv[0, h % 2 : h % 2 + 1], 8**-0.5)[0][0])


def test_positions_count_the_given_keys() -> None:
    """`j` runs over the part's own keys, `Sk` is their number, and a bias may be read by them."""
    score, mask = qk * scale + load("bias", j) + name("Sk") * 0.5, (j < 3) & (j <= i)
    bias = Input("bias", ("N",))
    attn = plain(dims=Dims(8, 6), kv=GIVEN, inputs=(CK, CV, bias), score=score, mask=mask)
    q, k, v, ck, cv = (normal(1, h, n, d) for h, n, d in ((4, 5, 8), (2, 5, 8), (2, 5, 6), (2, 4, 8), (2, 4, 6)))
    added = normal(4)
    got = reference.outputs(attn, q, k, v, inputs={"ck": ck, "cv": cv, "bias": added})
    seen = (torch.arange(4) < 3) & (torch.arange(4) <= torch.arange(5)[:, None])
    for h in range(4):
        s = q[0, h] @ ck[0, h // 2].T * 8**-0.5 + added + 2.0
        p = s.masked_fill(~seen, -torch.inf).softmax(-1)
        close(got.o[0, h], p @ cv[0, h // 2])


def _both(q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [attend(q[0], *kv, 8**-0.5) for kv in ((k[0], v[0]), (ck[0], cv[0]))]


@pytest.mark.parametrize("combine", ["lse", "add"])
def test_given_keys_beside_those_of_the_sequence_and_their_gradients(combine: str) -> None:
    attn = two(Part(qk * scale), Part(qk * scale, kv=GIVEN), Call(combine), inputs=(CK, CV))
    x = [normal(1, h, n, d) for h, n, d in ((4, 5, 8), (2, 7, 8), (2, 7, 6), (2, 3, 8), (2, 3, 6))]
    ours, theirs = ([t.clone().requires_grad_() for t in x] for _ in range(2))
    got = reference.attention(attn, *ours[:3], inputs={"ck": ours[3], "cv": ours[4]})
    if combine == "add":
        expected = sum(o for o, _ in _both(*theirs))
    else:  # one softmax over all keys of both
        q, k, v, ck, cv = theirs
        expected = attend(q[0], torch.cat([k[0], ck[0]], 1), torch.cat([v[0], cv[0]], 1), 8**-0.5)[0]
    assert isinstance(expected, Tensor)
    close(got[0], expected)
    along = normal(*got.shape)
    for mine, other in zip(
        torch.autograd.grad(got, ours, along), torch.autograd.grad(expected, theirs, along[0]), strict=True
    ):
        close(mine, other)


def test_given_keys_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    attn = two(Part(qk * scale, j <= i), Part(qk * scale, kv=GIVEN), Call("lse"), inputs=(CK, CV))
    q, k, v, ck, cv = (normal(1, h, n, d) for h, n, d in ((4, 7, 8), (2, 7, 8), (2, 7, 6), (2, 3, 8), (2, 3, 6)))
    whole = reference.attention(attn, q, k, v, inputs={"ck": ck, "cv": cv})
    monkeypatch.setattr(sequence, "CHUNK_ELEMENTS", 2 * 4 * 7)
    close(reference.attention(attn, q, k, v, inputs={"ck": ck, "cv": cv}), whole)


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "message"),
    [
        ((1, 2, 3, 8), (1, 2, 4, 6), "cv: expected 3 keys as ck has, got 4"),
        ((3, 2, 3, 8), (3, 2, 3, 6), r"ck: expected shape \[1 or 2, a divisor of 4"),
        ((1, 3, 3, 8), (1, 3, 3, 6), "ck: expected shape"),
        ((1, 8, 3, 8), (1, 8, 3, 6), "ck: expected shape"),
        ((1, 2, 3, 7), (1, 2, 3, 6), r"ck: expected shape .* keys, 8\]"),
        ((1, 2, 3, 8), (1, 2, 3, 8), r"cv: expected shape .* keys, 6\]"),
    ],
)
def test_wrong_given_keys(k_shape: tuple[int, ...], v_shape: tuple[int, ...], message: str) -> None:
    declared = (Input("ck", ("A", "X", "M", "D")), Input("cv", ("A", "X", "N", "E")))
    attn = plain(dims=Dims(8, 6), kv=GIVEN, inputs=declared)
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 6)
    with pytest.raises(ValueError, match=message):
        reference.attention(attn, q, k, v, inputs={"ck": normal(*k_shape), "cv": normal(*v_shape)})


def test_columns_of_given_keys_are_those_of_the_part() -> None:
    """Given keys are as wide as the part's columns."""
    part = Part(qk * const(0.5), kv=GIVEN, columns=(2, 5))
    narrow = (Input("ck", (1, 1, "N", 3)), Input("cv", (1, 1, "N", 6)))
    attn = replace(plain(dims=Dims(8, 6), inputs=narrow), parts=(part,))
    q, k, v, ck, cv = (normal(1, h, n, d) for h, n, d in ((4, 5, 8), (2, 7, 8), (2, 7, 6), (1, 3, 3), (1, 3, 6)))
    got = reference.attention(attn, q, k, v, inputs={"ck": ck, "cv": cv})
    close(got[0], attend(q[0, ..., 2:5], ck[0], cv[0], 0.5)[0])
