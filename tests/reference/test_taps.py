"""Taps against the dense matrix of weights: one part, several parts, chunks of rows, gradients, layouts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from attncc import reference
from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call
from attncc.reference import sequence
from attncc.spec import loads

B, SQ, SK, C = 2, 11, 14, 3
HEAD = """attncc: 1
name: t
heads: {q: 4, kv: 2}
dims: 8
inputs:
  w: {shape: [B, Sq], grad: true}
  z: {shape: [B, Sq, Sk, C], grad: true}
  sinks: {shape: [Hq], grad: true}
  gk: {shape: [1, 4, 5, 8], grad: true}
  gv: {shape: [1, 4, 5, 8], grad: true}
  g: {shape: [B, Hq, Sq], grad: true}
outputs:
- o
- column_mass
- column_mass(w[b, row])
- column_mass(row >= Sq - 3)
- row_mass((j >= 2) & (j < 9))
- row_mass
- block_mass(4, 5)
- pair_value(z)
"""
BODIES = {
    "causal": "mask: causal\n",
    "sink": "mask: causal & window(4)\nnormalizer: softmax(sink=sinks[h])\n",
    "empty rows": "mask: causal & (j > 6)\n",
    "two parts": "parts: [{mask: j < 3}, {mask: causal & (j >= 3), normalizer: 'softmax(sink=sinks[h])'}]\n",
    "beside given keys": "parts: [{mask: causal}, {kv: 'given(gk, gv)'}]\n",
    "beside means": "parts: [{mask: causal}, {kv: pooled(4)}]\n",
    "added": "parts: [{mask: causal}, {mask: window(3)}]\ncombine: add\n",
    "interpolated": "parts: [{mask: causal}, {mask: causal & window(3)}]\ncombine: lerp(g[b, h, row])\n",
    "gated": "parts: [{mask: causal}, {mask: window(3)}]\ncombine: gate(g[b, h, row], 0.5)\n",
}
NAMES = [
    *("column_mass", "column_mass_2", "column_mass_3"),
    *("row_mass", "row_mass_2", "block_mass", "pair_value"),
]


def normal(*shape: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    return x.requires_grad_()


def operands() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    qkv = {"q": normal(B, 4, SQ, 8), "k": normal(B, 2, SK, 8), "v": normal(B, 2, SK, 8)}
    inputs = {"w": normal(B, SQ), "z": normal(B, SQ, SK, C), "sinks": normal(4)}
    inputs |= {"gk": normal(1, 4, 5, 8), "gv": normal(1, 4, 5, 8), "g": normal(B, 4, SQ)}
    return qkv, inputs


def matrix(body: str, qkv: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The weights [B, H, Sq, Sk] of each body, written out."""
    i, j = torch.arange(SQ)[:, None] + SK - SQ, torch.arange(SK)[None, :]
    causal = j <= i
    k = qkv["k"].repeat_interleave(2, 1)
    e = torch.exp(qkv["q"] @ k.transpose(2, 3) / math.sqrt(8))
    sink = torch.exp(inputs["sinks"])[None, :, None, None]

    def over(seen: Tensor, more: Tensor | float = 0.0) -> Tensor:
        x = torch.where(seen, e, 0.0)
        total = x.sum(3, keepdim=True) + more
        return x / torch.where(total == 0, 1.0, total)

    g = inputs["g"][..., None]
    band = (i - j < 3) & (j <= i)
    match body:
        case "causal":
            return over(causal)
        case "sink":
            return over(causal & (i - j < 4), sink)
        case "empty rows":
            return over(causal & (j > 6))
        case "two parts":
            return over(causal | (j < 3), sink)
        case "beside given keys":
            own = torch.exp(qkv["q"] @ inputs["gk"].transpose(2, 3) / math.sqrt(8))
            return over(causal, own.sum(3, keepdim=True))
        case "beside means":
            means = torch.stack([x.mean(2) for x in k.split(4, 2)], 2)
            return over(causal, torch.exp(qkv["q"] @ means.mT / math.sqrt(8)).sum(3, keepdim=True))
        case "added":
            return over(causal) + over(band)
        case "interpolated":
            return (1 - g) * over(causal) + g * over(band)
        case _:
            return g * over(causal) + 0.5 * over(band)


