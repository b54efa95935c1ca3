"""Random scores and masks in CPU kernels against the oracle."""

from __future__ import annotations

import pytest
import torch
from built import built, in_turn
from codegen.emitted import normal
from codegen.test_packages import HEADS
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from attncc import reference
from attncc.errors import SpecError

INPUTS = (
    "{n: {shape: [], dtype: int32}, ids: {shape: [B, Sk], dtype: int8}, at: {shape: [Sq], dtype: int64}, "
    "w: {shape: [Hq, 7], dtype: bf16}, cuts: {shape: [B, m], dtype: int32, sorted: true}, "
    "on: {shape: [Sk], dtype: bool}}"
)


def whole(depth: int) -> st.SearchStrategy[str]:
    leaf = st.sampled_from(["i", "j", "row", "h", "hk", "b", "Sk", "Sq", "n", "m", "ids[b, j]", "at[row]"])
    leaf |= st.integers(-9, 40).map(str)
    if not depth:
        return leaf
    a = whole(depth - 1)
    two = st.tuples(a, st.sampled_from(["+", "-", "*", "//", "%"]), a).map(lambda x: f"({x[0]} {x[1]} {x[2]})")
    more = st.tuples(st.sampled_from(["min({}, {})", "max({}, {})"]), a, a).map(lambda x: x[0].format(*x[1:]))
    one = st.tuples(st.sampled_from(["abs({})", "(-{})", "ids[b, {}]", "at[{}]", "bucket(cuts[b], {})"]), a)
    chosen = st.tuples(condition(depth - 1), a, a).map(lambda x: f"where({x[0]}, {x[1]}, {x[2]})")
    return leaf | two | more | one.map(lambda x: x[0].format(x[1])) | chosen


def condition(depth: int) -> st.SearchStrategy[str]:
    leaf = st.sampled_from(["causal", "window(5, 2)", "on[j]", "(i < 9)", "(h == 1)", "segments(cuts)"])
    if not depth:
        return leaf
    a, c = whole(depth - 1), condition(depth - 1)
    compared = st.tuples(a, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), a)
    joined = st.tuples(c, st.sampled_from(["&", "|", "=="]), c)
    two = (compared | joined).map(lambda x: f"({x[0]} {x[1]} {x[2]})")
    return leaf | two | c.map(lambda x: f"~{x}")


def real(depth: int) -> st.SearchStrategy[str]:
    leaf = st.sampled_from(["qk", "qk * scale", "w[h, j % 7]", "w[h, i - 3]", "0.3", "-1.5"])
    if not depth:
        return leaf | whole(1).map(lambda x: f"({x}) * 0.1")
    a, c = real(depth - 1), condition(depth - 1)
    two = st.tuples(a, st.sampled_from(["+", "-", "*"]), a).map(lambda x: f"({x[0]} {x[1]} {x[2]})")
    one = st.tuples(st.sampled_from(["tanh({})", "sigmoid({})", "sin({})", "abs({})", "softcap({}, 2.0)"]), a)
    chosen = st.tuples(c, a, a).map(lambda x: f"where({x[0]}, {x[1]}, {x[2]})")
    bounded = st.tuples(a, a).map(lambda x: f"max(min({x[0]}, 4.0), {x[1]})")
    return leaf | two | chosen | bounded | one.map(lambda x: x[0].format(x[1]))


def agrees(score: str, mask: str, isa: str, layout: str = "bhsd") -> None:
    """Weights as scores are, so that a wrong one is seen, over a tile of rows that is cut and over a few."""
    head = f"{HEADS}dims: 4\ndtype: fp32\ninputs: {INPUTS}\n"
    body = f"{head}score: '{score}'\nmask: '{mask}'\nnormalizer: none\noutputs: [o]\nlayout: {layout}"
    try:
        p = built(body, isa, level=0)
    except SpecError as error:
        assume(not any(word in error.message for word in ("too large", "beyond", "is outside axis", "by zero")))
        raise
    for rows, keys in ((37, 70), (2, 66), (40, 9)):
        generator = torch.Generator().manual_seed(rows)
        draw = lambda high, *shape, g=generator: torch.randint(0, high, shape, generator=g)
        inputs = {
            "n": draw(5).int(),
            "ids": (draw(9, 2, keys) - 3).to(torch.int8),
            "at": draw(60, rows) - 5,
            "w": normal(4, 7).bfloat16(),
            "cuts": draw(keys, 2, 4).int().sort(-1).values,
            "on": draw(2, keys).bool(),
        }
        q, k, v = normal(2, 4, rows, 4), normal(2, 2, keys, 4, seed=1), normal(2, 2, keys, 4, seed=2)
        want = reference.attention(p.attn, q.double(), k.double(), v.double(), inputs=inputs)
        want = want if isinstance(want, torch.Tensor) else want[0]
        assume(want.isfinite().all() and want.abs().max() < 1e6)
        got = p(q, k, v, **inputs)
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max() + 1))


@pytest.mark.parametrize("number", [0, 1])
@given(data=st.data())
@settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_random_formulas(number: int, data: st.DataObject) -> None:
    agrees(data.draw(real(3)), data.draw(condition(3)), in_turn(number))
