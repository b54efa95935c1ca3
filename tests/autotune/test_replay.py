"""Replays of a search on a sweep that is known, and what the trial of kills counts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from autotune.bench_in_mind import Imagined

from attncc import spec
from attncc.autotune import search
from attncc.autotune.record import Card, Record
from attncc.autotune.store import Store
from attncc.autotune.task import Options, Task
from attncc.autotune.toolchain import toolchain
from attncc.device import H200, INTERPRETER
from attncc.errors import SpecError
from benchmarks import contest, kills, lookup, sweep
from benchmarks.hand_list import HAND_LIST
from benchmarks.replay import Cost, Setting, Trace, grid, outcome, replay, row
from benchmarks.sweep import Everything, Sweep, imagine, in_model_order, load, save

SPEC = spec.loads("attncc: 1\nname: imagined\nheads: 16\ndims: 128\nmask: causal\n")
SHORT, LONG = {"B": 16, "Sq": 1024, "Sk": 1024}, {"B": 1, "Sq": 16384, "Sk": 16384}
TASK = Task(SPEC, SPEC.attention, INTERPRETER, (SHORT, LONG))
WHOLE = imagine(TASK, {"device": "nowhere"}, seed=3)
SWEEP = replace(WHOLE, points=WHOLE.points[:80])
ALL = len(SWEEP.points)
WIDE = 10.0
"""A slack that leaves nothing out."""


def played(sampler: str, trials: int = ALL, found: Sweep = SWEEP, **more: Any) -> Trace:
    return replay(found, Setting(sampler, **({"slack": WIDE} | more)), 0, trials, 4, Cost(trial=1.0, shape=10.0))


def test_an_imagined_sweep_has_the_whole_space_and_is_not_the_model_alone() -> None:
    assert (WHOLE.share, SWEEP.share) == (1, 0.5)
    best = [min(WHOLE.points, key=lambda p: p.ms[n] or 0.0) for n in (0, 1)]
    assert all(p.choice != WHOLE.points[0].choice for p in best)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_replay_of_all_trials_finds_the_best(sampler: str) -> None:
    few = replace(SWEEP, points=SWEEP.points[:40])
    trace = played(sampler, ALL, few)
    assert len(trace.shares) == 41
    assert trace.shares[0] < 0.9
    assert trace.shares[-1] == 1
    assert list(trace.shares) == sorted(trace.shares)


def test_a_best_config_that_the_slack_cuts_off_is_never_found() -> None:
    hidden = SWEEP.points[-1]
    fast = replace(
        hidden, ms=tuple(b / 2 for b in SWEEP.best_ms), predicted_ms=tuple(99 * t for t in hidden.predicted_ms)
    )
    found = replace(SWEEP, points=(*SWEEP.points[:-1], fast))
    assert played("random", found=found, slack=1.5).shares[-1] < 0.6
    assert played("random", found=found, slack=1e9).shares[-1] == 1


def test_the_best_predictions_come_first_if_so_many_are_wanted() -> None:
    best = replace(SWEEP.points[0], ms=tuple(t / 9 for t in SWEEP.best_ms))
    led = replace(SWEEP, points=(best, *SWEEP.points[1:]))
    assert played("random", 1, led, first=12).shares[-1] == 1
    assert played("random", 1, led, first=0).shares[-1] < 1


def test_settings_hold_for_their_replay_alone() -> None:
    before = search.SEEDS, search.SLACK, dict(search.SAMPLERS)
    played("tpe", 3, first=1, slack=2.0, startup=2)
    assert (search.SEEDS, search.SLACK, dict(search.SAMPLERS)) == before


def test_a_trial_costs_what_it_took_or_a_flat_cost() -> None:
    flat = played("random", 3)
    assert flat.seconds == tuple(21.0 * n for n in range(4))
    took = replace(SWEEP, points=tuple(replace(p, seconds=(0.5, 1.0, 2.0)) for p in SWEEP.points))
    assert played("random", 3, took).seconds == (0.0, 3.5, 7.0, 10.5)


def test_a_hopeless_config_is_seen_on_the_first_shape_alone() -> None:
    slow = replace(SWEEP.points[0], ms=tuple(3 * d for d in SWEEP.default_ms), seconds=(0.5, 1.0, 2.0))
    value, times = outcome(SWEEP, slow)
    assert value == pytest.approx(math.log(3))
    assert len(times) == 1


def test_what_has_no_time_is_no_trial_with_a_value() -> None:
    assert outcome(SWEEP, replace(SWEEP.points[0], status="illegal", ms=(None, None))) == (None, [])
    assert outcome(SWEEP, replace(SWEEP.points[0], status="hung", ms=(SWEEP.default_ms[0], None)))[0] is None


def test_shares_are_read_by_trials_and_by_seconds() -> None:
    trace = Trace((0.5, 0.7, 0.99), (0.0, 3.0, 9.0))
    assert [trace.after_trials(n) for n in (0, 1, 7)] == [0.5, 0.7, 0.99]
    assert [trace.after_seconds(s) for s in (0, 2.9, 3, 100)] == [0.5, 0.5, 0.7, 0.99]
    assert (trace.trials_to(0.98), trace.trials_to(0.995)) == (2, math.inf)
    found = row(Setting("random"), [trace, Trace((0.5, 0.9, 0.9), (0.0, 3.0, 9.0))])
    assert found["by_trials"] == {"0": 0.5, "2": 0.945}
    assert (found["worst"], found["near_trials"]) == (0.9, None)


def test_startup_makes_no_difference_to_samplers_that_have_none() -> None:
    assert len(grid(["tpe", "random"], [12], [3.0], [8, 16])) == 3


# -- sweeps ---------------------------------------------------------------------------------------


def test_a_sweep_comes_back_from_its_file(tmp_path: Path) -> None:
    few = replace(SWEEP, points=SWEEP.points[:5])
    save(tmp_path / "sweep.json", few)
    assert load(tmp_path / "sweep.json") == few


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"meta": {}}', '{"meta": {}, "rows": []}', '{"meta": 3, "rows": []}', "7",
     '{"meta": {"shapes": [], "default_ms": [], "axes": [], "space": 1}, "rows": []}',
     '{"meta": {"shapes": [], "default_ms": [], "axes": {}}, "rows": []}',
     '{"meta": {"shapes": [], "default_ms": [], "axes": {}, "space": 1}, "rows": [{}]}',
     '{"meta": {"shapes": [], "default_ms": [], "axes": {}, "space": 1}, "rows": [3]}'],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SpecError, match="is no sweep"):
        load(tmp_path / "x.json")


def by_rows(config: Mapping[str, int], shape: Mapping[str, float]) -> float:
    return (1.0 if config["BM"] == 16 else 5.0) + config["GROUP"] / 1000


def everything(store: Path, trials: Imagined, compilers: int = 3) -> Everything:
    run = Everything(TASK, Options(budget_s=None, compilers=compilers), Store(store), trials, lambda standing: None)  # type: ignore[arg-type]
    run.begin()
    return run


def order(count: int) -> list[search.Candidate]:
    return [search.Candidate(p.branch, p.choice, p.config) for p in WHOLE.points[:count]]


def test_a_sweep_measures_all_on_all_shapes_however_slow(tmp_path: Path) -> None:
    trials = Imagined(by_rows, is_illegal=lambda c: c["BN"] == 128, hangs=lambda c: c["BN"] == 32)
    points = [*everything(tmp_path, trials).points(order(ALL), math.inf)]
    assert [p.config for p in points] == [p.config for p in SWEEP.points]
    for point in points:
        expected = {128: "illegal", 32: "hung"}.get(point.config["BN"], "measured")
        assert point.status == expected
        times = tuple(by_rows(point.config, s) for s in (SHORT, LONG)) if expected == "measured" else (None, None)
        assert point.ms == times


def test_a_sweep_goes_on_from_its_store(tmp_path: Path) -> None:
    first = [*everything(tmp_path, Imagined(by_rows, is_illegal=lambda c: c["GROUP"] == 1)).points(order(30), math.inf)]
    again = Imagined(by_rows)
    run = everything(tmp_path, again)
    asked = again.asked["legality"]
    second = [*run.points(order(40), math.inf)]
    assert [replace(p, seconds=()) for p in first] == second[:30]
    assert again.asked["legality"] - asked == sum(bool(p.seconds) for p in second[30:]) <= 10
    assert all(not p.seconds for p in second[:30])


def test_a_sweep_stops_when_its_time_is_up(tmp_path: Path) -> None:
    run = everything(tmp_path, Imagined(by_rows))
    assert not [*run.points(order(30), time.monotonic() - 1)]


def test_the_order_is_the_models() -> None:
    times = {json.dumps(p.config): p.predicted_ms for p in WHOLE.points}
    best = [min(column) for column in zip(*times.values(), strict=True)]
    shuffled = sorted(order(160), key=lambda c: c.config["BN"])
    sorted_ = in_model_order(shuffled, lambda config: times[json.dumps(config)])
    costs = [sum(t / b for t, b in zip(times[json.dumps(c.config)], best, strict=True)) for c in sorted_]
    assert costs == sorted(costs)
    assert costs != [costs[0]] * len(costs)


# -- comparisons ----------------------------------------------------------------------------------


def test_the_hand_list_is_the_tutorials_ranges() -> None:
    assert len({json.dumps(c, sort_keys=True) for c in HAND_LIST}) == 36


def test_full_rows_are_the_shape_without_its_sparsity() -> None:
    assert contest.filled({"B": 1, "Sq": 8, "Sk": 8, "sparsity": 0.9, "weight": 2}) == {
        "B": 1, "Sq": 8, "Sk": 8, "sparsity": 0, "weight": 2,
    }  # fmt: skip
    assert contest.filled({**LONG, "documents": 7})["documents"] == 1
    with pytest.raises(SpecError, match="nothing of sparsity"):
        contest.filled(LONG)


def test_configs_that_are_the_same_are_timed_once() -> None:
    trials = Imagined(by_rows)
    one, other = ({"BM": rows, "GROUP": 1} for rows in (16, 64))
    times = contest.alternated(trials, LONG, {"ours": one, "peer": other, "same": dict(one)})  # type: ignore[arg-type]
    rows = contest.against("fwd/x", times, {"ours": one, "peer": other, "same": one}, "peer", {"ours": 3.0})
    assert [(r["impl"], r["ms"], r.get("ratio")) for r in rows] == [
        ("ours", 1.001, 4.996), ("peer", 5.001, None), ("same", 1.001, 4.996),
    ]  # fmt: skip


# -- kills and look-ups ---------------------------------------------------------------------------


def record(rows: int) -> Record:
    return Record(
        variant="killed", program="0123456789abcdef", card=Card.of(H200), toolchain=toolchain(INTERPRETER),
        shape=LONG, config={"BM": rows}, status="measured", ms=1.0,
    )  # fmt: skip


def test_a_record_that_was_said_to_be_stored_and_is_not_counts_as_lost(tmp_path: Path) -> None:
    store = kills.Telling(tmp_path / "store", diary=kills.Diary(tmp_path / "diary"))
    store.add([record(16), record(32)])
    assert kills.missing(tmp_path) == (set(), 0)
    (file,) = (tmp_path / "store").rglob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:-30])
    lost, torn = kills.missing(tmp_path)
    assert lost is not None
    assert ([json.loads(text)["config"]["BM"] for text in lost], torn) == ([32], 1)


def test_what_is_measured_again_is_told_from_what_was_in_flight() -> None:
    diary = [("begun", "a"), ("stored", "a", ""), ("begun", "b"), ("begun", "b"), ("stored", "b", ""), ("begun", "a")]
    assert kills.repeats(diary) == {"measured": 4, "stored": 2, "in flight": 1, "repeated": 1}


@pytest.mark.parametrize("count", [1, 2, 12])
def test_of_a_table_that_is_looked_up_only_the_last_row_holds(count: int) -> None:
    rows = lookup.table_of(count, {"BM": 64})
    sizes = lookup.SIZES | {"pairs": 4 * 4096 * 4096}
    assert len(rows) == count
    assert [all(sizes[k] <= n for k, n in bounds.items()) for bounds, _ in rows] == [False] * (count - 1) + [True]


def test_progress_is_written_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PAUSE_S", -1.0)
    progress = sweep.Progress(tmp_path / "x.json", replace(SWEEP, points=()), 2)
    for n, point in enumerate(SWEEP.points[:2], 1):
        progress.add(point)
        assert load(tmp_path / "x.json").points == SWEEP.points[:n]
    assert "2 of 2 configs (2 measured)" in progress.line()


def test_how_near_the_best_of_a_sweep_the_configs_of_a_run_come() -> None:
    best = [min(SWEEP.points, key=lambda p: p.ms[n] or math.inf) for n in (0, 1)]
    rows = contest.shares(TASK, SWEEP, [best[0].config, best[0].config], "mine", 7.0)
    assert [r["impl"] for r in rows] == ["mine", "mine"]
    assert rows[0]["share"] == 1
    assert rows[1]["share"] == round(SWEEP.best_ms[1] / best[0].ms[1], 4) < 1  # type: ignore[operator]
    assert rows[1]["default_share"] == round(SWEEP.best_ms[1] / SWEEP.default_ms[1], 4)


def test_a_config_or_a_shape_that_the_sweep_does_not_have_is_named() -> None:
    config = SWEEP.points[0].config
    with pytest.raises(SpecError, match="no time of"):
        contest.shares(TASK, SWEEP, [{**config, "BM": 7}, config], "mine", 7.0)
    with pytest.raises(SpecError, match="other shapes"):
        contest.shares(replace(TASK, shapes=(SHORT,)), SWEEP, [config], "mine", 7.0)
