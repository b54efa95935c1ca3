"""Workers on one storage, PostgreSQL among them: killed, cut off, and of several kinds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from autotune.postgres import Server, server
from golden import TESTS
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from attncc import spec
from attncc.autotune.fleet import collect, jobs, submit
from attncc.autotune.record import Record
from attncc.autotune.storages import open_storage
from attncc.autotune.store import Store
from attncc.device import INTERPRETER, find
from attncc.errors import SpecError, Unsupported

ROOT = TESTS.parent
SPEC = spec.loads("attncc: 1\nname: imagined\nheads: 16\ndims: 128\nmask: causal\n")
SHAPE = {"B": 1, "Sq": 1024, "Sk": 1024}


@pytest.fixture(scope="module")
def database() -> Iterator[Server]:
    with server() as made:
        yield made


def worker(url: str, store: Path, card: str = "interpreter", seconds: float = 0.02) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(ROOT), str(TESTS)))
    return subprocess.Popen(
        [sys.executable, "-m", "autotune.imagined_worker", url, str(store), card, str(seconds)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def until_done(storage: BaseStorage, trials: int, patience: float = 60) -> int:
    """Waits until so many trials are done in the first study."""
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        done = next(jobs(storage)).done
        if done >= trials:
            return done
        time.sleep(0.05)
    raise AssertionError(f"{done} of {trials} trials within {patience} s")


def measured(storage: BaseStorage, study: str) -> list[Record]:
    """Of the trials that came to their end; those of the dead may have left a record, too."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(states=states)
    return [Record.model_validate(t.user_attrs["record0"]) for t in trials if "record0" in t.user_attrs]


@pytest.mark.postgres
def test_a_killed_worker_and_a_cut_connection_lose_the_trial_in_flight_alone(database: Server, tmp_path: Path) -> None:
    storage = open_storage(database.url)
    (study,) = submit(storage, SPEC, [INTERPRETER], 40, [SHAPE])
    killed, other = (worker(database.url, tmp_path / name, seconds=0.1) for name in ("killed", "other"))
    until_done(storage, 6)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    until_done(storage, 12)
    database.stop()
    time.sleep(1)
    database.start()
    assert "1 ended" in ended(other)
    found = measured(storage, study)
    assert len(found) >= 40
    assert max(Counter(r.knobs for r in found).values()) == 1, "a config was measured twice"
    kept = {r.knobs for name in ("killed", "other") for r in Store(tmp_path / name).records()}
    assert {r.knobs for r in found} <= kept


@pytest.mark.postgres
def test_a_mixed_fleet_tunes_all_its_kinds_and_anyone_collects(database: Server, tmp_path: Path) -> None:
    storage = open_storage(database.url)
    cards = ("nvidia_h200", "nvidia_h100")
    names = submit(storage, SPEC, map(find, cards), 8, [SHAPE])
    workers = [worker(database.url, tmp_path / card, card) for card in (*cards, cards[0])]
    assert all("ended" in ended(w) for w in workers)
    for card, name in zip(cards, names, strict=True):
        found = measured(storage, name)
        assert {r.card.name for r in found} == {card}
        assert 8 <= len(found) <= 10  # two workers may both begin a last one
    store = Store(tmp_path / "all")
    first, second = collect(storage, store), collect(storage, store)
    assert first.added == len([*store.records()])
    assert (second.added, second.skipped) == (0, 0)
    for card in cards:
        assert any(r.certificate for r in store.records(card=card)), "winners come with their certificates"


def test_a_journal_serves_two_processes(tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'trials'}"
    storage = open_storage(url)
    (study,) = submit(storage, SPEC, [INTERPRETER], 10, [SHAPE])
    for process in [worker(url, tmp_path / name) for name in "ab"]:
        assert "ended" in ended(process)
    found = measured(storage, study)
    assert 10 <= len(found) <= 11
    assert max(Counter(r.knobs for r in found).values()) == 1


def test_what_is_no_job_is_left_alone(tmp_path: Path) -> None:
    storage = open_storage(f"journal:{tmp_path / 'trials'}")
    for name, text in (("plain", None), ("text", "words"), ("fields", '{"spec": 1}'), ("list", [1, 2])):
        study = optuna.create_study(study_name=name, storage=storage)
        if text is not None:
            study.set_user_attr("attncc", text)
    trial = optuna.load_study(study_name="plain", storage=storage).ask()
    trial.set_user_attr("record0", {"program": "../../etc"})
    optuna.load_study(study_name="plain", storage=storage).tell(trial, 1.0)
    assert [*jobs(storage)] == []
    merged = collect(storage, Store(tmp_path / "store"))
    assert (merged.added, merged.skipped) == (0, 1)


def test_a_job_that_a_worker_cannot_read_is_said_and_left(tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'trials'}"
    storage = open_storage(url)
    study = optuna.create_study(study_name="broken", storage=storage)
    job = '{"spec": "attncc: 7", "file": "x.yaml", "card": "interpreter", "shapes": [{"B": 1}], "trials": 3}'
    study.set_user_attr("attncc", job)
    said = ended(worker(url, tmp_path / "store"))
    assert "broken: x.yaml:1" in said
    assert "0 ended" in said


@pytest.mark.parametrize(
    ("card", "trials", "shape", "error"),
    [
        ("cpu", 10, SHAPE, SpecError),
        ("nvidia_h200", 0, SHAPE, SpecError),
        ("nvidia_h200", -3, SHAPE, SpecError),
        ("nvidia_h200", 10, {"B": 0, "Sq": 4}, SpecError),
        ("nvidia_h200", 10, {"B": 1}, SpecError),
        ("nvidia_h200", 10, {"Sq": 4, "Sx": 4}, SpecError),
    ],
)
def test_wrong_work_is_refused(tmp_path: Path, card: str, trials: int, shape: dict, error: type[Exception]) -> None:
    storage = open_storage(f"journal:{tmp_path / 'trials'}")
    with pytest.raises(error):
        submit(storage, SPEC, [find(card)], trials, [shape])
    assert [*jobs(storage)] == []


def test_a_variant_without_a_lowering_is_refused(tmp_path: Path) -> None:
    storage = open_storage(f"journal:{tmp_path / 'trials'}")
    with pytest.raises(Unsupported):
        submit(storage, ROOT / "examples" / "nsa.yaml", [find("nvidia_h200")], 5, [SHAPE])
