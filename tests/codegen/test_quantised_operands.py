"""Packages over quantised operands, run by Triton's interpreter: the numbers are the oracle's, to fp32's rounding."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
import triton
import triton.language as tl
from codegen.emitted import Package, normal, package, passes
from torch import Tensor

from attncc import reference
from attncc.check.cases import Case, Trait
from attncc.codegen.helpers import from_fp8, to_fp8
from attncc.ir.attention import Attention

HEADS = "heads: {q: 4, kv: 2}\n"
OPERANDS = [
    *("q: fp8_e4m3", "q: fp8_e5m2(per=head)", "q: int8(per=block(5))", "q: int8(per=block)", "q: fp8_e4m3(per=token)"),
    *("k: int8", "k: fp8_e4m3(per=head)", "k: fp8_e5m2(per=block(48))", "k: int8(per=block(16))", "k: int8(per=token)"),
    *("v: fp8_e5m2", "v: int8(per=head)", "v: fp8_e4m3(per=channel)", "v: int8(per=channel)"),
    "q: int8(per=head), k: int8",
    "q: int8(per=token), k: int8(per=head)",
    "q: fp8_e4m3(per=head), k: fp8_e5m2(per=head), v: fp8_e4m3(per=head)",
]
SMOOTHED = [
    *("k: int8(smooth=mean)", "k: 'int8(per=token, smooth=mean)'", "k: 'fp8_e4m3(per=head, smooth=mean)'"),
    *("q: 'int8(per=block(16), smooth=mean)'", "q: 'int8(smooth=mean)', k: 'int8(per=token, smooth=mean)'"),
    "q: int8(per=block), k: 'int8(per=block, smooth=mean)', v: fp8_e4m3(per=channel), p: fp8_e4m3",
    "q: 'fp8_e4m3(per=token, smooth=mean)', k: int8(per=head)",
]
WEIGHTS = [
    *("p: fp8_e4m3", "p: fp8_e5m2(per=token)", "p: int8"),
    "q: fp8_e4m3(per=head), k: fp8_e4m3(per=head), v: fp8_e4m3(per=head), p: fp8_e4m3",
    "v: int8(per=channel), p: int8",
]
VARIANTS = {
    "no mask": "",
    "window": "mask: causal & window(9)",
    "top left": "mask: causal\nalign: top_left",
    "softcap": "mask: causal\nscore: softcap(qk * scale, 3)",
    "alibi": "mask: causal\nscore: qk * scale - 0.1 * (h + 1) * abs(i - j)",
    "a score without qk": "mask: causal\nscore: 0.1 * (h + 1)",
    "sink": "mask: causal\ninputs: {z: {shape: [Hq]}}\nnormalizer: softmax(sink=z[h])",
    "documents": "mask: causal & document(ids)\ninputs: {ids: {shape: [B, Sk], dtype: int32}}",
    "skewed": "mask: causal\ninputs: {rel: {shape: [Hq, 11]}}\nscore: qk * scale + rel[h, i - j + 5]",
    "names of its own": "inputs: {q_scales: {shape: [Hq]}, q_stored: {shape: [Hq]}, k_peaks: {shape: [Hq]}}\n"
    "score: qk * scale * q_scales[h] + q_stored[h] * k_peaks[h]\nmask: causal",
    "bshd": "mask: causal\nlayout: bshd",
    "tiled heads": "mask: causal\nheads: {q: 4, kv: 2, v: 4, map: tile}",
    "no lse": "mask: causal\noutputs: [o]",
}
MIXED = "quantize: {q: fp8_e4m3(per=token), k: int8(per=head), v: fp8_e4m3(per=channel)}"


def quantised(quantizers: str, dtype: str = "fp32", more: str = "mask: causal") -> Package:
    return package(f"{HEADS}dims: 24\ndtype: {dtype}\n{more}\nquantize: {{{quantizers}}}")


@pytest.mark.parametrize("quantizers", OPERANDS)
def test_operands(quantizers: str) -> None:
    p = quantised(quantizers)
    passes(p.tiles(16, 32), Case(2, 21, 37), Case(1, 37, 21))
    passes(p.tiles(32, 16), Case(1, 21, 70, "large_logits"), Case(2, 37, 21, "nan_keys"))


@pytest.mark.parametrize("quantizers", [*OPERANDS[-2:], *WEIGHTS[-2:]])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_operands_of_16_bits(quantizers: str, dtype: str) -> None:
    p = quantised(quantizers, dtype).tiles(16, 32)
    passes(p, Case(2, 21, 37), Case(1, 21, 70, "large_logits"), Case(1, 37, 21, "nan_keys"))


@pytest.mark.parametrize("quantizers", WEIGHTS)
def test_weights(quantizers: str) -> None:
    p = quantised(quantizers)
    traits: tuple[Trait, ...] = ("one_hot", "large_logits", "nan_keys")
    passes(p.tiles(16, 16), Case(1, 37, 21), Case(1, 1, 90))
    passes(p.tiles(32, 16), *(Case(2, 21, 70, trait) for trait in traits))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    heads = "" if "heads" in VARIANTS[variant] else HEADS
    p = package(f"{heads}dims: 16\ndtype: fp32\n{VARIANTS[variant]}\n{MIXED}")
    passes(p.tiles(16, 16), Case(2, 21, 37), Case(1, 37, 21, "nan_keys"), Case(2, 21, 37, "nan_around"))


@pytest.mark.parametrize("normalizer", ["sigmoid", "relu", "none", "linear(0.1)"])
def test_scores_under_other_normalizers(normalizer: str) -> None:
    score = "score: exp(qk * 0.1)\n" if "linear" in normalizer else ""
    p = quantised("q: int8(per=head), k: fp8_e4m3", more=f"{score}mask: causal\nnormalizer: {normalizer}\noutputs: [o]")
    passes(p.tiles(16, 16), Case(2, 21, 37), Case(1, 37, 21, "nan_keys"))


@pytest.mark.parametrize("dims", ["1", "7", "72", "{qk: 40, v: 24}", "{qk: 24, v: 96}", "192"])
def test_dims(dims: str) -> None:
    """Stored rows are padded with zeros, and read in pieces."""
    body = f"{HEADS}dims: {dims}\ndtype: fp16\nmask: causal\nlayout: bshd"
    quantizers = "{q: int8(per=token), k: fp8_e4m3(per=head), v: fp8_e4m3(per=channel)}"
    passes(package(f"{body}\nquantize: {quantizers}").tiles(16, 32), Case(2, 21, 37), Case(2, 21, 37, "nan_around"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 0, 16), (1, 16, 0), (0, 16, 16), (2, 3, 600), (1, 300, 9)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    """Also of several spans of tokens, and of several groups of peaks' spans."""
    passes(quantised("q: int8, k: fp8_e4m3(per=head), v: int8(per=channel)").tiles(16, 64), Case(*shape))


