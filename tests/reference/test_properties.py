"""What holds for all operands: symmetries of keys, merging of key sets, parts, and dtypes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import h, i, j, plain, qk, row, scale
from torch import Tensor

from attncc import reference
from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call, Dims, Heads, Input, Normalizer, Part
from attncc.ir.expr import Expr, cast_to, const, ew, load

NORMALIZERS = [
    Normalizer(),
    Normalizer("sigmoid"),
    Normalizer("relu"),
    Normalizer("none"),
    Normalizer("column_softmax"),
]
normalizers = st.sampled_from(NORMALIZERS)
seeds = st.integers(0, 2**31)
lengths = st.integers(1, 9)


def draw(attn: Attention, seed: int, Sq: int, Sk: int, B: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads, dims = attn.heads, attn.dims
    shapes = ((B, heads.q, Sq, dims.qk), (B, heads.kv, Sk, dims.qk), (B, heads.v, Sk, dims.v))
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return q, k, v


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@given(normalizers, seeds, lengths, lengths)
@settings(max_examples=40, deadline=None)
def test_order_of_keys_is_nothing_without_positions(normalizer: Normalizer, seed: int, Sq: int, Sk: int) -> None:
    attn = plain(normalizer=normalizer)
    q, k, v = draw(attn, seed, Sq, Sk)
    order = torch.randperm(Sk, generator=torch.Generator().manual_seed(seed))
    close(reference.attention(attn, q, k[:, :, order], v[:, :, order]), reference.attention(attn, q, k, v))


@given(normalizers, seeds, lengths, lengths)
@settings(max_examples=40, deadline=None)
def test_output_is_linear_in_values(normalizer: Normalizer, seed: int, Sq: int, Sk: int) -> None:
    attn = plain(normalizer=normalizer, mask=j <= i)
    q, k, v = draw(attn, seed, Sq, Sk)
    other = draw(attn, seed + 1, Sq, Sk)[2]
    total = reference.attention(attn, q, k, 2 * v + other)
    close(total, 2 * reference.attention(attn, q, k, v) + reference.attention(attn, q, k, other))


@given(seeds, lengths, st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_two_sets_of_keys_merge_by_lse(seed: int, Sq: int, first: int, second: int) -> None:
    attn = plain()
    q, k, v = draw(attn, seed, Sq, first + second)
    o, lse = reference.attention(attn, q, k, v, return_lse=True)
    a, lse_a = reference.attention(attn, q, k[:, :, :first], v[:, :, :first], return_lse=True)
    c, lse_c = reference.attention(attn, q, k[:, :, first:], v[:, :, first:], return_lse=True)
    close(lse, torch.logaddexp(lse_a, lse_c))
    if first + second:
        close(o, a * (lse_a - lse).exp()[..., None] + c * (lse_c - lse).exp()[..., None])


@given(seeds, lengths, lengths, st.integers(-3, 9))
@settings(max_examples=40, deadline=None)
def test_parts_that_share_out_the_keys_are_one(seed: int, Sq: int, Sk: int, cut: int) -> None:
    """Also with sinks: each joins the common denominator once."""
    mask = j <= i
    one = plain(mask=mask, normalizer=Normalizer(sink=const(0.25)))
    near = Part(qk * scale, mask & (j < cut), Normalizer(sink=const(0.25)))
    two = replace(one, parts=(near, Part(qk * scale, mask & (j >= cut))))
    q, k, v = draw(one, seed, Sq, Sk)
    for got, expected in zip(
        reference.attention(two, q, k, v, return_lse=True),
        reference.attention(one, q, k, v, return_lse=True),
        strict=True,
    ):
        close(got, expected)


@given(seeds, lengths, lengths)
@settings(max_examples=25, deadline=None)
def test_a_sink_is_a_key_with_no_value(seed: int, Sq: int, Sk: int) -> None:
    """A key whose logit is z and whose value is 0: k = 0 with a bias does that."""
    attn = plain(heads=Heads(2, 2, 2), normalizer=Normalizer(sink=const(0.75)))
    q, k, v = draw(attn, seed, Sq, Sk)
    zero_k, zero_v = torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1])
    extra = plain(heads=Heads(2, 2, 2), score=qk * scale + cast_to(j >= Sk, "f32") * 0.75)
    close(
        reference.attention(attn, q, k, v),
        reference.attention(extra, q, torch.cat([k, zero_k], 2), torch.cat([v, zero_v], 2)),
    )


@given(seeds, lengths, lengths, st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_a_row_constant_moves_lse_alone(seed: int, Sq: int, Sk: int, c: float) -> None:
    q, k, v = draw(plain(), seed, Sq, Sk)
    o, lse = reference.attention(plain(mask=j <= i), q, k, v, return_lse=True)
    moved, moved_lse = reference.attention(plain(score=qk * scale + c, mask=j <= i), q, k, v, return_lse=True)
    close(moved, o)
    close(moved_lse, lse + c)


@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e8])
def test_large_logits_neither_overflow_nor_vanish(magnitude: float) -> None:
    q, k, v = draw(plain(), 3, 5, 7)
    o, lse = reference.attention(plain(), q * magnitude, k, v, return_lse=True)
    s = q @ k.repeat_interleave(2, 1).transpose(2, 3) * magnitude / math.sqrt(8)
    torch.testing.assert_close(lse, torch.logsumexp(s, -1), rtol=1e-12, atol=1e-9)
    close(o, torch.softmax(s, -1) @ v.repeat_interleave(2, 1))


def test_infinite_scores_of_a_formula_are_no_keys() -> None:
    """A score of -inf is as good as a mask; a row of nothing else is empty."""
    masked = plain(mask=j <= i, heads=Heads(2, 2, 2))
    scored = plain(score=ew("where", j <= i, qk * scale, -math.inf), heads=Heads(2, 2, 2))
    q, k, v = draw(masked, 5, 6, 4)
    for got, expected in zip(
        reference.attention(scored, q, k, v, return_lse=True),
        reference.attention(masked, q, k, v, return_lse=True),
        strict=True,
    ):
        close(got, expected)


# -- combining parts -----------------------------------------------------------------------------

PARTS = (
    Part(qk * scale, j <= i, Normalizer(sink=const(0.5))),
    Part(qk, i - j < 3, Normalizer("sigmoid")),
    Part(qk * 0.5, normalizer=Normalizer("linear", eps=1.0)),
)
GATES = Input("gates", (3, "Hq"))


def combined(name: str, count: int, *args: Expr) -> tuple[Tensor, list[Tensor], Tensor]:
    """The whole, its parts alone, and the gates."""
    attn = plain(inputs=(GATES,))
    q, k, v = draw(attn, 9, 4, 6, B=2)
    gates = {"gates": torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
    alone = [reference.attention(replace(attn, parts=(p,)), q, k, v, inputs=gates) for p in PARTS[:count]]
    whole = replace(attn, parts=PARTS[:count], combine=Call(name, args))
    return reference.attention(whole, q, k, v, inputs=gates), alone, gates["gates"][:, None, :, None, None]


def gate(n: int) -> Expr:
    return load("gates", const(n), h)


def test_add() -> None:
    whole, alone, _ = combined("add", 3)
    close(whole, alone[0] + alone[1] + alone[2])


def test_a_gate_for_each_part() -> None:
    whole, alone, g = combined("gate", 3, gate(0), gate(1), gate(2))
    close(whole, g[0] * alone[0] + g[1] * alone[1] + g[2] * alone[2])


def test_the_first_part_may_go_ungated() -> None:
    whole, alone, g = combined("gate", 3, gate(1), gate(2))
    close(whole, alone[0] + g[1] * alone[1] + g[2] * alone[2])


def test_lerp() -> None:
    whole, alone, g = combined("lerp", 2, gate(0))
    close(whole, (1 - g[0]) * alone[0] + g[0] * alone[1])


def test_gates_may_read_rows() -> None:
    whole, alone, _ = combined("lerp", 2, ew("sigmoid", row - 1))
    t = torch.sigmoid(torch.arange(4, dtype=torch.float64) - 1)[:, None]
    close(whole, (1 - t) * alone[0] + t * alone[1])


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (Call("lse"), 2),
        (Call("lerp", (const(0.5),)), 3),
        (Call("lerp"), 2),
        (Call("gate", (const(0.5),)), 3),
        (Call("gate", (const(0.5),) * 4), 3),
        (Call("mix"), 2),
    ],
)
def test_other_combinations_are_refused(call: Call, count: int) -> None:
    attn = replace(plain(), parts=PARTS[:count], combine=call)
    with pytest.raises(Unsupported) as refusal:
        reference.attention(attn, *draw(attn, 0, 2, 2))
    assert refusal.value.key == "combine"


def test_no_lse_of_other_combinations() -> None:
    attn = replace(plain(), parts=(PARTS[0], PARTS[0]), combine=Call("add"))
    with pytest.raises(Unsupported, match="lse"):
        reference.attention(attn, *draw(attn, 0, 2, 2), return_lse=True)


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=lambda n: n.kind)
def test_max_score(normalizer: Normalizer) -> None:
    attn = plain(mask=j < i, normalizer=normalizer)
    q, k, v = draw(attn, 4, 5, 5)
    s = q @ k.repeat_interleave(2, 1).transpose(2, 3) / math.sqrt(8)
    hidden = ~torch.ones(5, 5, dtype=torch.bool).tril(-1)
    close(reference.outputs(attn, q, k, v).max_score, s.masked_fill(hidden, -math.inf).amax(-1))


# -- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eager_computation_is_in_the_operands_dtype(dtype: torch.dtype) -> None:
    attn = plain(mask=j <= i, heads=Heads(2, 2, 2), dims=Dims(16, 16))
    q, k, v = (x.to(dtype) for x in draw(attn, 1, 16, 16))
    o, lse = reference.attention(attn, q, k, v, dtype=None, return_lse=True)
    s = ((q @ k.transpose(2, 3)).float() * 0.25).masked_fill(~torch.ones(16, 16).tril().bool(), -math.inf)
    expected = torch.softmax(s, -1).to(dtype) @ v
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(o.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse, torch.logsumexp(s, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_dtype_is_nearer(dtype: torch.dtype) -> None:
    attn = plain(mask=j <= i)
    q, k, v = (x.bfloat16() for x in draw(attn, 1, 32, 32))
    exact = reference.attention(attn, q, k, v)
    assert exact.dtype == torch.float64
    near, far = (reference.attention(attn, q, k, v, dtype=d) for d in (dtype, None))
    assert (near - exact).abs().max() <= 1e-5 < 1e-3 < (far - exact).abs().max()


def test_integers_do_not_overflow() -> None:
    """Beyond 32 bits, and beyond what float32 holds exactly."""
    big = Input("big", ("Sk",), "int64")
    attn = plain(score=qk * scale + cast_to(load("big", j, dtype="i64") * 4 - 2**33, "f32"), inputs=(big,))
    q, k, v = draw(attn, 2, 3, 4)
    given_: dict[str, Any] = {"big": torch.full((4,), 2**31)}
    close(reference.attention(attn, q, k, v, inputs=given_), reference.attention(plain(), q, k, v))
