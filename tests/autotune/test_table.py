"""Decision tables: few configs, no shape slower than stated or than untuned, nothing uncertified."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from autotune.tuning_records import CERTIFICATE, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ir.ir_samples import PLAIN

from attncc.autotune.record import Record, Sparsity
from attncc.autotune.table import AXES, FAR, Decision, axes_of, decide, pick, row_of, sizes_of
from attncc.errors import TuneError
from attncc.ir.attention import Numerics

CONFIGS = [{"BM": bm, "BN": bn} for bm in (16, 64, 128) for bn in (32, 64)]
DEFAULT = CONFIGS[3]
FALLBACK = (({"pairs": 2**10}, CONFIGS[0]), ({"Sq": 16}, CONFIGS[1]), ({}, DEFAULT))
LOSS = 0.02
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
Knobs = tuple[tuple[str, int], ...]


def knobs(mapping: Mapping[str, int]) -> Knobs:
    return tuple(sorted(mapping.items()))


def measured(shape: dict[str, int], times: dict[int, float], **more: Any) -> list[Record]:
    """One record a config, by its number."""
    return [record(shape=shape, config=CONFIGS[n], ms=ms, **more) for n, ms in times.items()]


def square(s: int, b: int = 1) -> dict[str, int]:
    return {"B": b, "Sq": s, "Sk": s}


def chosen(decision: Decision, shape: dict[str, int]) -> dict[str, int]:
    return dict(pick(decision.rows, sizes_of(shape)))


# -- properties ----------------------------------------------------------------------------------

SHAPES = st.builds(
    lambda b, q, k: {"B": b, "Sq": q, "Sk": k}, *(st.sampled_from(v) for v in ((1, 4), (1, 128, 4096), (256, 8192)))
)
TIMES = st.floats(0.5, 2.0)


@st.composite
def matrices(draw: st.DrawFn) -> list[Record]:
    """Some configs measured at each of some shapes, most of them certified, some wrong."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=6, unique_by=lambda s: tuple(s.values())))
    certified = draw(st.sets(st.integers(0, len(CONFIGS) - 1), min_size=1))
    failed = draw(st.sets(st.integers(0, len(CONFIGS) - 1), max_size=1)) - {3}
    records: list[Record] = []
    for shape in shapes:
        for n in draw(st.sets(st.integers(0, len(CONFIGS) - 1), min_size=1)) | {min(certified)}:
            certificate = CERTIFICATE if n in certified else None
            records += measured(shape, {n: draw(TIMES)}, certificate=certificate)
    for n in failed:
        records.append(record(shape=square(64), config=CONFIGS[n], status="wrong", ms=None, certificate=None))
    return records


def wrong(records: list[Record]) -> set[Knobs]:
    return {r.knobs for r in records if r.status == "wrong"}


def winners(records: list[Record]) -> set[Knobs]:
    return {r.knobs for r in records if r.certificate} - wrong(records)


@QUICK
@given(matrices(), st.sampled_from([FALLBACK, FALLBACK[2:]]))
def test_no_shape_is_slower_than_stated_or_untuned(records: list[Record], fallback: Any) -> None:
    """The shapes differ in sizes, so a table can tell them apart: the loss holds at each."""
    may = winners(records)
    times: dict[Knobs, dict[Knobs, float]] = {}
    untuned: dict[Knobs, Knobs] = {}
    for r in records:
        shape = knobs(r.shape)
        untuned[shape] = knobs(pick(fallback, sizes_of(r.shape)))
        if r.ms and (r.knobs in may or (r.knobs == untuned[shape] and r.knobs not in wrong(records))):
            times.setdefault(shape, {})[r.knobs] = r.ms
    if not times:
        with pytest.raises(TuneError):
            decide(records, fallback, LOSS)
        return
    decision = decide(records, fallback, LOSS)
    assert decision.rows[-1][0] == {}
    assert times.keys() == decision.losses.keys()
    for shape, measurements in times.items():
        ms = measurements[knobs(chosen(decision, dict(shape)))]
        assert ms <= min(measurements.values()) * (1 + LOSS)
        assert ms <= measurements.get(untuned[shape], math.inf)
        assert decision.losses[shape] == pytest.approx(ms / min(measurements.values()) - 1)
    assert max(decision.losses.values()) == decision.stated <= LOSS + 1e-9
    assert {knobs(c) for _, c in decision.rows} <= (may | {knobs(c) for _, c in fallback}) - wrong(records)


