"""Compressed and composed systems, each example against a definition of its own, at its own heads and dims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, normalize, pad, scaled_dot_product_attention

from attncc import reference, spec
from attncc.ir.attention import Attention

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Attention:
    return spec.load(EXAMPLES / f"{name}.yaml").attention


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).requires_grad_()


def close(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def same_gradients(got: Tensor, expected: Tensor, leaves: Sequence[Tensor]) -> None:
    weight = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), leaves, retain_graph=True),
        strict=True,
    ):
        close(a, b)


def softmax_of(s: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Weights and lse of scores [..., Sq, Sk]."""
    if causal:
        rows, keys = s.shape[-2:]
        s = torch.stack([s[..., r, :].masked_fill(torch.arange(keys) > r + keys - rows, -math.inf)
                         for r in range(rows)], -2)  # fmt: skip
    lse = s.exp().sum(-1).log()
    return (s - lse[..., None]).exp(), lse


# -- DeepSeek's latent attention -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latent:
    """One layer's q [B, H, S, 128 + 64], latent c [B, S, 512], turned keys [B, S, 64] and projections."""

    q: Tensor = field(default_factory=lambda: normal(1, 128, 3, 192))
    c: Tensor = field(default_factory=lambda: normal(1, 7, 512))
    turned: Tensor = field(default_factory=lambda: normal(1, 7, 64))
    w_uk: Tensor = field(default_factory=lambda: normal(128, 128, 512, scale=512**-0.5).detach())
    w_uv: Tensor = field(default_factory=lambda: normal(128, 512, 128, scale=512**-0.5).detach())

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """What training makes of the latent: k [B, H, S, 192], v [B, H, S, 128]."""
        up = torch.einsum("hnr,bsr->bhsn", self.w_uk, self.c)
        return torch.cat([up, self.turned[:, None].expand(-1, 128, -1, -1)], -1), torch.einsum(
            "hrd,bsr->bhsd", self.w_uv, self.c
        )


def naive(x: Latent) -> tuple[Tensor, Tensor]:
    k, v = x.keys_and_values()
    s = torch.einsum("bhid,bhjd->bhij", x.q, k) / math.sqrt(192)
    p, lse = softmax_of(s)
    return torch.einsum("bhij,bhjd->bhid", p, v), lse


def test_mla_naive() -> None:
    x = Latent()
    k, v = x.keys_and_values()
    got = reference.outputs(example("mla_naive"), x.q, k, v)
    o, lse = naive(x)
    close(got.o, o)
    close(got.lse, lse)
    same_gradients(got.o, o, [x.q, x.c, x.turned])


def test_mla_absorbed_is_mla_naive() -> None:
    """o and lse alike, at the scale of 192 columns; the cache alone is read."""
    x = Latent()
    cache = torch.cat([x.c, x.turned], -1)[:, None]
    got = reference.outputs(example("mla_absorbed"), x.q, cache, inputs={"w_uk": x.w_uk, "w_uv": x.w_uv})
    o, lse = naive(x)
    close(got.o, o)
    close(got.lse, lse)


def test_mla_decodes_token_by_token() -> None:
    x = Latent(q=normal(1, 128, 7, 192))
    inputs = {"w_uk": x.w_uk, "w_uv": x.w_uv}
    cache = torch.cat([x.c, x.turned], -1)[:, None]
    whole = naive(x)[0]
    for t in (0, 1, 6):
        step = reference.outputs(example("mla_absorbed"), x.q[:, :, t : t + 1], cache[:, :, : t + 1], inputs=inputs)
        close(step.o[:, :, 0], whole[:, :, t])