@pytest.mark.parametrize("quantizers", SMOOTHED)
def test_means_are_taken_off(quantizers: str) -> None:
    """And come back as terms of the products, whatever the score makes of these."""
    p = quantised(quantizers)
    passes(p.tiles(16, 32), Case(2, 21, 37), Case(1, 300, 290))
    passes(quantised(quantizers, more=VARIANTS["softcap"]).tiles(16, 32), Case(2, 21, 37))


@pytest.mark.parametrize("variant", ["alibi", "bshd", "no mask", "documents", "sink"])
def test_means_in_other_variants(variant: str) -> None:
    p = quantised("q: 'int8(per=token, smooth=mean)', k: 'int8(per=head, smooth=mean)'", more=VARIANTS[variant])
    passes(p.tiles(16, 32), Case(2, 21, 37), Case(2, 1, 37), Case(0, 16, 16), Case(1, 4, 0), Case(2, 0, 16))


def test_means_of_heads_that_are_served_in_turn() -> None:
    more = "heads: {q: 4, kv: 2, v: 4, map: tile}\ndims: 24\ndtype: fp32\nmask: causal\n"
    p = package(f"{more}quantize: {{q: 'int8(smooth=mean)', k: 'int8(smooth=mean)'}}")
    passes(p.tiles(16, 32), Case(2, 21, 37))


