"""The linear family: examples against the recurrences of their papers, at fewer columns than published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from golden import TESTS
from systems.smaller import close, dense, example, normal
from torch import Tensor
from torch.nn.functional import elu, logsigmoid, normalize, relu, silu, softplus

from attncc import reference
from attncc.ir.attention import Attention

B = 2
Tensors = Mapping[str, Tensor]


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    scale: float = 1.0,
    g: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o and the last state: fade, then write (or correct), then read.

    q, k [B, H, T, K], v [B, H, T, V], s [B, H, K, V], g [B, H, T, K or 1], beta [B, H, T].
    """
    o: list[Tensor] = []
    for t in range(q.shape[2]):
        if g is not None:
            s = torch.exp(g[:, :, t])[..., None] * s
        write = v[:, :, t]
        if beta is not None:
            write = beta[:, :, t, None] * (write - torch.einsum("bhk,bhkv->bhv", k[:, :, t], s))
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, :, t], write)
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, :, t], s))
    return torch.stack(o, 2), s


def _elu1(q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> tuple[Tensor, ...]:
    q, k = elu(q) + 1, elu(k) + 1
    o, s = recurrence(q, k, v, x["s0"])
    total, z = recurrence(q, k, torch.ones_like(v[..., :1]), x["z0"][..., None])
    return o / (total + 1e-10), s, z[..., 0]


def _relu(q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> tuple[Tensor, ...]:
    return recurrence(relu(q), relu(k), v, x["s0"], q.shape[-1] ** -0.5)


def _turned(t: Tensor, x: Tensors) -> Tensor:
    """Column n and n + D / 2 as one complex number, turned by its angle."""
    z = torch.complex(*t.chunk(2, -1)) * torch.complex(x["cos_table"], x["sin_table"])
    return torch.cat([z.real, z.imag], -1)


def _fixed(log: Tensor) -> Tensor:
    return log[None, :, None, None].expand(-1, -1, 64, -1)


def _retnet(q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> tuple[Tensor, ...]:
    gamma = 1 - 2.0 ** torch.arange(-5, -13, -1, dtype=torch.float64)
    return recurrence(_turned(q, x), _turned(k, x), v, x["s0"], q.shape[-1] ** -0.5, _fixed(torch.log(gamma)))


def _lightning(q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> tuple[Tensor, ...]:
    """Layer 3 of 24: slopes 8 h / H times 1 - 3 / 24."""
    slopes = torch.arange(16, dtype=torch.float64) * 0.5 * (21 / 24)
    return recurrence(q, k, v, x["s0"], q.shape[-1] ** -0.5, _fixed(-slopes))


def _gated(q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> tuple[Tensor, ...]:
    g = x["g"] if x["g"].ndim == 4 else x["g"][..., None]
    return recurrence(q, k, v, x["s0"], q.shape[-1] ** -0.5, g)


def _delta(q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> tuple[Tensor, ...]:
    g = x.get("g")
    g = g[..., None] if g is not None and g.ndim == 3 else g
    q, k = (normalize(silu(t), dim=-1) for t in (q, k))
    return recurrence(q, k, v, x["s0"], q.shape[-1] ** -0.5, g, x["beta"])


def _mamba2(q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> tuple[Tensor, ...]:
    """As the paper has it, of x = v / dt: h = exp(A dt) h + dt B x, y = C h + D x."""
    inner = v / x["dt"][..., None]
    state, y = x["s0"], []
    for t in range(q.shape[2]):
        entering = torch.einsum("bn,bh,bhp->bhnp", k[:, 0, t], x["dt"][:, :, t], inner[:, :, t])
        state = torch.exp(x["a_dt"][:, :, t])[..., None, None] * state + entering
        y.append(torch.einsum("bhn,bhnp->bhp", q[:, :, t], state) + x["D"][:, None] * inner[:, :, t])
    return torch.stack(y, 2), state


@dataclass(frozen=True)
class Case:
    """An example's definition, and how the inputs that may not be any numbers are made from normal ones."""

    of: Callable[[Tensor, Tensor, Tensor, Tensors], tuple[Tensor, ...]]
    drawn: Mapping[str, Callable[[Tensor], Tensor]]


GATE: Mapping[str, Callable[[Tensor], Tensor]] = {"g": lambda x: -torch.exp(x) * softplus(x + 0.1)}
BETA: Mapping[str, Callable[[Tensor], Tensor]] = {"beta": torch.sigmoid}
DIMS = {
    "dims: 128": "dims: 16",
    "dims: 256": "dims: 16",
    "{qk: 128, v: 64}": "{qk: 16, v: 12}",
    "{qk: 128, v: 256}": "{qk: 16, v: 12}",
    "{qk: 256, v: 512}": "{qk: 16, v: 12}",
}
CASES = {
    "linear_attention_elu1": Case(_elu1, {"z0": torch.exp}),
    "linear_attention_relu": Case(_relu, {}),
    "retnet": Case(_retnet, {}),
    "lightning_attention": Case(_lightning, {}),
    "simple_gla": Case(_gated, {"g": logsigmoid}),
    "gla": Case(_gated, {"g": lambda x: logsigmoid(x) / 16}),
    "mamba2_ssd": Case(_mamba2, {"a_dt": lambda x: -torch.exp(x), "dt": lambda x: softplus(x) + 0.1}),
    "deltanet": Case(_delta, {"beta": lambda x: 2 * torch.sigmoid(x)}),
    "gated_deltanet": Case(_delta, {**GATE, **BETA}),
    "kda": Case(_delta, {"g": logsigmoid, **BETA}),
}


def small(name: str) -> Attention:
    """The example with its own heads, which decays speak of, and 16 columns."""
    text = (TESTS.parent / "examples" / f"{name}.yaml").read_text()
    return example(name, *((old, new) for old, new in DIMS.items() if old in text))


def draw(name: str, attn: Attention, T: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    heads, dims = attn.heads, attn.dims
    sizes = {"B": B, "Hq": heads.q, "Sk": T, "Dqk": dims.qk, "Dv": dims.v}
    x: dict[str, Tensor] = {}
    for n, declared in enumerate(attn.inputs):
        made = normal(*(sizes.get(e, 1) if isinstance(e, str) else e for e in declared.shape), seed=n)
        x[declared.name] = CASES[name].drawn.get(declared.name, lambda t: t)(made)
    if "cos_table" in x:
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
        x |= {"cos_table": torch.cos(angle), "sin_table": torch.sin(angle)}
    q, k = normal(B, heads.q, T, dims.qk, seed=90), normal(B, heads.kv, T, dims.qk, seed=91)
    return q, k, normal(B, heads.v, T, dims.v, seed=92), x


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients(name: str) -> None:
    attn = small(name)
    q, k, v, x = draw(name, attn, 5)
    trained = {i.name for i in attn.inputs if i.grad}
    leaves = [t.requires_grad_() for t in (q, k, v, *(t for n, t in x.items() if n in trained))]
    got = reference.outputs(attn, q, k, v, inputs=x)
    made = [got.o, *got.taps.values()]
    want = CASES[name].of(q, k, v, x)
    assert len(made) == len(want)
    for mine, other in zip(made, want, strict=True):
        close(mine, other)
    weights = [normal(*t.shape, seed=7) for t in made]
    ours, theirs = (sum((t * w).sum() for t, w in zip(some, weights, strict=True)) for some in (made, want))
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_decode_goes_on_from_the_final_state(name: str) -> None:
    attn = small(name)
    q, k, v, x = draw(name, attn, 6)
    whole = reference.outputs(attn, q, k, v, inputs=x)
    tokens = {i.name: i.shape.index("Sk") for i in attn.inputs if "Sk" in i.shape}
    o: list[Tensor] = []
    for a, b in ((0, 3), (3, 4), (4, 6)):
        now = {n: t.narrow(tokens[n], a, b - a) if n in tokens else t for n, t in x.items()}
        some = reference.outputs(attn, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], inputs=now)
        o.append(some.o)
        x["s0"] = some.taps["final_state"]
        if "z0" in x:
            x["z0"] = some.taps["final_mass"]
    close(torch.cat(o, 2), whole.o)
    close(x["s0"], whole.taps["final_state"])


def test_retnet_is_a_sum_with_powers_of_gamma() -> None:
    """The parallel form of the paper: (Q K^T * gamma^(i - j)) V, of rows rotated outside."""
    attn = small("retnet")
    q, k, v, x = draw("retnet", attn, 7)
    x["s0"] = torch.zeros_like(x["s0"])
    gamma = 1 - 2.0 ** -(5 + torch.arange(8, dtype=torch.float64))
    apart = (torch.arange(7)[:, None] - torch.arange(7)).clamp(min=0)
    w = torch.tril(_turned(q, x) @ _turned(k, x).mT / 4 * gamma[:, None, None] ** apart)
    close(reference.attention(attn, q, k, v, inputs=x), w @ v)


# -- windows and prefixes ----------------------------------------------------------------------------


def test_scatterformer_attends_within_windows_of_any_size() -> None:
    attn = example("scatterformer")
    counts = [0, 1, 31, 32, 33, 0, 5]
    cuts = torch.tensor([0, *counts]).cumsum(0)
    n = sum(counts)
    q, k, v = (normal(n, 4, 32, seed=s).requires_grad_() for s in range(3))
    got = reference.attention(attn, q, k, v, cu_seqlens_q=cuts, cu_seqlens_k=cuts)
    window = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    w = torch.einsum("nhd,mhd->hnm", relu(q), relu(k)) * (window[:, None] == window)
    want = torch.einsum("hnm,mhd->nhd", w / (w.sum(-1, keepdim=True) + 1e-6), v)
    close(got, want)
    weight = normal(n, 4, 32, seed=3)
    ours, theirs = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (got, want))
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


def test_scatterformer_rows_without_features_are_0() -> None:
    attn, cuts = example("scatterformer"), torch.tensor([0, 3])
    q = (-normal(3, 4, 32).abs()).requires_grad_()
    o = reference.attention(attn, q, q.abs(), normal(3, 4, 32), cu_seqlens_q=cuts, cu_seqlens_k=cuts)
    assert not bool(o.any())
    assert bool(torch.autograd.grad(o.sum(), q)[0].isfinite().all())


SMALL = ("heads: 32", "heads: 3"), ("dims: 128", "dims: 16")


def _features(x: Tensor) -> Tensor:
    return elu(x / x.shape[-1] ** 0.25) + 1


def test_ntk_attention_is_softmax_beside_a_state() -> None:
    """The published formula, exponentials written out; gradients also where nothing is trained yet (Z = mass = 0)."""
    attn = example("ntk_attention", *SMALL)
    for size in (1.0, 0.0):
        q, k, v = (normal(B, 3, 6, 16, seed=s).requires_grad_() for s in range(3))
        Z, mass = (size * normal(1, 3, 16, 16)).requires_grad_(), (size * normal(1, 3, 16).abs()).requires_grad_()
        got = reference.outputs(attn, q, k, v, inputs={"Z": Z, "mass": mass})
        a, f = torch.exp(q @ k.mT / 4).tril(), _features(q)
        total = a.sum(-1) + (f * mass[:, :, None]).sum(-1)
        want = (a @ v + f @ Z) / total[..., None]
        close(got.o, want)
        assert got.lse is not None
        close(got.lse, torch.log(total))
        weight = normal(*want.shape, seed=5)
        ours, theirs = (torch.autograd.grad((o * weight).sum(), (q, k, v, Z, mass)) for o in (got.o, want))
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other)
            assert bool(other.any())


def test_ntk_attention_without_mass_is_attention() -> None:
    attn = example("ntk_attention", *SMALL)
    q, k, v = (normal(B, 3, 6, 16, seed=s) for s in range(3))
    got = reference.outputs(attn, q, k, v, inputs={"Z": torch.zeros(1, 3, 16, 16), "mass": torch.zeros(1, 3, 16)})
    o, lse, _ = dense(q, k, v, torch.ones(6, 6).tril().bool())
    close(got.o, o)
    assert got.lse is not None
    close(got.lse, lse)


def test_a_prefix_of_tokens_is_a_state_of_their_features() -> None:
    """Z = phi(K)^T V and mass = sum of phi(K) of prefix tokens: their weights are phi(q)·phi(k)."""
    attn = example("ntk_attention", *SMALL)
    q, k, v = (normal(B, 3, 6, 16, seed=s) for s in range(3))
    keys, values = normal(3, 50, 16, seed=8), normal(3, 50, 16, seed=9)
    f = _features(keys)
    got = reference.attention(attn, q, k, v, inputs={"Z": (f.mT @ values)[None], "mass": f.sum(1)[None]})
    a = torch.cat([_features(q) @ f.mT, torch.exp(q @ k.mT / math.sqrt(16)).tril()], -1)
    every = torch.cat([values.expand(B, -1, -1, -1), v], 2)
    close(got, a @ every / a.sum(-1, keepdim=True))
