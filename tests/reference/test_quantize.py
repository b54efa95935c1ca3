"""Quantizers against loops over single numbers: the integers, the groups that share a scale, and what is restored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from attncc import reference, spec
from attncc.errors import SpecError
from attncc.ir.attention import Call
from attncc.reference.formats import read_back

HEAD = """\
attncc: 1
name: small
heads: {q: 4, kv: 2}
dims: {qk: 8, v: 6}
"""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def operands(Sq: int = 37, Sk: int = 37, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return normal(B, 4, Sq, 8, seed=1), normal(B, 2, Sk, 8, seed=2), normal(B, 2, Sk, 6, seed=3)


def attend(body: str, q: Tensor, k: Tensor, v: Tensor | None, head: str = HEAD) -> reference.Outputs:
    return reference.outputs(spec.loads(head + body).attention, q, k, v)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """o and lse, GQA of 4 on 2."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    s = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(s.shape[-1] - s.shape[-2] + 1), -math.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def close(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# -- definitions, one number at a time -----------------------------------------------------------

Place = tuple[int, ...]
PER: dict[str, Callable[[str, Place], object]] = {
    "tensor": lambda operand, at: 0,
    "head": lambda operand, at: at[0],
    "channel": lambda operand, at: (at[0], at[2]),
    "token": lambda operand, at: at[:2],
    "block(16)": lambda operand, at: (at[0], at[1] // 16),
    "block": lambda operand, at: (at[0], at[1] // (128 if operand == "q" else 64)),
    "group(3)": lambda operand, at: (at[0], at[1], at[2] // 3),
    "thread": lambda operand, at: (
        (at[0], at[1] // 32, at[1] % 8) if operand == "q" else (at[0], at[1] // 64, at[1] % 8 // 2)
    ),
}
BITS = {"int8": 8, "int4": 4, "int2": 2}


def groups(x: Tensor, per: str, operand: str = "k") -> Iterator[list[Place]]:
    """The places [H, S, D] that share a scale."""
    found: dict[object, list[Place]] = {}
    for at in product(*map(range, x.shape)):
        found.setdefault(PER[per](operand, at), []).append(at)
    return iter(found.values())


def integers(numbers: list[float], bits: int) -> tuple[list[int], float]:
    """The whole numbers that a symmetric format stores, and their scale; Python's round goes half to even."""
    most = 2 ** (bits - 1) - 1
    scale = max(map(abs, numbers)) / most or 1.0
    return [max(-most, min(most, round(x / scale))) for x in numbers], scale


def levels(numbers: list[float], bits: int) -> list[float]:
    """An asymmetric format, read back."""
    low, high = min(numbers), max(numbers)
    step = (high - low) / (2**bits - 1) or 1.0
    return [round((x - low) / step) * step + low for x in numbers]


def defined(x: Tensor, dtype: str, per: str, symmetric: bool = True, operand: str = "k") -> Tensor:
    """[H, S, D] through an integer or fp8 format."""
    out = torch.full_like(x, math.nan)
    for places in groups(x, per, operand):
        numbers = [float(x[at]) for at in places]
        if not symmetric:
            kept = levels(numbers, BITS[dtype])
        elif dtype in BITS:
            whole, scale = integers(numbers, BITS[dtype])
            kept = [n * scale for n in whole]
        else:
            most, kind = (448.0, torch.float8_e4m3fn) if dtype == "fp8_e4m3" else (57344.0, torch.float8_e5m2)
            scale = max(map(abs, numbers)) / most
            kept = [float(torch.tensor(n / scale, dtype=torch.float64).to(kind)) * scale for n in numbers]
        for at, n in zip(places, kept, strict=True):
            out[at] = n
    return out


def batched(x: Tensor, dtype: str, per: str, symmetric: bool = True, operand: str = "k") -> Tensor:
    return torch.stack([defined(one, dtype, per, symmetric, operand) for one in x])


# -- granularities and formats -------------------------------------------------------------------


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("operand", ["q", "k"])
def test_groups_share_a_scale(per: str, operand: str) -> None:
    q, k, v = operands(Sq=140, Sk=140, B=1)
    expected = {"q": q, "k": k}
    expected[operand] = batched(expected[operand], "int8", per, operand=operand)
    o, lse = dense(expected["q"], expected["k"], v)
    got = attend(f"quantize: {{{operand}: int8(per={per})}}\n", q, k, v)
    close(got.o, o)
    close(got.lse, lse)


@pytest.mark.parametrize("text", ["int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_in_every_format(text: str, symmetric: bool) -> None:
    if text.startswith("fp8") and not symmetric:
        return
    q, k, v = operands()
    body = f"quantize: {{v: '{text}(per=token, symmetric={str(symmetric).lower()})'}}\n"
    close(attend(body, q, k, v).o, dense(q, k, batched(v, text, "token", symmetric))[0])


def test_ties_go_to_even_and_extremes_are_reached() -> None:
    x = torch.tensor([[[127.0, 0.5, 1.5, -0.5, -2.5, -127.0, 126.5, 0.0]]], dtype=torch.float64)
    assert read_back(x, "int8", None)[0, 0].tolist() == [127, 0, 2, 0, -2, -127, 126, 0]
    x = torch.tensor([[[0.0, 0.5, 1.5, 15.0]]], dtype=torch.float64)
    assert read_back(x, "int4", None, symmetric=False)[0, 0].tolist() == [0, 0, 2, 15]
    assert read_back(x * 0, "int4", None, symmetric=False).tolist() == (x * 0).tolist()
    assert read_back(x * 0, "int4", None).tolist() == (x * 0).tolist()
    assert read_back(x[:, :0], "int4", None).shape == (1, 0, 4)


def test_nvfp4_is_e2m1_in_groups_with_e4m3_scales() -> None:
    x = normal(2, 3, 40) * 3
    numbers = [sign * n for sign in (1, -1) for n in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    even = {0.0, 1.0, 2.0, 4.0}
    out = torch.zeros_like(x)
    for h, s, start in product(range(2), range(3), range(0, 40, 16)):
        group = x[h, s, start : start + 16]
        scale = float((group.abs().max() / 6).to(torch.float8_e4m3fn))
        for d, n in enumerate(group.tolist()):
            out[h, s, start + d] = scale * min(numbers, key=lambda y: (abs(n / scale - y), abs(y) not in even))
    close(read_back(x, "nvfp4", None), out)
    tie = torch.tensor([[[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0]]])
    assert read_back(tie, "nvfp4", None)[0, 0].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -4]
    q, k, v = operands()
    kept = torch.stack([read_back(one, "nvfp4", None) for one in k])
    close(attend("quantize: {k: nvfp4}\n", q, k, v).o, dense(q, kept, v)[0])


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_reading_back_twice_changes_nothing(dtype: str, symmetric: bool) -> None:
    once = defined(normal(2, 21, 8), dtype, "token", symmetric or dtype.startswith("fp8"))
    close(read_back(once, dtype, Call("token"), symmetric), once)


def test_computed_in_float64_whatever_the_operands_are() -> None:
    q, k, v = (x.bfloat16() for x in operands())
    got = attend("quantize: {k: int8(per=token)}\n", q, k, v).o
    close(got, dense(q.double(), batched(k.double(), "int8", "token"), v.double())[0])
    narrow = reference.outputs(spec.loads(HEAD + "quantize: {k: int8(per=token)}\n").attention, q, k, v, dtype=None).o
    torch.testing.assert_close(narrow.double(), got, rtol=0.05, atol=0.05)


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int8"])
def test_weights_are_relative_to_the_greatest_of_their_row(dtype: str) -> None:
    q, k, v = operands(Sq=11)
    s = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).masked_fill(
        torch.ones(11, 37, dtype=torch.bool).triu(27), -math.inf
    )
    relative = (s - s.amax(-1, keepdim=True)).exp()
    most, kind = {"fp8_e4m3": (448, torch.float8_e4m3fn), "int8": (127, None)}[dtype]
    stored = (relative * most).to(kind).double() if kind else torch.round(relative * most)
    expected = stored / most @ v.repeat_interleave(2, 1) / relative.sum(-1, keepdim=True)
    got = attend(f"mask: causal\nquantize: {{p: {dtype}}}\n", q, k, v)
    close(got.o, expected)
    close(got.lse, s.logsumexp(-1))  # the denominator sums the weights before they are stored


def test_unsigned_weights_have_twice_the_levels() -> None:
    q, k, v = operands(Sq=5)
    s = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    relative = (s - s.amax(-1, keepdim=True)).exp()
    expected = torch.round(relative * 255) / 255 @ v.repeat_interleave(2, 1) / relative.sum(-1, keepdim=True)
    close(attend("quantize: {p: 'int8(symmetric=false)'}\n", q, k, v).o, expected)


# -- smoothing -----------------------------------------------------------------------------------


def test_smoothing_restores_products_and_lse() -> None:
    """True lse = lse' + scale * q km: with keys that the format holds exactly, nothing is left of it."""
    q, _, v = operands()
    held = torch.randint(-7, 8, (2, 2, 37, 8), generator=torch.Generator().manual_seed(0)).double()
    held[:, :, 0], held[:, :, 1] = 7, -7
    held = held - held.mean(2, keepdim=True).round()  # whole numbers; a mean of their own stays
    bias = 50 * normal(1, 2, 1, 8, seed=9)
    for keys in (held, held + bias):
        km = keys.mean(2, keepdim=True)
        centred = batched(keys - km, "int8", "token")
        s = (q @ (centred + km).repeat_interleave(2, 1).mT) / math.sqrt(8)
        got = attend("quantize: {k: 'int8(per=token, smooth=mean)'}\n", q, keys, v)
        close(got.lse, s.logsumexp(-1))
        close(got.o, s.softmax(-1) @ v.repeat_interleave(2, 1))


def test_queries_may_be_smoothed_too() -> None:
    q, k, v = operands()
    q, k = q + 3, k - 2
    qm, km = q.mean(2, keepdim=True), k.mean(2, keepdim=True)
    q4 = batched(q - qm, "int4", "token", operand="q")
    k4 = batched(k - km, "int4", "token")
    wide = {"k": (k - km).repeat_interleave(2, 1), "k4": k4.repeat_interleave(2, 1), "km": km.repeat_interleave(2, 1)}
    s = (q4 @ wide["k4"].mT + q @ wide["km"].mT + qm @ wide["k"].mT) / math.sqrt(8)
    body = "quantize: {q: 'int4(per=token, smooth=mean)', k: 'int4(per=token, smooth=mean)'}\n"
    got = attend(body, q, k, v)
    close(got.lse, s.logsumexp(-1))
    close(got.o, s.softmax(-1) @ v.repeat_interleave(2, 1))


def test_a_large_bias_of_a_channel_is_what_smoothing_is_for() -> None:
    q, k, v = operands()
    k = k + torch.tensor([0, 0, 200.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    exact = dense(q, k, v)[0]
    error = {
        smooth: float((attend(f"quantize: {{k: 'int8(per=block{smooth})'}}\n", q, k, v).o - exact).abs().max())
        for smooth in ("", ", smooth=mean")
    }
    assert error[", smooth=mean"] < 0.03 < 0.3 < error[""]


# -- the cache -----------------------------------------------------------------------------------


def test_the_cache_is_keys_and_values() -> None:
    q, k, v = operands()
    got = attend("quantize: {cache: 'int4(per=token, symmetric=false)'}\n", q, k, v).o
    close(got, dense(q, batched(k, "int4", "token", False), batched(v, "int4", "token", False))[0])


def test_groups_of_a_plain_cache_are_columns_of_a_token() -> None:
    """Of keys too: a token may be stored alone."""
    q, k, v = operands()
    got = attend("quantize: {cache: 'int4(per=group(3))'}\n", q, k, v).o
    close(got, dense(q, batched(k, "int4", "group(3)"), batched(v, "int4", "group(3)"))[0])


def replayed(x: Tensor, formats: list[str], length: int, keys: bool, symmetric: bool) -> Tensor:
    """[S, D], the newest segment in formats[1], then down; groups of 3 tokens (keys) or 3 channels (values)."""
    full, out = len(x) // length, x.clone()
    for segment in range(full):
        age = full - 1 - segment
        mine = out[segment * length : (segment + 1) * length]
        for step in range(1, min(age + 1, len(formats) - 1) + 1):
            bits, one = BITS[formats[step]], mine.mT if keys else mine
            for line, start in product(range(len(one)), range(0, one.shape[1], 3)):
                part = one[line, start : start + 3].tolist()
                whole, scale = integers(part, bits)
                kept = [n * scale for n in whole] if symmetric else levels(part, bits)
                one[line, start : start + 3] = torch.tensor(kept, dtype=x.dtype)
    return out


@pytest.mark.parametrize("tokens", [3, 8, 20, 43])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_staircase_replays_what_each_segment_went_through(tokens: int, symmetric: bool) -> None:
    q, k, v = (x.bfloat16().double() for x in operands(Sq=2, Sk=tokens))
    stairs = "[(8, bf16), (16, int8), (24, int4), (inf, int2)]"
    body = f"quantize: {{cache: 'staircase({stairs}, per=group(3), symmetric={str(symmetric).lower()})'}}\n"

    def kept(x: Tensor, formats: list[str], keys: bool) -> Tensor:
        return torch.stack([torch.stack([replayed(head, formats, 8, keys, symmetric) for head in one]) for one in x])

    formats = ["bf16", "int8", "int4", "int2"]
    values = kept(v, formats, False)
    close(attend(body, q, k, v).o, dense(q, kept(k, formats, True), values)[0])
    if tokens == 43:  # 5 segments, oldest first: int2 int2 int2 int4 int8, then 3 tokens as they are
        assert bool((values[:, :, 40:] == v[:, :, 40:]).all())
        assert not torch.allclose(values[:, :, 32:40], v[:, :, 32:40], atol=1e-4)


def test_rounding_twice_is_not_rounding_once() -> None:
    """…but for 255, 15 and 3 steps, which nest in odd ratios: no midpoint of the wide ones is passed on the way."""
    x = normal(4, 50, 8)
    for symmetric in (True, False):
        twice = read_back(read_back(x, "int8", Call("token"), symmetric), "int4", Call("token"), symmetric)
        assert torch.allclose(twice, read_back(x, "int4", Call("token"), symmetric)) is not symmetric


def test_the_first_step_of_a_staircase_may_quantise_too() -> None:
    q, k, v = operands(Sq=2, Sk=11)
    body = "quantize: {cache: 'staircase([(8, int8), (inf, int4)], per=token)'}\n"
    twice = [batched(batched(x[:, :, :8], "int8", "token"), "int4", "token") for x in (k, v)]
    rest = [batched(x[:, :, 8:], "int8", "token") for x in (k, v)]
    kept = [torch.cat([a, b], 2) for a, b in zip(twice, rest, strict=True)]
    close(attend(body, q, k, v).o, dense(q, kept[0], kept[1])[0])


def test_a_wide_staircase_is_the_operands() -> None:
    q, k, v = operands()
    close(attend("quantize: {cache: 'staircase([(inf, fp32)])'}\n", q.float(), k.float(), v.float()).o,
          dense(q.float().double(), k.float().double(), v.float().double())[0])  # fmt: skip


def test_latent_values_are_columns_of_the_stored_keys() -> None:
    head = HEAD.replace("kv: 2", "kv: 1") + "kv: latent(rope=2)\n"
    q, k, _ = operands()
    k = k[:, :1]
    for body, kept in (
        ("quantize: {k: int4(per=token)}\n", batched(k, "int4", "token")),
        ("quantize: {cache: int4(per=token)}\n", torch.cat([batched(k[..., :6], "int4", "token"), k[..., 6:]], -1)),
        ("quantize: {k: 'int4(per=token, smooth=mean)'}\n",
         batched(k - k.mean(2, keepdim=True), "int4", "token") + k.mean(2, keepdim=True)),
    ):  # fmt: skip
        kept = kept.expand(-1, 2, -1, -1)
        close(attend(body, q, k, None, head).o, dense(q, kept, kept[..., :6])[0])


# -- what makes no sense -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("quantize: {p: int8(per=block(64))}", "relative to the greatest of their row"),
        ("quantize: {v: int8(per=thread)}", "in q and k"),
        ("quantize: {v: int8}\nkv: latent(rope=2)", "V is a view of K"),
        ("quantize: {k: int8}\nmodes: [prefill, backward]", "no gradient"),
        ("quantize: {k: int8(smooth=mean)}\ncolumns: [0, 4]", "products of whole queries"),
        ("quantize: {cache: 'staircase([(8, bf16), (20, int8), (inf, int4)])'}", "multiples"),
    ],
)
def test_impossible(body: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec.loads(f"{HEAD}{body}\n")
