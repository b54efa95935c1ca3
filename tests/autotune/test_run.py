"""A tuning run over imagined kernels: what may win, what is kept, and where the next run goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from autotune.bench_in_mind import Imagined

from attncc import driver, spec
from attncc.autotune.run import HOPELESS, Run
from attncc.autotune.storages import open_storage
from attncc.autotune.store import Store
from attncc.autotune.table import pick, sizes_of
from attncc.autotune.task import Options, Standing, Task, Tuned
from attncc.device import H200, INTERPRETER, Device
from attncc.errors import TuneError
from attncc.passes.lower.defaults import default_configs

SPEC = spec.loads("attncc: 1\nname: imagined\nheads: 16\ndims: 128\nmask: causal\n")
SHORT, LONG = {"B": 16, "Sq": 1024, "Sk": 1024}, {"B": 1, "Sq": 16384, "Sk": 16384}
Config = Mapping[str, int]


def run(
    bench: Imagined,
    store: Path,
    device: Device = INTERPRETER,
    watch: Callable[[Standing], None] = lambda standing: None,
    **options: Any,
) -> Tuned:
    task = Task(SPEC, SPEC.attention, device, (SHORT, LONG))
    given = {"budget_s": None, "trials": 40, "compilers": 3, "sampler": "random"} | options
    return Run(task, Options(**given), Store(store), bench, watch).tune(None)  # type: ignore[arg-type]


def chosen(found: Tuned, shape: Mapping[str, int]) -> Config:
    return pick(found.decision.rows, sizes_of(shape))


def by_rows(config: Config, shape: Mapping[str, float]) -> float:
    """Tall tiles are slow on short sequences, low ones on long ones."""
    best = 16 if shape["Sq"] == 1024 else 128
    return 1.0 + abs(config["BM"] - best) / 100 + config["GROUP"] / 1000


def test_each_shape_gets_what_is_fastest_there(tmp_path: Path) -> None:
    found = run(Imagined(by_rows), tmp_path, trials=None)
    assert chosen(found, SHORT)["BM"] == 16
    assert chosen(found, LONG)["BM"] == 128
    assert all(o.ms is not None and o.ms < (o.default_ms or 0) for o in found.decision.outcomes)


def test_what_is_wrong_never_wins_and_is_kept_as_wrong(tmp_path: Path) -> None:
    trials = Imagined(by_rows, is_wrong=lambda c: c["BM"] == 128)
    found = run(trials, tmp_path, trials=None)
    assert all(config["BM"] != 128 for _, config in found.decision.rows)
    wrong = [r for r in Store(tmp_path).records() if r.status == "wrong"]
    assert wrong
    assert all(r.config["BM"] == 128 and "random: o" in r.why for r in wrong)


def test_what_hangs_or_is_off_or_does_not_fit_costs_its_trial_alone(tmp_path: Path) -> None:
    trials = Imagined(
        by_rows,
        hangs=lambda c: c["BM"] == 16 and c["BN"] == 16,
        is_off=lambda c: c["BN"] == 32,
        is_illegal=lambda c: c["BN"] == 128,
    )
    found = run(trials, tmp_path, trials=None)
    assert {s: n > 0 for s, n in found.standing.statuses.items()} == dict.fromkeys(
        ("measured", "hung", "wrong", "illegal"), True
    )
    assert all(config["BN"] in (16, 64) for _, config in found.decision.rows)
    status = {(r.status, r.config["BN"]) for r in Store(tmp_path).records()}
    assert ("illegal", 128) in status
    assert ("measured", 128) not in status


def test_a_default_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TuneError, match=r"the default config .* is hung"):
        run(Imagined(by_rows, hangs=lambda c: True), tmp_path)


def test_a_lead_within_the_noise_is_none(tmp_path: Path) -> None:
    def nearly(config: Config, shape: Mapping[str, float]) -> float:
        return 1.0 - 0.001 * (config["BM"] == 16)

    found = run(Imagined(nearly), tmp_path, trials=None)
    assert all(o.ms == o.default_ms for o in found.decision.outcomes)


def test_everything_that_wins_has_a_certificate(tmp_path: Path) -> None:
    found = run(Imagined(by_rows), tmp_path, trials=None)
    assert found.decision.used
    assert all(r.certificate is not None for r in found.decision.used)


def test_the_next_run_measures_nothing_twice(tmp_path: Path) -> None:
    first = Imagined(by_rows)
    before = run(first, tmp_path, trials=None)
    second = Imagined(by_rows)
    after = run(second, tmp_path, trials=None)
    assert second.asked["measure"] == second.asked["certify"] == 0
    assert before.decision.rows == after.decision.rows


def test_a_fresh_run_measures_anew(tmp_path: Path) -> None:
    run(Imagined(by_rows), tmp_path)
    again = Imagined(by_rows)
    run(again, tmp_path, resume=False)
    assert again.asked["measure"] > 2


def test_another_toolchain_counts_as_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Imagined(by_rows), tmp_path)
    monkeypatch.setattr("attncc.autotune.toolchain.VERSION", "9.9")
    again = Imagined(by_rows)
    run(again, tmp_path)
    assert again.asked["measure"] > 2


@pytest.mark.parametrize("after", [2, 9, 40])
def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path, after: int) -> None:
    first, second = Imagined(by_rows, stop_after=after), Imagined(by_rows)
    assert run(first, tmp_path).interrupted
    assert len({(r.knobs, r.shape["Sq"]) for r in Store(tmp_path).records()}) == after
    assert not run(second, tmp_path).interrupted
    assert not set(first.measured[:after]) & set(second.measured), "something was measured twice"


def test_hopeless_configs_are_not_measured_on_every_shape(tmp_path: Path) -> None:
    def slow(config: Config, shape: Mapping[str, float]) -> float:
        return 1.0 if config["BM"] == 64 else 10.0

    assert HOPELESS < 1
    trials = Imagined(slow)
    found = run(trials, tmp_path, trials=None)
    records = [*Store(tmp_path).records()]
    on = {r.shape["Sq"] for r in records if r.config["BM"] == 16 and r.config["ONE_PASS"] == 0}
    assert on == {1024}
    assert all(config["BM"] == 64 for bounds, config in found.decision.rows if not bounds)


def test_trials_are_counted_and_a_default_of_two_shapes_is_compiled_once(tmp_path: Path) -> None:
    trials = Imagined(by_rows)
    found = run(trials, tmp_path, trials=5)
    assert found.standing.tried == trials.asked["legality"] - 1 == 5


def test_the_watch_hears_of_every_trial(tmp_path: Path) -> None:
    heard: list[Standing] = []
    run(Imagined(by_rows), tmp_path, trials=6, watch=heard.append)
    assert sorted({s.tried for s in heard}) == list(range(7))
    assert heard[-1].default_ms[0] == by_rows({"BM": 64, "GROUP": 8}, SHORT)
    assert min(heard[-1].best_ms) <= min(heard[-1].default_ms)


def test_an_engine_is_a_branch_of_the_same_space(tmp_path: Path) -> None:
    def engine_wins(config: Config, shape: Mapping[str, float]) -> float:
        return 0.5 + config["E_STAGES"] / 10 if config.get("ENGINE") else 1.0

    found = run(Imagined(engine_wins), tmp_path, H200, trials=60)
    assert chosen(found, LONG)["ENGINE"] == 1
    assert chosen(found, LONG)["E_STAGES"] == 2
    assert {bool(r.config.get("ENGINE")) for r in Store(tmp_path).records()} == {True, False}
    assert found.rank_correlation is not None


def test_a_run_that_is_killed_between_certificate_and_comparison_lets_no_noise_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearly(config: Config, shape: Mapping[str, float]) -> float:
        return 0.97 if config["BM"] == 16 else 1.0

    bench = Imagined(nearly)
    monkeypatch.setattr(bench, "compare", lambda shape, configs: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        run(bench, tmp_path, trials=None)
    assert not [r for r in Store(tmp_path).records() if r.certificate and r.config["BM"] == 16]
    after = Imagined(lambda config, shape: 1.0)  # in alternation there is no lead
    found = run(after, tmp_path, trials=None)
    assert all(o.ms == o.default_ms for o in found.decision.outcomes)


def test_an_engine_that_was_left_out_of_the_package_is_not_tried(tmp_path: Path) -> None:
    task = Task(SPEC, SPEC.attention, H200, (SHORT,))
    options = Options(budget_s=None, trials=20, sampler="random")
    found = Run(task, options, Store(tmp_path), Imagined(by_rows), lambda s: None, has_engine=False).tune(None)  # type: ignore[arg-type]
    assert not [r for r in Store(tmp_path).records() if r.config.get("ENGINE")]
    assert not [c for _, c in found.decision.rows if c.get("ENGINE")]


def test_what_an_interrupted_run_had_asked_for_is_left_to_others(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "trials"))
    task = Task(SPEC, SPEC.attention, INTERPRETER, (SHORT,))
    options = Options(budget_s=None, trials=30, sampler="random", compilers=4)
    bench = Imagined(by_rows, stop_after=8)
    found = Run(task, options, Store(tmp_path / "store"), bench, lambda s: None).tune(storage)  # type: ignore[arg-type]
    assert found.interrupted
    trials = optuna.load_study(study_name=task.name, storage=storage).trials
    states = Counter(t.state.name for t in trials)
    assert states["RUNNING"] == 0
    assert states["FAIL"] == 4


def test_the_default_of_one_shape_is_tried_on_the_others(tmp_path: Path) -> None:
    tiny = {"B": 1, "Sq": 64, "Sk": 64}
    task = Task(SPEC, SPEC.attention, INTERPRETER, (tiny, LONG))
    bench = Imagined(lambda config, shape: by_rows(config, LONG) * shape["Sq"])
    options = Options(budget_s=None, sampler="random", compilers=3)
    Run(task, options, Store(tmp_path), bench, lambda s: None).tune(None)  # type: ignore[arg-type]
    default = default_configs(driver.lower(SPEC.attention)[0], INTERPRETER)[0][-1][1]
    on = {r.shape["Sq"] for r in Store(tmp_path).records() if r.config == dict(default)}
    assert on == {64, LONG["Sq"]}
