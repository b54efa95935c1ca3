"""The search asks for each config once, for what the model thinks of first, and finds the best of a small space."""

from __future__ import annotations

import random
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from attncc.autotune.search import SAMPLERS, SEEDS, SLACK, Search
from attncc.autotune.space import Branch, Candidate
from attncc.autotune.storages import open_storage
from attncc.autotune.task import Options
from attncc.errors import SpecError

AXES = {"A": tuple(range(8)), "C": (1, 2, 4, 8)}
BRANCHES = (
    Branch("plain", AXES, lambda choice: {**choice, "X": 0}),
    Branch("engine", {"A": (0, 1)}, lambda choice: {**choice, "X": 1}),
)
CANDIDATES = [Candidate(b.name, *pair) for b in BRANCHES for pair in b.configs()]


def time(config: dict[str, int]) -> float:
    return 1.0 + abs(config["A"] - 5) / 10 + config.get("C", 1) / 100 - 0.05 * config["X"]


def search(sampler: str = "tpe", **more: object) -> Search:
    return Search(BRANCHES, CANDIDATES, lambda c: [time(dict(c))], sampler, **more)  # type: ignore[arg-type]


def run(made: Search, count: int = 10**6) -> list[dict[str, int]]:
    asked: list[dict[str, int]] = []
    while len(asked) < count and (found := made.ask()):
        trial, candidate = found
        asked.append(dict(candidate.config))
        made.tell(trial, candidate, time(asked[-1]) - 1, {"record0": {}})
    return asked


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_config_is_asked_for_once(sampler: str) -> None:
    asked = run(search(sampler))
    assert len(asked) == len(CANDIDATES) == len({frozenset(c.items()) for c in asked})


def test_the_best_predictions_come_first() -> None:
    best = sorted({time(dict(c.config)) for c in CANDIDATES})
    assert sorted(map(time, run(search(), SEEDS))) == pytest.approx(best[:SEEDS])


def test_what_is_predicted_to_be_hopeless_is_never_asked_for() -> None:
    def predicted(config: dict[str, int]) -> list[float]:
        return [1.0, 1.0] if config["A"] < 4 else [SLACK * 1.01, SLACK * 0.99] if config["A"] == 4 else [9.0, 9.0]

    made = Search(BRANCHES, CANDIDATES, predicted, "random")  # type: ignore[arg-type]
    assert {c["A"] for c in run(made)} == {0, 1, 2, 3, 4}


def test_what_is_known_is_not_asked_for() -> None:
    made = search()
    known = [dict(c.config) for c in CANDIDATES[:10]]
    for number, config in enumerate(known):
        made.know(config, None if number % 2 else time(config))
    made.know({"A": 99, "X": 0}, 1.0)
    asked = run(made)
    assert len(asked) == len(CANDIDATES) - 10
    assert not [c for c in asked if c in known]


def test_a_sampler_finds_the_best_sooner_than_chance() -> None:
    wide = {f"K{n}": tuple(range(6)) for n in range(4)}
    branch = (Branch("plain", wide, dict),)
    every = [Candidate("plain", *pair) for pair in branch[0].configs()]

    def value(config: dict[str, int]) -> float:
        return sum((n - 3) ** 2 for n in config.values())

    def best(sampler: str, seed: int) -> float:
        shuffled = random.Random(seed).sample(every, len(every))
        made = Search(branch, shuffled, lambda c: [1.0], sampler, seed)
        values: list[float] = []
        for _ in range(60):
            found = made.ask()
            assert found
            values.append(value(dict(found[1].config)))
            made.tell(found[0], found[1], values[-1], {})
        return min(values)

    tpe, chance = (sum(best(s, seed) for seed in range(4)) for s in ("tpe", "random"))
    assert tpe < chance


def test_two_searches_of_one_study_share_what_they_know(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "trials"))
    first, second = (search("random", storage=storage, seed=n) for n in range(2))
    mine = run(first, 10)
    heard = second.catch_up()
    assert len(heard) == 10
    assert second.catch_up() == []
    rest = run(second)
    assert len(rest) == len(CANDIDATES) - 10
    assert not [c for c in rest if c in mine]
    first.catch_up()
    assert first.ask() is None


def test_a_config_under_way_elsewhere_is_left_to_it_until_it_fails(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "trials"))
    first, second = (search("random", storage=storage, seed=n) for n in range(2))
    found = first.ask()
    assert found
    second.catch_up()
    assert len(second.left) == len(CANDIDATES) - 1
    first.study.tell(found[0], state=TrialState.FAIL)
    second.catch_up()
    assert len(second.left) == len(CANDIDATES)


def test_a_config_that_two_ask_for_at_once_is_the_earlier_trial_s(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "trials"))
    first, second = (search("random", storage=storage, seed=0) for n in range(2))  # both suggest the same
    pairs = [(first.ask(), second.ask()) for _ in range(len(CANDIDATES) // 2)]
    asked = [found[1].config for pair in pairs for found in pair if found]
    assert len(asked) == len(CANDIDATES)
    assert len({frozenset(config.items()) for config in asked}) == len(CANDIDATES)
    assert (first.ask(), second.ask()) == (None, None)


def test_a_trial_that_was_taken_for_dead_ends_without_harm_and_is_not_asked_for_again(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "trials"))
    made, other = (search("random", storage=storage) for _ in range(2))
    found = made.ask()
    assert found
    other.study.tell(found[0], state=TrialState.FAIL)
    made.catch_up()
    assert found[1] not in made.left.values(), "it is under way"
    made.tell(*found, 0.5, {"record0": {}})
    made.catch_up()
    assert found[1] not in made.left.values()
    assert found[1] in other.left.values()


@pytest.mark.parametrize("wrong", [{"sampler": "luck"}, {"sampler": ""}, {"trials": 0}, {"trials": -1}])
def test_wrong_options_are_refused(wrong: dict) -> None:
    with pytest.raises(SpecError):
        Options(**wrong)


def test_a_storage_may_be_away_while_the_trials_of_the_dead_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = search(storage=open_storage(f"sqlite:///{tmp_path}/a.db"))
    answers = iter((StorageInternalError("shutting down"), OperationalError("", {}, Exception("refused")), None))
    asked: list[object] = []

    def stale(study: object) -> None:
        asked.append(study)
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(optuna.storages, "fail_stale_trials", stale)
    monkeypatch.setattr("attncc.autotune.heartbeat.PAUSE_S", 0.0)
    assert made.catch_up() == []
    assert asked == [made.study] * 3