def test_means_of_what_stands_off() -> None:
    """A channel of the keys far from 0 takes all of an int8's range, unless its mean is taken off."""
    q, k, v = normal(1, 4, 40, 24), normal(1, 2, 40, 24, seed=1), normal(1, 2, 40, 24, seed=2)
    k[..., 5] += 100.0
    off: list[float] = []
    for how in ("k: int8(per=token)", "k: 'int8(per=token, smooth=mean)'"):
        o = quantised(how).tiles(16, 32)(q, k, v)
        s = (q @ k.repeat_interleave(2, 1).mT / 24**0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
        off.append(float((o - s.softmax(-1) @ v.repeat_interleave(2, 1)).norm()))
    assert off[1] * 5 < off[0]


# -- answers that would be wrong -----------------------------------------------------------------


def uneven(heads: int, tokens: int, seed: int) -> Tensor:
    """Heads, tokens and channels of very different sizes, so that it matters who shares a scale."""
    x = normal(1, heads, tokens, 24, seed=seed)
    sizes = [torch.logspace(-1, 1, n) for n in (heads, tokens, 24)]
    return x * sizes[0][:, None, None] * sizes[1].flip(0)[:, None] * sizes[2]


def judged(p: Package, attn: Attention) -> bool:
    q, k, v = uneven(4, 40, 0), uneven(2, 40, 1), uneven(2, 40, 2)
    return reference.acceptance(p(q, k, v, return_lse=True), attn, q, k, v).ok


GROUPS = {
    "q": ("tensor", "head", "block(16)", "token"),
    "k": ("tensor", "head", "block(16)", "token"),
    "v": ("tensor", "head", "channel"),
}


@pytest.mark.parametrize("operand", GROUPS)
def test_scales_of_other_groups_are_refused(operand: str) -> None:
    made = {per: quantised(f"{operand}: int8(per={per})").tiles(16, 16) for per in GROUPS[operand]}
    assert all(judged(p, p.attn) for p in made.values())
    assert not [pair for pair in permutations(made, 2) if judged(made[pair[0]], made[pair[1]].attn)]


def test_operands_of_another_format_are_refused() -> None:
    made = [quantised(f"k: {form}(per=token)").tiles(16, 16) for form in ("int8", "fp8_e4m3", "fp8_e5m2")]
    made.append(package(f"{HEADS}dims: 24\ndtype: fp32\nmask: causal").tiles(16, 16))
    assert all(judged(p, p.attn) for p in made)
    assert not [1 for p, other in permutations(made, 2) if judged(p, other.attn)]


# -- groups that hold what is no number ----------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_shares_what_is_no_number(bad: float) -> None:
    """The oracle's scale of such a group is none, hidden keys or not; rows that see nothing of it stay empty."""
    q, k, v = normal(1, 4, 30, 24), normal(1, 2, 20, 24, seed=1), normal(1, 2, 20, 24, seed=2)
    v[0, 1, 19, 3] = bad
    p = quantised("v: fp8_e4m3(per=channel)").tiles(16, 16)
    o = p(q, k, v)
    assert reference.acceptance(o, p.attn, q, k, v).ok
    assert o[:, 2:, 10:, 3].isnan().all()
    assert not o[:, 2:, :10].any()
    assert o[..., [*range(3), *range(4, 24)]].isfinite().all()
    k[0, 0, 19, 0] = bad
    p = quantised("k: int8(per=head)").tiles(16, 16)
    o, lse = p(q, k, normal(1, 2, 20, 24), return_lse=True)
    assert o[:, :2, 10:].isnan().all()
    assert not o[:, :2, :10].any()
    assert (lse[:, :, :10] == -math.inf).all()
    assert o[:, 2:].isfinite().all()


def test_a_group_of_zeros_is_zero() -> None:
    q, k, v = normal(1, 4, 20, 24), normal(1, 2, 20, 24, seed=1), normal(1, 2, 20, 24, seed=2)
    v[:, 0], k[:, 1] = 0.0, 0.0
    p = quantised("q: int8, k: fp8_e4m3(per=head), v: fp8_e5m2(per=head)").tiles(16, 16)
    o = p(q, k, v)
    assert not o[:, :2].any()
    assert reference.acceptance(o, p.attn, q, k, v).ok


# -- the conversions themselves ------------------------------------------------------------------


@triton.jit
def convert(X, Codes, Back, MANTISSA: tl.constexpr, BIAS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Codes + at, to_fp8(tl.load(X + at), MANTISSA, BIAS, False))
    tl.store(Back + at, from_fp8(tl.load(Codes + at), MANTISSA, BIAS).to(tl.float32))


@pytest.mark.parametrize(
    ("theirs", "shape"), [(torch.float8_e4m3fn, (3, 7)), (torch.float8_e5m2, (2, 15))], ids=["e4m3", "e5m2"]
)
def test_fp8_has_the_bits_that_torch_gives_it(theirs: torch.dtype, shape: tuple[int, int]) -> None:
    """Every number of the format, halfway to the next one, close to that, and zero's sign."""
    numbers = torch.arange(256).to(torch.uint8).view(theirs).float()
    numbers = numbers[numbers.isfinite()]
    halves = (numbers.unique()[1:] + numbers.unique()[:-1]) / 2
    x = torch.cat([numbers, halves, halves * (1 + 1e-6), halves * (1 - 1e-6)])
    x = torch.cat([x, x.new_zeros(1024 - len(x))])
    codes, back = torch.empty(x.shape, dtype=torch.uint8), torch.empty_like(x)
    convert[(1,)](x, codes, back, *shape, len(x))
    assert torch.equal(codes, x.to(theirs).view(torch.uint8))
    assert torch.equal(back, x.to(theirs).float())
