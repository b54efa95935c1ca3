"""Which config to try next: Optuna's samplers over the knobs, over a space that is ordered by the model first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from attncc.autotune.space import Branch, Candidate, Config
from attncc.errors import SpecError, nearest

SAMPLERS: Final[Mapping[str, Callable[[int], BaseSampler]]] = {
    "tpe": lambda seed: TPESampler(seed=seed, constant_liar=True, n_startup_trials=16),
    "random": lambda seed: RandomSampler(seed=seed),
    "qmc": lambda seed: QMCSampler(seed=seed, warn_independent_sampling=False, warn_asynchronous_seeding=False),
}
"""By name; `benchmarks/tuning.py replay` compares them on sweeps that were measured once."""
SLACK: Final = 3.0
"""Times the predicted best that a config may be predicted to take on every shape, and still be tried."""
SEEDS: Final = 12
"""Configs of the best predictions that are tried first, no two of the same prediction."""
REPEATS: Final = 16
"""Suggestions in a row that were made before, behind which one is taken that was not."""
BRANCH: Final = "branch"

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
        """`predicted`: milliseconds of a config, a number a shape.

        Raises:
            SpecError: for an unknown sampler.
        """
        if sampler not in SAMPLERS:
            raise SpecError(f"unknown sampler '{sampler}'", hint=nearest(sampler, SAMPLERS))
        self.axes = {branch.name: branch.axes for branch in branches}
        every = [(c, tuple(predicted(c.config))) for c in candidates]
        self.by_config = {frozenset(c.config.items()): c for c, _ in every}
        promising = _promising(every)
        self.left = {_place(c): c for c, _ in promising}
        """Worth a try and not asked for yet, the most promising first."""
        self.values: dict[Place, float | None] = {}
        self.study = optuna.create_study(
            study_name=name, storage=storage, sampler=SAMPLERS[sampler](seed), load_if_exists=True
        )
        apart = {times: c for c, times in reversed(promising)}  # many configs differ in what the model does not see
        for candidate in [c for c, times in promising if apart[times] is c][:SEEDS]:
            self.study.enqueue_trial(_parameters(candidate), skip_if_exists=True)

    def candidate(self, config: Config) -> Candidate | None:
        """The place of a config in the space, if it has one."""
        return self.by_config.get(frozenset(config.items()))

    def know(self, config: Config, value: float | None) -> None:
        """A result of an earlier run; None for a config that has no time."""
        if candidate := self.candidate(config):
            self.left.pop(_place(candidate), None)
            self.values[_place(candidate)] = value
            self.study.add_trial(self._finished(candidate, value))

    def ask(self) -> tuple[Trial, Candidate] | None:
        """A config that was not tried yet, and its trial; None if all were."""
        repeats = 0
        while self.left:
            if repeats >= REPEATS:
                self.study.enqueue_trial(_parameters(next(iter(self.left.values()))))
                repeats = 0
            trial = self.study.ask()
            place = self._suggested(trial)
            if place in self.left:
                return trial, self.left.pop(place)
            self.tell(trial, self.values.get(place))
            repeats += 1
        return None

    def tell(self, trial: Trial, value: float | None, candidate: Candidate | None = None) -> None:
        """The value of a trial; None if its config has no time."""
        if candidate is not None:
            self.values[_place(candidate)] = value
        if value is None:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, value)

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