def expected(p: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    blocks = torch.zeros(B, 4, 3, 3, dtype=p.dtype)
    for x in range(3):
        for y in range(3):
            blocks[:, :, x, y] = p[:, :, 4 * x : 4 * x + 4, 5 * y : 5 * y + 5].sum((2, 3))
    values = sum(p[..., j, None] * inputs["z"][:, None, :, j] for j in range(SK))
    assert isinstance(values, Tensor)
    weighted = (p * inputs["w"][:, None, :, None]).sum(2)
    return [p.sum(2), weighted, p[:, :, -3:].sum(2), p[..., 2:9].sum(3), p.sum(3), blocks, values]


def attention(body: str) -> Attention:
    return loads(HEAD + BODIES[body]).attention


@pytest.mark.parametrize("chunk", [2**23, 4 * SK * 3], ids=["whole", "in chunks"])
@pytest.mark.parametrize("body", BODIES)
def test_taps_are_sums_of_the_weights(body: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "CHUNK_ELEMENTS", chunk)
    qkv, inputs = operands()
    got = reference.outputs(attention(body), **qkv, inputs=inputs).taps
    want = expected(matrix(body, qkv, inputs), inputs)
    assert list(got) == NAMES
    leaves = [*qkv.values(), *inputs.values()]
    for name, right in zip(NAMES, want, strict=True):
        torch.testing.assert_close(got[name], right, rtol=1e-9, atol=1e-11)
        d = torch.randn(right.shape, dtype=right.dtype, generator=torch.Generator().manual_seed(1))
        gradients = [grad((x * d).sum(), leaves, retain_graph=True, allow_unused=True) for x in (got[name], right)]
        for leaf, a, b in zip(leaves, *gradients, strict=True):
            zero = torch.zeros_like(leaf)
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-11)


