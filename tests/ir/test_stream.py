"""The cuts of stream-K and split-KV: coverage, hosts, balance, scratch slots, and the published figures."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.ir.stream import Cut, Fragment, fixups, lines, programs, split_kv, stream_k

tile_counts = st.lists(st.integers(0, 9), max_size=12)


def check(tiles: list[int] | tuple[int, ...], fragments: tuple[Fragment, ...]) -> None:
    """What any cut must hold."""
    held = Counter((f.line, t) for f in fragments for t in range(f.lo, f.hi))
    assert held == Counter({(line, t): 1 for line, n in enumerate(tiles) for t in range(n)})
    assert all(f.lo < f.hi <= f.of == tiles[f.line] for f in fragments)
    nonempty = [line for line, n in enumerate(tiles) if n]
    assert sorted(f.line for f in fragments if f.host) == nonempty
    assert sorted(f.line for f in fragments if f.finishing) == nonempty
    slots = [f.slot for f in fragments if not f.whole]
    assert len(slots) == len(set(slots))
    merged = fixups(fragments)
    by_slot = {f.slot: f for f in fragments if not f.whole}
    assert sorted(merged) == sorted({f.line for f in fragments if not f.whole})
    for line, used in merged.items():
        parts = [by_slot[s] for s in used]
        assert {f.line for f in parts} == {line}
        assert [f.lo for f in parts] == [0, *(f.hi for f in parts[:-1])]
        assert parts[-1].hi == tiles[line]
    assert sum(map(len, merged.values())) == len(slots)


@settings(max_examples=300, deadline=None)
@given(tile_counts, st.integers(1, 40))
def test_stream_k(tiles: list[int], ranges: int) -> None:
    fragments = stream_k(tiles, ranges)
    check(tiles, fragments)
    load = Counter(dict.fromkeys(range(ranges), 0))
    for f in fragments:
        load[f.range] += f.hi - f.lo
    assert max(load.values()) - min(load.values()) <= 1
    unfinished = Counter(f.range for f in fragments if not f.whole)
    assert max(unfinished.values(), default=0) <= 2


@settings(max_examples=300, deadline=None)
@given(tile_counts, st.integers(1, 12), st.integers(0, 9))
def test_split_kv(tiles: list[int], splits: int, another: int) -> None:
    fragments = split_kv(tiles, splits)
    check(tiles, fragments)
    for line, n in enumerate(tiles):
        mine = [f.hi - f.lo for f in fragments if f.line == line]
        assert len(mine) == min(splits, n)
        assert not mine or max(mine) - min(mine) <= 1
    assert split_kv([*tiles, another], splits)[: len(fragments)] == fragments


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 500), st.integers(1, 60))
def test_ranges_are_contiguous_and_nearly_equal(total: int, ranges: int) -> None:
    cut = Cut(total, ranges)
    bounds = cut.bounds()
    assert bounds[0][0] == 0
    assert bounds[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    sizes = [hi - lo for lo, hi in bounds]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes.count(cut.most) == cut.high
    assert sizes[0] == cut.most


def test_the_figures_of_a_published_schedule() -> None:
    """One query of one head over 384 keys in tiles of 128, as in ONNX Runtime's test of its lean attention."""
    tiles = lines([384], heads=1, tile=128)
    grid = programs(sum(tiles), most=2 * 108, per_line=3)
    cut = Cut(sum(tiles), grid)
    assert (tiles, grid, cut.most, cut.high) == ((3,), 2, 2, 1)
    first, second = stream_k(tiles, grid)
    assert (first.host, first.finishing, second.host, second.finishing) == (True, False, False, True)
    assert fixups((first, second)) == {0: (1, 2)}


def test_no_keys_are_no_tiles() -> None:
    tiles = lines([0], heads=4, tile=128)
    assert programs(sum(tiles), most=132, per_line=0) == 0
    assert Cut(0, 0).bounds() == ()
    assert stream_k(tiles, 0) == split_kv(tiles, 8) == ()
    assert fixups(()) == {}


@pytest.mark.parametrize("grid", [1, 5, 7, 26, 79])
def test_ragged_batches(grid: int) -> None:
    tiles = lines([40, 13, 97], heads=4, tile=8)
    assert tiles == (5, 2, 13) * 4
    fragments = stream_k(tiles, grid)
    check(tiles, fragments)
    assert {f.range for f in fragments} == set(range(grid))


def test_tiles_need_a_range() -> None:
    with pytest.raises(ValueError, match="5 tiles"):
        stream_k([5], 0)


def test_a_range_inside_a_line_has_one_fragment() -> None:
    middle = stream_k([9], 4)[1]
    assert (middle.lo, middle.hi, middle.host, middle.finishing, middle.slot) == (3, 5, False, False, 2)


def test_many_tiles_fill_the_machine_and_few_are_kept_in_pairs() -> None:
    assert programs(1000, most=132, per_line=100) == 132
    assert programs(100, most=132, per_line=5) == 50
    assert programs(100, most=132, per_line=100) == 32
