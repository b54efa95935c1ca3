"""Tuning by several machines: what is to be tuned lies in a storage, and each worker takes up what its own card can do.

Trials, records and certificates all go into the storage, so that any machine can collect them into its store.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Final

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from pydantic import Field, ValidationError

from attncc import driver, spec
from attncc.autotune.declared import Shape, shapes_of
from attncc.autotune.heartbeat import insist
from attncc.autotune.record import Data, Name, Record
from attncc.autotune.run import CERTIFIED, Watch
from attncc.autotune.search import RECORD
from attncc.autotune.store import Merged, Store
from attncc.autotune.task import Options, Task, Tuned
from attncc.autotune.tune import tune
from attncc.device import Device, here
from attncc.errors import AttnccError, SpecError
from attncc.spec import Spec

JOB: Final = "attncc"
"""Of a study's attributes, the one that says what is to be tuned."""
PAUSE_S: Final = 5.0


class Job(Data):
    """What is to be tuned, for one kind of card."""

    spec: Annotated[str, Field(max_length=2**16)]
    file: Annotated[str, Field(max_length=256)]
    card: Name
    shapes: Annotated[tuple[dict[Name, int | float], ...], Field(min_length=1, max_length=64)]
    trials: Annotated[int, Field(gt=0, lt=2**20)]


@dataclass(frozen=True, slots=True)
class Open:
    """A job, and how far it is."""

    study: str
    job: Job
    done: int


def submit(
    storage: BaseStorage,
    source: Spec | str | os.PathLike[str],
    devices: Iterable[Device],
    trials: int,
    shapes: Iterable[Shape] | None = None,
) -> list[str]:
    """Leaves a variant to the workers on cards of these kinds; the names of the studies, one a card.

    Raises:
        Unsupported: for a variant that no skeleton carries.
        SpecError: for wrong shapes or numbers, or a device that is no GPU and not interpreted.
        TuneError: if the storage is away.
    """
    loaded = driver.load(source)
    driver.lower(loaded.attention)
    wanted = None if shapes is None else [*shapes]
    names: list[str] = []
    for device in devices:
        if device.takes_libraries:
            raise SpecError(f"there is nothing to tune for {device.name}", hint="name a card, such as nvidia_h200")
        task = Task(loaded, loaded.attention, device, shapes_of(loaded.attention, wanted, device.is_gpu))
        try:
            shaped = tuple(dict(s) for s in task.shapes)
            job = Job(spec=loaded.text, file=loaded.file, card=device.name, shapes=shaped, trials=trials)
        except ValidationError as error:
            raise SpecError(f"this cannot be left to workers: {error.errors()[0]['msg']}") from None
        study = insist(lambda t=task: optuna.create_study(study_name=t.name, storage=storage, load_if_exists=True))
        insist(lambda s=study, j=job: s.set_user_attr(JOB, j.model_dump_json()))
        names.append(task.name)
    return names


def jobs(storage: BaseStorage, card: str | None = None) -> Iterator[Open]:
    """What is to be tuned, on a kind of card; what in the storage is no job of ours is left out."""
    for summary in insist(lambda: optuna.get_all_study_summaries(storage, include_best_trial=False)):
        try:
            job = Job.model_validate_json(summary.user_attrs.get(JOB, ""))
        except (ValidationError, TypeError):
            continue
        if card in (None, job.card):
            study = optuna.load_study(study_name=summary.study_name, storage=storage)
            yield Open(summary.study_name, job, sum(1 for _ in _carried_out(study)))


def work(
    storage: BaseStorage,
    store: Store,
    device: Device | None = None,
    options: Options | None = None,
    once: bool = False,
    watch: Watch = lambda standing: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Tuned]:
    """Tunes what is left to cards of this kind, until nothing is, or for good; what came of each.

    A job that cannot be tuned here is said, and left to others.

    Raises:
        TuneError: if the storage stays away.
    """
    card = device or here()[0]
    given = options or Options()
    ended: list[Tuned] = []
    refused: set[str] = set()
    while True:
        due = next((j for j in jobs(storage, card.name) if j.done < j.job.trials and j.study not in refused), None)
        if due is None:
            if once:
                return ended
            time.sleep(PAUSE_S)
            continue
        say(f"{due.study}: {due.done} of {due.job.trials} trials done")
        mine = replace(given, trials=due.job.trials, budget_s=None)
        try:
            loaded = spec.loads(due.job.spec, due.job.file)
            ended.append(tune(loaded, due.job.shapes, card, mine, store, storage, watch))
        except AttnccError as error:
            refused.add(due.study)
            say(f"{due.study}: {error}")
            continue
        if ended[-1].interrupted:
            return ended
        if ended[-1].exhausted:
            refused.add(due.study)


def collect(storage: BaseStorage, store: Store) -> Merged:
    """Adds all records in a storage to a store; notes that are no records are skipped."""
    found: list[Record] = []
    skipped = 0
    for summary in insist(lambda: optuna.get_all_study_summaries(storage, include_best_trial=False)):
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        notes = [n for t in _carried_out(study) for name, n in t.user_attrs.items() if name.startswith("record")]
        notes += chain.from_iterable(n for name, n in study.user_attrs.items() if name.startswith(CERTIFIED))
        for note in notes:
            try:
                found.append(Record.model_validate(note))
            except ValidationError:
                skipped += 1
    known = {_text(r) for r in store.records()}
    fresh = {_text(r): r for r in found if _text(r) not in known}
    store.add(fresh.values())
    return Merged(len(fresh), len(found) - len(fresh), skipped)


def _text(record: Record) -> str:
    return json.dumps(record.model_dump(mode="json"), sort_keys=True)


def _carried_out(study: optuna.Study) -> Iterator[Any]:
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    yield from (t for t in study.get_trials(deepcopy=False, states=states) if RECORD in t.user_attrs)
