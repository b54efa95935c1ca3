"""Operands have the shape, the values and the memory that their trait promises; inputs respect their use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attncc.check.cases import TRAITS, Case, Trait
from attncc.check.inputs import draw_inputs
from attncc.check.operands import Operands, draw
from attncc.ir.attention import Align, Attention, Dims, Heads, Input, Layout, Part, Size
from attncc.ir.expr import bucket, const, eq, load, name

QK = name("qk", "f32")
B, H, I, J = (name(n) for n in ("b", "h", "i", "j"))
DENSE = Attention("dense", Heads(6, 3, 3), Dims(16, 24), (Part(QK),), scale=const(1.0))


def drawn(attn: Attention, case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Operands:
    return draw(attn, case, dtype, torch.Generator().manual_seed(seed))


def inputs(attn: Attention, b: int = 2, query: int = 30, key: int = 50) -> dict[str, torch.Tensor]:
    sizes = {"B": b, "Sq": query, "Sk": key, "Hq": 6, "Hk": 3, "Hv": 3, "Dqk": 16, "Dv": 24}
    return draw_inputs(attn, sizes, torch.Generator().manual_seed(0))


def reading(mask: object, *declared: Input, **changes: object) -> Attention:
    return replace(DENSE, parts=(Part(QK, mask),), inputs=declared, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize(
    ("layout", "q", "v"),
    [("bhsd", (3, 6, 7, 16), (3, 3, 9, 24)), ("bshd", (3, 7, 6, 16), (3, 9, 3, 24))],
)
def test_shapes(layout: Layout, q: tuple[int, ...], v: tuple[int, ...], trait: Trait) -> None:
    x = drawn(replace(DENSE, layout=layout), Case(3, 7, 9, trait), torch.float16)
    assert (tuple(x.q.shape), tuple(x.v.shape)) == (q, v)
    assert {x.q.dtype, x.k.dtype, x.v.dtype} == {torch.float16}
    assert x.q.isfinite().all()
    assert x.compared == (2 if trait == "nan_neighbour" else 3)


@pytest.mark.parametrize("trait", TRAITS)
def test_packed_rows(trait: Trait) -> None:
    x = drawn(replace(DENSE, layout="varlen"), Case(3, 30, 60, trait))
    ends = {name: t.tolist() for name, t in x.offsets.items()}
    if trait != "expanded":
        assert ends == {"cu_seqlens_q": [0, 30, 30, 40], "cu_seqlens_k": [0, 60, 60, 80]}
    assert tuple(x.q.shape) == (ends["cu_seqlens_q"][-1], 6, 16)
    assert x.compared == (30 if trait == "nan_neighbour" else ends["cu_seqlens_q"][-1])


def test_the_same_seed_draws_the_same() -> None:
    case = Case(2, 5, 6)
    assert torch.equal(drawn(DENSE, case).k, drawn(DENSE, case).k)
    assert not torch.equal(drawn(DENSE, case).k, drawn(DENSE, case, seed=1).k)


@pytest.mark.parametrize("heads", [Heads(6, 3, 3), Heads(6, 3, 3, "tile")])
def test_one_hot_rows_have_one_key(heads: Heads) -> None:
    x = drawn(replace(DENSE, heads=heads), Case(1, 12, 9, "one_hot"))
    serving = [h % 3 if heads.map == "tile" else h // 2 for h in range(6)]
    p = (x.q @ x.k[:, serving].transpose(-1, -2)).softmax(-1)
    assert (p.max(-1).values > 0.99).float().mean() > 0.9


def test_large_logits_overflow_exp() -> None:
    x = drawn(DENSE, Case(1, 12, 12, "large_logits"))
    logits = (x.q[:, :3] @ x.k.transpose(-1, -2)) * 16**-0.5
    assert torch.exp(logits).isinf().any()


def test_uniform_keys_are_alike() -> None:
    x = drawn(DENSE, Case(1, 4, 9, "uniform"))
    assert torch.equal(x.k[:, :, :1].expand_as(x.k), x.k)


def test_nan_lies_around_and_not_inside() -> None:
    x = drawn(DENSE, Case(2, 5, 6, "nan_around"))
    base = x.k._base
    assert base is not None
    assert base.isnan().sum() == base.numel() - x.k.numel()
    assert x.k.stride(-1) == 1
    assert x.k.storage_offset() * x.k.element_size() % 16 == 0


def test_late_keys_are_nan() -> None:
    x = drawn(DENSE, Case(1, 5, 80, "nan_keys"))
    assert x.k[0, 0].isnan().any(1).nonzero().flatten().tolist() == [60, 79]
    assert torch.equal(x.k[0, 0].isnan().all(1), x.v[0, 2].isnan().all(1))


def test_a_nan_neighbour_is_not_compared() -> None:
    x = drawn(DENSE, Case(3, 5, 6, "nan_neighbour"))
    assert x.k[-1].isnan().all()
    assert x.v[-1].isnan().all()
    assert x.k[: x.compared].isfinite().all()


def test_strides_are_odd_where_the_trait_says_so() -> None:
    assert drawn(DENSE, Case(2, 5, 6, "expanded")).k.stride(0) == 0
    unaligned = drawn(DENSE, Case(2, 5, 6, "unaligned"), torch.float16).k
    assert unaligned.stride(2) % 8 != 0
    assert unaligned.data_ptr() % 16 != 0
    assert drawn(DENSE, Case(2, 5, 6, "last_axis_strided")).k.stride(-1) != 1


# -- extra inputs --------------------------------------------------------------------------------


def test_own_sizes_are_what_the_indices_reach() -> None:
    table = Input("table", ("Hq", "W"))
    attn = reading(load("table", H, I - J + 50) > 0, table)
    assert tuple(inputs(attn)["table"].shape) == (6, 100)  # i - j + 50 is at most 49 - 0 + 50


def test_own_sizes_keep_their_bounds() -> None:
    attn = reading(load("table", I) > 0, Input("table", ("W",)), sizes=(Size("W", max=30, multiple=8),))
    assert inputs(attn)["table"].shape[0] == 30
    fixed = reading(load("table", I) > 0, Input("table", ("W",)), sizes=(Size("W", fixed=5),))
    assert inputs(fixed)["table"].shape[0] == 5


def test_sorted_offsets_rise_within_the_keys() -> None:
    attn = reading(
        eq(bucket("starts", B, I), bucket("starts", B, J)), Input("starts", ("B", "N"), "int32", sorted=True)
    )
    starts = inputs(attn)["starts"]
    assert (starts.diff() >= 0).all()
    assert starts.min() >= 0
    assert 3 < starts.max() <= 50


def test_documents_are_few() -> None:
    attn = reading(
        eq(load("doc", B, I, dtype="i32"), load("doc", B, J, dtype="i32")), Input("doc", ("B", "Sk"), "int32")
    )
    assert inputs(attn)["doc"].unique().tolist() == [0, 1, 2]


def test_indices_stay_inside_what_they_index() -> None:
    inner = load("kind", J, dtype="i32")
    attn = reading(load("bias", inner) > 0, Input("kind", ("Sk",), "int64"), Input("bias", (7,)))
    kind = inputs(attn)["kind"]
    assert kind.dtype == torch.int64
    assert 0 <= kind.min() <= kind.max() == 6


def test_positions_reach_into_the_keys() -> None:
    attn = reading(load("prefix", B, dtype="i32") > J, Input("prefix", ("B",), "int32"))
    assert inputs(attn, b=64)["prefix"].max() > 30


def test_offsets_of_the_first_query() -> None:
    attn = reading(J <= I, Input("start", ("B",), "int32"), align=Align("input", "start"))
    assert inputs(attn, b=64)["start"].max() <= 20


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int32", "int64", "int8", "uint8", "bool"])
def test_every_dtype_can_be_drawn(dtype: str) -> None:
    x = inputs(reading(const(True), Input("x", ("B", 1, "Sk"), dtype)), key=1000)["x"]
    assert tuple(x.shape) == (2, 1, 1000)
    assert x.float().std() > 0
