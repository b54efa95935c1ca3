"""Emitted packages, run by Triton's interpreter, against the oracle by the acceptance rule."""

from __future__ import annotations

import pytest
import torch
from codegen.emitted import normal, package, passes

from attncc.check.cases import Case

HEADS = "heads: {q: 4, kv: 2}\n"
PLAIN = f"{HEADS}dims: 16\ndtype: fp32\n"
IDS = "inputs: {ids: {shape: [B, Sk], dtype: int32}}\n"
FEATURES = {
    "no mask": PLAIN,
    "causal": f"{PLAIN}mask: causal",
    "window": f"{PLAIN}mask: causal & window(9)",
    "band": f"{PLAIN}mask: window(5, right=3)",
    "two ranges": f"{PLAIN}mask: causal & (window(9) | sink(3))",
    "three ranges": f"{PLAIN}mask: (j < 3) | ((j >= 12) & (j < 20) & causal) | ((i - j < 4) & causal)",
    "prefix": f"{PLAIN}mask: causal | prefix(7)",
    "chunks": f"{PLAIN}mask: causal & chunked(8)",
    "skipped tiles": f"{PLAIN}mask: causal & dilated(40)",
    "complement": f"{PLAIN}mask: ~causal",
    "rows that see nothing": f"{PLAIN}mask: causal & (i % 3 > 0)",
    "nothing visible": f"{PLAIN}mask: i < 0",
    "by head": f"{PLAIN}mask: (h < 2) | causal",
    "listed by batch": f"{PLAIN}{IDS}mask: causal & document(ids)",
    "listed by head": f"{PLAIN}inputs: {{on: {{shape: [Hq, Sk], dtype: bool}}}}\nmask: on[h, j]",
    "listed by both": f"{PLAIN}inputs: {{on: {{shape: [B, Hq, Sk], dtype: bool}}}}\nmask: on[b, h, j] & causal",
    "listed for all": f"{PLAIN}inputs: {{on: {{shape: [Sk], dtype: uint8}}}}\nmask: on[j] > on[i]",
    "listed by blocks": f"{PLAIN}inputs: {{blocks: {{shape: [m, n], dtype: bool}}}}\nmask: blocks[i // 128, j // 128]",
    "widened": f"{PLAIN}inputs: {{lim: {{shape: [Sq], dtype: int32}}}}\nmask: j < lim[row] * 3",
    "rows of an input": f"{PLAIN}inputs: {{lim: {{shape: [Sq], dtype: int32}}, f: {{shape: [Hq, Sq, 2]}}}}\n"
    "score: qk * scale + f[h, row, 0] * f[h, row, 1]\nmask: j < lim[row]",
    "offsets of documents": f"{PLAIN}inputs: {{cuts: {{shape: [B, n], dtype: int32, sorted: true}}}}\n"
    "mask: causal & segments(cuts)",
    "lengths": f"{PLAIN}inputs: {{lens: {{shape: [B], dtype: int64}}}}\nmask: j < lens[b]",
    "softcap": f"{PLAIN}score: softcap(qk * scale, 3)\nmask: causal",
    "alibi": f"{PLAIN}score: qk * scale - 0.1 * (h + 1) * abs(i - j)\nmask: causal",
    "bias": f"{PLAIN}inputs: {{bias: {{shape: [B, 1, Sq, Sk]}}}}\nscore: qk * scale + bias[b, h, row, j]",
    "bias of fp16": f"{PLAIN}inputs: {{bias: {{shape: [Hq, Sq, Sk], dtype: fp16}}}}\n"
    "score: qk * scale + bias[h, row, j]\nmask: causal",
    "key bias": f"{PLAIN}inputs: {{bias: {{shape: [Sk]}}}}\nscore: qk * scale + bias[j]",
    "skewed": f"{PLAIN}inputs: {{rel: {{shape: [Hq, 11]}}}}\nscore: qk * scale + rel[h, i - j + 5]\nmask: causal",
    "skewed by batch": f"{PLAIN}inputs: {{rel: {{shape: [B, 91]}}}}\nscore: qk * scale + rel[b, j - i + 40]",
    "gathered": f"{PLAIN}{IDS[:-2]}, emb: {{shape: [5, Hk]}}}}\nscore: qk * scale + emb[ids[b, j], hk]",
    "buckets": f"{PLAIN}inputs: {{t5: {{shape: [Hq, 8]}}}}\n"
    "score: qk * scale + t5[h, min(abs(i - j) // 4, 7)]\nmask: causal",
    "a sorted row a query": f"{PLAIN}inputs: {{c: {{shape: [Sq, n], dtype: int32, sorted: true}}}}\n"
    "score: qk * scale + bucket(c[row], j) * 0.1",
    "sorted rows outside": f"{PLAIN}inputs: {{c: {{shape: [9, n], dtype: int32, sorted: true}}}}\n"
    "score: qk * scale + bucket(c[row - 3], j - 2) * 0.1 + bucket(c[2 * h - 1], i - 2) * 0.1",
    "reads outside": f"{PLAIN}{IDS}score: qk * scale + ids[b, 2 * j] + ids[b, j - 3]",
    "a score without qk": f"{PLAIN}score: 0.1 * (h + 1)\nmask: causal",
    "a score of rows": f"{PLAIN}score: float(i) * 0.1",
    "powers": f"{PLAIN}score: qk * scale - (i - j) ** 2 * 0.01 + (j % 3) ** 3 * 0.1",
    "floors of floats": f"{PLAIN}score: qk // 0.7 + qk % (j - 3.5)",
    "divisors from data": f"{PLAIN}{IDS}mask: (j // ids[b, j] > 1) | (i % ids[b, i] == 0)",
    "no sink": f"{PLAIN}normalizer: softmax(sink=-inf)\nmask: causal",
    "squares": f"{PLAIN}mask: j * j < i * 3",
    "numbers of tokens": f"{PLAIN}score: qk * scale * log(Sk + 2.0)",
    "sink": f"{PLAIN}inputs: {{z: {{shape: [Hq]}}}}\nnormalizer: softmax(sink=z[h])\nmask: causal",
    "sigmoid": f"{PLAIN}normalizer: sigmoid\noutputs: [o]\nmask: causal",
    "relu": f"{PLAIN}normalizer: relu\noutputs: [o]",
    "none": f"{PLAIN}normalizer: none\noutputs: [o]\nmask: causal",
    "linear": f"{PLAIN}normalizer: linear(0.1)\noutputs: [o]\nscore: exp(qk * 0.1)\nmask: causal",
    "tiled heads": "heads: {q: 6, kv: 2, map: tile}\ndims: 16\ndtype: fp32\nmask: causal",
    "one key head": "heads: {q: 3, kv: 1}\ndims: 16\ndtype: fp32\nmask: causal",
    "more value heads": "heads: {q: 4, kv: 1, v: 4}\ndims: 16\ndtype: fp32\nmask: causal",
    "fewer value heads": "heads: {q: 4, kv: 4, v: 2}\ndims: 16\ndtype: fp32",
    "no lse": f"{PLAIN}outputs: [o]\nmask: causal",
    "every operator": f"{PLAIN}score: sigmoid(qk) + tanh(qk) * erf(qk) + log1p(abs(qk)) - sqrt(abs(qk)) * sin(qk)"
    " + cos(qk) * rsqrt(1.0 + qk * qk) + exp2(min(qk, 2)) + exp(-abs(qk)) + log(1.5 + sin(qk)) + floor(qk) / 4"
    " + abs(qk) ** 1.5 - max(qk, 0) ** 2 + where(qk > 1, 1, qk) + log2(2.0 + cos(qk)) + clamp(qk, -1, 1)",
    "integers": f"{PLAIN}mask: ((i - j) // 3 % 2 == 0) & (((j - i) % 5) < 4) & ((i - 40) // 7 != j // -9)",
}
DIMS = ["1", "7", "16", "40", "72", "80", "96", "{qk: 192, v: 128}", "{qk: 40, v: 24}", "{qk: 24, v: 96}"]
SMALL = Case(2, 21, 37)
WIDE = Case(1, 37, 21)


