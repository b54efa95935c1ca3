"""Vision papers whose pattern is a shape: folded batches, latents, few queries, given logits, columns, channels."""

from __future__ import annotations

import pytest
import torch
from agree import agree
from smaller import close, example, normal
from torch import Tensor
from torch.nn.functional import gelu

from attncc import reference

# -- iLRM ----------------------------------------------------------------------------------------


def test_ilrm_reads_each_view_alone() -> None:
    """Viewpoint tokens [scene, view, H, n, D] and image tokens [scene, view, H, m, D], view by view."""
    scenes, views = 2, 3

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def define(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (scenes, views)) for x in (q, k, v))
        o = torch.zeros_like(q)
        for view in range(views):
            s = normed(q[:, view], q_weight) @ normed(k[:, view], k_weight).mT / 8
            o[:, view] = torch.softmax(s, -1) @ v[:, view]
        return o.flatten(0, 1)

    shapes = {"q": (6, 2, 7, 64), "k": (6, 2, 19, 64), "v": (6, 2, 19, 64), "q_weight": (64,), "k_weight": (64,)}
    agree(example("ilrm", ("heads: 12", "heads: 2")), define, {n: normal(*shape) for n, shape in shapes.items()})


# -- DiT-3D --------------------------------------------------------------------------------------

GRID = (8, 4, 4)
"""Voxels along x, y and z: two windows of 4 x 4 x 4."""


def folded(x: Tensor) -> Tensor:
    """[B, H, voxels, D] as [B * windows, H, 64, D]."""
    grid = x.unflatten(2, GRID)
    for axis in (2, 4, 6):
        grid = grid.unflatten(axis, (-1, 4))
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7, 8).flatten(0, 3).flatten(2, 4)


