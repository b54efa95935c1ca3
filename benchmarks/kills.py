"""What SIGKILL costs a tuning run: killed hundreds of times, it must lose no record that it had put into its store.

`python -m benchmarks.kills -n 200 --json FILE` starts runs of imagined trials (20 ms each), kills them at a random time
of a whole run's, and starts them again on the same store until all is tried, when another store begins. Each run is
forked from a process that has imported everything, so that kills come fast. A run says what it is about to measure, and
then, behind the store, what it has stored; that must be there in every word, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from attncc import spec
from attncc.autotune import tune as tuner
from attncc.autotune.declared import Shape
from attncc.autotune.record import Certificate, Record, Sparsity
from attncc.autotune.sparsity import Kept
from attncc.autotune.store import Store
from attncc.autotune.task import Options
from attncc.autotune.trials import Legality, Tried
from attncc.device import INTERPRETER
from benchmarks import report

Config = Mapping[str, int]
SPEC: Final = spec.loads("attncc: 1\nname: killed\nheads: 4\ndims: 64\nmask: causal\n")
SHAPES: Final = ({"B": 4, "Sq": 1024, "Sk": 1024}, {"B": 1, "Sq": 8192, "Sk": 8192})
TRIAL_S: Final = 0.02
TRIALS: Final = 40
"""Of a run that is not killed."""
MORE: Final = 3
"""A run's exit code if there is something left to try."""
BOUND_S: Final = 120.0
"""That a run may take before it counts as stuck."""


@dataclass(frozen=True, slots=True)
class Diary:
    """A file of lines that outlive the process that writes them."""

    file: Path

    def write(self, *words: object) -> None:
        handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(handle, (json.dumps(words) + "\n").encode())
        os.close(handle)

    def read(self) -> Iterator[list[Any]]:
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            yield json.loads(line)


@dataclass(frozen=True)
class Telling(Store):
    """A store that says what it has stored, once it has."""

    diary: Diary = Diary(Path(os.devnull))

    def add(self, records: Iterable[Record]) -> None:
        known = [*records]
        Store.add(self, known)
        for record in known:
            self.diary.write("stored", key_of(record.config, record.shape), record.model_dump_json())


@dataclass(frozen=True, slots=True)
class Imagined:
    """Trials that take their time, and say when they begin."""

    diary: Diary

    def describe(self, shape: Shape) -> Kept:
        return Kept(0.5, Sparsity(tiles=4.0, variance=0.1, full=0.5, skew=1.0))

    def legality(self, config: Config) -> Future[Legality]:
        found: Future[Legality] = Future()
        too_much = max(config["BM"], config["BN"]) > 64 or config["GROUP"] in (2, 4)
        found.set_result(Legality(("it takes too much",) if too_much else ()))
        return found

    def measure(self, shape: Shape, config: Config, trusted: Config) -> Tried:
        self.diary.write("begun", key_of(config, shape))
        time.sleep(TRIAL_S / len(SHAPES))
        ms = 1.0 + abs(config["BM"] - (16 if shape["Sq"] == 1024 else 64)) / 100 + config["GROUP"] / 1000
        return Tried("measured", ms=ms, spread=(ms, ms))

    def certify(self, config: Config) -> Tried:
        time.sleep(TRIAL_S)
        return Tried("measured", certificate=Certificate(cases=3, inputs=("random",), worst=0.5))

    def compare(self, shape: Shape, configs: Sequence[Config]) -> list[list[float]]:
        time.sleep(TRIAL_S)
        return [[1.0 + n / 100] * 3 for n, _ in enumerate(configs)]


def key_of(config: Config, shape: Mapping[str, float]) -> str:
    return json.dumps([sorted(config.items()), sorted(shape.items())])


@dataclass(slots=True)
class Tally:
    """What was seen so far."""

    kills: int = 0
    ended: int = 0
    """Runs that came to their end."""
    stored: int = 0
    lost: set[str] = field(default_factory=set)
    measured: int = 0
    repeated: int = 0
    """Measured again although it was stored."""
    in_flight: int = 0
    """Measured again because the kill came before it was stored."""
    torn: int = 0
    unreadable: int = 0
    """Times that the store could not be read."""
    wrong: int = 0
    """Runs that ended neither well nor by our kill."""
    survivors: list[int] = field(default_factory=list)
    """Records in each store, at its end."""

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.repeated or self.unreadable or self.wrong) and self.in_flight <= self.kills


