"""A search replayed on a sweep: how near it comes to the sweep's best, by trials and by seconds; no GPU is needed.

Its trials are answered from the sweep, by the rules of a real run: several are asked for ahead of the one that is
answered, and a config that is hopeless on the first shapes is not seen on the others. A trial costs the seconds that
it took in the sweep or, where those are not known, a flat cost.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from optuna.samplers import TPESampler

from attncc.autotune import search as tuner
from attncc.autotune.run import HOPELESS
from attncc.autotune.search import SAMPLERS, SEEDS, SLACK, Search
from attncc.autotune.space import Candidate
from benchmarks.sweep import Point, Sweep, branches_of

STARTUP: Final = 16
"""Random trials of TPE where none are named."""
TRIALS: Final = (0, 10, 20, 50, 100, 200, 400)
SECONDS: Final = (10, 30, 60, 120, 300, 600)
NEAR: Final = 0.98
"""Of the best speed."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be chosen by measurement."""

    sampler: str = "tpe"
    first: int = SEEDS
    """Configs of the best predictions that are tried first."""
    slack: float = SLACK
    startup: int = STARTUP

    def __str__(self) -> str:
        startup = f" startup={self.startup}" if self.sampler == "tpe" else ""
        return f"{self.sampler} first={self.first} slack={self.slack:g}{startup}"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For searches that are made meanwhile."""
        tpe = {"tpe": lambda seed: TPESampler(seed=seed, constant_liar=True, n_startup_trials=self.startup)}
        with (
            patch.object(tuner, "SEEDS", self.first),
            patch.object(tuner, "SLACK", self.slack),
            patch.object(tuner, "SAMPLERS", {**SAMPLERS, **tpe}),
        ):
            yield


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a trial that the sweep does not tell."""

    trial: float = 0.3
    shape: float = 0.4


@dataclass(frozen=True, slots=True)
class Trace:
    """One replay: the share of the best speed, and the seconds, behind each number of trials from 0 on."""

    shares: tuple[float, ...]
    seconds: tuple[float, ...]

    def after_trials(self, n: int) -> float:
        return self.shares[min(n, len(self.shares) - 1)]

    def after_seconds(self, s: float) -> float:
        return self.shares[max(0, sum(t <= s for t in self.seconds) - 1)]

    def trials_to(self, share: float) -> float:
        return next((n for n, s in enumerate(self.shares) if s >= share), math.inf)


def grid(
    samplers: Sequence[str], firsts: Sequence[int], slacks: Sequence[float], startups: Sequence[int]
) -> list[Setting]:
    """Every combination; only TPE starts up."""
    every = itertools.product(samplers, firsts, slacks, startups)
    return list(dict.fromkeys(Setting(s, f, k, n if s == "tpe" else STARTUP) for s, f, k, n in every))


def replay(sweep: Sweep, setting: Setting, seed: int, trials: int, ahead: int, cost: Cost) -> Trace:
    """One search of so many trials at most."""
    points = {frozenset(p.config.items()): p for p in sweep.points}
    space = [Candidate(p.branch, p.choice, p.config) for p in sweep.points]
    with setting.applied():
        search = Search(
            branches_of(sweep),
            space,
            lambda config: points[frozenset(config.items())].predicted_ms,
            setting.sampler,
            seed,
        )
    best, goal = list(sweep.default_ms), sweep.best_ms
    shares, seconds = [_share(goal, best)], [0.0]
    asked: deque[Any] = deque()
    while len(shares) <= trials:
        while len(asked) < min(ahead, trials + 1 - len(shares)) and (found := search.ask()) is not None:
            asked.append(found)
        if not asked:
            break
        trial, candidate = asked.popleft()
        point = points[frozenset(candidate.config.items())]
        value, times = outcome(sweep, point)
        search.tell(trial, candidate, value, {})
        best = [min(b, t) for b, t in itertools.zip_longest(best, times, fillvalue=math.inf)]
        shares.append(_share(goal, best))
        seconds.append(seconds[-1] + spent(point, len(times), cost))
    return Trace(tuple(shares), tuple(seconds))


def outcome(sweep: Sweep, point: Point) -> tuple[float | None, list[float]]:
    """The value of a trial, None if it has none; and the times that a run would have measured."""
    times: list[float] = []
    value = 0.0
    weights = [float(s.get("weight", 1)) for s in sweep.shapes]
    for ms in point.ms:
        if ms is None:
            return None, times
        times.append(ms)
        ratios = [w * math.log(t / d) for w, t, d in zip(weights, times, sweep.default_ms, strict=False)]
        value = sum(ratios) / sum(weights[: len(times)])
        if value > HOPELESS:
            break
    return value, times


def spent(point: Point, shapes: int, cost: Cost) -> float:
    """Seconds of a trial that measured so many shapes."""
    if point.seconds:
        return sum(point.seconds[: 1 + shapes])
    return cost.trial + cost.shape * shapes


def _share(goal: Sequence[float], best: Sequence[float]) -> float:
    """Of the best speed, in the geometric mean over shapes."""
    return math.exp(statistics.fmean(math.log(g / b) for g, b in zip(goal, best, strict=True)))


def row(setting: Setting, traces: Sequence[Trace]) -> dict[str, Any]:
    """Means over seeds."""
    near = statistics.median(t.trials_to(NEAR) for t in traces)
    longest, last = max(len(t.shares) for t in traces) - 1, max(t.seconds[-1] for t in traces)
    marks = [n for n in TRIALS if n < longest] + [longest]
    times = [s for s in SECONDS if s < last]
    return {
        "case": str(setting), "sampler": setting.sampler, "first": setting.first, "slack": setting.slack,
        "startup": setting.startup, "seeds": len(traces), "near_trials": None if math.isinf(near) else near,
        "by_trials": {str(n): _mean(t.after_trials(n) for t in traces) for n in marks},
        "by_seconds": {str(s): _mean(t.after_seconds(s) for t in traces) for s in times},
        "worst": round(min(t.shares[-1] for t in traces), 4),
    }  # fmt: skip


def _mean(shares: Iterator[float]) -> float:
    return round(statistics.fmean(shares), 4)


def draw(file: Path, meta: Mapping[str, Any], found: Mapping[Setting, Sequence[Trace]]) -> None:
    """Two panels: over trials, and over seconds."""
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("trials", "seconds"))
    for n, (setting, traces) in enumerate(found.items()):
        line = {"color": qualitative.Plotly[n % len(qualitative.Plotly)]}
        trials = range(max(len(t.shares) for t in traces))
        last = max(t.seconds[-1] for t in traces)
        ticks = [last * k / 200 for k in range(201)]
        over_trials = [_mean(t.after_trials(k) for t in traces) for k in trials]
        over_seconds = [_mean(t.after_seconds(s) for t in traces) for s in ticks]
        figure.add_scatter(x=[*trials], y=over_trials, name=str(setting), line=line, row=1, col=1)
        figure.add_scatter(x=ticks, y=over_seconds, showlegend=False, line=line, row=1, col=2)
    title = f"share of the best speed of a sweep of {meta.get('variant', '')} ({meta.get('device', '')})"
    figure.update_layout(title=title, width=1000, height=480, legend={"orientation": "h", "y": -0.12})
    if file.suffix == ".html":
        figure.write_html(file, include_plotlyjs="cdn")
    else:
        figure.write_image(file)
    print(file)