def test_a_variant_whose_sequences_are_apart_has_bounds_of_their_own_sizes_alone() -> None:
    """A bound on the batch, or on the longest keys in it, would make bits depend on neighbours."""
    records = [*measured(square(4096), {0: 1.0, 1: 2.0}), *measured(square(4096, 8), {0: 2.0, 1: 1.0})]
    records += [*measured({"B": 8, "Sq": 1, "Sk": 4096}, {0: 2.0, 1: 1.0, 2: 0.5})]
    apart = replace(PLAIN, numerics=Numerics("batch"))
    assert axes_of(PLAIN) == AXES
    assert {size for bounds, _ in decide(records, FALLBACK[2:], LOSS).rows for size in bounds} - {"Sq"}
    decision = decide(records, FALLBACK[2:], LOSS, axes=axes_of(apart))
    assert {size for bounds, _ in decision.rows for size in bounds} == {"Sq"}
    assert chosen(decision, square(4096)) == chosen(decision, square(4096, 8))
    packed = decide(records, FALLBACK[2:], LOSS, packed=True, axes=axes_of(apart))
    assert [bounds for bounds, _ in packed.rows] == [{}]


@QUICK
@given(matrices(), st.randoms())
def test_the_order_of_records_does_not_matter(records: list[Record], random: Any) -> None:
    shuffled = random.sample(records, len(records))
    if winners(records):
        assert decide(shuffled, FALLBACK, LOSS).rows == decide(records, FALLBACK, LOSS).rows


# -- cases ---------------------------------------------------------------------------------------


def test_one_config_serves_all_that_it_is_good_enough_for() -> None:
    records = measured(square(1024), {0: 1.00, 1: 1.01}) + measured(square(8192), {0: 10.5, 1: 10.0})
    decision = decide(records, FALLBACK[2:], LOSS)
    assert decision.rows == (({}, CONFIGS[1]),)
    assert decision.losses[("B", 1), ("Sk", 1024), ("Sq", 1024)] == pytest.approx(0.01)
    assert decision.stated == pytest.approx(0.01)


def test_sizes_are_split_at_the_geometric_mean() -> None:
    records = measured(square(1024), {0: 1.0, 1: 2.0}) + measured(square(4096), {0: 20.0, 1: 10.0})
    rows = decide(records, FALLBACK[2:], LOSS).rows
    assert rows == (({"pairs": 2**22}, CONFIGS[0]), ({}, CONFIGS[1]))


def test_shapes_of_as_many_pairs_are_told_apart_by_queries() -> None:
    decode, prefill = {"B": 1, "Sq": 1, "Sk": 2**20}, square(1024)
    records = measured(decode, {0: 1.0, 1: 2.0}) + measured(prefill, {0: 2.0, 1: 1.0})
    decision = decide(records, FALLBACK[2:], LOSS)
    assert decision.rows == (({"Sq": 32}, CONFIGS[0]), ({}, CONFIGS[1]))
    assert decision.stated == 0


def test_what_bounds_cannot_tell_apart_shares_the_config_of_least_loss() -> None:
    sparse = Sparsity(tiles=4, variance=0, full=0.5, skew=1)
    shape = square(4096)
    records = measured(shape, {0: 1.0, 1: 1.3, 2: 1.2}) + measured(shape, {0: 2.0, 1: 1.0, 2: 1.2}, sparsity=sparse)
    decision = decide(records, FALLBACK[2:], LOSS)
    assert decision.rows == (({}, CONFIGS[2]),)
    assert decision.stated == pytest.approx(0.2)
    assert len(decision.outcomes) == 2
    with_default = records + measured(shape, {3: 1.25}) + measured(shape, {3: 1.1}, sparsity=sparse)
    assert decide(with_default, FALLBACK[2:], LOSS).rows == (({}, DEFAULT),), "config 2 is slower than untuned once"