@pytest.mark.parametrize("layout", ["bhsd", "varlen"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, layout: str) -> None:
    """Each pair of a layout, a way through the keys and a kind of operands, but not all three together."""
    p = package(f"{FEATURES[feature]}\nlayout: {layout}")
    clean, spoilt = ((16, 32, 0), (32, 16, 1)) if layout == "bhsd" else ((32, 16, 1), (16, 32, 0))
    passes(p.tiles(*clean), WIDE if layout == "bhsd" else SMALL)
    passes(p.tiles(*spoilt), Case(2, 21, 37, "nan_keys"))


@pytest.mark.parametrize("dims", DIMS)
def test_dims(dims: str) -> None:
    p = package(f"{HEADS}dims: {dims}\ndtype: fp16\nmask: causal\nlayout: bshd").tiles(16, 32)
    passes(p, SMALL, Case(2, 21, 37, "nan_around"))


@pytest.mark.parametrize("align", ["top_left", "starts"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "varlen"])
def test_alignment(align: str, layout: str) -> None:
    body = f"{PLAIN}inputs: {{starts: {{shape: [B], dtype: int32}}}}\nmask: causal & window(11)\nlayout: {layout}"
    passes(package(f"{body}\nalign: {align}").tiles(16, 16), SMALL, WIDE)


@pytest.mark.parametrize(
    "trait", ["one_hot", "uniform", "large_logits", "nan_around", "nan_neighbour", "expanded", "unaligned"]
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "varlen"])
def test_operands(layout: str, trait: str) -> None:
    passes(package(f"{PLAIN}mask: causal\nlayout: {layout}").tiles(16, 16), Case(3, 21, 37, trait))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 40), (1, 40, 1), (1, 0, 16), (1, 16, 0), (0, 16, 16), (3, 48, 48)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "varlen"])