def main() -> int:
    """1 if a record was lost, or anything was measured twice that was stored."""
    args = parser().parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder:
        found, whole_s = trial(args.kills, args.seed, Path(folder))
    seconds = round(time.monotonic() - begun, 1)
    row = {
        "case": "SIGKILL/tune", "kills": found.kills, "runs_that_ended": found.ended, "records_stored": found.stored,
        "records_lost": len(found.lost), "trials_measured": found.measured, "trials_repeated": found.repeated,
        "trials_again_after_in_flight": found.in_flight, "torn_lines_skipped": found.torn,
        "stores_unreadable": found.unreadable, "runs_that_failed": found.wrong, "stores": len(found.survivors),
        "records_at_the_end": found.survivors, "whole_run_s": round(whole_s, 2), "seconds": seconds,
    }  # fmt: skip
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    if args.json:
        facts = {
            "trial_s": TRIAL_S,
            "trials_of_a_run": TRIALS,
            "shapes": len(SHAPES),
            "seed": args.seed,
            "processes": "forked, with all imported",
        }
        report.save(args.json, report.cpu_meta() | facts, [row], [])
    return int(not found.is_clean)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    top.add_argument("-n", "--kills", type=int, default=200)
    top.add_argument("--seed", type=int, default=0, help="of the times of kills")
    top.add_argument("--json", type=Path, metavar="FILE")
    return top


def trial(kills: int, seed: int, folder: Path) -> tuple[Tally, float]:
    """So many kills, over as many stores as that takes; and how long a whole run takes."""
    chance, tally, number = random.Random(seed), Tally(), 0
    begun = time.monotonic()
    life(folder / "first", BOUND_S, Tally())
    whole_s = time.monotonic() - begun
    while tally.kills < kills:
        number += 1
        home = folder / str(number)
        while tally.kills < kills and not life(home, chance.uniform(0, whole_s), tally):
            checked(home, tally)
        while not life(home, BOUND_S, tally):
            checked(home, tally)
        tally.survivors.append(summed(home, tally))
        print(f"{tally.kills} kills, {len(tally.lost)} of {tally.stored} records lost", flush=True)
    return tally, whole_s


def life(home: Path, patience: float, tally: Tally) -> bool:
    """One run, killed after so many seconds unless it ends before; whether all is tried, or it went wrong."""
    home.mkdir(exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            code = tuned(home)
        except BaseException:  # nothing of the parent's may run in the child
            traceback.print_exc()
            code = 1
        os._exit(code)
    until, done, status = time.monotonic() + patience, 0, 0
    while not done and time.monotonic() < until:
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        tally.kills += 1
        tally.wrong += done > 0 or patience >= BOUND_S
        return patience >= BOUND_S
    tally.ended += 1
    code = os.waitstatus_to_exitcode(status)
    tally.wrong += code not in (0, MORE)
    return code != MORE


def tuned(home: Path) -> int:
    """What the process does that is killed: plain `tune`, with imagined trials; its exit code."""
    diary = Diary(home / "diary")

    @contextmanager
    def opened(*_: object) -> Iterator[Imagined]:
        yield Imagined(diary)

    tempfile.tempdir = str(home)  # packages of the killed stay behind
    options = Options(budget_s=None, trials=TRIALS, sampler="random", compilers=2)
    with patch.object(tuner, "opened", opened):
        found = tuner.tune(SPEC, SHAPES, INTERPRETER, options, Telling(home / "store", diary=diary))
    return 0 if found.exhausted else MORE


def checked(home: Path, tally: Tally) -> None:
    """Whether the store can be read, and has all that was said to be in it."""
    lost, _ = missing(home)
    tally.unreadable += lost is None
    tally.lost |= lost or set()


def missing(home: Path) -> tuple[set[str] | None, int]:
    """The records that were stored and are not there, None if the store cannot be read; and how many lines are torn."""
    torn: list[str] = []
    try:
        there = {r.model_dump_json() for r in Store(home / "store", torn.append).records()}
    except Exception as error:  # whatever it is, it is what is looked for
        print(f"{home}: {type(error).__name__}: {error}", file=sys.stderr)
        return None, len(torn)
    said = [words[2] for words in Diary(home / "diary").read() if words[0] == "stored"]
    return set(said) - there, len(torn)


def summed(home: Path, tally: Tally) -> int:
    """Adds what one store saw until its end; how many records are left in it."""
    lost, torn = missing(home)
    tally.unreadable += lost is None
    tally.lost |= lost or set()
    tally.torn += torn
    again = repeats(Diary(home / "diary").read())
    tally.stored += again["stored"]
    tally.measured += again["measured"]
    tally.repeated += again["repeated"]
    tally.in_flight += again["in flight"]
    return sum(1 for _ in Store(home / "store", lambda text: None).records())


def repeats(diary: Iterable[Sequence[Any]]) -> Counter[str]:
    """How often something was measured again: though it was stored, or because it was in flight."""
    begun: set[str] = set()
    stored: set[str] = set()
    found: Counter[str] = Counter()
    for what, key, *_ in diary:
        if what == "stored":
            stored.add(key)
            found["stored"] += 1
            continue
        found["measured"] += 1
        found["repeated" if key in stored else "in flight"] += key in begun
        begun.add(key)
    return found


if __name__ == "__main__":
    sys.exit(main())
