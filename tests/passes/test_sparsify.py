"""Key ranges against brute force: sound for any mask, without slack for the usual ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    SEQUENCES,
    attention,
    causal,
    chunked,
    dilated,
    h,
    i,
    j,
    masks,
    n,
    same,
    segments,
    sink,
    tensors,
    window,
)
from scalar_numpy import Scope, evaluate

from attncc.ir.attention import KeyRange, KeyTiles
from attncc.ir.expr import FALSE, TRUE, Expr, const, ew, load, name
from attncc.passes.canonicalize import canonicalize
from attncc.passes.legalize import legalize
from attncc.passes.sparsify import sparsify


@dataclass(frozen=True)
class Case:
    """One problem, its rows cut into tiles."""

    sq: int
    sk: int
    offset: int
    tile: int
    seed: int = 0
    batch: int = 0
    n: int = 3

    def scope(self) -> Scope:
        names = {"Sq": self.sq, "Sk": self.sk, "B": SEQUENCES, "b": self.batch, "h": 1, "n": self.n}
        return Scope(names, tensors(self.sk, self.seed))

    def tiles(self) -> Iterator[tuple[slice, Scope]]:
        scope = self.scope()
        for first in range(0, self.sq, self.tile):
            row = np.arange(first, min(first + self.tile, self.sq))
            at = row + self.offset
            ends = {"i0": at[0], "i1": at[-1], "row0": row[0], "row1": row[-1]}
            yield slice(first, row[-1] + 1), replace(scope, names={**scope.names, **ends}, rows=(at, row))

    def visible(self, mask: Expr) -> np.ndarray:
        """[Sq, Sk]"""
        row = np.arange(self.sq)[:, None]
        scope = self.scope()
        named = {**scope.names, "row": row, "i": row + self.offset, "j": np.arange(self.sk)[None, :]}
        return np.broadcast_to(evaluate(mask, replace(scope, names=named)), (self.sq, self.sk))


cases = st.builds(
    Case,
    sq=st.integers(1, 24),
    sk=st.integers(1, 40),
    offset=st.integers(-12, 30),
    tile=st.integers(1, 16),
    seed=st.integers(0, 50),
    batch=st.integers(0, SEQUENCES - 1),
    n=st.integers(1, 7),
)


def key_tiles(mask: Expr) -> KeyTiles:
    solved = legalize(sparsify(attention(mask))).part.key_tiles
    assert solved is not None
    return solved


def covered(tiles: KeyTiles, scope: Scope, sk: int) -> tuple[np.ndarray, np.ndarray]:
    """Which keys the ranges say may be seen, and which they say all rows see."""
    key = np.arange(sk)
    seen, full = np.zeros(sk, bool), np.zeros(sk, bool)
    for r in tiles.ranges:
        lo, hi, full_lo, full_hi = (evaluate(e, scope) for e in (r.lo, r.hi, r.full_lo, r.full_hi))
        seen |= (lo <= key) & (key < hi)
        full |= (full_lo <= key) & (key < full_hi)
    return seen, full


@settings(max_examples=400, deadline=None)
@given(masks, cases, st.integers(1, 16), st.booleans())
def test_ranges_are_sound(mask: Expr, case: Case, width: int, canonical: bool) -> None:
    solved = key_tiles(canonicalize(attention(mask)).part.mask if canonical else mask)
    visible = case.visible(mask)
    for rows, scope in case.tiles():
        seen, full = covered(solved, scope, case.sk)
        assert not (visible[rows].any(axis=0) & ~seen).any()
        assert not (full & ~visible[rows].all(axis=0)).any()
        if solved.skip is None:
            continue
        for j0 in range(0, case.sk, width):
            ends = {"j0": j0, "j1": min(j0 + width, case.sk) - 1}
            kept = evaluate(solved.skip, replace(scope, names={**scope.names, **ends}))
            assert kept or not visible[rows, j0 : j0 + width].any()


@settings(max_examples=150, deadline=None)
@given(masks, cases)
def test_the_mask_that_kernels_evaluate_is_the_same(mask: Expr, case: Case) -> None:
    """Either form, as written or solved, whichever is cheaper a pair."""
    assert (case.visible(sparsify(attention(mask)).part.mask) == case.visible(mask)).all()


@settings(max_examples=150, deadline=None)
@given(masks, cases)
def test_listed_masks_are_constant_on_their_blocks(mask: Expr, case: Case) -> None:
    solved = key_tiles(mask)
    visible = case.visible(mask)
    at = np.arange(case.sq) + case.offset
    down, across = (np.minimum(g, 64) for g in solved.granularity)
    for block in {*(at // down)} if solved.listed else ():
        for left in range(0, case.sk, across):
            part = visible[at // down == block, left : left + across]
            assert part.all() or not part.any()


EXACT: dict[str, Expr] = {
    "true": TRUE,
    "false": FALSE,
    "causal": causal,
    "anticausal": ~causal,
    "window": window(5),
    "symmetric window": window(4, 4),
    "causal window": causal & window(6),
    "run-time window": window(n + 2),
    "input window": causal & (i - j < load("lengths", h, dtype="i32") + 1),
    "sink": causal & sink(4),
    "sink and window": causal & (sink(3) | window(5)),
    "sink or window": sink(3) | window(5, 2),
    "prefix": causal | sink(load("lengths", name("b"), dtype="i32")),
    "chunked": chunked(8),
    "causal chunked": causal & chunked(5),
    "run-time chunks": chunked(n),
    "neighbouring chunks": (i // 4 - j // 4 <= 1) & (j // 4 <= i // 4),
    "outside a window": causal & ~window(4),
    "segments": segments("offsets"),
    "causal segments": causal & segments("starts", name("b")),
    "sorted ids": same("ids"),
    "causal sorted ids": causal & same("ids"),
    "lengths": sink(load("lengths", name("b"), dtype="i32")),
    "global rows and keys": (i < 5) | (j < 5),
    "not self": ~((i <= j) & (j <= i)),
    "per-row limit": j < load("limit", i, dtype="i32"),
}


@pytest.mark.parametrize("label", EXACT)
@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_ranges_have_no_slack(label: str, case: Case) -> None:
    """Every range begins and ends at a key that some row sees; every key seen by all rows is in a full range."""
    mask = EXACT[label]
    solved = key_tiles(mask)
    assert solved.skip is None
    assert not solved.listed
    visible = case.visible(mask)
    in_range = case.offset >= 0 and case.offset + case.sq <= case.sk
    if not in_range and label in ("segments", "causal segments", "sorted ids", "causal sorted ids", "per-row limit"):
        return
    for rows, scope in case.tiles():
        seen, full = covered(solved, scope, case.sk)
        some, every = visible[rows].any(axis=0), visible[rows].all(axis=0)
        assert (seen == some).all()
        assert (full == every).all()


def test_rows_of_two_kinds_in_one_tile_are_still_seen_exactly() -> None:
    """A tile that mixes global and windowed rows: what all of them see is more than the ranges say."""
    solved = key_tiles((i < 5) | (j < 5) | window(4, 4))
    case = Case(sq=30, sk=30, offset=0, tile=4)
    visible = case.visible((i < 5) | (j < 5) | window(4, 4))
    for rows, scope in case.tiles():
        seen, _ = covered(solved, scope, case.sk)
        assert (seen == visible[rows].any(axis=0)).all()


@pytest.mark.parametrize("step", [2, 16, 17, 40])
def test_dilation_skips_exactly_the_empty_tiles(step: int) -> None:
    solved = key_tiles(causal & dilated(step))
    assert [r.hi for r in solved.ranges] == [name("i1") + 1]
    assert (solved.skip is None) == (step <= 16)
    case = Case(sq=64, sk=64, offset=0, tile=4)
    visible = case.visible(dilated(step))
    for rows, scope in case.tiles():
        for j0 in range(0, 64, 4) if solved.skip is not None else ():
            kept = evaluate(solved.skip, replace(scope, names={**scope.names, "j0": j0, "j1": j0 + 3}))
            assert kept == visible[rows, j0 : j0 + 4].any()


def test_causal_is_two_numbers() -> None:
    i0, i1 = name("i0"), name("i1")
    assert key_tiles(causal).ranges == (KeyRange(const(0), i1 + 1, const(0), i0 + 1),)
    assert key_tiles(causal & window(1024)).ranges == (KeyRange(i0 - 1023, i1 + 1, i1 - 1023, i0 + 1),)


def test_ranges_from_the_first_key_come_first() -> None:
    assert [r.lo for r in key_tiles(causal & (window(8) | sink(4))).ranges] == [const(0), name("i0") - 7]


def test_a_neighbourhood_bounds_its_lines_and_skips_by_columns() -> None:
    near = (ew("abs", i // 32 - j // 32) <= 3) & (ew("abs", i % 32 - j % 32) <= 3)
    solved = key_tiles(near)
    (only,) = solved.ranges
    assert (only.lo, only.hi) == (name("i0") // 32 * 32 - 96, name("i1") // 32 * 32 + 128)
    assert solved.skip is not None
    assert not solved.listed


@pytest.mark.parametrize(
    ("mask", "granularity"),
    [
        (load("blocks", i // 128, j // 64, dtype="bool"), (128, 64)),
        (load("blocks", i // 12, j // 64, dtype="bool") & ew("ne", i // 8, j // 64), (4, 64)),
        (causal & load("blocks", i // 128, j // 128, dtype="bool"), (1, 1)),
        (same("document"), (1, 1)),
        (load("flag", j, dtype="bool"), (2**24, 1)),
    ],
)
def test_data_that_moves_with_the_keys_is_listed(mask: Expr, granularity: tuple[int, int]) -> None:
    solved = key_tiles(mask)
    assert solved.listed
    assert solved.granularity == granularity


def test_a_false_mask_is_one_empty_range() -> None:
    assert key_tiles(causal & ~causal).ranges == (KeyRange(*[const(0)] * 4),)


@pytest.mark.parametrize("huge", [2**31 - 1, -(2**31), 2**31 - 2])
@pytest.mark.parametrize("mask", [window(2**31 - 1, 2**31 - 1), window(5, 2**31 - 2), *[
    op(window(load("lengths", h, dtype="i32"), load("lengths", h, dtype="i32")))
    for op in (lambda m: m, lambda m: ~m, lambda m: causal & m)
]])  # fmt: skip
def test_no_number_of_an_input_overflows_a_bound(mask: Expr, huge: int) -> None:
    """Evaluated in 32 bits, where the formula says so."""
    case = Case(sq=12, sk=20, offset=3, tile=4)
    solved = key_tiles(mask)
    lengths = {"lengths": np.array([huge, huge])}
    row, key = np.arange(12)[:, None] + 3, np.arange(20)[None, :]
    names = {**case.scope().names, "i": row, "j": key, "row": row - 3}
    visible = np.broadcast_to(evaluate(mask, Scope(names, lengths)), (12, 20))
    for rows, scope in case.tiles():
        seen, full = covered(solved, replace(scope, buffers=lengths, int32=True), case.sk)
        assert (seen == visible[rows].any(axis=0)).all()
        assert (full == visible[rows].all(axis=0)).all()