def test_mla_paged_is_mla_naive_but_for_its_projections() -> None:
    """Those of keys and values are the caller's; latents lie in pages of 64, in no order."""
    x = Latent(c=normal(1, 130, 512), turned=normal(1, 130, 64))
    cache = torch.full((6, 64, 1, 576), math.nan, dtype=torch.float64)
    table = torch.tensor([[4, 0, 3, -1], [2, 5, 9, 9]], dtype=torch.int32)
    latents = torch.cat([x.c, x.turned], -1)[0].detach()
    for row, length in zip(table.tolist(), (130, 65), strict=True):
        for t in range(length):
            cache[row[t // 64], t % 64, 0] = latents[t]
    q = torch.cat([torch.einsum("bhin,hnr->bhir", x.q[..., :128], x.w_uk), x.q[..., 128:]], -1)
    got = reference.outputs(
        example("mla_paged"), q.expand(2, -1, -1, -1), cache, block_table=table, seqused_k=torch.tensor([130, 65])
    )
    o, lse = naive(x)
    assert got.lse is not None
    close(torch.einsum("hir,hrd->hid", got.o[0], x.w_uv), o[0])
    close(got.lse[0], lse[0])
    shorter, its_lse = naive(Latent(q=x.q, c=x.c[:, :65], turned=x.turned[:, :65], w_uk=x.w_uk, w_uv=x.w_uv))
    close(torch.einsum("hir,hrd->hid", got.o[1], x.w_uv), shorter[0])
    close(got.lse[1], its_lse[0])


# -- compressed convolutional attention ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compressed:
    """Zyphra's layer between its projections, one sequence: whole, or a token at a time with caches."""

    heads: int
    key_heads: int
    w: dict[str, Tensor]
    D: int = 128

    @property
    def channels(self) -> int:
        return (self.heads + self.key_heads) * self.D

    def mixed(self, r: Tensor) -> Tensor:
        """Both convolutions without padding: r [channels, T + 2] to [channels, T]."""
        r = conv1d(r[None], self.w["conv0"].reshape(self.channels, 1, 2), self.w["bias0"].flatten(),
                   groups=self.channels)  # fmt: skip
        kernel = self.w["conv1"].reshape(self.channels, self.D, 2)
        return conv1d(r, kernel, self.w["bias1"].flatten(), groups=self.heads + self.key_heads)[0]

    def finished(self, r: Tensor, c: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """q and k [T, H, D] of what went into the convolutions and what came out [channels, T]."""
        group, tokens = self.heads // self.key_heads, r.shape[1]
        (q0, k0), (cq, ck) = ((x[: self.heads * self.D].T.unflatten(1, (-1, self.D)),
                               x[self.heads * self.D :].T.unflatten(1, (-1, self.D))) for x in (r, c))  # fmt: skip
        mean_q = 0.5 * (q0 + k0.repeat_interleave(group, 1))
        mean_k = mean_q.reshape(tokens, self.key_heads, group, self.D).mean(2)
        q = normalize(cq + mean_q, dim=-1) * math.sqrt(self.D)
        k = normalize(ck + mean_k, dim=-1) * math.sqrt(self.D) * self.w["temp"][None, :, None]
        return self.turned(q, first), self.turned(k, first)

    def turned(self, x: Tensor, first: int) -> Tensor:
        """The first 64 columns, as complex numbers; base 5e6."""
        t = torch.arange(32, dtype=x.dtype)
        angle = torch.arange(first, first + len(x)).to(x.dtype)[:, None] * 5e6 ** (-t / 32)
        z = torch.complex(x[..., :32], x[..., 32:64]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([z.real, z.imag, x[..., 64:]], -1)

    def whole(self, q0: Tensor, k0: Tensor, v0: Tensor) -> Tensor:
        """o [T, H, D] of a prompt; all arguments are [T, columns], the last half of v0 still undelayed."""
        r = torch.cat([q0, k0], 1).T
        q, k = self.finished(r, self.mixed(pad(r, (2, 0))), 0)
        half = v0.shape[1] // 2
        v = torch.cat([v0[:, :half], pad(v0[:-1, half:], (0, 0, 1, 0))], 1).unflatten(1, (self.key_heads, self.D))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)

    def token_by_token(self, q0: Tensor, k0: Tensor, v0: Tensor) -> Tensor:
        """The same with the caches of decode: two columns before the convolutions, one delayed half of a value."""
        columns, late = q0.new_zeros(self.channels, 2), v0.new_zeros(v0.shape[1] // 2)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        out: list[Tensor] = []
        for t in range(len(q0)):
            r = torch.cat([q0[t], k0[t]])[:, None]
            window = torch.cat([columns, r], 1)
            q, k = self.finished(r, self.mixed(window), t)
            values.append(torch.cat([v0[t, : len(late)], late]).reshape(self.key_heads, self.D))
            keys.append(k[0])
            columns, late = window[:, 1:], v0[t, len(late) :]
            rows = []
            for h in range(self.heads):
                mine = h * self.key_heads // self.heads
                s = torch.stack([q[0, h] @ k[mine] for k in keys]) / math.sqrt(self.D)
                rows.append(s.softmax(0) @ torch.stack([v[mine] for v in values]))
            out.append(torch.stack(rows))
        return torch.stack(out)


def compressed(name: str) -> tuple[Attention, Compressed, tuple[Tensor, Tensor, Tensor]]:
    """The example, the layer with its parameters, and q0, k0, v0 [T, columns]."""
    attn = example(name)
    H, Hk = attn.heads.q, attn.heads.kv
    shapes = {"conv0": (H + Hk, 128, 2), "bias0": (H + Hk, 128), "conv1": (H + Hk, 128, 128, 2),
              "bias1": (H + Hk, 128), "temp": (Hk,)}  # fmt: skip
    w = {key: normal(*shape, seed=n, scale=0.1 if key == "conv1" else 1.0)
         for n, (key, shape) in enumerate(shapes.items())}  # fmt: skip
    x = normal(14, H * 128), normal(14, Hk * 128, seed=1), normal(14, Hk * 128, seed=2)
    return attn, Compressed(H, Hk, w), x


def evaluated(attn: Attention, layer: Compressed, x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    q, k, v = (y.unflatten(1, (-1, 128)).transpose(0, 1)[None] for y in x)
    return reference.outputs(attn, q, k, v, inputs=layer.w).o[0].transpose(0, 1)


def test_compressed_convolutional_attention() -> None:
    attn, layer, x = compressed("ccgqa")
    got, expected = evaluated(attn, layer, x), layer.whole(*x)
    close(got, expected)
    same_gradients(got, expected, [*x, *layer.w.values()])


@pytest.mark.parametrize("name", ["cca", "ccgqa"])
def test_its_prefill_is_its_decode(name: str) -> None:
    attn, layer, x = compressed(name)
    with torch.no_grad():
        close(evaluated(attn, layer, x), layer.token_by_token(*x))


def test_it_is_causal() -> None:
    attn, layer, x = compressed("ccgqa")
    with torch.no_grad():
        before = evaluated(attn, layer, x)
        changed = tuple(torch.cat([y[:9], y[9:10] + 3, y[10:]]) for y in x)
        after = evaluated(attn, layer, (changed[0], changed[1], changed[2]))
    assert torch.equal(before[:9], after[:9])
    assert all(not torch.allclose(before[t], after[t]) for t in range(9, 14))


def test_its_convolutions_pad_once() -> None:
    """Zeros of its own for each convolution would change token 0 of q and k, and with it every output."""
    attn, layer, x = compressed("ccgqa")
    r = torch.cat(x[:2], 1).T
    once = layer.mixed(pad(r, (2, 0)))
    first = conv1d(pad(r, (1, 0))[None], layer.w["conv0"].reshape(-1, 1, 2), layer.w["bias0"].flatten(), groups=1280)
    kernel = layer.w["conv1"].reshape(1280, 128, 2)
    apart = conv1d(pad(first, (1, 0)), kernel, layer.w["bias1"].flatten(), groups=10)[0]
    close(apart[:, 1:], once[:, 1:])
    assert not torch.allclose(apart[:, 0], once[:, 0], atol=0.1)
    q, k = layer.finished(r, apart, 0)
    v = x[2].unflatten(1, (2, 128))
    v = torch.stack([v[:, 0], pad(v[:-1, 1], (0, 0, 1, 0))], 1)  # with 2 heads the second is the delayed one
    q, k, v = (y.transpose(0, 1) for y in (q, k, v))
    wrong = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)
    got = evaluated(attn, layer, x)
    close(got[0, :4], wrong[0, :4])  # one key: its value, whatever the scores
    assert not torch.allclose(got[1:], wrong[1:], atol=1e-3)


# -- fewer query heads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads"),
    [("sqa", (16, 8)), ("ssqa", (16, 16)), ("xsqa", (8, 8)), ("xsmqa", (8, 1)), ("lsqa", (24, 8)), ("rsqa", (8, 16))],
)
def test_sparse_query_attention(name: str, heads: tuple[int, int]) -> None:
    """Of 32 heads; where there are fewer query heads than key heads, key head h meets query head h mod 8."""
    queries, keys = heads
    q, k, v = normal(2, queries, 6, 128), normal(2, keys, 6, 128, seed=1), normal(2, keys, 6, 128, seed=2)
    outs, lses = [], []
    for h in range(max(heads)):
        mine = h * keys // max(heads)
        p, lse = softmax_of(q[:, h % queries] @ k[:, mine].mT / math.sqrt(128))
        outs.append(p @ v[:, mine])
        lses.append(lse)
    expected = torch.stack(outs, 1)
    repeated = q.repeat(1, max(heads) // queries, 1, 1)
    got = reference.outputs(example(name), repeated, k, v)
    close(got.o, expected)
    close(got.lse, torch.stack(lses, 1))
    same_gradients(got.o, expected, [q, k, v])


# -- compositions --------------------------------------------------------------------------------


def test_softpag() -> None:
    """Weights drawn towards the identity, rows that still sum to 1; only what lambda names changes."""
    q, k, v = (normal(2, 20, 7, 64, seed=n) for n in range(3))
    lam = torch.zeros(2, 20, dtype=torch.float64)
    lam[1, 3], lam[1, 4], lam[1, 5] = 0.3, 1.0, 0.7
    lam.requires_grad_()
    p, _ = softmax_of(q @ k.mT / 8, causal=False)
    drawn = (1 - lam[..., None, None]) * p + lam[..., None, None] * torch.eye(7)
    close(drawn.sum(-1), torch.ones(2, 20, 7, dtype=torch.float64))
    got = reference.outputs(example("softpag"), q, k, v, inputs={"lam": lam}).o
    close(got, drawn @ v)
    same_gradients(got, drawn @ v, [q, k, v, lam])
    assert torch.equal(got[1, 4], v[1, 4])
    close(got[0], (p @ v)[0])


def test_attenst() -> None:
    q, k, v, stylised = (normal(2, 20, 7, 64, seed=n) for n in range(4))
    p, lse = softmax_of((0.75 * q + 0.25 * stylised) * 1.5 @ k.mT / 8, causal=False)
    got = reference.outputs(example("attenst"), q, k, v, inputs={"stylised": stylised})
    close(got.o, p @ v)
    close(got.lse, lse)


def test_rope_and_alibi() -> None:
    q, k, v = (normal(1, 32, 9, 128, seed=n) for n in range(3))
    numbers = [sum(1 / t for t in range(1, n + 1)) for n in range(9)]
    harmonic = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    s = torch.stack([torch.stack([_turned_dot(q[:, :, i], k[:, :, j], i - j) for j in range(9)], -1)
                     for i in range(9)], -2) / math.sqrt(128)  # fmt: skip
    distance = (torch.arange(9)[:, None] - torch.arange(9)).clamp(min=0)
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / 32) for h in range(32)], dtype=torch.float64)
    readings: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
        "rope_alibi": (s - slopes[:, None, None] * harmonic[distance], {"harmonic": harmonic}),
        "rope_alibi_product": (s / (distance + 1), {}),
    }
    for name, (scores, inputs) in readings.items():
        p, lse = softmax_of(scores)
        got = reference.outputs(example(name), q, k, v, inputs=inputs)
        close(got.o, p @ v)
        close(got.lse, lse)
        same_gradients(got.o, p @ v, [q, k, v, *inputs.values()])


def _turned_dot(q: Tensor, k: Tensor, distance: int) -> Tensor:
    """The product of two turned heads [..., 128] knows the distance alone."""
    t = torch.arange(64, dtype=q.dtype)
    spin = torch.polar(torch.ones_like(t), distance * 10000.0 ** (-t / 64))
    return (torch.complex(q[..., :64], q[..., 64:]) * torch.complex(k[..., :64], -k[..., 64:]) * spin).real.sum(-1)


def test_the_queries_of_an_absorbed_projection() -> None:
    """They are as wide as the projection asks for, which has to be there."""
    x = Latent()
    cache = torch.cat([x.c, x.turned], -1)[:, None]
    with pytest.raises(TypeError, match="w_uk: the input is missing"):
        reference.outputs(example("mla_absorbed"), x.q, cache, inputs={"w_uv": x.w_uv})
    with pytest.raises(ValueError, match="q: expected a last axis of 192"):
        reference.outputs(
            example("mla_absorbed"), normal(1, 128, 3, 576), cache, inputs={"w_uk": x.w_uk, "w_uv": x.w_uv}
        )
