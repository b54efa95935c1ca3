"""Traced callables: the same numbers as torch gives for the callable itself, and faults at the user's line."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scalar_numpy import Scope, evaluate

import attncc
from attncc.errors import SpecError
from attncc.spec import Spec, loads

B, H, SQ, SK = 2, 4, 5, 7

bias = torch.randn(H, 2 * SK + 1, generator=torch.Generator().manual_seed(0))
slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.bfloat16)
documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
block_seen = torch.tensor([[True, False], [True, True]])
strength = torch.tensor(0.75)
permutation = torch.tensor([3, 1, 0, 2], dtype=torch.int32)


def traced(score: Any = None, mask: Any = None, **keys: Any) -> Spec:
    return attncc.attention(name="traced", heads=H, dims=16, score=score, mask=mask, **keys)


def positions() -> tuple[torch.Tensor, ...]:
    axes = [torch.arange(n) for n in (B, H, SQ, SK)]
    return tuple(torch.meshgrid(*axes, indexing="ij"))


def one_by_one(function: Callable[..., Any], *args: torch.Tensor) -> torch.Tensor:
    """The callable at each position by itself, as FlexAttention means it."""
    flat = [a.reshape(-1) for a in args]
    return torch.stack([torch.as_tensor(function(*at)) for at in zip(*flat, strict=True)]).reshape(args[0].shape)


def scope(spec: Spec, qk: np.ndarray) -> Scope:
    b, h, q, k = (axis.numpy() for axis in positions())
    names = {"qk": qk, "scale": 1.0, "b": b, "h": h, "hk": h, "i": q, "row": q, "j": k, "Sq": SQ, "Sk": SK}
    return Scope(
        names, {n: t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in spec.captured.items()}
    )


def alibi(score, b, h, q_idx, kv_idx):
    return score - torch.exp2(-8.0 * (h + 1) / H) * (q_idx - kv_idx)


def relative(score, b, h, q_idx, kv_idx):
    return score + bias[h, q_idx - kv_idx + SK]


def nested_index(score, b, h, q_idx, kv_idx):
    return score * slopes[permutation[h] % 4] + bias[h][(q_idx + 1) % 3]


def captured_number(score, b, h, q_idx, kv_idx):
    return torch.tanh(score / 20) * 20 * strength + torch.tensor(2.0)


def bools_count(score, b, h, q_idx, kv_idx):
    return score + (q_idx >= kv_idx) * 2.5 + (h == 1)


def torch_functions(score, b, h, q_idx, kv_idx):
    x = torch.clamp(score, min=-1.0, max=0.5).abs() + torch.sqrt(torch.square(score))
    x = torch.where(torch.logical_and(q_idx > 1, kv_idx < 4), x, torch.sigmoid(-x))
    x = torch.maximum(x, torch.minimum(score, x * 0.5)) + torch.log1p(torch.exp(score.clamp(max=1)))
    x = x + torch.div(kv_idx, 3, rounding_mode="floor") + torch.remainder(q_idx, 2) + kv_idx // 2 % 2
    return x + torch.add(q_idx.float(), kv_idx.to(torch.float32), alpha=2) * 1e-2 - torch.relu(score)


def python_operators(score, b, h, q_idx, kv_idx):
    x = 2 - score + 3 / (1 + abs(score)) + 2.0 ** -kv_idx.float() + (-score) ** 2
    return x + (7 - q_idx) // 2 + (9 - kv_idx) % 4 + 1.5 * h


def masked_by_fill(score, b, h, q_idx, kv_idx):
    return torch.masked_fill(score, ~(q_idx >= kv_idx), 0.0)


class Module:
    def __init__(self) -> None:
        self.weight = bias + 1

    def score(self, score, b, h, q_idx, kv_idx):
        return score + self.weight[h, kv_idx]


def closed_over(table: torch.Tensor) -> Callable[..., Any]:
    def score_mod(score, b, h, q_idx, kv_idx):
        return score * table[b % 2, h]

    return score_mod


SCORES = {
    "alibi": alibi,
    "relative": relative,
    "nested_index": nested_index,
    "captured_number": captured_number,
    "bools_count": bools_count,
    "torch_functions": torch_functions,
    "python_operators": python_operators,
    "masked_by_fill": masked_by_fill,
    "method": Module().score,
    "closure": closed_over(torch.randn(2, H, dtype=torch.float64)),
    "partial": functools.partial(lambda extra, score, b, h, q_idx, kv_idx: score + extra, 3),
    "lambda": lambda score, b, h, q_idx, kv_idx: score - 0.1 * (q_idx - kv_idx).abs(),
}


@pytest.mark.parametrize("function", SCORES.values(), ids=SCORES)
def test_scores_mean_what_torch_computes(function: Callable[..., Any]) -> None:
    spec = traced(function)
    qk = torch.randn(B, H, SQ, SK, generator=torch.Generator().manual_seed(1))
    expected = one_by_one(function, qk, *positions())
    found = np.broadcast_to(evaluate(spec.attention.part.score, scope(spec, qk.numpy())), qk.shape)
    np.testing.assert_allclose(found, expected.double().numpy(), rtol=2e-6, atol=2e-6)
    assert loads(spec.text).attention == spec.attention


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def same_document(b, h, q_idx, kv_idx):
    return documents[b, q_idx] == documents[b, kv_idx]


def and_masks(*masks: Callable[..., Any]) -> Callable[..., Any]:
    def both(b, h, q_idx, kv_idx):
        result = masks[0](b, h, q_idx, kv_idx)
        for m in masks[1:]:
            result = result & m(b, h, q_idx, kv_idx)
        return result

    return both


def blocks_or_window(b, h, q_idx, kv_idx):
    near = (q_idx - kv_idx).abs() < 2
    return torch.logical_or(block_seen[q_idx // 4, kv_idx // 4], near) & (h != 3) | (kv_idx == 0)


MASKS = {
    "causal": causal,
    "document": same_document,
    "and_masks": and_masks(causal, same_document),
    "blocks_or_window": blocks_or_window,
    "xor": lambda b, h, q, k: (q > k) ^ (k % 2 == 0),
    "everything": lambda b, h, q, k: True,
    "not": lambda b, h, q, k: torch.bitwise_not(q.eq(k)) | torch.logical_not(q < k),
}


@pytest.mark.parametrize("function", MASKS.values(), ids=MASKS)
def test_masks_mean_what_torch_computes(function: Callable[..., Any]) -> None:
    spec = traced(mask=function)
    expected = one_by_one(function, *positions())
    found = np.broadcast_to(evaluate(spec.attention.part.mask, scope(spec, np.zeros(1))), (B, H, SQ, SK))
    np.testing.assert_array_equal(found, expected.numpy())


def test_the_score_is_scaled_before_the_callable_sees_it() -> None:
    assert traced(lambda score, b, h, q, k: score + 1.0).text.endswith("score: qk * scale + 1.0\n")


def test_minus_infinity_is_a_mask() -> None:
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, torch.where(kv_idx == 3, -math.inf, score * 2), float("-inf"))

    alone = traced(score_mod).text
    assert alone.endswith("score: qk * scale * 2.0\nmask: (i >= j) & ~(j == 3)\n")
    both = traced(score_mod, mask=lambda b, h, q, k: h < 2).text
    assert both.endswith("mask: (h < 2) & ((i >= j) & ~(j == 3))\n")
    texts = traced(score_mod, mask="window(4) | sink(1)").attention.part.mask
    assert texts == traced(mask="((i >= j) & ~(j == 3)) & (window(4) | sink(1))").attention.part.mask


def test_a_score_that_depends_on_itself_keeps_its_infinity() -> None:
    spec = traced(lambda score, b, h, q, k: torch.where(score > 0, score, -math.inf))
    assert spec.text.endswith("score: where(qk * scale > 0.0, qk * scale, -inf)\n")


def test_captured_tensors_are_inputs_named_after_their_variables() -> None:
    spec = traced(nested_index, same_document)
    shapes = {x.name: (x.shape, x.dtype) for x in spec.attention.inputs}
    assert shapes == {
        "slopes": ((4,), "bf16"),
        "permutation": ((4,), "int32"),
        "bias": ((4, 15), "fp32"),
        "documents": ((2, 7), "int64"),
    }
    assert spec.captured["bias"] is bias
    assert set(spec.captured) == set(shapes)


def test_same_tensor_same_input_and_other_tensor_other_name() -> None:
    one, two = torch.zeros(H), torch.ones(H)

    def first() -> Callable[..., Any]:
        table = one
        return lambda score, b, h, q, k: score + table[h] * table[h]

    def second() -> Callable[..., Any]:
        table = two
        return lambda b, h, q, k: (table[h] > 0) & (two[h] < 1)

    spec = traced(first(), second())
    assert {x.name for x in spec.attention.inputs} == {"table", "table_2"}
    assert {id(t) for t in spec.captured.values()} == {id(one), id(two)}


def test_views_of_the_same_values_are_one_input() -> None:
    spec = traced(lambda score, b, h, q, k: score + bias[0][k] + bias[0][q])
    (only,) = spec.attention.inputs
    assert (only.name, only.shape) == ("bias", (15,))


def test_names_that_mean_something_else_are_changed() -> None:
    scale = torch.randn(H)
    q = torch.randn(H)
    spec = traced(lambda score, b, h, m, n: score * scale[h] + q[h])
    assert {x.name for x in spec.attention.inputs} == {"scale_input", "q_input"}


def test_declared_shapes_of_captured_tensors() -> None:
    spec = traced(relative, inputs={"bias": {"shape": ["Hq", "W"], "grad": True}})
    assert spec.attention.input("bias").shape == ("Hq", "W")
    assert spec.attention.input("bias").grad
    assert spec.captured["bias"] is bias
    with pytest.raises(SpecError, match="declared with 1 axes"):
        traced(relative, inputs={"bias": {"shape": ["Hq"]}})


@pytest.mark.parametrize(
    ("dtype", "declared", "kept"),
    [(torch.int16, "int32", torch.int32), (torch.float64, "fp32", torch.float32), (torch.uint8, "uint8", torch.uint8)],
)
def test_dtypes_that_no_input_has_are_converted(dtype: torch.dtype, declared: str, kept: torch.dtype) -> None:
    table = torch.tensor([0, 1, 2, 3], dtype=dtype)
    spec = traced(lambda score, b, h, q, k: score + table[h])
    assert spec.attention.input("table").dtype == declared
    assert spec.captured["table"].dtype == kept
    assert spec.captured["table"].tolist() == [0, 1, 2, 3]


def test_broadcast_axes() -> None:
    wide = torch.randn(1, H, 1, SK)
    spec = traced(lambda score, b, h, q, k: score + wide[b, h, q, k])
    assert "wide[0, h, 0, j]" in spec.text


def test_callables_in_parts() -> None:
    spec = traced(parts=[{"mask": causal}, {"score": alibi, "mask": "sink(4)"}], combine="lse")
    assert len(spec.attention.parts) == 2
    assert "mask: i >= j" in spec.text


# -- what cannot be traced ---------------------------------------------------------------------------


def branch_on_score(score, b, h, q_idx, kv_idx):
    if score > 0:  # here: score > 0
        return score
    return score * 2


def branch_deep_inside(score, b, h, q_idx, kv_idx):
    return score + helper(q_idx - kv_idx)


def helper(distance):
    return 1.0 if distance == 0 else 0.0  # here: distance == 0


def chained(b, h, q_idx, kv_idx):
    return 0 <= q_idx - kv_idx < 4  # here: 0 <= q_idx - kv_idx < 4


def python_and(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx and h < 2  # here: q_idx >= kv_idx


def builtin_max(score, b, h, q_idx, kv_idx):
    return max(score, kv_idx)  # here: max(score, kv_idx)


def to_float(score, b, h, q_idx, kv_idx):
    return score + float(q_idx)  # here: float(q_idx)


def to_int(score, b, h, q_idx, kv_idx):
    return score + int(q_idx)  # here: int(q_idx)


def python_math(score, b, h, q_idx, kv_idx):
    return score + math.exp(q_idx)  # here: math.exp(q_idx)


def list_index(score, b, h, q_idx, kv_idx):
    return score + [1.0, 2.0, 3.0, 4.0][h]  # here: [1.0, 2.0, 3.0, 4.0][h]


def iterate(score, b, h, q_idx, kv_idx):
    for x in score:  # here: for x in score:
        score = score + x
    return score


def loop_to_a_position(score, b, h, q_idx, kv_idx):
    return score + sum(range(kv_idx))  # here: range(kv_idx)


def unknown_function(score, b, h, q_idx, kv_idx):
    return torch.cumsum(score, 0)  # here: torch.cumsum(score, 0)


def unknown_method(score, b, h, q_idx, kv_idx):
    return score.softmax(-1)  # here: score.softmax


def random(score, b, h, q_idx, kv_idx):
    return score + torch.rand_like(score)  # here: torch.rand_like(score)


def item(score, b, h, q_idx, kv_idx):
    return score + kv_idx.item()  # here: kv_idx.item


def whole_tensor(score, b, h, q_idx, kv_idx):
    return score + bias  # here: score + bias


def partly_indexed(score, b, h, q_idx, kv_idx):
    return score + bias[h]  # here: score + bias[h]


def too_many_indices(score, b, h, q_idx, kv_idx):
    return score + bias[h, q_idx, kv_idx]  # here: bias[h, q_idx, kv_idx]


def sliced(score, b, h, q_idx, kv_idx):
    return score + bias[h, :]  # here: bias[h, :]


def float_index(score, b, h, q_idx, kv_idx):
    return score + bias[h, score]  # here: bias[h, score]


def half_cast(score, b, h, q_idx, kv_idx):
    return score.to(torch.bfloat16)  # here: score.to(torch.bfloat16)


def float_to_int(score, b, h, q_idx, kv_idx):
    return bias[h, (score * 2).long()]  # here: (score * 2).long()


def undefined_name(score, b, h, q_idx, kv_idx):
    return score + missing  # noqa: F821  # here: missing


def own_exception(score, b, h, q_idx, kv_idx):
    raise RuntimeError("not today")  # here: raise RuntimeError("not today")


def add_text(score, b, h, q_idx, kv_idx):
    return score + "1"  # here: score + "1"


def and_of_ints(b, h, q_idx, kv_idx):
    return q_idx & kv_idx  # here: q_idx & kv_idx


def doubling(score, b, h, q_idx, kv_idx):
    for _ in range(60):
        score = score * score  # here: score * score
    return score


def power_of_position(score, b, h, q_idx, kv_idx):
    return score * 2**kv_idx  # here: 2**kv_idx


def unicode_before(score, b, h, q_idx, kv_idx):
    return ("µµµ" and score) + float(h)  # here: float(h)


UNTRACEABLE = [
    branch_on_score, branch_deep_inside, builtin_max, to_float, to_int, python_math, list_index, iterate,
    loop_to_a_position, unknown_function, unknown_method, random, item, whole_tensor, partly_indexed,
    too_many_indices, sliced, float_index, half_cast, float_to_int, undefined_name, own_exception, add_text,
    doubling, power_of_position, unicode_before,
]  # fmt: skip
UNTRACEABLE_MASKS = [chained, python_and, and_of_ints]


@pytest.mark.parametrize("function", [*UNTRACEABLE, *UNTRACEABLE_MASKS], ids=lambda f: f.__name__)
def test_faults_show_the_users_line(function: Callable[..., Any]) -> None:
    key = "mask" if function in UNTRACEABLE_MASKS else "score"
    with pytest.raises(SpecError) as caught:
        traced(**{key: function})
    place = caught.value.location
    assert place is not None
    assert place.file == __file__
    code, _, marked = place.text.rpartition("  # here: ")
    assert code, f"not the marked line: {place.text}"
    pointed = place.text[place.column - 1 : place.column - 1 + place.width]
    assert (
        pointed.startswith(marked)
        if function is python_and
        else pointed.removesuffix(place.text[len(code) :]) == marked
    )
    assert f"{place.line} | " in str(caught.value)
    assert "^" * min(len(marked), 20) in str(caught.value)


def returns_nothing(score, b, h, q_idx, kv_idx):
    score * 2


def returns_int(score, b, h, q_idx, kv_idx):
    return q_idx


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (returns_nothing, "NoneType"),
        (returns_int, "must be a float"),
        (lambda score, b, h, q_idx: score, "does not take 5 arguments"),
        (lambda: None, "does not take 5 arguments"),
        (torch.exp, "does not take 5 arguments|cannot be traced"),
    ],
)
def test_faults_of_the_whole_callable(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        traced(function)
    if hasattr(function, "__code__"):
        assert caught.value.location is not None
        assert caught.value.location.line == function.__code__.co_firstlineno


def test_masks_must_be_bools() -> None:
    with pytest.raises(SpecError, match="must be a bool"):
        traced(mask=lambda b, h, q, k: q - k)


def test_a_score_callable_must_not_get_a_masks_arguments() -> None:
    with pytest.raises(SpecError, match="does not take 4 arguments"):
        traced(mask=alibi)


@pytest.mark.parametrize("tensor", [torch.zeros(4, dtype=torch.complex64), torch.zeros(0, 4)])
def test_tensors_that_no_input_can_be(tensor: torch.Tensor) -> None:
    with pytest.raises(SpecError) as caught:
        traced(lambda score, b, h, q, k: score + tensor[h])
    assert caught.value.location is not None
