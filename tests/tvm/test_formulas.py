"""Scores and masks of the language in CPU kernels, tiles of rows and single rows alike, against the oracle."""

from __future__ import annotations

import pytest
import torch
from built import agrees, built, in_turn
from codegen.emitted import normal
from codegen.test_packages import FEATURES, PLAIN

from attncc import passes, spec
from attncc.check.cases import Case
from attncc.codegen.tvm.formulas import OPERATORS
from attncc.ir.attention import Attention
from attncc.ir.rewrite import walk
from attncc.spec.macros import MACROS

CASES = [
    Case(2, 21, 37),
    Case(1, 37, 21),
    Case(2, 2, 150),
    Case(1, 1, 70),
    Case(2, 70, 150, "nan_keys"),
    Case(2, 21, 37, "nan_around"),
]
"""Several tiles of rows, one cut tile, and as few rows as have a kernel of their own."""


def inputs(**declared: str) -> str:
    return PLAIN + "inputs: {" + ", ".join(f"{name}: {{{x}}}" for name, x in declared.items()) + "}\n"


DTYPES = ("bool", "int8", "uint8", "int32", "int64", "fp16", "bf16", "fp32")


def of_every_dtype(shape: str, index: str) -> str:
    """The sum of an input of each dtype, as numbers near 1."""
    reads = {dtype: f"x_{dtype}[{index}] * 0.1" for dtype in DTYPES}
    reads |= {dtype: f"x_{dtype}[{index}] % 7 * 0.1" for dtype in ("int8", "uint8", "int32", "int64")}
    reads |= {"bool": f"where(x_bool[{index}], 1.5, -0.5)"}
    declared = {f"x_{dtype}": f"shape: {shape}, dtype: {dtype}" for dtype in DTYPES}
    return f"{inputs(**declared)}score: qk * scale + {' + '.join(reads.values())}"


MORE = {
    "every dtype by key": of_every_dtype("[B, Sk]", "b, j"),
    "every dtype by row": of_every_dtype("[Sq, Hq]", "row, h"),
    "every dtype by pair": of_every_dtype("[Sk, Sq]", "j, row"),
    "a scalar": inputs(t="shape: []") + "score: qk * t",
    "an integer scalar": inputs(n="shape: [], dtype: int32") + "mask: causal & (j % (n + 1) != 1)",
    "ones": inputs(x="shape: [1, Hq, 1, 1]") + "score: qk * scale + x[b + 7, h, i - 99, 3 * j]",
    "outside behind": inputs(x="shape: [5]") + "score: qk * scale + x[j] + x[row + 2]",
    "outside before": inputs(x="shape: [40, 3]") + "score: qk * scale + x[i - j, h - 1]",
    "outside far": inputs(x="shape: [9]") + "score: qk * scale + x[(i - 30) * 1000000] + x[j * 4000000000]",
    "own size": inputs(x="shape: [n], dtype: bool") + "mask: (j < n) & x[n - 1 - j]",
    "nested": inputs(a="shape: [B, Sk], dtype: int32", c="shape: [9], dtype: int64", e="shape: [Hq, 5], dtype: bf16")
    + "score: qk * scale + e[h, c[a[b, j] % 9] % 5]",
    "nested by rows": inputs(a="shape: [Sq], dtype: int8", c="shape: [9, Sk]") + "score: qk * scale + c[a[row] % 9, j]",
    "buckets": inputs(c="shape: [7], dtype: int32, sorted: true", w="shape: [8, Hk]")
    + "score: qk * scale + w[bucket(c, j), hk] + bucket(c, i - 3) * 0.1",
    "buckets by batch": inputs(c="shape: [B, m], dtype: int64, sorted: true")
    + "score: qk * scale + bucket(c[b], abs(i - j)) * 0.2",
    "buckets by row": inputs(c="shape: [Sq, m], dtype: int32, sorted: true", w="shape: [Hq, 9]")
    + "score: qk * scale + bucket(c[row], j) * 0.1 + w[h, bucket(c[row], 7)] + bucket(c[row - 9], j - 2) * 0.1",
    "buckets by key": inputs(c="shape: [B, Sk, m], dtype: int32, sorted: true")
    + "score: qk * scale + bucket(c[b, j], 9) * 0.1 + bucket(c[b, j - 9], row) * 0.1",
    "no buckets": inputs(c="shape: [m], dtype: int32, sorted: true") + "score: qk * scale + bucket(c, j) * 0.2",
    "segments": inputs(c="shape: [B, m], dtype: int32, sorted: true") + "mask: segments(c) & causal",
    "sink": f"{PLAIN}mask: causal & (sink(3) | window(5))",
    "global tokens": f"{PLAIN}mask: global_tokens(4) | window(6, right=2)",
    "neighborhood": f"{PLAIN}mask: 'neighborhood((6, 7), (3, 3))'\nsizes: {{Sq: 42, Sk: 42}}",
    "tree": inputs(x="shape: [B, Sq, 2], dtype: int32") + "mask: tree(x)",
    "softcap and clamp": f"{PLAIN}score: softcap(clamp(qk, -2, 2), 1.5)",
    "min and max of many": f"{PLAIN}score: min(qk, 1, j * 0.1) + max(row - j, 3, hk) * 0.1",
    "integer powers": f"{PLAIN}score: qk * scale - (i - j) ** 2 * 0.01\nmask: (i - j) ** 3 < 4000",
    "a NaN that is hidden": f"{PLAIN}score: qk * log(j - 4.0)\nmask: causal & (j > 4)",
    "compared floats": f"{PLAIN}score: where((qk * 0.0 == 0) & (qk != qk + 1), qk, 1)\nmask: float(j) / 3 != i * 0.5",
    "conditions compared": f"{PLAIN}mask: ((i < 9) == (j < 9)) | ((i < 5) != (h < 2))",
    "conditions chosen": f"{PLAIN}mask: where(i % 3 == 0, j < 9, where(h < 2, causal, j > 3))",
    "a condition read, denied": inputs(x="shape: [B, Sk], dtype: bool") + "mask: ~x[b, j] | ~(causal & x[b, j])",
    "sizes": f"{PLAIN}score: qk / Dqk + (Sk - j) * 0.01 + B * Hq * 0.1 - Hk / (Sq + 1.0)",
    "heads": f"{PLAIN}score: qk * 2.0 ** -(h + 1) + hk",
    "sigmoid of a bias": inputs(x="shape: [Hq, Sk]") + "score: sigmoid(x[h, j]) * qk + tanh(x[h, j])\nmask: causal",
    "selected by data": inputs(x="shape: [Sk]") + "mask: (x[j] > 0.2) | (j == i)",
}
TABLE = dict(FEATURES)
TABLE |= {f"{name}, again" if name in FEATURES else name: body for name, body in MORE.items()}


