"""What a call has to compute and to move, by hand; and rank correlations, by their textbook."""

from __future__ import annotations

from math import isnan

import pytest

from attncc.autotune.ranks import rank_correlation
from attncc.autotune.record import Sparsity
from attncc.autotune.work import Work, kept, work
from attncc.errors import SpecError
from attncc.spec import loads

SPEC = "attncc: 1\nname: tiny\nheads: {q: 8, kv: 2}\ndims: {qk: 64, v: 32}\n"
SHAPE = {"B": 3, "Sq": 5, "Sk": 7}


def test_flops_and_bytes_by_hand() -> None:
    q, k, v, o, lse = 3 * 8 * 5 * 64, 3 * 2 * 7 * 64, 3 * 2 * 7 * 32, 3 * 8 * 5 * 32, 3 * 8 * 5
    assert work(loads(SPEC).attention, SHAPE) == Work(2 * 3 * 8 * 5 * 7 * 96, 2 * (q + k + v + o) + 4 * lse)


def test_a_mask_takes_flops_and_no_bytes() -> None:
    whole, part = (work(loads(SPEC).attention, SHAPE, share) for share in (1.0, 0.25))
    assert (part.flops, part.bytes) == (whole.flops / 4, whole.bytes)
    assert part.intensity == pytest.approx(whole.intensity / 4)


def test_wide_numbers_and_no_lse() -> None:
    wide = work(loads(SPEC + "dtype: fp32\noutputs: [o]\n").attention, SHAPE)
    both = work(loads(SPEC + "outputs: [o]\n").attention, SHAPE)
    assert wide == Work(both.flops, 2 * both.bytes)
    assert both.bytes == work(loads(SPEC).attention, SHAPE).bytes - 4 * 3 * 8 * 5


def test_a_size_that_the_spec_fixes_need_not_be_said() -> None:
    attn = loads(SPEC + "sizes: {B: 3}\n").attention
    assert work(attn, {"Sq": 5, "Sk": 7}) == work(attn, SHAPE)


@pytest.mark.parametrize("shape", [{}, {"B": 1, "Sq": 2}, {"B": 0, "Sq": 2, "Sk": 3}, {"B": 1, "Sq": 2, "Sk": 0}])
def test_a_shape_without_its_sizes_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="tiny"):
        work(loads(SPEC).attention, shape)


@pytest.mark.parametrize("tiles", [1, 2, 8, 64])
def test_what_a_causal_mask_keeps_is_half(tiles: int) -> None:
    """A row of tiles has (n + 1) / 2 of them, and one is cut."""
    causal = Sparsity(tiles=(tiles + 1) / 2, variance=0.3, full=(tiles - 1) / (tiles + 1), skew=2)
    assert kept(causal, 128 * tiles) == pytest.approx(0.5)


def test_what_is_not_said_is_kept() -> None:
    assert kept(None, 4096) == 1.0
    assert kept(Sparsity(tiles=1, variance=0, full=1, skew=1), 77) == 1.0


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3], [10, 200, 3000], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17], -29 / 165),
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        ([1, 1, 2, 2], [5, 5, 9, 9], 1.0),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
    ],
)
def test_rank_correlation(x: list[float], y: list[float], expected: float) -> None:
    assert rank_correlation(x, y) == pytest.approx(expected)
    assert rank_correlation(y, x) == pytest.approx(expected)
    assert rank_correlation([2.0**a for a in x], y) == pytest.approx(expected)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1], [2]), ([3, 3, 3], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])])
def test_without_an_order_there_is_no_correlation(x: list[float], y: list[float]) -> None:
    assert isnan(rank_correlation(x, y))


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers against 1"):
        rank_correlation([1, 2], [1])