def test_a_mask_at_which_the_config_was_not_measured_is_told() -> None:
    sparse = Sparsity(tiles=4, variance=0, full=0.5, skew=1)
    records = measured(square(4096), {0: 1.0}) + measured(square(4096), {1: 1.0}, sparsity=sparse)
    decision = decide(records, FALLBACK[2:], LOSS)
    assert decision.unmeasured == 1
    assert max(decision.losses.values()) == math.inf
    assert decision.stated == 0


def test_what_runs_untuned_wins_where_it_is_fastest_without_a_certificate() -> None:
    records = measured(square(4096), {0: 1.01}) + measured(square(4096), {3: 1.0, 4: 0.5}, certificate=None)
    assert decide(records, FALLBACK[2:], LOSS).rows == (({}, DEFAULT),)


@pytest.mark.parametrize("status", ["wrong", "crashed", "hung"])
def test_what_failed_anywhere_wins_nowhere(status: str) -> None:
    records = measured(square(4096), {0: 1.0, 1: 2.0, 3: 1.5})
    records += [record(shape=square(64), config=CONFIGS[n], status=status, ms=None, certificate=None) for n in (0, 3)]
    assert decide(records, FALLBACK, LOSS).rows[-1] == ({}, CONFIGS[1])
    assert all(config != CONFIGS[0] for _, config in decide(records, FALLBACK, LOSS).rows), "nor as a row for few pairs"


def test_of_two_trials_the_later_counts() -> None:
    day = datetime(2026, 1, 1, tzinfo=UTC)
    old = measured(square(4096), {0: 0.1, 1: 1.0}, when=day)
    new = measured(square(4096), {0: 2.0}, when=day + timedelta(days=1))
    for records in (old + new, new + old):
        decision = decide(records, FALLBACK[2:], LOSS)
        assert decision.rows == (({}, CONFIGS[1]),)
        assert [o.ms for o in decision.outcomes] == [1.0]


@pytest.mark.parametrize("records", [[], measured(square(64), {0: 1.0}, certificate=None)])
def test_nothing_certified_is_an_error(records: list[Record]) -> None:
    with pytest.raises(TuneError, match=f"none of {len(records)} records"):
        decide(records, FALLBACK, LOSS)


# -- rows of the default rule ---------------------------------------------------------------------


def test_default_rows_stay_where_no_tuned_shape_is() -> None:
    rows = decide(measured(square(4096), {4: 1.0}), FALLBACK, LOSS).rows
    assert rows == (*FALLBACK[:2], ({}, CONFIGS[4]))


def test_tuned_shapes_among_the_small_ones_push_the_default_rows_back() -> None:
    small = {"B": 1, "Sq": 16, "Sk": 32}
    rows = decide(measured(small, {4: 1.0}), FALLBACK, LOSS).rows
    assert rows == (({"pairs": 512 // FAR}, CONFIGS[0]), ({"Sq": 16 // FAR}, CONFIGS[1]), ({}, CONFIGS[4]))
    one = {"B": 1, "Sq": 1, "Sk": 4096}
    assert decide(measured(one, {4: 1.0}), FALLBACK, LOSS).rows == (FALLBACK[0], ({}, CONFIGS[4]))


def test_a_row_that_changes_nothing_is_left_out() -> None:
    assert decide(measured(square(4096), {1: 1.0}), FALLBACK, LOSS).rows == (FALLBACK[0], ({}, CONFIGS[1]))


def test_packed_sequences_are_told_apart_by_tokens() -> None:
    few, many = square(64, b=4), square(4096, b=4)
    assert sizes_of(few, packed=True) == {"B": 4, "Tq": 256, "Tk": 256, "pairs": 4 * 256 * 256}
    records = measured(few, {0: 1.0, 1: 2.0}) + measured(many, {0: 2.0, 1: 1.0})
    rows = decide(records, FALLBACK[2:], LOSS, packed=True).rows
    assert row_of(rows, {"pairs": 4 * 1024 * 1024}) == ({"pairs": 2**24}, CONFIGS[0])
    assert row_of(rows, {"pairs": 2**24 + 1})[1] == CONFIGS[1]