def test_a_state_takes_its_share_and_has_no_columns() -> None:
    """Softmax beside a state of a learnt prefix, as NTK-Attention has it: rows sum to what softmax keeps of them."""
    text = """attncc: 1
name: t
heads: 2
dims: 8
inputs: {s0: {shape: [1, Hq, Dqk, Dv], grad: true}, mass: {shape: [1, Hq, Dqk], grad: true}}
parts:
- mask: causal
- normalizer: linear(0)
  state: {feature: elu1, update: none, initial: s0, initial_mass: mass, scale: 1.0}
outputs: [o, column_mass, row_mass]
"""
    q, k, v = normal(2, 2, 6, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8)
    s0, mass = normal(1, 2, 8, 8), normal(1, 2, 8).detach().abs().requires_grad_()
    got = reference.outputs(loads(text).attention, q, k, v, inputs={"s0": s0, "mass": mass}).taps
    e = torch.exp(q @ k.mT / math.sqrt(8)).tril()
    features = torch.nn.functional.elu(q) + 1
    p = e / (e.sum(3, keepdim=True) + (features * mass[:, :, None]).sum(3, keepdim=True))
    for name, axis in (("column_mass", 2), ("row_mass", 3)):
        torch.testing.assert_close(got[name], p.sum(axis), rtol=1e-9, atol=1e-11)
        for a, b in zip(
            grad(got[name][..., 0].sum(), (q, k, mass), retain_graph=True),
            grad(p.sum(axis)[..., 0].sum(), (q, k, mass), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_rows_of_block_masses_sum_to_their_queries() -> None:
    """Without an empty row each row has a mass of 1: AdaSpa's search counts on it."""
    attn = loads("attncc: 1\nname: t\nheads: 2\ndims: 8\nmask: causal\noutputs: [o, 'block_mass(4, 3)']\n").attention
    q, k, v = normal(1, 2, 10, 8), normal(1, 2, 10, 8), normal(1, 2, 10, 8)
    mass = reference.outputs(attn, q, k, v).taps["block_mass"]
    torch.testing.assert_close(mass.sum(3), torch.tensor([4.0, 4.0, 2.0], dtype=q.dtype).expand(1, 2, 3))
    assert mass[0, 0, 0, 2] == 0  # keys 6 to 8 lie behind rows 0 to 3


def test_packed_sequences_have_taps_of_their_own() -> None:
    text = "attncc: 1\nname: t\nheads: 2\ndims: 8\nmask: causal\noutputs: [o, column_mass, 'block_mass(2, 2)']\n"
    lengths = [5, 0, 3]
    cu = torch.tensor([0, 5, 5, 8])
    q, k, v = normal(8, 2, 8), normal(8, 2, 8), normal(8, 2, 8)
    packed = loads(text + "layout: varlen\n").attention
    got = reference.outputs(packed, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu).taps
    assert isinstance(got["column_mass"], tuple)
    assert [x.shape[1] for x in got["column_mass"]] == lengths
    assert got["block_mass"][1].shape == (2, 0, 0)
    dense = replace(packed, layout="bhsd")
    for n, at in ((0, slice(0, 5)), (2, slice(5, 8))):
        one = reference.outputs(dense, *(x[at].transpose(0, 1)[None] for x in (q, k, v))).taps
        for name, pieces in got.items():
            torch.testing.assert_close(pieces[n], one[name][0])


def test_pair_values_of_one_row_serve_all() -> None:
    text = "attncc: 1\nname: t\nheads: 2\ndims: 8\ninputs: {z: {shape: [1, 1, Sk, 2]}}\noutputs: [o, pair_value(z)]\n"
    q, k, v, z = normal(2, 2, 4, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8), normal(1, 1, 6, 2)
    got = reference.outputs(loads(text).attention, q, k, v, inputs={"z": z}).taps["pair_value"]
    p = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8), 3)
    torch.testing.assert_close(got, p @ z[:, 0][None])


def test_selected_keys_alone_have_mass() -> None:
    text = """attncc: 1
name: t
heads: 2
dims: 8
mask: causal
select: {block: {q: 4, k: 3}, score: pooled_dot, rule: topk(2), force: [diagonal]}
outputs: [o, column_mass, 'block_mass(4, 3)', indices]
"""
    q, k, v = normal(2, 2, 14, 8), normal(2, 2, 14, 8), normal(2, 2, 14, 8)
    got = reference.outputs(loads(text).attention, q, k, v)
    chosen = (got.taps["indices"] == 1).repeat_interleave(4, 2)[:, :, :14].repeat_interleave(3, 3)[..., :14]
    e = torch.where(chosen, torch.exp(q @ k.mT / math.sqrt(8)), 0.0).tril()
    p = e / e.sum(3, keepdim=True)
    torch.testing.assert_close(got.o, p @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.taps["column_mass"], p.sum(2), rtol=1e-9, atol=1e-11)
    assert bool((got.taps["block_mass"][got.taps["indices"] != 1] == 0).all())


def test_a_projected_sum_has_no_weights() -> None:
    text = "attncc: 1\nname: t\nheads: 2\ndims: 8\ninputs: {w: {shape: [Dv, Dv]}}\n"
    text += "parts: [{mask: causal}, {mask: j < 2}]\ncombine: add(w)\n"
    attn = replace(loads(text).attention, outputs=(Call("o"), Call("row_mass")))
    with pytest.raises(Unsupported, match="projection"):
        reference.outputs(attn, *(normal(1, 2, 4, 8) for _ in "qkv"), inputs={"w": normal(8, 8)})
