"""Mask expressions for the tests: the macros of the language, and random masks over a few inputs."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from attncc.ir.attention import Attention, Dims, Heads, Input, Part
from attncc.ir.expr import OPS, Expr, Value, bucket, const, eq, ew, load, maximum, minimum, name, where

i, j, b, h, row, n = (name(text) for text in ("i", "j", "b", "h", "row", "n"))
causal = j <= i

SEQUENCES = 2
INPUTS = (
    Input("offsets", (6,), "int32", sorted=True),
    Input("starts", ("B", 5), "int64", sorted=True),
    Input("ids", ("B", "Sk"), "int32", sorted=True),
    Input("pages", (64,), "int32", sorted=True),
    Input("document", ("B", "Sk"), "int32"),
    Input("lengths", ("B",), "int32"),
    Input("limit", ("Sk",), "int32"),
    Input("flag", ("Sk",), "bool"),
    Input("blocks", (16, 16), "bool"),
    Input("bias", ("Sk",), "fp32"),
    Input("sized", ("n",), "fp32"),
)


def value(e: Expr, at: dict[str, np.ndarray]) -> np.ndarray:
    """What a formula over names comes to; what is converted becomes float64."""
    if e.op == "const":
        return np.asarray(e.value)
    if e.op == "name":
        return at[str(e.attr)]
    args = [value(a, at) for a in e.args]
    return args[0].astype(np.float64) if e.op == "cast" else OPS[e.op].numpy(*args)


def window(left: Value, right: Value = 0) -> Expr:
    return (i - j < left) & (j - i <= right)


def sink(count: Value) -> Expr:
    return j < count


def chunked(count: Value) -> Expr:
    return eq(i // count, j // count)


def dilated(count: Value) -> Expr:
    return eq((i - j) % count, 0)


def segments(x: str, *leading: Value) -> Expr:
    return eq(bucket(x, *leading, i), bucket(x, *leading, j))


def same(x: str) -> Expr:
    return eq(load(x, b, i, dtype="i32"), load(x, b, j, dtype="i32"))


def attention(mask: Expr) -> Attention:
    part = Part(name("qk", "f32"), mask)
    return Attention("probe", Heads(1, 1, 1), Dims(16, 16), (part,), const(1.0), inputs=INPUTS)


def tensors(sk: int, seed: int) -> dict[str, np.ndarray]:
    """Values for `INPUTS`; offsets may repeat, begin after 0 and stop short of the end."""
    rng = np.random.default_rng(seed)

    def rising(*shape: int) -> np.ndarray:
        return np.sort(rng.integers(-2, sk + 4, shape), axis=-1)

    return {
        "offsets": rising(6),
        "starts": rising(SEQUENCES, 5),
        "ids": np.sort(rng.integers(-1, 5, (SEQUENCES, sk)), axis=-1),
        "pages": np.sort(rng.integers(0, 6, 64)),
        "document": rng.integers(0, 3, (SEQUENCES, sk)),
        "lengths": rng.integers(0, sk + 3, SEQUENCES),
        "limit": rng.integers(-2, sk + 3, sk),
        "flag": rng.random(sk) < 0.7,
        "blocks": rng.random((16, 16)) < 0.4,
        "bias": rng.choice(np.array([0.5, -1.0, np.nan, np.inf], np.float32), sk),
    }


small = st.integers(-9, 20)
count = st.integers(1, 9)

row_numbers = st.one_of(
    small.map(const),
    st.sampled_from([i, i, row, n, i // 4, i % 5, load("lengths", b, dtype="i32"), load("limit", i, dtype="i32")]),
    st.sampled_from([bucket("offsets", i), bucket("starts", b, i), load("ids", b, i, dtype="i32"), minimum(i, n)]),
)
key_numbers = st.sampled_from(
    [j, j, j, j, bucket("offsets", j), bucket("starts", b, j + 2), load("ids", b, j, dtype="i32"),
     load("pages", j // 2, dtype="i32"), load("pages", j * 3 - 9, dtype="i32"), bucket("offsets", j * 2 - 3)]
)  # fmt: skip


def _grow(numbers: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    pair = st.tuples(numbers, numbers)
    return st.one_of(
        pair.map(lambda p: p[0] + p[1]),
        pair.map(lambda p: p[0] - p[1]),
        pair.map(lambda p: minimum(*p)),
        pair.map(lambda p: maximum(*p)),
        numbers.map(lambda e: ew("abs", e)),
        numbers.map(lambda e: -e),
        st.tuples(numbers, st.integers(-3, 3)).map(lambda p: p[0] * p[1]),
        st.tuples(numbers, count).map(lambda p: p[0] // p[1]),
        st.tuples(numbers, count).map(lambda p: p[0] % p[1]),
        numbers.map(lambda e: e // n),
        numbers.map(lambda e: n * e),
        st.tuples(numbers, numbers, numbers).map(lambda p: where(p[0] <= i, p[1], p[2])),
    )


numbers = st.recursive(st.one_of(key_numbers, row_numbers), _grow, max_leaves=5)
comparison = st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), numbers, numbers).map(lambda p: ew(*p))
macro = st.one_of(
    st.just(causal),
    st.tuples(count, st.integers(0, 4)).map(lambda p: window(*p)),
    st.one_of(count, st.just(n), st.just(load("lengths", b, dtype="i32"))).map(sink),
    st.one_of(count, st.just(n)).map(chunked),
    st.integers(1, 40).map(dilated),
    st.sampled_from([segments("offsets"), segments("starts", b), same("ids"), same("document")]),
    st.integers(0, 9).map(lambda c: (i < c) | (j < c)),
)
oddity = st.sampled_from(
    [
        load("flag", i, dtype="bool"),
        load("flag", j, dtype="bool"),
        load("blocks", i // 4, j // 4, dtype="bool"),
        load("bias", i) < 0.75,
        load("bias", j) < 0.75,
        j < 0.5 * i,
        minimum(i / j, 5.0) < 6.0,
        (i / 4.0 - j / 8.0) * 0.5 < 3.0,
        ew("sqrt", i - j) < 3.0,
        ew("log1p", ew("abs", i - j)) < 2.0,
        eq(causal, j < 5),
        eq(ew("floor", i / 8), ew("floor", j / 8)),
    ]
)
masks = st.recursive(
    st.one_of(macro, comparison, comparison, oddity),
    lambda m: st.one_of(
        st.tuples(m, m).map(lambda p: p[0] & p[1]),
        st.tuples(m, m).map(lambda p: p[0] | p[1]),
        m.map(lambda x: ~x),
        st.tuples(m, m, m).map(lambda p: where(*p)),
    ),
    max_leaves=5,
)
