"""Signs of life for trials that are under way, in storages that fail what has gone silent."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Final, Self, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import Trial
from sqlalchemy.exc import DBAPIError

from attncc.errors import TuneError

Result = TypeVar("Result")

# heartbeats come from a thread of ours, for trials that are asked for ahead
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed", category=UserWarning)
warnings.filterwarnings("ignore", message=".*fail_stale_trials is experimental", category=ExperimentalWarning)

LOST: Final = (StorageInternalError, DBAPIError, ConnectionError)
"""What says that a storage cannot be reached."""
PATIENCE_S: Final = 60.0
"""That a storage may be away."""
PAUSE_S: Final = 1.0


class Heartbeat:
    """Beats for the trials it holds, from a thread of its own; a storage without heartbeats needs none."""

    def __init__(self, study: optuna.Study, storage: BaseStorage | None) -> None:
        self.storage = storage if isinstance(storage, RDBStorage) and storage.heartbeat_interval else None
        self.study = study
        self.held: dict[int, int] = {}
        """Numbers in the storage by numbers in the study."""
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if self.storage is not None:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.storage is not None:
            self.thread.join()

    def hold(self, trial: Trial) -> None:
        """Beats for this trial from now on."""
        if self.storage is not None:
            study = self.storage.get_study_id_from_name(self.study.study_name)
            number = self.storage.get_trial_id_from_study_id_trial_number(study, trial.number)
            self.storage.record_heartbeat(number)
            self.held[trial.number] = number

    def release(self, trial: Trial) -> None:
        """It has ended."""
        self.held.pop(trial.number, None)

    def bury(self) -> None:
        """Fails the trials of those that have gone silent, so that others may take them up."""
        if self.storage is not None:
            optuna.storages.fail_stale_trials(self.study)

    def _beat(self) -> None:
        storage = self.storage
        if storage is None or storage.heartbeat_interval is None:
            return
        while not self.over.wait(storage.heartbeat_interval / 2):
            try:
                for number in list(self.held.values()):
                    storage.record_heartbeat(number)
            except LOST:
                continue  # whoever asks or tells next finds out, and waits


def insist(call: Callable[[], Result]) -> Result:
    """The result of a call to a storage, which may be away for a while.

    Raises:
        TuneError: if it stays away.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except LOST as error:
            if time.monotonic() > until:
                hint = "what was measured is in the store; start again with --storage when it is back"
                raise TuneError(f"the storage of trials has been away for {PATIENCE_S:.0f} s", hint=hint) from error
        time.sleep(PAUSE_S)
