"""Steps before attention against loops over tokens and columns; attention behind them is torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d
from torch.nn.functional import pad as padded

from attncc import reference, spec
from attncc.errors import SpecError
from attncc.ir.attention import Attention
from attncc.reference import Outputs
from attncc.reference.evaluate import Scope
from attncc.reference.rotary import rotate

HEAD = """\
attncc: 1
name: small
heads: {q: 4, kv: 2}
dims: {qk: 8, v: 6}
inputs:
  w: {shape: [8], grad: true}
  wh: {shape: [Hk, 8], grad: true}
  t: {shape: [Hk], grad: true}
  s: {shape: [Hq], grad: true}
  other: {shape: [B, Hq, Sq, 8], grad: true}
  cosines: {shape: [P, 3]}
  sines: {shape: [P, 3]}
  c0: {shape: [6, 8, 3], grad: true}
  b0: {shape: [6, 8], grad: true}
  c1: {shape: [48, 8, 2], grad: true}
  b1: {shape: [48], grad: true}
  ck: {shape: [2, 8, 2], grad: true}
mask: causal
modes: [prefill, backward]
"""
Operands = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def operands(Sq: int = 7, Sk: int = 7) -> tuple[Operands, Operands]:
    """q, k, v, and the inputs."""
    shapes = {"w": (8,), "wh": (2, 8), "t": (2,), "s": (4,), "other": (2, 4, Sq, 8), "ck": (2, 8, 2)}
    shapes |= {"c0": (6, 8, 3), "b0": (6, 8), "c1": (48, 8, 2), "b1": (48,), "cosines": (20, 3), "sines": (20, 3)}
    inputs = {name: normal(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    return {"q": normal(2, 4, Sq, 8), "k": normal(2, 2, Sk, 8, seed=1), "v": normal(2, 2, Sk, 6, seed=2)}, inputs


def evaluated(attn: Attention, x: Operands, inputs: Operands, dtype: torch.dtype | None = torch.float64) -> Outputs:
    return reference.outputs(attn, x["q"], x["k"], x["v"], inputs=inputs, dtype=dtype)


def dense(x: Operands) -> Tensor:
    q, k, v = x["q"], *(x[name].repeat_interleave(2, 1) for name in "kv")
    s = q @ k.mT / math.sqrt(8)
    hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1 + s.shape[-1] - s.shape[-2])
    return s.masked_fill(hidden, -math.inf).softmax(-1) @ v


def turned(x: Tensor, dims: int, base: float, neighbours: bool = False, first: int = 0) -> Tensor:
    """Rotary positions as complex numbers: column pairs times exp(i position frequency)."""
    columns = []
    for t in range(dims // 2):
        a, b = (2 * t, 2 * t + 1) if neighbours else (t, t + dims // 2)
        angle = (torch.arange(x.shape[2]) + first).double() * base ** (-2 * t / dims)
        z = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)
        columns += [(a, z.real), (b, z.imag)]
    out = list(x.unbind(-1))
    for at, column in columns:
        out[at] = column
    return torch.stack(out, -1)


def looked_up(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = cos[: x.shape[2]], sin[: x.shape[2]]
    a, b = x[..., :3], x[..., 3:6]
    return torch.cat([a * c - b * s, b * c + a * s, x[..., 6:]], -1)


def over(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    """Root mean square norm, token by token."""
    return torch.stack([row / (row.pow(2).mean(-1, keepdim=True) + eps).sqrt() for row in x.unbind(2)], 2) * weight


def unit(x: Tensor, to: float = 1.0, eps: float = 1e-6) -> Tensor:
    return x / torch.maximum(x.pow(2).sum(-1, keepdim=True).sqrt(), torch.tensor(eps)) * to


def convolved(x: Tensor, zeros: int, *kernels: tuple[Tensor, Tensor | None, int]) -> Tensor:
    """[B, H, S, D] through torch's conv1d of the heads' columns, `zeros` before the first token."""
    y = padded(x.transpose(2, 3).flatten(1, 2), (zeros, 0))
    for weight, bias, groups in kernels:
        y = conv1d(y, weight, bias, groups=groups)
    return y.unflatten(1, (x.shape[1], -1)).transpose(2, 3)


def both(x: Operands, f: Callable[[Tensor], Tensor]) -> Operands:
    return {**x, "q": f(x["q"]), "k": f(x["k"])}


def hadamard(n: int) -> Tensor:
    return torch.tensor([[(-1.0) ** bin(a & b).count("1") for a in range(n)] for b in range(n)]).double() / math.sqrt(n)


def shifted(v: Tensor, delayed: int) -> Tensor:
    """The last columns of [B, S, H * D] one token later."""
    flat = v.transpose(1, 2).flatten(2)
    out = torch.zeros_like(flat)
    for t in range(flat.shape[1]):
        for c in range(flat.shape[2]):
            late = c >= flat.shape[2] - delayed
            if not late or t:
                out[:, t, c] = flat[:, t - late, c]
    return out.unflatten(2, v.shape[1::2]).transpose(1, 2)


def residual(x: Operands, entered: Operands, scale: float) -> Operands:
    q, k = x["q"].clone(), x["k"].clone()
    for h in range(4):
        mean = scale * (entered["q"][:, h] + entered["k"][:, h // 2])
        q[:, h] = q[:, h] + mean
        k[:, h // 2] = k[:, h // 2] + mean / 2
    return {**x, "q": q, "k": k}


def compressed(x: Operands, i: Operands) -> Operands:
    """Two convolutions with zeros before them once, and the residual of what came before the convolutions."""
    r = torch.cat([x["q"], x["k"]], 1)
    c = convolved(r, 3, (i["c0"].reshape(48, 1, 3), i["b0"].reshape(48), 48), (i["c1"], i["b1"], 6))
    return residual({**x, "q": c[:, :4], "k": c[:, 4:]}, x, 0.5)


STEPS: dict[str, Callable[[Operands, Operands], Operands]] = {
    "rope": lambda x, i: both(x, lambda y: turned(y, 8, 10000.0)),
    "rope(dims=4, base=5000.0)": lambda x, i: both(x, lambda y: turned(y, 4, 5000.0)),
    "rope(pairs=interleaved, on=k)": lambda x, i: {**x, "k": turned(x["k"], 8, 10000.0, neighbours=True)},
    "rope(cos=cosines, sin=sines)": lambda x, i: both(x, lambda y: looked_up(y, i["cosines"], i["sines"])),
    "rms_norm": lambda x, i: both(x, over),
    "rms_norm(weight=w, eps=0.5, on=q)": lambda x, i: {**x, "q": over(x["q"], i["w"], 0.5)},
    "rms_norm(weight=wh, on=k)": lambda x, i: {**x, "k": over(x["k"], i["wh"][:, None])},
    "l2_norm": lambda x, i: both(x, unit),
    "l2_norm(to=2.5, eps=3.0)": lambda x, i: both(x, lambda y: unit(y, 2.5, 3.0)),
    "silu(on=v)": lambda x, i: {**x, "v": x["v"] / (1 + torch.exp(-x["v"]))},
    "temperature(t[hk], on=k)": lambda x, i: {**x, "k": x["k"] * i["t"][:, None, None]},
    "temperature(t[hk] * s[h], on=q)": lambda x, i: {
        **x, "q": x["q"] * (i["t"].repeat_interleave(2) * i["s"])[:, None, None]
    },
    "temperature(1.0 + h, on=v)": lambda x, i: {**x, "v": x["v"] * torch.tensor([1.0, 2.0])[:, None, None]},
    "lerp(other, 0.25, on=q)": lambda x, i: {**x, "q": 0.75 * x["q"] + 0.25 * i["other"]},
    "smooth(on=k)": lambda x, i: {**x, "k": x["k"] - x["k"].sum(2, keepdim=True) / 7},
    "hadamard": lambda x, i: both(x, lambda y: y @ hadamard(8)),
    "hadamard(on=k)": lambda x, i: {**x, "k": x["k"] @ hadamard(8)},
    "value_shift(fraction=0.5)": lambda x, i: {**x, "v": shifted(x["v"], 6)},
    "value_shift(fraction=0.25)": lambda x, i: {**x, "v": shifted(x["v"], 3)},
    "causal_conv(ck, on=k)": lambda x, i: {**x, "k": convolved(x["k"], 1, (i["ck"].reshape(16, 1, 2), None, 16))},
    "mean_residual(scale=0.3)": lambda x, i: residual(x, x, 0.3),
    "causal_conv(c0, kernel=3, bias=b0); causal_conv(c1, groups=heads, bias=b1); mean_residual(scale=0.5)": compressed,
    "causal_conv(ck, on=k); smooth(on=k); causal_conv(ck, on=k)": lambda x, i: {
        **x, "k": convolved(
            (y := convolved(x["k"], 1, (i["ck"].reshape(16, 1, 2), None, 16))) - y.mean(2, keepdim=True),
            1, (i["ck"].reshape(16, 1, 2), None, 16),
        ),
    },
    "l2_norm(to=2.0); temperature(t[hk], on=k); rope(dims=4)": lambda x, i: both(
        {**x, "q": unit(x["q"], 2.0), "k": unit(x["k"], 2.0) * i["t"][:, None, None]}, lambda y: turned(y, 4, 10000.0)
    ),
}  # fmt: skip


def gradients(o: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum that weighs each number differently."""
    weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    found = torch.autograd.grad((o * weight).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def variant(steps: str, head: str = HEAD) -> spec.Spec:
    return spec.loads(head + "prologue:\n" + "".join(f"- {step}\n" for step in steps.split("; ")))


@pytest.mark.parametrize("steps", STEPS)
def test_a_step_and_its_gradients(steps: str) -> None:
    x, inputs = operands()
    leaves = [*x.values(), *inputs.values()]
    o = evaluated(variant(steps).attention, x, inputs).o
    expected = dense(STEPS[steps](x, inputs))
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
    for got, right in zip(gradients(o, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


def test_queries_stand_where_the_alignment_puts_them() -> None:
    x, inputs = operands(Sq=3, Sk=9)
    o = evaluated(variant("rope").attention, x, inputs).o
    right = {**x, "q": turned(x["q"], 8, 10000.0, first=6), "k": turned(x["k"], 8, 10000.0)}
    torch.testing.assert_close(o, dense(right), rtol=1e-9, atol=1e-9)


def test_positions_of_many_rows_broadcast_against_the_keys() -> None:
    """Packed positions differ from row to row: x [H, 1, K, D] and positions [H, R, K] give [H, R, K, D]."""
    x, (rope,) = normal(2, 5, 8), variant("rope(dims=4)").attention.prologue
    positions = torch.randint(0, 9, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    scope = Scope({}, {}, torch.float64, torch.device("cpu"))
    got = rotate(x[:, None], positions, rope, scope)
    for h, r, key in product(range(2), range(3), range(5)):
        alone = turned(x[None, h : h + 1, key : key + 1], 4, 10000.0, first=int(positions[h, r, key]))
        torch.testing.assert_close(got[h, r, key], alone[0, 0, 0], rtol=1e-9, atol=1e-9)


def test_convolutions_that_follow_each_other_pad_once() -> None:
    """What stands left of token 0 for the second is the bias of the first: other zeros change token 0, and it alone."""
    x, i = operands()
    steps = "causal_conv(c0, bias=b0); causal_conv(c1, groups=heads, bias=b1)"
    first = (i["c0"].reshape(48, 1, 3), i["b0"].reshape(48), 48)
    r = torch.cat([x["q"], x["k"]], 1)
    apart = convolved(convolved(r, 2, first), 1, (i["c1"], i["b1"], 6))
    once = convolved(r, 3, first, (i["c1"], i["b1"], 6))
    torch.testing.assert_close(apart[:, :, 1:], once[:, :, 1:])
    assert not torch.allclose(apart[:, :, 0], once[:, :, 0], atol=1e-3)
    s = evaluated(variant(steps).attention, x, i)
    assert s.lse is not None
    single = torch.einsum("bhd,bhd->bh", once[:, :4, 0], once[:, 4:, 0].repeat_interleave(2, 1)) / math.sqrt(8)
    torch.testing.assert_close(s.lse[:, :, 0], single, rtol=1e-9, atol=1e-9)


def test_steps_in_bf16_are_near_those_in_float64() -> None:
    x, inputs = operands()
    narrow = {name: y.detach().bfloat16() for name, y in x.items()}
    attn = variant("rms_norm; rope; hadamard").attention
    wide = evaluated(attn, narrow, inputs).o
    o = evaluated(attn, narrow, inputs, dtype=None).o
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.double(), wide, rtol=0.05, atol=0.05)


ABSORB = """\
attncc: 1
name: small
heads: {q: 4, kv: 1}
dims: {qk: 8, v: 5}
inputs:
  up: {shape: [Hq, 3, 5], grad: true}
kv: latent(rope=3)
prologue: ["absorb(up, on=q)"]
"""


def test_an_absorbed_projection_widens_the_queries() -> None:
    attn = spec.loads(ABSORB).attention
    q, k, up = normal(2, 4, 3, 6), normal(2, 1, 9, 8), normal(4, 3, 5)
    keys = torch.cat([torch.einsum("hnr,bkr->bhkn", up, k[:, 0, :, :5]), k[..., 5:].expand(-1, 4, -1, -1)], -1)
    expected = (q @ keys.mT / math.sqrt(8)).softmax(-1) @ k[..., :5]
    got = reference.outputs(attn, q, k, inputs={"up": up}).o
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(got, [q, k, up]), gradients(expected, [q, k, up]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="q: expected a last axis of 6"):
        reference.outputs(attn, normal(2, 4, 3, 8), k, inputs={"up": up})


def test_keys_and_values_may_absorb_projections_too() -> None:
    text = ABSORB.replace("kv: 1", "kv: 2").replace("kv: latent(rope=3)\n", "").replace("[Hq, 3, 5]", "[2, 3, 5]")
    q, k, v, up = normal(2, 4, 3, 8), normal(2, 2, 9, 6), normal(2, 2, 9, 3), normal(2, 3, 5)
    attn = spec.loads(text.replace('["absorb(up, on=q)"]', '["absorb(up, on=k)", "absorb(up, on=v)"]')).attention
    keys = torch.cat([k[..., :3] @ up, k[..., 3:]], -1).repeat_interleave(2, 1)
    expected = (q @ keys.mT / math.sqrt(8)).softmax(-1) @ (v @ up).repeat_interleave(2, 1)
    torch.testing.assert_close(reference.outputs(attn, q, k, v, inputs={"up": up}).o, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("step", "message"),
    [("rope(on=v)", "the head has 7"), ("mean_residual(scale=0.5, on=v)", "queries and keys")],
)
def test_impossible(step: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        variant(step, HEAD.replace("v: 6", "v: 7"))


def test_bad_inputs_are_named() -> None:
    x, inputs = operands()
    for steps, message in {
        "causal_conv(c0, kernel=2)": "c0: expected a kernel of 2, got 3",
        "rope(cos=cosines, sin=sines, dims=8)": "cosines: expected 4 columns, got 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluated(variant(steps).attention, x, inputs)
    x, inputs = operands(Sq=3)
    with pytest.raises(ValueError, match="expected 7 rows, one a key"):
        evaluated(variant("mean_residual(scale=0.5)").attention, x, inputs)
