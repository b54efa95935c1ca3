"""Which config to try next: Optuna's samplers over the knobs, over a space that is ordered by the model first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from attncc.autotune.heartbeat import Heartbeat, insist
from attncc.autotune.space import Branch, Candidate, Config

SAMPLERS: Final[Mapping[str, Callable[[int], BaseSampler]]] = {
    "tpe": lambda seed: TPESampler(seed=seed, constant_liar=True, n_startup_trials=16),
    "random": lambda seed: RandomSampler(seed=seed),
}
"""By name; `benchmarks/tuning.py replay` compares them on sweeps that were measured once."""
SLACK: Final = 3.0
"""Times the predicted best that a config may be predicted to take on every shape, and still be tried."""
SEEDS: Final = 12
"""Configs of the best predictions that are tried first, no two of the same prediction."""
REPEATS: Final = 16
"""Suggestions in a row that were made before, behind which one is taken that was not."""
BRANCH: Final = "branch"
RECORD: Final = "record0"
"""What a trial that was carried out has among its notes."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


Place = tuple[str, frozenset[tuple[str, int]]]
"""Where a candidate stands: its branch and its choice."""


class Search:
    """The space of a variant on a device, and a study over it; values are logarithms of time over the default's."""

    def __init__(
        self,
        branches: Sequence[Branch],
        candidates: Iterable[Candidate],
        predicted: Callable[[Config], Sequence[float]],
        sampler: str = "tpe",
        seed: int = 0,
        storage: BaseStorage | None = None,
        name: str = "tuning",
    ) -> None:
        """`predicted`: milliseconds of a config, a number a shape. `sampler`: one of SAMPLERS."""
        self.axes = {branch.name: branch.axes for branch in branches}
        every = [(c, tuple(predicted(c.config))) for c in candidates]
        self.by_config = {frozenset(c.config.items()): c for c, _ in every}
        promising = _promising(every)
        self.left = {_place(c): c for c, _ in promising}
        """Worth a try and not asked for yet, the most promising first."""
        self.by_place = {_place(c): c for c, _ in every}
        self.values: dict[Place, float | None] = {}
        self.mine: set[int] = set()
        """Numbers of trials that are this run's own, or known."""
        self.under_way: set[Place] = set()
        """Asked for here, and neither told nor left yet."""
        self.is_shared = storage is not None
        self.study = insist(
            lambda: optuna.create_study(
                study_name=name, storage=storage, sampler=SAMPLERS[sampler](seed), load_if_exists=True
            )
        )
        self.heartbeat = Heartbeat(self.study, storage)
        apart = {times: c for c, times in reversed(promising)}  # many configs differ in what the model does not see
        for candidate in [c for c, times in promising if apart[times] is c][:SEEDS]:
            insist(lambda c=candidate: self.study.enqueue_trial(_parameters(c), skip_if_exists=True))

    def candidate(self, config: Config) -> Candidate | None:
        """The place of a config in the space, if it has one."""
        return self.by_config.get(frozenset(config.items()))

    def know(self, config: Config, value: float | None) -> None:
        """A result of an earlier run; None for a config that has no time."""
        candidate = self.candidate(config)
        if candidate is not None and _place(candidate) not in self.values:
            self.left.pop(_place(candidate), None)
            self.values[_place(candidate)] = value
            self.study.add_trial(self._finished(candidate, value))

    def catch_up(self) -> list[FrozenTrial]:
        """Trials that others have finished since; what they do, or did, is not asked for here any more."""
        if not self.is_shared:
            return []
        insist(self.heartbeat.bury)
        fresh: list[FrozenTrial] = []
        for trial in insist(lambda: self.study.get_trials(deepcopy=False)):
            candidate = self._placed(trial.params)
            if candidate is None or trial.number in self.mine:
                continue
            place = _place(candidate)
            match trial.state:
                case TrialState.RUNNING:
                    self.left.pop(place, None)
                case TrialState.FAIL if place not in self.values and place not in self.under_way:
                    self.left[place] = candidate
                case TrialState.COMPLETE | TrialState.PRUNED if RECORD in trial.user_attrs:
                    self.mine.add(trial.number)
                    self.left.pop(place, None)
                    self.values[place] = trial.value
                    fresh.append(trial)
        return fresh

    def ask(self) -> tuple[Trial, Candidate] | None:
        """A config that was not tried yet, and its trial; None if all were."""
        repeats = 0
        while self.left:
            if repeats >= REPEATS:
                parameters = _parameters(next(iter(self.left.values())))
                insist(lambda p=parameters: self.study.enqueue_trial(p))
                repeats = 0
            trial = insist(self.study.ask)
            self.mine.add(trial.number)
            place = insist(lambda t=trial: self._suggested(t))
            candidate = self.left.pop(place, None)
            if candidate is not None and not self._is_taken(candidate, trial.number):
                insist(lambda t=trial: self.heartbeat.hold(t))
                self.under_way.add(place)
                return trial, candidate
            self._end(trial, self.values.get(place))
            repeats += 1
        return None

    def tell(self, trial: Trial, candidate: Candidate, value: float | None, notes: Mapping[str, Any]) -> None:
        """The value of a trial, None if its config has no time; and what others should know of it."""
        self.values[_place(candidate)] = value
        self.under_way.discard(_place(candidate))
        with suppress(UpdateFinishedTrialError):  # it was taken for dead meanwhile, and its config is with another
            for name, note in notes.items() if self.is_shared else ():
                insist(lambda n=name, x=note: trial.set_user_attr(n, x))
        self._end(trial, value)
        self.heartbeat.release(trial)

    def leave(self, trial: Trial, candidate: Candidate) -> None:
        """A trial that does not come to its end here: its config is free for others, and for the next run."""
        self.left[_place(candidate)] = candidate
        self.under_way.discard(_place(candidate))
        insist(lambda: self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True))
        self.heartbeat.release(trial)

    def share(self, name: str, what: Any) -> None:
        """Leaves something that is no trial to the others of a fleet, or to whoever collects it."""
        if self.is_shared:
            insist(lambda: self.study.set_user_attr(name, what))

    def _is_taken(self, candidate: Candidate, number: int) -> bool:
        """Whether another has asked for the same at the same time; whose trial is the earlier keeps it."""
        if not self.is_shared:
            return False
        running = insist(lambda: self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        others = (t for t in running if t.number < number and t.number not in self.mine)
        return candidate in (self._placed(t.params) for t in others)

    def _end(self, trial: Trial, value: float | None) -> None:
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        # told twice where the answer to the first time was lost
        insist(lambda: self.study.tell(trial, value, state=state, skip_if_finished=True))

    def _placed(self, parameters: Mapping[str, Any]) -> Candidate | None:
        """The candidate of these parameters, which come from elsewhere."""
        branch = str(parameters.get(BRANCH))
        choice = {axis: parameters.get(f"{branch}.{axis}") for axis in self.axes.get(branch, {})}
        whole = {axis: n for axis, n in choice.items() if isinstance(n, int)}
        return self.by_place.get((branch, frozenset(whole.items())))

    def _suggested(self, trial: Trial) -> Place:
        branch = trial.suggest_categorical(BRANCH, list(self.axes))
        choice = {axis: trial.suggest_categorical(f"{branch}.{axis}", ns) for axis, ns in self.axes[branch].items()}
        return branch, frozenset(choice.items())

    def _finished(self, candidate: Candidate, value: float | None) -> FrozenTrial:
        axes = self.axes[candidate.branch]
        distributions: dict[str, BaseDistribution] = {BRANCH: CategoricalDistribution(list(self.axes))}
        distributions |= {f"{candidate.branch}.{axis}": CategoricalDistribution(ns) for axis, ns in axes.items()}
        return create_trial(
            params=_parameters(candidate),
            distributions=distributions,
            value=value,
            state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        )


def _promising(every: Sequence[tuple[Candidate, tuple[float, ...]]]) -> list[tuple[Candidate, tuple[float, ...]]]:
    """Those that may win on some shape, by the mean of their predicted times over the best ones'."""
    best = [min(times) for times in zip(*(times for _, times in every), strict=True)]
    ratios = [[t / b for t, b in zip(times, best, strict=True)] for _, times in every]
    order = sorted(range(len(every)), key=lambda n: sum(ratios[n]))
    return [every[n] for n in order if min(ratios[n]) <= SLACK]


def _place(candidate: Candidate) -> Place:
    return candidate.branch, frozenset(candidate.choice.items())


def _parameters(candidate: Candidate) -> dict[str, Any]:
    return {BRANCH: candidate.branch} | {f"{candidate.branch}.{axis}": n for axis, n in candidate.choice.items()}
