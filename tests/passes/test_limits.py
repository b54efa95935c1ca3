"""Limits of scores hold whatever they are made of, and weights relative to a base that follows stay inside fp32."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from masks import b, h, i, j, value

from attncc import spec
from attncc.ir.attention import Attention
from attncc.ir.expr import Expr, cast_to, const, ew, load, maximum, minimum, name, where
from attncc.passes.lower.limits import HEAVIEST, LIGHTEST, base_of, limits
from attncc.passes.lower.normalizers import LOG2E

qk = name("qk", "f32")
HEAD = "attncc: 1\nname: limits\nheads: 2\ndims: 64\n"
VALUES = np.array([-np.inf, -1e30, -88.0, -30.0, -1.0, -0.3, 0.0, 1e-3, 0.5, 2.0, 29.0, 50.0, 1e4, 3e38, np.inf])
LEAVES = st.sampled_from([qk, qk * 0.125, const(3.0), const(-0.5), cast_to(i - j, "f32"), ew("tanh", qk)])
FORMULAS = st.recursive(
    LEAVES,
    lambda e: (
        st.builds(ew, st.sampled_from(["tanh", "sigmoid", "erf", "neg", "abs", "sin", "exp", "sqrt"]), e)
        | st.builds(ew, st.sampled_from(["add", "sub", "mul", "min", "max"]), e, e)
        | st.builds(lambda x, y, z: where(x < y, x, z), e, e, e)
        | st.builds(Expr.__truediv__, e, st.sampled_from([const(4.0), const(-2.0)]))
    ),
    max_leaves=6,
)


def attention(score: str, more: str = "dtype: bf16\n") -> Attention:
    return spec.loads(f"{HEAD}score: {score}\n{more}").attention


@given(FORMULAS)
def test_no_score_lies_outside(e: Expr) -> None:
    found = limits(e)
    assume(found is not None)
    low, high = found or (0.0, 0.0)
    at = {"qk": VALUES[:, None, None], "i": np.arange(0, 4000, 777)[:, None], "j": np.arange(0, 4000, 501)[None, :]}
    with np.errstate(all="ignore"):
        scores = value(e, at)
    scores = scores[~np.isnan(scores)]
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    assert (low - slack <= scores).all()
    assert (scores <= high + slack).all()


@pytest.mark.parametrize(
    ("score", "found"),
    [
        ("softcap(qk * scale, 30)", (-30, 30)),
        ("2 * softcap(qk, 20) - 1", (-41, 39)),
        ("softcap(qk * scale, 10) * sigmoid(qk)", (-10, 10)),
        ("min(max(qk * scale, -20), 5)", (-20, 5)),
        ("abs(softcap(qk * scale, 60))", (0, 60)),
        ("softcap(qk * scale, 30) + softcap(j - i, 4)", (-34, 34)),
    ],
)
def test_limits_are_those_of_the_formula(score: str, found: tuple[float, float]) -> None:
    assert limits(attention(score).part.score) == pytest.approx(found)


@pytest.mark.parametrize(
    "score",
    [
        "qk * scale",
        "min(qk * scale, 5)",
        "softcap(qk * scale, 30) + j - i",
        "softcap(qk * scale, 30) - m[h]",
        "softcap(qk * scale, m[h])",
        "exp(qk)",
    ],
)
def test_what_may_be_any_number_has_none(score: str) -> None:
    assert limits(attention(score, "inputs: {m: {shape: [Hq]}}\n" if "m[" in score else "").part.score) is None


def test_names_and_tensors_may_be_anything() -> None:
    assert limits(ew("tanh", load("bias", b, h)) * 2.0) == (-2.0, 2.0)
    assert limits(maximum(minimum(name("scale", "f32") * qk, 4.0), -3.0)) == (-3.0, 4.0)
    assert limits(ew("tanh", qk) * name("scale", "f32")) is None
    assert limits(ew("tanh", qk) / const(0.0)) is None
    assert limits(where(qk < 0.0, -math.inf, 1.0)) is None


@given(cap=st.floats(0.01, 200), above=st.floats(-300, 300))
def test_weights_stay_inside_their_format(cap: float, above: float) -> None:
    base = base_of(attention(f"softcap(qk * scale, {cap}) + {above}"))
    low, high = ((above - cap) * math.log2(math.e), (above + cap) * math.log2(math.e))
    if base is None:
        assert high - low > HEAVIEST - LIGHTEST - 2
        return
    assert low - base + 1e-6 >= LIGHTEST
    assert high - base <= HEAVIEST + 1e-6
    above = round(high - base)  # the highest weight is 1, or a power of 2
    assert high - base == pytest.approx(above)
    if high - low < -LIGHTEST - 2:
        assert high - base == pytest.approx(0)


@pytest.mark.parametrize(
    ("score", "more", "base"),
    [
        ("softcap(qk * scale, 30)", "dtype: bf16\n", 30 * LOG2E),
        ("softcap(qk * scale, 50)", "dtype: bf16\nmask: causal & window(64)\n", 50 * LOG2E - 39),
        ("softcap(qk * scale, 60)", "dtype: bf16\n", None),
        ("softcap(qk * scale, 30)", "dtype: fp16\n", None),
        ("softcap(qk * scale, 30)", "dtype: bf16\nnormalizer: sigmoid\n", None),
        ("softcap(qk * scale, 30)", "quantize: {q: fp8_e4m3, k: fp8_e4m3, v: fp8_e4m3, p: fp8_e4m3}\n", None),
    ],
)
def test_a_base_is_there_where_the_format_holds_all_weights(score: str, more: str, base: float | None) -> None:
    assert base_of(attention(score, more)) == pytest.approx(base)
