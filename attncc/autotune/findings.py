"""What a set of trials says: the best of each shape beside the default, what was rejected, and which knobs matter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log, prod
from typing import Final

import numpy as np

from attncc.autotune.ranks import rank_correlation
from attncc.autotune.record import Record, Sparsity
from attncc.autotune.table import holds, sizes_of
from attncc.ir.attention import SIZE_NAMES

Config = Mapping[str, int]
Rows = Sequence[tuple[Mapping[str, int], Config]]
"""A decision table: upper bounds of sizes, and the config where they hold; the first that holds counts."""

NUMBER: Final = re.compile(r"0x[0-9a-f]+|\d[\d,.]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Case:
    """What trials are compared on: a shape, and what the mask leaves of it."""

    sizes: tuple[tuple[str, int], ...]
    sparsity: Sparsity | None = None

    @classmethod
    def of(cls, record: Record) -> Case:
        return cls(tuple(sorted(record.shape.items())), record.sparsity)

    @property
    def shape(self) -> dict[str, int]:
        return dict(self.sizes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All trials of one case."""

    case: Case
    name: str
    """`B=2 Sq=4096 Sk=4096`, with the sparsity where only that tells cases apart."""
    trials: tuple[Record, ...]
    default: Record | None = None
    """The trial of the config that a package has without tuning, if there is one."""
    chosen: Record | None = None
    """The trial of what the decision table chooses, if there is one."""

    @property
    def measured(self) -> tuple[Record, ...]:
        return tuple(r for r in self.trials if r.ms is not None)

    @property
    def best(self) -> Record | None:
        return min(self.measured, key=time_ms, default=None)


@dataclass(frozen=True, slots=True)
class Rejection:
    """Trials that ended alike."""

    status: str
    count: int
    example: Record


def time_ms(record: Record) -> float:
    """The time of a measured record."""
    if record.ms is None:
        raise ValueError(f"a record that is {record.status} has no time")
    return record.ms


def outcomes(records: Sequence[Record], defaults: Rows = (), table: Rows = ()) -> tuple[Outcome, ...]:
    """The records by case, small shapes first."""
    cases: dict[Case, list[Record]] = {}
    for record in records:
        cases.setdefault(Case.of(record), []).append(record)
    names = _names(cases)
    return tuple(
        Outcome(case, names[case], tuple(trials), _trial(trials, defaults), _trial(trials, table))
        for case, trials in sorted(cases.items(), key=lambda c: (prod(c[0].shape.values()), names[c[0]]))
    )


def row_for(rows: Rows, shape: Mapping[str, int]) -> int | None:
    """Which row of a decision table a call of this shape takes, as an emitted package reads it."""
    sizes = sizes_of(shape)
    return next((at for at, (bounds, _) in enumerate(rows) if holds(bounds, sizes)), None)


def importance(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """By knob, the share of the variance of log(time over the case's best) that its value alone explains.

    That is the main effect: the variance of the means of its values over that of all; the largest share first. Knobs
    of one value are left out, and all are where times do not differ.
    """
    trials = [(r.config, log(time_ms(r) / time_ms(o.best))) for o in outcomes if o.best for r in o.measured]
    times = np.array([t for _, t in trials])
    if not trials or np.ptp(times) == 0:
        return {}
    shares: dict[str, float] = {}
    for knob in sorted({k for config, _ in trials for k in config}):
        values = np.array([config.get(knob, -1) for config, _ in trials])  # settings are never negative
        means = {v: times[values == v].mean() for v in np.unique(values)}
        if len(means) > 1:
            shares[knob] = float(np.var([means[v] for v in values]) / times.var())
    return dict(sorted(shares.items(), key=lambda s: -s[1]))


def rejections(records: Iterable[Record]) -> tuple[Rejection, ...]:
    """What was not measured, by status and reason, the most frequent first; reasons may differ in their numbers."""
    rejected = [r for r in records if r.status != "measured"]
    alike = [(r.status, NUMBER.sub("#", r.why)) for r in rejected]
    examples = dict(zip(reversed(alike), reversed(rejected), strict=True))
    return tuple(Rejection(key[0], n, examples[key]) for key, n in Counter(alike).most_common())


def predictions(trials: Iterable[Record]) -> tuple[list[float], list[float]]:
    """Predicted and measured times of the trials that have both."""
    pairs = [(r.predicted_ms, r.ms) for r in trials if r.predicted_ms is not None and r.ms is not None]
    return [p for p, _ in pairs], [m for _, m in pairs]


def order(trials: Iterable[Record]) -> float:
    """How well predictions order the measured times."""
    return rank_correlation(*predictions(trials))


def _trial(trials: Sequence[Record], rows: Rows) -> Record | None:
    at = row_for(rows, trials[0].shape)
    return None if at is None else next((r for r in trials if r.config == dict(rows[at][1])), None)


def _names(cases: Iterable[Case]) -> dict[Case, str]:
    short = {case: " ".join(f"{k}={v}" for k, v in sorted(case.sizes, key=_place)) or "one shape" for case in cases}
    count = Counter(short.values())
    return {case: text if count[text] == 1 else f"{text}, {_sparsity(case.sparsity)}" for case, text in short.items()}


def _place(size: tuple[str, int]) -> tuple[int, str]:
    name = size[0]
    return SIZE_NAMES.index(name) if name in SIZE_NAMES else len(SIZE_NAMES), name


def _sparsity(s: Sparsity | None) -> str:
    return "dense" if s is None else f"{s.tiles} tiles ± {s.variance}, {s.full} full, skew {s.skew}"