def test_shapes(layout: str, shape: tuple[int, int, int]) -> None:
    passes(package(f"{PLAIN}mask: causal\nlayout: {layout}").tiles(16, 16), Case(*shape))
    passes(package(f"{PLAIN}{IDS}mask: document(ids)\nlayout: {layout}").tiles(16, 16), Case(*shape))


@pytest.mark.parametrize("trait", ["random", "nan_keys", "large_logits"])
def test_bf16_is_computed_in_fp32(trait: str) -> None:
    p = package(f"{HEADS}dims: 40\nmask: causal").tiles(16, 16)
    q, k = normal(1, 4, 20, 40, dtype=torch.bfloat16), normal(1, 2, 20, 40, dtype=torch.bfloat16)
    assert p(q, k, k).dtype == torch.bfloat16
    passes(p, Case(2, 21, 37, trait))


@pytest.mark.parametrize("body", [f"{PLAIN}mask: causal", f"{PLAIN}{IDS}mask: document(ids)"])
@pytest.mark.parametrize("one_pass", [0, 1])
def test_the_lse_changes_nothing(body: str, one_pass: int) -> None:
    p = package(body).tiles(16, 16, one_pass)
    q, k = normal(1, 4, 20, 16), normal(1, 2, 20, 16, seed=1)
    more = {"ids": torch.zeros(1, 20, dtype=torch.int32)} if "ids" in body else {}
    o, _ = p(q, k, k, **more, return_lse=True)
    assert torch.equal(o, p(q, k, k, **more))


def test_tiles_do_not_matter_much() -> None:
    p = package(f"{PLAIN}mask: causal & (window(9) | sink(3))")
    q, k, v = normal(1, 4, 70, 16), normal(1, 2, 70, 16, seed=1), normal(1, 2, 70, 16, seed=2)
    results = [p.tiles(*t)(q, k, v) for t in ((16, 16), (64, 16), (16, 64), (64, 64), (128, 128))]
    for r in results[1:]:
        torch.testing.assert_close(r, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("one_pass", [0, 1])
def test_hidden_keys_and_values_do_not_matter(bad: float, one_pass: int) -> None:
    p = package(f"{PLAIN}mask: causal").tiles(16, 16, one_pass)
    q, k, v = normal(1, 4, 40, 16), normal(1, 2, 40, 16, seed=1), normal(1, 2, 40, 16, seed=2)
    clean = p(q, k, v)
    v[:, :, 25] = bad
    k[:, :, 30] = bad
    o = p(q, k, v)
    assert torch.equal(o[:, :, :25], clean[:, :, :25])
    assert not o[:, :, 25:].isfinite().any()


def test_memory_behind_an_operand_is_not_read() -> None:
    """Rows and columns past the end are NaN in memory; the last piece of a head sticks out of it."""
    p = package(f"{HEADS}dims: 40\ndtype: fp32\nmask: causal").tiles(16, 16)
    room = torch.full((1, 4, 64, 64), torch.nan)
    views = [room.clone()[:, :heads, 8:29, :40].copy_(normal(1, heads, 21, 40, seed=heads)) for heads in (4, 2, 2)]
    assert torch.equal(p(*views), p(*(x.contiguous() for x in views)))


def test_given_scale() -> None:
    p = package(f"{PLAIN}mask: causal").tiles(16, 16)
    q, k = normal(1, 4, 20, 16), normal(1, 2, 20, 16, seed=1)
    torch.testing.assert_close(p(q * 2, k, k, scale=0.125), p(q, k, k, scale=0.25))
    torch.testing.assert_close(p(q, k, k), p(q, k, k, scale=0.25))