def attention(body: str) -> Attention:
    return passes.run(spec.loads(f"attncc: 1\nname: table\n{body}\n").attention)


@pytest.mark.parametrize("name", TABLE)
def test_formulas(name: str) -> None:
    number = list(TABLE).index(name)
    layout = ("bhsd", "varlen", "bshd")[number // 2 % 3]
    layout = "bhsd" if "neighborhood" in TABLE[name] else layout
    cases = [Case(2, 42, 42), Case(2, 42, 42, "nan_keys")] if "sizes: {" in TABLE[name] else CASES
    agrees(built(f"{TABLE[name]}\nlayout: {layout}", in_turn(number), level=0), cases)


def test_the_table_has_every_operator_and_macro() -> None:
    used: set[str] = set()
    for body in TABLE.values():
        part = attention(body).part
        used |= {node.op for e in (part.score, part.mask) for node in walk(e)}
    assert set(OPERATORS) - used <= {"not"}  # the passes take it into comparisons
    texts = " ".join(TABLE.values())
    assert [macro for macro in MACROS if macro not in texts] == []


def test_the_least_integer_by_minus_one() -> None:
    """Processors trap on it; the quotient wraps around, and nothing else is harmed."""
    p = built(
        inputs(a="shape: [Sk], dtype: int32", c="shape: [Sk], dtype: int32") + "score: qk * 0.0\nmask: a[j] // c[j] < 3"
    )
    a = torch.tensor([-(2**31), 7, 7, 5], dtype=torch.int32)
    c = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    q, k, v = normal(1, 4, 5, 16), normal(1, 2, 4, 16), normal(1, 2, 4, 16, seed=1)
    got = p(q, k, v, a=a, c=c)
    torch.testing.assert_close(got, v[:, :, :3].mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(got))


def test_an_empty_input_has_size_0() -> None:
    p = built(
        inputs(x="shape: [n], dtype: int32", c="shape: [m], dtype: int32, sorted: true")
        + "score: (n + x[j]) * 1.0 + bucket(c, j)\nmask: causal"
    )
    q, k = normal(1, 4, 30, 16), normal(1, 2, 30, 16)
    none = torch.zeros(0, dtype=torch.int32)
    _, lse = p(q, k, k, x=none, c=none, return_lse=True)
    torch.testing.assert_close(lse, torch.arange(1.0, 31).log().expand(1, 4, 30))
    _, lse = p(q, k, k, x=none, c=none + 0, return_lse=True)
    one = torch.zeros(1, dtype=torch.int32)
    _, more = p(q, k, k, x=one, c=one, return_lse=True)
    torch.testing.assert_close(more, lse + 2)
