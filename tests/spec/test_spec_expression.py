"""Expressions: what each text means, and where each wrong one is underlined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scalar_numpy import Scope, evaluate
from spec_samples import HEAD, INPUTS, mask, refusal, score, spec, underlined

from attncc.ir.expr import TRUE, Expr, bucket, cast_to, const, eq, ew, load, maximum, minimum, name, where

QK, SCALE = name("qk", "f32"), name("scale", "f32")
B, H, I, J, ROW = (name(n) for n in ("b", "h", "i", "j", "row"))
SQ, SK = name("Sq"), name("Sk")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qk * scale", QK * SCALE),
        ("qk", QK),
        ("-qk ** 2", -(QK**2)),
        ("2.0 ** -qk", ew("pow", 2.0, -QK)),
        ("qk - 1 - 2", QK - 1.0 - 2.0),
        ("qk - (1.5 - qk)", QK - (1.5 - QK)),
        ("qk / 2 / scale", QK / 2.0 / SCALE),
        ("+qk", QK),
        ("-0.5 * qk", -0.5 * QK),
        ("qk + -inf", QK + const(-math.inf)),
        ("softcap(qk, 50)", 50.0 * ew("tanh", QK / 50.0)),
        ("clamp(qk, -1, 1)", minimum(maximum(QK, -1.0), 1.0)),
        ("min(qk, 1, scale)", minimum(minimum(QK, 1.0), SCALE)),
        ("where(j <= i, qk, 0)", where(J <= I, QK, 0.0)),
        ("exp2(-8 * (h + 1) / Hq) * (i - j)", ew("exp2", -8 * (H + 1) / 8) * (I - J)),
        ("qk + bias[h, i - j + 1024]", QK + load("bias", H, I - J + 1024)),
        ("qk + table[b, h, row, j]", QK + load("table", B, 0, ROW, J)),
        ("qk + bias[h, ids[b, j] % W]", QK + load("bias", H, load("ids", B, J, dtype="i32") % name("W"))),
        ("qk + bias[h, bucket(edges, i - j)]", QK + load("bias", H, bucket("edges", I - J))),
        ("qk + bucket(offsets[b], j)", QK + bucket("offsets", B, J)),
        ("qk * tau", QK * load("tau")),
        ("qk * Dqk", QK * 64.0),
        ("qk * (2 * 3 + 2 ** 4 - 7 // 2 % 5)", QK * 19.0),
        ("qk * (7 // -2)", QK * -4.0),
        ("qk * (-7 % 3)", QK * 2.0),
        ("  qk  ", QK),
        ("float(i) * qk", cast_to(I, "f32") * QK),
        ("float(qk) + float(3)", QK + 3.0),
        ("float(where(true, i, 0.5))", cast_to(I, "f32")),
    ],
)
def test_scores(text: str, expected: Expr) -> None:
    assert score(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", TRUE),
        ("causal", J <= I),
        ("0 <= i - j < 4", (const(0) <= I - J) & (I - J < 4)),
        ("~(i == j) | (i != Sk - Sq)", ~eq(I, J) | ew("ne", I, SK - SQ)),
        ("blocks[i // 128, j // 128]", load("blocks", I // 128, J // 128, dtype="bool")),
        ("blocks[0, 0] == blocks[1, 1]", eq(*(load("blocks", k, k, dtype="bool") for k in (0, 1)))),
        ("where(h < 4, causal, true)", where(H < 4, J <= I, TRUE)),
        ("causal & true", J <= I),
        ("causal & causal", J <= I),
        ("j < lengths[b]", ew("lt", J, load("lengths", B, dtype="i32"))),
        ("flat_ids[i] == 3000000000", eq(load("flat_ids", I, dtype="i64"), 3000000000)),
        ("h % Hk == hk", eq(H % 2, name("hk"))),
    ],
)
def test_masks(text: str, expected: Expr) -> None:
    assert mask(text) == expected


def test_multi_line_texts_are_one_expression() -> None:
    folded = spec("score: >\n  softcap(qk * scale,\n    50)\n").attention.part.score
    plain = spec("score: softcap(qk *\n  scale, 50)\n").attention.part.score
    assert folded == plain == score("softcap(qk * scale, 50)")


def test_fixed_sizes_are_numbers() -> None:
    body = "inputs: {t: {shape: [W]}}\nsizes: {Sk: 4096, W: 16, Sq: {max: 64}}\nscore: qk + t[j % W] + Sk + Sq + Hq\n"
    expected = QK + load("t", J % 16) + 4096.0 + SQ + 8.0
    assert spec(body).attention.part.score == expected


@pytest.mark.parametrize(
    ("text", "message", "pointed", "hint"),
    [
        ("qk * scal", "unknown name 'scal'", "scal", "scale"),
        ("qk + bas[h, 0]", "unknown input 'bas'", "bas", "bias"),
        ("sofcap(qk, 50)", "unknown function 'sofcap'", "sofcap", "softcap"),
        ("softcap(qk)", "takes 2 arguments, got 1", "softcap(qk)", ""),
        ("qk + exp(qk, qk)", "takes 1 arguments", "exp(qk, qk)", ""),
        ("max(qk)", "takes 2 to 16", "max(qk)", ""),
        ("softcap(qk, c=50)", "no arguments by name", "c=50", ""),
        ("qk + softcap", "is a function", "softcap", ""),
        ("qk + window", "needs arguments", "window", "window(left, right=0)"),
        ("qk + bias", "is a tensor", "bias", "bias[Hq, W]"),
        ("qk + bias[h]", "2 axes", "bias[h]", ""),
        ("qk + bias[h, i, j]", "2 axes", "bias[h, i, j]", ""),
        ("qk + bias[h][i]", "only an input can be indexed", "bias[h]", "one pair"),
        ("qk + tau[h]", "0 axes", "tau[h]", ""),
        ("qk + qk[h]", "only an input can be indexed", "qk", ""),
        ("qk + bias[h, qk]", "must be an int", "qk", ""),
        ("qk + bias[h, i / 2]", "must be an int", "i / 2", ""),
        ("qk + bias[h, causal]", "must be an int", "causal", ""),
        ("qk + bias[h, 1:2]", "slice", "1:2", "index per axis"),
        ("qk + per_kv[h]", "runs to Hq", "h", "use hk"),
        ("qk + bias[9, i]", "outside", "9, i", ""),
        ("qk + bias[-1, i]", "outside", "-1, i", ""),
        ("qk + table[b, h, i, j]", "runs to Sk", "b, h, i, j", "use row"),
        ("qk + slopes[j // 0]", "by zero", "j // 0", ""),
        ("qk + slopes[j % 0]", "by zero", "j % 0", ""),
        ("causal", "must be a float", "causal", "where"),
        ("float(causal)", "takes numbers", "float(causal)", ""),
        ("i - j", "must be a float", "i - j", "float(…)"),
        ("qk + causal", "takes numbers", "qk + causal", "where"),
        ("qk & scale", "joins bools", "qk & scale", "bind weaker"),
        ("exp(causal)", "takes numbers", "exp(causal)", ""),
        ("where(qk, 1, 2)", "must be a bool", "where(qk, 1, 2)", ""),
        ("where(causal, qk, causal)", "where chooses", "where(causal, qk, causal)", ""),
        ("qk if causal else 0", "'if … else'", "qk if causal else 0", "where"),
        ("qk and scale", "'and' and 'or'", "qk and scale", "&"),
        ("not qk", "'not'", "not qk", "~"),
        ("qk ^ 2", "'^'", "qk ^ 2", ""),
        ("qk in scale", "'in'", "qk in scale", ""),
        ("True", "'True'", "True", "'true'"),
        ("None", "finite number", "None", ""),
        ("2 ** (i - j) * qk", "may be negative", "2 ** (i - j)", "2.0"),
        ("bucket(bias, 1) * qk", "sorted", "bucket(bias, 1)", "sorted: true"),
        ("bucket(offsets, j) * qk", "1 row indices", "bucket(offsets, j)", ""),
        ("bucket(edges, qk)", "must be an int", "qk", ""),
        ("bucket(edges)", "2 arguments", "bucket(edges)", ""),
        ("qk + ", "not an expression", "+", ""),
        ("qk * (scale", "not an expression", "(", ""),
        ("qk * scale)", "not an expression", ")", ""),
        ("qk scale", "not an expression", "scale", ""),
        ("qk + 'a'", "not part", "'", ""),
        ("qk.real", "attributes", "qk.real", ""),
    ],
)
def test_wrong_scores(text: str, message: str, pointed: str, hint: str) -> None:
    error = refusal(f"{HEAD}{INPUTS}score: {text}\n")
    assert message in error.message
    assert underlined(error) == pointed
    assert hint in error.hint


@pytest.mark.parametrize(
    ("text", "message", "pointed"),
    [
        ("qk > 0", "'qk' has no value here", "qk"),
        ("j < i & i < 3", "joins bools", "i & i"),
        ("i - j", "must be a bool", "i - j"),
        ("causal()", "takes no arguments", "causal()"),
        ("windo(4)", "unknown function 'windo'", "windo"),
        ("window()", "other arguments", "window()"),
        ("window(1, 2, 3)", "other arguments", "window(1, 2, 3)"),
        ("window(left=1, left=2)", "no such argument", "left=2"),
        ("window(1, left=2)", "no such argument", "left=2"),
        ("window(1, wide=2)", "no such argument", "wide=2"),
        ("window(4.5)", "must be an int", "4.5"),
        ("dilated(0)", "at least 1", "dilated(0)"),
        ("chunked(-3)", "at least 1", "chunked(-3)"),
        ("document(bias)", "takes ints", "document(bias)"),
        ("document(i)", "needs an input", "i"),
        ("document(offset)", "unknown input", "offset"),
        ("segments(ids)", "sorted", "segments(ids)"),
        ("tree(offsets[b])", "needs an input", "offsets[b]"),
        ("neighborhood((8, 8), (3, 3, 3))", "2 axes and a kernel of 3", "neighborhood((8, 8), (3, 3, 3))"),
        ("neighborhood((8, 8), 9)", "does not fit", "neighborhood((8, 8), 9)"),
        ("neighborhood((8, Sk), 3)", "made of numbers", "Sk"),
        ("neighborhood((8, 0), 3)", "made of numbers", "0"),
        ("neighborhood(8)", "other arguments", "neighborhood(8)"),
        ("blocks[h, b] & ids[b, i]", "joins bools", "blocks[h, b] & ids[b, i]"),
        ("ids[h, j] == 1", "runs to Hq", "h, j"),
        ("ids[b, b] == 1", "runs to B", "b, b"),
    ],
)
def test_wrong_masks(text: str, message: str, pointed: str) -> None:
    error = refusal(f"{HEAD}{INPUTS}mask: {text}\n")
    assert message in error.message
    assert underlined(error) == pointed


def test_places_in_quoted_and_nested_texts() -> None:
    error = refusal(HEAD + 'score: "qk * scal"\n')
    assert underlined(error) == "scal"
    error = refusal(HEAD + "parts:\n  - {mask: causal & windo(3)}\n  - {mask: causal}\n")
    assert underlined(error) == "windo"
    error = refusal(HEAD + "score: >\n  qk *\n  scal\n")
    assert error.location is not None
    assert error.location.line == 5


def test_top_left_lets_i_index_query_rows() -> None:
    body = "align: top_left\ninputs: {t: {shape: [Sq, Sk]}}\nscore: qk + t[i, j]\n"
    assert spec(body).attention.part.score == QK + load("t", I, J)


# -- what the macros mean, against definitions written another way -----------------------------------


def table(text: str, sq: int, sk: int, **buffers: np.ndarray) -> np.ndarray:
    """The mask of a text as a [Sq, Sk] table of batch 0."""
    row, j = np.arange(sq)[:, None], np.arange(sk)[None, :]
    names = {"b": 0, "h": 0, "hk": 0, "i": row + sk - sq, "j": j, "row": row, "Sq": sq, "Sk": sk}
    return np.broadcast_to(evaluate(mask(text), Scope(names, buffers)), (sq, sk))


def by_pairs(sq: int, sk: int, seen: object) -> np.ndarray:
    return np.array([[seen(row + sk - sq, j) for j in range(sk)] for row in range(sq)])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("causal", lambda i, j: j <= i),
        ("window(3)", lambda i, j: i - 2 <= j <= i),
        ("window(3, 2)", lambda i, j: i - 2 <= j <= i + 2),
        ("window(left=3, right=Sk)", lambda i, j: j >= i - 2),
        ("sink(2)", lambda i, j: j in (0, 1)),
        ("prefix(h + 3)", lambda i, j: j in (0, 1, 2)),
        ("dilated(3)", lambda i, j: abs(i - j) in range(0, 99, 3)),
        ("chunked(4)", lambda i, j: int(i / 4) == int(j / 4)),
        ("global_tokens(2)", lambda i, j: min(i, j) < 2),
    ],
)
def test_macros(text: str, seen: object) -> None:
    for sq, sk in ((9, 9), (4, 11)):
        np.testing.assert_array_equal(table(text, sq, sk), by_pairs(sq, sk, seen))


def test_document_and_segments_agree() -> None:
    offsets = np.array([[0, 3, 4, 9, 12, 12]])
    ids = np.array([[0] * 3 + [1] + [2] * 5 + [3] * 3])
    seen = by_pairs(5, 12, lambda i, j: ids[0, i] == ids[0, j])
    np.testing.assert_array_equal(table("document(ids)", 5, 12, ids=ids), seen)
    np.testing.assert_array_equal(table("document(flat_ids)", 5, 12, flat_ids=ids[0]), seen)
    np.testing.assert_array_equal(table("segments(offsets)", 5, 12, offsets=offsets), seen)
    np.testing.assert_array_equal(table("segments(edges)", 5, 12, edges=offsets[0]), seen)


def nearest_keys(at: int, size: int, kernel: int) -> range:
    """NATTEN's window along one axis, found by sliding it until it fits."""
    first = at - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > size:
        first -= 1
    return range(first, first + kernel)


