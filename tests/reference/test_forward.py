"""The oracle against an element-by-element loop and against torch's own attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import Twin, attend, b, h, hk, i, j, plain, qk, row, scale
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attncc import reference
from attncc.ir.attention import Align, Attention, Dims, Heads, Input, Layout, Normalizer, Size, Storage
from attncc.ir.expr import TRUE, Expr, bucket, const, eq, ew, load, maximum, name, where


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def operands(attn: Attention, B: int, Sq: int, Sk: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [B, H, S, D]."""
    heads, dims = attn.heads, attn.dims
    return normal(B, heads.q, Sq, dims.qk), normal(B, heads.kv, Sk, dims.qk), normal(B, heads.v, Sk, dims.v)


def close(got: Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=1e-10, atol=1e-10)


def _float64(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def naive(attn: Attention, twin: Twin, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """The loop over a batch of equal sequences."""
    offset = {"bottom_right": k.shape[2] - q.shape[2], "top_left": 0}.get(attn.align.kind, 0)
    rows = [attend(attn, twin, n, q[n].tolist(), k[n].tolist(), v[n].tolist(), offset, **more) for n in range(len(q))]
    return _float64([o for o, _ in rows]), _float64([lse for _, lse in rows])


TWINS = {
    "plain": Twin(qk * scale, lambda at: at.qk * at.scale),
    "causal": Twin(qk * scale, lambda at: at.qk * at.scale, j <= i, lambda at: at.j <= at.i),
    "window": Twin(
        qk * scale,
        lambda at: at.qk * at.scale,
        (i - j < 3) & (j - i <= 1),
        lambda at: at.i - at.j < 3 and at.j - at.i <= 1,
    ),
    "softcap": Twin(
        ew("tanh", qk * scale / 2.0) * 2.0,
        lambda at: math.tanh(at.qk * at.scale / 2) * 2,
        j <= i,
        lambda at: at.j <= at.i,
    ),
    "alibi": Twin(
        qk * scale - ew("exp2", -(h + 1)) * ew("abs", i - j),
        lambda at: at.qk * at.scale - 2.0 ** -(at.h + 1) * abs(at.i - at.j),
    ),
    "by batch and row": Twin(
        qk * scale + where(eq(row, b), 1.0, 0.0), lambda at: at.qk * at.scale + (1.0 if at.row == at.b else 0.0),
        ~eq((i + j) % 3, hk), lambda at: (at.i + at.j) % 3 != at.hk,
    ),
    "sizes": Twin(qk / name("Sk") + i / name("Sq"), lambda at: at.qk / at.Sk + at.i / at.Sq),
    "empty rows": Twin(qk * scale, lambda at: at.qk * at.scale, i < 0, lambda at: at.i < 0),
}  # fmt: skip

NORMALIZERS = {
    "softmax": Normalizer(),
    "sink": Normalizer(sink=h * 0.5 - 1.0),
    "sigmoid": Normalizer("sigmoid"),
    "relu": Normalizer("relu"),
    "none": Normalizer("none"),
    "linear": Normalizer("linear", eps=0.25),
    "column_softmax": Normalizer("column_softmax"),
}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("twin", TWINS)
def test_normalizers_against_the_loop(twin: str, normalizer: str) -> None:
    t = TWINS[twin]
    attn = plain(score=t.score, mask=t.mask, normalizer=NORMALIZERS[normalizer], dims=Dims(8, 6))
    q, k, v = operands(attn, 2, 5, 7)
    sink = (lambda head: head * 0.5 - 1.0) if normalizer == "sink" else None
    o, lse = naive(attn, t, q, k, v, sink=sink)
    got = reference.outputs(attn, q, k, v)
    close(got.o, o)
    if attn.part.normalizer.kind == "softmax":
        assert got.lse is not None
        close(got.lse, lse)
    else:
        assert got.lse is None


HEADS = [Heads(4, 2, 2), Heads(4, 4, 4), Heads(4, 1, 1), Heads(6, 2, 3), Heads(6, 3, 1), Heads(4, 2, 4), Heads(1, 1, 1)]


@pytest.mark.parametrize("mapping", ["interleave", "tile"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_against_the_loop(heads: Heads, mapping: Any) -> None:
    t = TWINS["by batch and row"]
    attn = plain(score=t.score, mask=t.mask, heads=replace(heads, map=mapping), dims=Dims(3, 5))
    q, k, v = operands(attn, 2, 4, 5)
    o, lse = naive(attn, t, q, k, v)
    got = reference.attention(attn, q, k, v, return_lse=True)
    close(got[0], o)
    close(got[1], lse)


@pytest.mark.parametrize(("Sq", "Sk"), [(5, 7), (7, 5), (1, 9), (9, 1), (6, 6), (4, 0), (0, 4)])
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_alignment_against_the_loop(align: Any, Sq: int, Sk: int) -> None:
    t = TWINS["causal"]
    attn = plain(mask=t.mask, align=Align(align))
    q, k, v = operands(attn, 2, Sq, Sk)
    got = reference.attention(attn, q, k, v, return_lse=True)
    if not Sq:
        assert got[0].shape == (2, 4, 0, 8)
        return
    o, lse = naive(attn, t, q, k, v)
    close(got[0], o)
    close(got[1], lse)


def test_offsets_align_each_sequence() -> None:
    t = TWINS["causal"]
    attn = plain(mask=t.mask, align=Align("input", "at"), inputs=(Input("at", ("B",), "int32"),))
    q, k, v = operands(attn, 3, 4, 6)
    offsets = [0, 5, -2]
    got = reference.attention(attn, q, k, v, inputs={"at": torch.tensor(offsets)})
    for n, offset in enumerate(offsets):
        o, _ = attend(attn, t, n, q[n].tolist(), k[n].tolist(), v[n].tolist(), offset)
        close(got[n], o)


# -- layouts and storage -------------------------------------------------------------------------


def test_bshd_is_bhsd_transposed() -> None:
    attn = plain(mask=j <= i, dims=Dims(8, 6))
    q, k, v = operands(attn, 2, 5, 7)
    o, lse = reference.attention(attn, q, k, v, return_lse=True)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    other, other_lse = reference.attention(replace(attn, layout="bshd"), *views, return_lse=True)
    close(other, o.transpose(1, 2))
    close(other_lse, lse)


LENGTHS = [((3, 4, 1), (3, 4, 1)), ((2, 0, 5), (6, 3, 0)), ((4,), (2,)), ((0, 0), (0, 0)), ((1, 1, 1, 1), (3, 1, 4, 1))]


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("twin", ["causal", "by batch and row", "sizes"])
def test_varlen_is_each_sequence_alone(twin: str, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    t = TWINS[twin]
    attn = plain(score=t.score, mask=t.mask, layout="varlen", dims=Dims(4, 6))
    q, k, v = normal(sum(queries) + 2, 4, 4), normal(sum(keys) + 3, 2, 4), normal(sum(keys) + 3, 2, 6)
    q[sum(queries) :], k[sum(keys) :], v[sum(keys) :] = math.nan, math.nan, math.nan
    cu_q, cu_k = starts(queries), starts(keys)
    o, lse = reference.attention(attn, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    assert o.shape == (len(q), 4, 6)
    assert lse.shape == (4, len(q))
    for n, (Sq, Sk) in enumerate(zip(queries, keys, strict=True)):
        if not Sq:
            continue
        qs, ks = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        heads_first = [x.transpose(0, 1).tolist() for x in (q[qs], k[ks], v[ks])]
        expected, expected_lse = attend(attn, t, n, *heads_first, Sk - Sq)
        close(o[qs].transpose(0, 1), expected)
        close(lse[:, qs], expected_lse)
    close(o[sum(queries) :], torch.zeros(2, 4, 6))
    close(lse[:, sum(queries) :], torch.full((4, 2), -math.inf))


def paged(k: Tensor, lengths: list[int], page_size: int) -> tuple[Tensor, Tensor]:
    """k [B, H, S, D] in shuffled pages of NaN, and the block table; entries that must not be read are -1."""
    B, H, S, D = k.shape
    count = -(-S // page_size)
    order = torch.randperm(B * count + 3, generator=torch.Generator().manual_seed(1))[: B * count].view(B, count)
    pages = torch.full((B * count + 3, page_size, H, D), math.nan, dtype=k.dtype)
    for n, length in enumerate(lengths):
        for key in range(length):
            pages[order[n, key // page_size], key % page_size] = k[n, :, key]
    for n, length in enumerate(lengths):
        order[n, -(-length // page_size) :] = -1
    return pages, order.int()


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "varlen"])
@pytest.mark.parametrize("lengths", [[7, 3, 8], [0, 1, 4]])
def test_pages_hold_the_same_keys(layout: Layout, lengths: list[int]) -> None:
    t = TWINS["causal"]
    attn = plain(mask=t.mask, kv=Storage("paged", page_size=4), layout=layout)
    q, k, v = operands(attn, 3, 2, 8)
    (pages_k, table), (pages_v, _) = paged(k, lengths, 4), paged(v, lengths, 4)
    arguments: dict[str, Any] = {"block_table": table, "seqused_k": torch.tensor(lengths, dtype=torch.int32)}
    given, heads_first = q, lambda o, n: o[n]
    if layout == "bshd":
        given, heads_first = q.transpose(1, 2), lambda o, n: o[n].transpose(0, 1)
    if layout == "varlen":
        given, heads_first = q.transpose(1, 2).flatten(0, 1), lambda o, n: o[2 * n : 2 * n + 2].transpose(0, 1)
        arguments["cu_seqlens_q"] = torch.tensor([0, 2, 4, 6])
    o = reference.attention(attn, given, pages_k, pages_v, **arguments)
    for n, length in enumerate(lengths):
        keys, values = k[n, :, :length].tolist(), v[n, :, :length].tolist()
        expected, _ = attend(attn, t, n, q[n].tolist(), keys, values, length - 2)
        close(heads_first(o, n), expected)


def test_an_empty_batch_has_no_lengths_to_differ_from_fixed_ones() -> None:
    attn = replace(plain(mask=j <= i), sizes=(Size("Sq", fixed=3), Size("Sk", fixed=3)))
    q, k, v = operands(attn, 0, 3, 3)
    o, lse = reference.attention(attn, q, k, v, return_lse=True)
    assert o.shape == (0, 4, 3, attn.dims.v)
    assert lse.shape == (0, 4, 3)
    with pytest.raises(ValueError, match="Sq: the spec fixes it to 3, got 2"):
        reference.attention(attn, *operands(attn, 1, 2, 3))


def test_seqused_cuts_dense_keys() -> None:
    attn = plain(mask=j <= i)
    q, k, v = operands(attn, 2, 3, 8)
    k[0, :, 5:], v[0, :, 5:] = math.nan, math.nan
    o = reference.attention(attn, q, k, v, seqused_k=torch.tensor([5, 8]))
    close(o[:1], reference.attention(attn, q[:1], k[:1, :, :5], v[:1, :, :5]))
    close(o[1:], reference.attention(attn, q[1:], k[1:], v[1:]))


def test_latent_values_are_columns_of_the_keys() -> None:
    attn = plain(kv=Storage("latent", rope=2), dims=Dims(8, 6), heads=Heads(4, 1, 1), mask=j <= i)
    q, k = normal(2, 4, 5, 8), normal(2, 1, 7, 8)
    dense = replace(attn, parts=(replace(attn.part, kv=Storage()),))
    close(reference.attention(attn, q, k), reference.attention(dense, q, k, k[..., :6]))


def test_latent_values_are_columns_of_the_keys_in_their_pages() -> None:
    """Pages that nobody has hold NaN."""
    attn = plain(kv=Storage("latent", 4, 2), dims=Dims(8, 6), heads=Heads(4, 1, 1), mask=j <= i)
    apart = replace(attn, parts=(replace(attn.part, kv=Storage("paged", 4)),))
    lengths = [7, 0, 8, 1]
    q, (pages, table) = normal(4, 4, 2, 8), paged(normal(4, 1, 8, 8), lengths, 4)
    where: dict[str, Any] = {"block_table": table, "seqused_k": torch.tensor(lengths, dtype=torch.int32)}
    got = reference.outputs(attn, q, pages, **where)
    expected = reference.outputs(apart, q, pages, pages[..., :6], **where)
    close(got.o, expected.o)
    assert got.lse is not None
    assert expected.lse is not None
    assert torch.equal(got.lse, expected.lse)
    assert bool(got.o.isfinite().all())
    assert bool((got.o[1] == 0).all() and (got.lse[1] == -math.inf).all())


def test_gathered_keys_against_the_loop() -> None:
    t = TWINS["causal"]
    attn = plain(
        mask=t.mask, kv=Storage("gathered", index="picks"), inputs=(Input("picks", ("B", "Hk", "Sq", 3), "int32"),)
    )
    q, k, v = operands(attn, 2, 4, 6)
    picks = torch.randint(-1, 7, (2, 2, 4, 3), generator=torch.Generator().manual_seed(3))
    o, lse = reference.attention(attn, q, k, v, inputs={"picks": picks}, return_lse=True)
    for n, listed in enumerate(picks.tolist()):

        def allowed(hk: int, r: int, key: int, listed: Any = listed) -> bool:
            return key in listed[hk][r]

        expected, expected_lse = attend(attn, t, n, q[n].tolist(), k[n].tolist(), v[n].tolist(), 2, allowed=allowed)
        close(o[n], expected)
        close(lse[n], expected_lse)


# -- inputs --------------------------------------------------------------------------------------


def test_loads_and_axes_that_broadcast() -> None:
    inputs = (Input("bias", ("B", 1, "Sq", "Sk")), Input("slope", ("Hq",)), Input("shift", (1,)))
    score = qk * scale + load("bias", b, h, row, j) * load("slope", h) + load("shift", b)
    attn = plain(score=score, inputs=inputs)
    q, k, v = operands(attn, 2, 3, 5)
    given = {"bias": normal(2, 1, 3, 5), "slope": normal(4), "shift": normal(1)}
    mask = given["bias"] * given["slope"][None, :, None, None] + given["shift"]
    close(
        reference.attention(attn, q, k, v, inputs=given),
        scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
    )


def test_nested_loads() -> None:
    inputs = (Input("bias", ("Hq", 4)), Input("kind", ("B", "Sk"), "int64"))
    attn = plain(score=qk * scale + load("bias", h, load("kind", b, j, dtype="i64")), inputs=inputs)
    q, k, v = operands(attn, 2, 3, 5)
    bias, kind = normal(4, 4), torch.randint(0, 4, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = bias[:, kind].transpose(0, 1)[:, :, None, :]
    close(
        reference.attention(attn, q, k, v, inputs={"bias": bias, "kind": kind}),
        scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 4, 3, 5), enable_gqa=True),
    )


def test_reads_outside_of_an_input_are_zero() -> None:
    attn = plain(score=qk * scale + load("rel", i - j + 1), inputs=(Input("rel", (3,)),))
    q, k, v = operands(attn, 1, 6, 6)
    rel = normal(3)
    distance = torch.arange(6)[:, None] - torch.arange(6) + 1
    inside = (distance >= 0) & (distance < 3)
    mask = torch.where(inside, rel[distance.clamp(0, 2)], 0.0)
    close(
        reference.attention(attn, q, k, v, inputs={"rel": rel}),
        scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 4, 6, 6), enable_gqa=True),
    )


@pytest.mark.parametrize("axes", [1, 2])
def test_documents_as_sorted_offsets(axes: int) -> None:
    cuts = torch.tensor([[2, 2, 5, 9], [1, 4, 4, 7]])[:axes]
    shape: tuple[str | int, ...] = ("B", "n") if axes == 2 else ("n",)
    lead = (b,) if axes == 2 else ()
    mask = eq(bucket("cuts", *lead, i), bucket("cuts", *lead, j)) & (j <= i)
    attn = plain(mask=mask, inputs=(Input("cuts", shape, "int32", sorted=True),))
    q, k, v = operands(attn, 2, 8, 8)
    o = reference.attention(attn, q, k, v, inputs={"cuts": cuts if axes == 2 else cuts[0]})
    position = torch.arange(8)
    for n in range(2):
        which = (cuts[n if axes == 2 else 0][None] <= position[:, None]).sum(1)
        seen = (which[:, None] == which) & (position[:, None] >= position)
        close(
            o[n],
            scaled_dot_product_attention(q[n : n + 1], k[n : n + 1], v[n : n + 1], attn_mask=seen, enable_gqa=True)[0],
        )


def test_a_sink_read_from_an_input() -> None:
    attn = plain(normalizer=Normalizer(sink=load("sinks", h)), inputs=(Input("sinks", ("Hq",)),))
    q, k, v = operands(attn, 2, 3, 5)
    sinks = normal(4)
    s = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) / math.sqrt(8)
    wide = torch.softmax(torch.cat([s, sinks[None, :, None, None].expand(2, 4, 3, 1)], -1), -1)[..., :-1]
    o, lse = reference.attention(attn, q, k, v, inputs={"sinks": sinks}, return_lse=True)
    close(o, wide @ v.repeat_interleave(2, 1))
    close(lse, torch.logsumexp(s, -1))


def test_the_scale_argument_replaces_the_default() -> None:
    attn = plain()
    q, k, v = operands(attn, 1, 3, 5)
    close(
        reference.attention(attn, q, k, v, scale=0.3), scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    )
    close(
        reference.attention(attn, q, k, v, scale=torch.tensor(0.3, dtype=torch.float64)),
        scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True),
    )


# -- torch's own attention -----------------------------------------------------------------------

SDPA: dict[str, tuple[Expr, Callable[[Tensor, Tensor], Tensor]]] = {
    "dense": (TRUE, lambda i, j: torch.ones((), dtype=torch.bool)),
    "causal": (j <= i, lambda i, j: j <= i),
    "window": (i - j < 5, lambda i, j: i - j < 5),
    "chunked": (eq(i // 4, j // 4), lambda i, j: i // 4 == j // 4),
    "dilated": (eq((i - j) % 3, const(0)), lambda i, j: (i - j) % 3 == 0),
    "sink or window": ((j < 2) | (i - j < 3), lambda i, j: (j < 2) | (i - j < 3)),
    "negative": (~(j <= i) | eq(maximum(i, j), const(0)), lambda i, j: ~(j <= i) | (torch.maximum(i, j) == 0)),
}


@pytest.mark.parametrize("heads", [Heads(4, 4, 4), Heads(8, 2, 2), Heads(6, 1, 1)], ids=str)
@pytest.mark.parametrize("mask", SDPA)
@pytest.mark.parametrize(("Sq", "Sk"), [(17, 17), (9, 33), (33, 33)])
def test_sdpa_agrees(mask: str, heads: Heads, Sq: int, Sk: int) -> None:
    e, meaning = SDPA[mask]
    attn = plain(mask=e, heads=heads, dims=Dims(16, 16))
    q, k, v = operands(attn, 2, Sq, Sk)
    seen = meaning((torch.arange(Sq) + Sk - Sq)[:, None], torch.arange(Sk)[None]).expand(Sq, Sk)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    expected = torch.where(seen.any(1)[:, None], expected, 0.0)  # torch leaves NaN in empty rows
    close(reference.attention(attn, q, k, v), expected)


@pytest.mark.parametrize("kind", ["softmax", "column_softmax"])
def test_chunks_of_rows_change_nothing(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attn = plain(mask=j <= i, normalizer=Normalizer(kind))
    q, k, v = (x.requires_grad_() for x in operands(attn, 2, 11, 13))
    whole = reference.attention(attn, q, k, v)
    gradients = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr("attncc.reference.sequence.CHUNK_ELEMENTS", 4 * 13 * 3)
    pieces = reference.attention(attn, q, k, v)
    close(pieces, whole)
    for got, expected in zip(torch.autograd.grad(pieces.square().sum(), (q, k, v)), gradients, strict=True):
        close(got, expected)


def test_a_long_sequence_fits() -> None:
    attn = plain(mask=j <= i, heads=Heads(1, 1, 1), dims=Dims(16, 16))
    q, k, v = (x.float() for x in operands(attn, 1, 4096, 4096))
    o, lse = reference.attention(attn, q, k, v, dtype=torch.float32, return_lse=True)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-5)
    assert lse.shape == (1, 1, 4096)
