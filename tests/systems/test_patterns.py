"""Attention patterns of vision papers with masks, groups, windows and added parts, each beside its own definition."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from agree import agree
from golden import TESTS
from smaller import example, normal
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attncc import reference
from attncc.ir.attention import Attention, Call
from attncc.spec import loads

# -- CATANet -------------------------------------------------------------------------------------


def sorted_order(x: Tensor, centres: Tensor) -> Tensor:
    """The tokens [N, C] in the order of their most similar centre."""
    likeness = torch.nn.functional.cosine_similarity(x[:, None], centres[None], dim=-1)
    return torch.argsort(likeness.argmax(1), stable=True)


def catanet(order: Tensor, q: Tensor, k: Tensor, v: Tensor, centre_k: Tensor, centre_v: Tensor) -> Tensor:
    """A group reads itself and the next one in the sorted order, which goes on backwards behind its end."""
    size = min(8, q.shape[2])
    groups = -(-q.shape[2] // size)
    o = torch.zeros_like(v)
    for b in range(len(q)):
        longer = torch.cat([order[b], order[b].flip(0)])[: size * (groups + 1)]
        for g in range(groups):
            rows, keys = order[b, g * size : (g + 1) * size], longer[g * size : (g + 2) * size]
            o[b, :, rows] = sdpa(q[b][:, rows], k[b][:, keys], v[b][:, keys])
    return o + sdpa(q, centre_k.expand(len(q), -1, -1, -1), centre_v.expand(len(q), -1, -1, -1))


def catanet_operands(tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    shapes = {"q": (2, 4, tokens, 9), "k": (2, 4, tokens, 9), "v": (2, 4, tokens, 10)}
    shapes |= {"centre_k": (1, 4, 16, 9), "centre_v": (1, 4, 16, 10)}
    order = torch.stack([sorted_order(normal(tokens, 40, seed=b), normal(16, 40)) for b in range(2)])
    return {name: normal(*shape) for name, shape in shapes.items()}, order


def small_catanet() -> Attention:
    """Groups of 8 tokens for those of 128."""
    text = (TESTS.parent / "examples" / "catanet.yaml").read_text()
    assert text.count("// 128") == 8
    return loads(text.replace("// 128", "// 8")).attention


@pytest.mark.parametrize("tokens", [20, 16, 13, 5])
def test_catanet(tokens: int) -> None:
    """Ragged and whole last groups, and fewer tokens than a group has."""
    tensors, order = catanet_operands(tokens)
    rank = torch.argsort(order, 1).int()
    agree(small_catanet(), lambda **x: catanet(order, **x), tensors, {"rank": rank})


def test_catanet_adds_two_softmaxes_which_one_merged_softmax_is_not() -> None:
    tensors, order = catanet_operands(20)
    added = small_catanet()
    inputs = {"rank": torch.argsort(order, 1).int(), "centre_k": tensors["centre_k"], "centre_v": tensors["centre_v"]}
    operands = [tensors[n] for n in ("q", "k", "v")]
    merged = reference.attention(replace(added, combine=Call("lse")), *operands, inputs=inputs)
    assert float((reference.attention(added, *operands, inputs=inputs) - merged).abs().max()) > 0.1
    ones = [torch.ones_like(x) if n == "v" else x for n, x in zip("qkv", operands, strict=True)]
    inputs["centre_v"] = torch.ones_like(inputs["centre_v"])
    total = reference.attention(added, *ones, inputs=inputs)
    torch.testing.assert_close(total, torch.full_like(total, 2.0))  # the weights of a row sum to two


# -- EE-MLLM -------------------------------------------------------------------------------------


def test_ee_mllm_is_the_text_rows_of_full_attention() -> None:
    """Visual tokens drop out as queries; the text that is left reads them wherever they stand, and earlier text."""
    attn = example("ee_mllm", ("heads: 32", "heads: 4"), ("dims: 128", "dims: 16"))
    visual = torch.zeros(2, 23, dtype=torch.bool)
    visual[0, 3:12] = visual[1, 10:15] = visual[1, 19:23] = True
    place = torch.stack([(~row).nonzero()[:, 0] for row in visual])
    whole, k, v = normal(2, 4, 23, 16), normal(2, 4, 23, 16, seed=1), normal(2, 4, 23, 16, seed=2)
    at = place[:, None, :, None].expand(-1, 4, -1, 16)

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = torch.ones(23, 23, dtype=torch.bool).tril()
        everything = whole.scatter(2, at, q)  # other queries are there, and are thrown away
        o = sdpa(everything, k, v, attn_mask=(causal | visual[:, None, :])[:, None])
        return o.gather(2, at)

    fixed = {"visual": visual, "place": place.int()}
    agree(attn, define, {"q": whole.gather(2, at), "k": k, "v": v}, fixed)


# -- RGT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "kept"), [(37, 5), (16, 1), (1, 9)])
def test_rgt_global(tokens: int, kept: int) -> None:
    """All tokens read few, at half the channels, scaled by what is left of a head of 30."""

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * (30 * 0.5) ** -0.5, -1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)

    shapes = {"q": (2, 6, tokens, 15), "k": (2, 6, kept, 15), "v": (2, 6, kept, 30)}
    agree(example("rgt_global"), define, {n: normal(*shape) for n, shape in shapes.items()})


SIDE = 16
"""Of the image."""
WINDOWS = ((2, 8), (8, 2))
"""Small ones of 8 x 32 and 32 x 8: their size is in the inputs alone."""


def shifted_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, forbidden: float) -> Tensor:
    """Three heads with lying windows, three with standing ones, rolled by half a window, as windowed models do it."""
    outputs: list[Tensor] = []
    for half, (height, width) in enumerate(WINDOWS):
        heads, roll = slice(3 * half, 3 * half + 3), (height // 2, width // 2)
        number = torch.zeros(SIDE, SIDE, dtype=torch.long)
        for n, down in enumerate(strips(height)):
            for m, across in enumerate(strips(width)):
                number[down, across] = 3 * n + m

        def cut(image: Tensor, h: int = height, w: int = width) -> Tensor:
            """[…, y, x, D] as [windows, …, places, D]."""
            tiles = image.unflatten(-2, (-1, w)).unflatten(-4, (-1, h)).movedim((-5, -3), (0, 1))
            return tiles.flatten(0, 1).flatten(-3, -2)

        rolled = (x[:, heads].unflatten(2, (SIDE, SIDE)).roll((-roll[0], -roll[1]), (2, 3)) for x in (q, k, v))
        qw, kw, vw = map(cut, rolled)
        ids = cut(number[..., None])[..., 0]
        apart = torch.where(ids[:, :, None] == ids[:, None, :], 0.0, forbidden).double()
        places = height * width
        s = qw @ kw.mT * 30**-0.5 + bias[heads, :places, :places] + apart[:, None, None]
        tiles = (torch.softmax(s, -1) @ vw).unflatten(0, (SIDE // height, -1)).unflatten(-2, (height, width))
        image = tiles.movedim((0, 1), (-5, -3)).flatten(-5, -4).flatten(-3, -2)
        outputs.append(image.roll(roll, (2, 3)).flatten(2, 3))
    return torch.cat(outputs, 1)


def strips(window: int) -> tuple[slice, slice, slice]:
    """Which rows (or columns) of a rolled image were together before."""
    return slice(0, SIDE - window), slice(SIDE - window, SIDE - window // 2), slice(SIDE - window // 2, SIDE)


def window_inputs() -> dict[str, Tensor]:
    """group, place and region of every pixel, pixel by pixel."""
    tables = torch.zeros(3, 2, SIDE * SIDE, dtype=torch.int32)
    for half, (height, width) in enumerate(WINDOWS):
        for pixel in range(SIDE * SIDE):
            y, x = ((pixel // SIDE - height // 2) % SIDE, (pixel % SIDE - width // 2) % SIDE)
            region = [int(a >= SIDE - w) + int(a >= SIDE - w // 2) for a, w in ((y, height), (x, width))]
            tables[0, half, pixel] = y // height * (SIDE // width) + x // width
            tables[1, half, pixel] = y % height * width + x % width
            tables[2, half, pixel] = 3 * region[0] + region[1]
    return dict(zip(("group", "place", "region"), tables, strict=True))


def test_rgt_local() -> None:
    tensors = {name: normal(1, 6, SIDE * SIDE, 30, seed=n) for n, name in enumerate("qkv")}
    tensors["bias"] = normal(6, 256, 256)
    agree(example("rgt_local"), lambda **x: shifted_windows(**x, forbidden=-100.0), tensors, window_inputs())


def test_rgt_local_forbids_with_a_hundred_not_with_infinity() -> None:
    q, k, v = (normal(1, 6, SIDE * SIDE, 30, seed=n) for n in range(3))
    q, bias = 40 * q, normal(6, 256, 256)
    got = reference.attention(example("rgt_local"), q, k, v, inputs={**window_inputs(), "bias": bias})
    torch.testing.assert_close(got, shifted_windows(q, k, v, bias, -100.0), rtol=1e-9, atol=1e-9)
    assert float((got - shifted_windows(q, k, v, bias, -math.inf)).abs().max()) > 0.1


# -- SReT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [48, 50, 5])
def test_sret(tokens: int) -> None:
    """Slices of a drawn order; where 8 does not divide the tokens, slices differ by one."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cuts = [-(-tokens * n // 8) for n in range(9)]
        slices = [order[a:b] for a, b in pairwise(cuts) if b > a]
        found = torch.cat([sdpa(q[:, :, some], k[:, :, some], v[:, :, some]) for some in slices], 2)
        return found[:, :, torch.argsort(order)]

    tensors = {n: normal(2, 2, tokens, 32, seed=s) for s, n in enumerate("qkv")}
    agree(example("sret"), define, tensors, {"place": torch.argsort(order).int()})


def test_sret_recursion_draws_another_order() -> None:
    """The second pass, with shared weights, mixes what the first kept apart."""
    attn = example("sret")
    first = torch.arange(32).int()
    second = torch.argsort(torch.arange(32).reshape(8, 4).T.flatten()).int()
    q, k = torch.zeros(2, 1, 2, 32, 32, dtype=torch.float64).unbind()
    v = torch.eye(32, dtype=torch.float64).expand(1, 2, 32, 32)
    once = reference.attention(attn, q, k, v, inputs={"place": first})
    twice = reference.attention(attn, q, k, once, inputs={"place": second})
    assert int((once[0, 0, 0] > 0).sum()) == 4
    assert int((twice[0, 0, 0] > 0).sum()) == 16