def whole_grid(q: Tensor, k: Tensor, v: Tensor, rx: Tensor, ry: Tensor, rz: Tensor) -> Tensor:
    """Every voxel with the voxels of its window; the query itself, not scaled, meets the rows of its distances."""
    places = torch.cartesian_prod(*map(torch.arange, GRID))
    together = (places[:, None] // 4 == places[None] // 4).all(-1)
    apart = (places[:, None] - places[None] + 3).clamp(0, 6)  # far ones are not together
    rows = rx[apart[..., 0]] + ry[apart[..., 1]] + rz[apart[..., 2]]
    s = q @ k.mT * 72**-0.5 + torch.einsum("bhid,ijd->bhij", q, rows)
    return torch.softmax(s.masked_fill(~together, -torch.inf), -1) @ v


def test_dit3d() -> None:
    tensors = {n: normal(1, 2, 128, 72, seed=s) for s, n in enumerate("qkv")}
    tensors |= {n: normal(7, 72, seed=s) for s, n in enumerate(("rx", "ry", "rz"))}
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    want = whole_grid(**leaves)
    along = normal(*want.shape)
    grads = dict(zip(tensors, torch.autograd.grad(want, list(leaves.values()), along), strict=True))

    ours = {n: (folded(x) if n in "qkv" else x).clone().requires_grad_() for n, x in tensors.items()}
    tables = {n: ours[n] for n in ("rx", "ry", "rz")}
    got = reference.attention(
        example("dit3d", ("heads: 16", "heads: 2")), ours["q"], ours["k"], ours["v"], inputs=tables
    )
    close(got, folded(want))
    found = torch.autograd.grad(got, list(ours.values()), folded(along))
    for name, mine in zip(ours, found, strict=True):
        torch.testing.assert_close(mine, folded(grads[name]) if name in "qkv" else grads[name], rtol=1e-9, atol=1e-9)


def test_dit3d_adds_a_bias_that_depends_on_the_query() -> None:
    """With keys all alike, only the queries' own weighing of distances tells them apart."""
    q, v = normal(1, 2, 64, 72), normal(1, 2, 64, 72, seed=1)
    tables = {n: normal(7, 72, seed=s) for s, n in enumerate(("rx", "ry", "rz"))}
    attn, k = example("dit3d", ("heads: 16", "heads: 2")), torch.zeros_like(q)
    once, turned = (reference.attention(attn, x, k, v, inputs=tables) for x in (q, -q))
    assert float((once - turned).abs().max()) > 0.1
    flat = {n: torch.zeros_like(x) for n, x in tables.items()}
    close(reference.attention(attn, q, k, v, inputs=flat), v.mean(2, keepdim=True).expand(v.shape))


@pytest.mark.parametrize("tokens", [48, 63, 80])
def test_dit3d_windows_are_whole(tokens: int) -> None:
    """A side that 4 does not divide leaves windows of other sizes, whose distances would be wrong: refused."""
    q, k, v = (normal(2, 2, tokens, 72, seed=s) for s in range(3))
    with pytest.raises(ValueError, match="fixes it to 64"):
        reference.attention(
            example("dit3d", ("heads: 16", "heads: 2")), q, k, v, inputs={n: normal(7, 72) for n in ("rx", "ry", "rz")}
        )


# -- efficient probing ---------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [49, 1])
def test_efficient_probing(patches: int) -> None:
    """Learnt queries over raw features; query m weighs slice m of the projected features."""
    features, queries, project = normal(3, patches, 768), normal(32, 768), normal(768, 768) / 28

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bmc,bnc->bmn", q[:, :, 0], k[:, 0]) * 768**-0.5, -1)
        return torch.einsum("bmn,bmnd->bmd", weights, v)[:, :, None]

    values = (features @ project).unflatten(-1, (32, 24)).transpose(1, 2)
    tensors = {"q": queries[None, :, None].expand(3, -1, -1, -1), "k": features[:, None], "v": values}
    agree(example("efficient_probing"), define, tensors)
    o = reference.attention(example("efficient_probing"), *tensors.values())
    weights = torch.softmax(features @ queries.T * 768**-0.5, 1)
    pooled = torch.stack(
        [weights[:, :, m, None].mul(features).sum(1) @ project[:, 24 * m : 24 * m + 24] for m in range(32)], 1
    )
    close(o[:, :, 0], pooled)


# -- HSDT ----------------------------------------------------------------------------------------


def test_hsdt_applies_one_map_of_bands_at_every_pixel() -> None:
    """Cubes [B, C, bands, Y, X]; logits are the bands' means over pixels times learnt queries, softmax, no scale."""
    cube, learnt = normal(2, 16, 31, 3, 5), normal(31, 16)

    def logits(cube: Tensor) -> Tensor:
        return torch.einsum("bcd,ec->bde", cube.mean((3, 4)), learnt)

    def whole(cube: Tensor, maps: Tensor) -> Tensor:
        return torch.einsum("bde,bceyx->bcdyx", torch.softmax(maps, -1), cube)

    def fold(x: Tensor) -> Tensor:
        return x.permute(0, 3, 4, 2, 1).flatten(0, 2)[:, None]

    def define(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        bands = v[:, 0].unflatten(0, (2, 3, 5)).permute(0, 4, 3, 1, 2)
        return fold(whole(bands, logits))

    unread = normal(30, 1, 31, 1)
    agree(example("hsdt"), define, {"q": unread, "k": unread, "v": fold(cube), "logits": logits(cube)})


# -- SoftHGNN ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "edges"), [(21, 8), (5, 9)])
def test_softhgnn(tokens: int, edges: int) -> None:
    """Edges gather tokens, pass a layer, and tokens read them back: the same weights A twice, softmax over tokens."""
    x, prototypes, layer = normal(2, tokens, 256), normal(2, edges, 256), normal(256, 256) / 16

    def define(x: Tensor, prototypes: Tensor, layer: Tensor) -> Tensor:
        heads = torch.einsum("bnhd,bmhd->bhnm", x.unflatten(-1, (4, 64)), prototypes.unflatten(-1, (4, 64)))
        a = torch.softmax((heads / 64**0.5).mean(1), 1)
        assert torch.allclose(a.sum(1), torch.ones(2, edges, dtype=a.dtype))
        return a @ gelu(a.mT @ x @ layer)

    def ours(x: Tensor, prototypes: Tensor, layer: Tensor) -> Tensor:
        tokens, centres = x[:, None], prototypes[:, None]
        gathered = reference.attention(example("softhgnn_gather"), centres, tokens, tokens)
        return reference.attention(example("softhgnn_scatter"), tokens, centres, gelu(gathered @ layer))[:, 0]

    mine, other = ([t.clone().requires_grad_() for t in (x, prototypes, layer)] for _ in range(2))
    got, want = ours(*mine), define(*other)
    close(got, want)
    along = normal(*got.shape)
    for a, b in zip(torch.autograd.grad(got, mine, along), torch.autograd.grad(want, other, along), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- ROICtrl -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [25, 7])
def test_roictrl(side: int) -> None:
    """Images with 2, 0 and 1 regions: the map of each region reads its own caption of 77 tokens."""
    counts = (2, 0, 1)

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps, keys, values = (x.split(counts) for x in (q, k, v))
        found: list[Tensor] = []
        for image in range(len(counts)):
            for roi in range(counts[image]):
                s = torch.einsum("hid,hjd->hij", maps[image][roi], keys[image][roi]) / 40**0.5
                found.append(torch.einsum("hij,hjd->hid", torch.softmax(s, -1), values[image][roi]))
        return torch.stack(found)

    shapes = {"q": (3, 2, side**2, 40), "k": (3, 2, 77, 40), "v": (3, 2, 77, 40)}
    agree(example("roictrl", ("heads: 8", "heads: 2")), define, {n: normal(*shape) for n, shape in shapes.items()})


# -- Dynamic Perceiver ---------------------------------------------------------------------------


@pytest.mark.parametrize(("latents", "places"), [(128, 49), (3, 1)])
def test_dyn_perceiver(latents: int, places: int) -> None:
    def define(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bld,bpd->blp", q[:, 0], k[:, 0]) * 16**-0.5 + bias, -1)
        return torch.einsum("blp,bpc->blc", weights, v[:, 0])[:, None]

    shapes = {"q": (2, 1, latents, 16), "k": (2, 1, places, 16), "v": (2, 1, places, 128), "bias": (1, places)}
    agree(example("dyn_perceiver"), define, {n: normal(*shape) for n, shape in shapes.items()})


# -- QTSeg ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loudness", [0.15, 1.0])
def test_qtseg_channel(loudness: float) -> None:
    """E = X X^T over channels, softmax(rowmax(E) - E), times gamma, plus X."""

    def define(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
        energy = torch.einsum("bcp,bdp->bcd", q[:, 0], k[:, 0])
        weights = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1)
        return (gamma * torch.einsum("bcd,bdp->bcp", weights, v[:, 0]) + v[:, 0])[:, None]

    x = loudness * normal(2, 1, 24, 1024)
    agree(example("qtseg_channel"), define, {"q": x, "k": x, "v": x, "gamma": normal(1)})


def test_qtseg_channel_weighs_the_unlike_most() -> None:
    x = torch.zeros(1, 1, 3, 1024, dtype=torch.float64)
    x[0, 0, 0, :8] = x[0, 0, 1, :8] = 1.0
    x[0, 0, 2, 8:16] = 1.0
    o = reference.attention(example("qtseg_channel"), x, x, x, inputs={"gamma": torch.ones(1).double()})
    taken = (o - x)[0, 0, 0]
    assert float(taken[8:16].min()) > 0.99
    assert float(taken[:8].max()) < 0.01
