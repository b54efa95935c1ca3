"""The oracle's random bits: the published vectors of Philox4x32-10, and dropout as a function of positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from naive import i, j, plain
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Align, Dims, Heads, Normalizer
from attncc.reference.philox import kept, philox

VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in words(counter))
    low, high = words(key)
    assert [int(word) for word in philox((c0, c1, c2, c3), low | high << 32)] == words(expected)


def word(b: int, h: int, i: int, j: int, seed: int) -> int:
    """The word of one position, as the layout has it."""
    c0, c1, c2, c3 = (torch.tensor(x) for x in (j // 4, i, h, b))
    return int(philox((c0, c1, c2, c3), seed)[j % 4])


def positions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (2, 3, 5, 37)
    b, h, i, j = (torch.arange(n) for n in shape)
    return b[:, None, None, None], h[:, None, None], i[:, None], j


def test_a_position_is_one_word_of_its_block() -> None:
    b, h, i, j = positions()
    keep = kept(0.25, 99, b, h, i, j)
    for at in [(0, 0, 0, 0), (1, 2, 4, 36), (1, 0, 3, 13), (0, 2, 2, 6)]:
        assert bool(keep[at]) == (word(*at, seed=99) >= 2**30)


def test_any_tile_draws_the_same_bits() -> None:
    b, h, i, j = positions()
    keep = kept(0.5, 7, b, h, i, j)
    assert torch.equal(keep[..., 1:4, 5:22], kept(0.5, 7, b, h, i[1:4], j[5:22]))
    assert not torch.equal(keep, kept(0.5, 8, b, h, i, j))
    assert not torch.equal(keep, kept(0.5, 7 + 2**32, b, h, i, j))


def test_negative_positions_have_bits_too() -> None:
    zero = torch.tensor(0)
    keep = kept(0.5, 1, zero, zero, torch.arange(-64, 0)[:, None], torch.arange(64))
    assert 0.45 < float(keep.double().mean()) < 0.55


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_of_kept_positions(p: float) -> None:
    zero = torch.tensor(0)
    keep = kept(p, 3, zero, zero, torch.arange(150)[:, None], torch.arange(150))
    assert abs(float(keep.double().mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p)) / 150 + 1e-12


@pytest.mark.parametrize("normalizer", [Normalizer(), Normalizer("sigmoid"), Normalizer("linear", eps=4.0)])
def test_dropout_against_the_loop(normalizer: Normalizer) -> None:
    """With values that are unit vectors, outputs are the weights themselves."""
    attn = plain(mask=j <= i, normalizer=normalizer, heads=Heads(2, 1, 1), dims=Dims(4, 6))
    q, k = torch.rand(2, 2, 4, 4, dtype=torch.float64), torch.rand(2, 1, 6, 4, dtype=torch.float64)
    v = torch.eye(6, dtype=torch.float64).expand(2, 1, 6, 6)
    weights = reference.attention(attn, q, k, v)
    dropping = replace(attn, parts=(replace(attn.part, dropout=0.4),))
    dropped = reference.attention(dropping, q, k, v, seed=11)
    seen = 0
    for b, h, row, key in torch.ones_like(weights).nonzero().tolist():
        keep = word(b, h, row + 2, key, 11) >= int(0.4 * 2**32)
        expected = float(weights[b, h, row, key]) / 0.6 if keep else 0.0
        assert float(dropped[b, h, row, key]) == pytest.approx(expected, rel=1e-12)
        seen += not keep
    assert seen > 10


def test_dropout_leaves_lse_alone() -> None:
    q, k, v = (torch.randn(1, n, 5, 8, dtype=torch.float64) for n in (4, 2, 2))
    _, lse = reference.attention(plain(), q, k, v, return_lse=True)
    _, dropped = reference.attention(plain(dropout=0.5), q, k, v, return_lse=True, seed=5)
    torch.testing.assert_close(dropped, lse)


def test_a_decode_step_draws_the_bits_of_its_position() -> None:
    attn = plain(dropout=0.5, mask=j <= i)
    q, k, v = (torch.randn(1, n, 9, 8, dtype=torch.float64) for n in (4, 2, 2))
    whole = reference.attention(attn, q, k, v, seed=2)
    torch.testing.assert_close(reference.attention(attn, q[:, :, -1:], k, v, seed=2), whole[:, :, -1:])
    first = plain(dropout=0.5, mask=j <= i, align=Align("top_left"))
    torch.testing.assert_close(reference.attention(first, q[:, :, :4], k, v, seed=2), whole[:, :, :4])