@pytest.mark.parametrize(
    ("text", "shape", "kernel"),
    [
        ("neighborhood(12, 5)", (12,), (5,)),
        ("neighborhood((5, 7), (3, 5))", (5, 7), (3, 5)),
        ("neighborhood((5, 7), (2, 7))", (5, 7), (2, 7)),
        ("neighborhood((3, 4, 5), 3)", (3, 4, 5), (3, 3, 3)),
    ],
)
def test_neighborhood(text: str, shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    def seen(i: int, j: int) -> bool:
        cells = zip(np.unravel_index(i, shape), np.unravel_index(j, shape), shape, kernel, strict=True)
        return all(key in nearest_keys(int(query), size, width) for query, key, size, width in cells)

    n = math.prod(shape)
    found = table(text, n, n)
    np.testing.assert_array_equal(found, by_pairs(n, n, seen))
    assert (found.sum(1) == math.prod(kernel)).all()


@pytest.mark.parametrize("words", [0, 1, 3])
def test_tree(words: int) -> None:
    random = np.random.default_rng(words)
    tokens, before = (70 if words > 1 else 31), 6
    parents = [-1] + [int(random.integers(t)) for t in range(1, tokens)]
    ancestors = np.zeros((tokens, tokens), bool)
    for t, parent in enumerate(parents):
        ancestors[t] = ancestors[parent] if parent >= 0 else False
        ancestors[t, t] = True
    bits = np.zeros((1, tokens, max(words, 1)), np.int64)
    for row, t in np.argwhere(ancestors):
        bits[0, row, t // 31] += 1 << (t % 31)
    assert bits.max() < 2**31
    expected = np.concatenate([np.ones((tokens, before), bool), ancestors], axis=1)
    buffer = {"tree_words": bits} if words else {"tree_bits": bits[..., 0]}
    found = table(f"tree({next(iter(buffer))})", tokens, before + tokens, **buffer)
    np.testing.assert_array_equal(found, expected)
