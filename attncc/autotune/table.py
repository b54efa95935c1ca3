"""From measured times to a decision table: few configs, and bounds of sizes that say which is for what.

Every case (a shape, and what its mask leaves) has configs that are good enough for it: no slower than `loss` over the
best one, nor than what would run untuned. A greedy set cover finds few configs of which every case has a good one.
A small decision tree then tells the cases apart: it halves them at an upper bound of one size, as long as no single
config is good for all that is left, each time where the most cases are served by one config a side. Read from left to
right its leaves are the rows of the table, since the first row that holds wins: the last one needs no bounds. Between
two shapes the bound is their geometric mean.

A config may win if some record of it has a certificate and none says that it was wrong, crashed or hung. What would
run untuned, the fallback, may stay without one. Its rows with bounds (calls as small as a launch, a few queries) stay
in front, as no tuned shape speaks for those sizes; where tuned shapes lie inside the bounds themselves, they speak for
all but what is `FAR` times smaller than the smallest of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from attncc.autotune.record import Record, Sparsity, latest
from attncc.errors import TuneError
from attncc.ir.attention import Attention

Config = Mapping[str, int]
Row = tuple[Mapping[str, int], Config]
Knobs = tuple[tuple[str, int], ...]

AXES: Final = ("pairs", "Sq", "Tq", "Sk", "Tk", "B")
"""Sizes that bounds are set on, those that say most first."""
OWN_AXES: Final = ("Sq",)
"""Of them what a sequence has whatever stands beside it, which may be longer than it is."""
LOSS: Final = 0.02
"""A table with fewer configs is worth this much time."""
FAR: Final = 8
BROKEN: Final = ("wrong", "crashed", "hung")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the table does for one case."""

    shape: Mapping[str, int]
    sparsity: Sparsity | None
    ms: float | None
    """None where the config was not measured, because a case that no bound tells apart needs it."""
    best_ms: float
    default_ms: float | None

    @property
    def loss(self) -> float:
        """The time over the best one, less one."""
        return math.inf if self.ms is None else self.ms / self.best_ms - 1


@dataclass(frozen=True, slots=True)
class Decision:
    """A table, and what it costs at every shape that it was made from."""

    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    used: tuple[Record, ...]
    """The measurements of its configs."""

    @property
    def losses(self) -> dict[Knobs, float]:
        """By shape, as sorted pairs of size and number: the largest loss, whatever the mask leaves."""
        found: dict[Knobs, float] = {}
        for outcome in self.outcomes:
            key = tuple(sorted(outcome.shape.items()))
            found[key] = max(found.get(key, 0.0), outcome.loss)
        return found

    @property
    def stated(self) -> float:
        """What no shape loses more than, of those at which its config was measured."""
        return max((o.loss for o in self.outcomes if o.ms is not None), default=0.0)

    @property
    def unmeasured(self) -> int:
        """How many cases have a config that was not measured there."""
        return sum(outcome.ms is None for outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class _Case:
    shape: Mapping[str, int]
    sparsity: Sparsity | None
    sizes: Mapping[str, int]
    times: Mapping[Knobs, float]
    """Of the configs that may win."""
    default_ms: float | None
    good: frozenset[Knobs]

    @property
    def best_ms(self) -> float:
        return min(self.times.values())

    def share(self, knobs: Knobs) -> float:
        """A config's time over the best one."""
        return self.times.get(knobs, math.inf) / self.best_ms

    def is_slower(self, knobs: Knobs) -> bool:
        """Than what would run untuned."""
        return self.default_ms is not None and self.times.get(knobs, math.inf) > self.default_ms


def axes_of(attn: Attention) -> Sequence[str]:
    """The sizes that a variant's config may depend on."""
    return OWN_AXES if attn.is_apart else AXES


def decide(
    records: Sequence[Record],
    fallback: Sequence[Row],
    loss: float = LOSS,
    packed: bool = False,
    axes: Sequence[str] = AXES,
) -> Decision:
    """The table for the records of one variant on one card.

    Args:
        records: in any order; of two that say the same config of the same case the later one counts.
        fallback: rows that hold where nothing is tuned, the last without bounds.
        loss: how much slower than the best a config may be.
        packed: shapes are of sequences that stand one behind the other.
        axes: the sizes that tell cases apart; those of the fallback's bounds are among them.

    Raises:
        TuneError: no config may win.
    """
    left = latest(records)
    broken = _broken(left)
    cases = _cases(left, fallback, loss, packed, axes)
    if not cases:
        hint = "tune it: only what was measured and agreed with the oracle can win"
        raise TuneError(f"none of {len(records)} records is of a certified config with a time", hint=hint)
    table = _tidy([*_kept(fallback, cases, broken), *_rows(cases, _cover(cases), {})])
    chosen = [(case, _knobs(pick(table, case.sizes))) for case in cases]
    outcomes = [Outcome(c.shape, c.sparsity, c.times.get(k), c.best_ms, c.default_ms) for c, k in chosen]
    knobs = {_knobs(config) for _, config in table}
    return Decision(tuple(table), tuple(outcomes), tuple(r for r in left if r.knobs in knobs and r.ms is not None))


def certified(records: Iterable[Record]) -> set[Knobs]:
    """The configs that may win."""
    left = latest(records)
    return {r.knobs for r in left if r.certificate is not None} - _broken(left)


def _broken(records: Iterable[Record]) -> set[Knobs]:
    return {r.knobs for r in records if r.status in BROKEN}


def sizes_of(shape: Mapping[str, int], packed: bool = False) -> dict[str, int]:
    """A shape with what an emitted package's table may ask of a call."""
    sizes = dict(shape)
    batch = shape.get("B", 1)
    if packed:
        for side in "qk":
            if f"S{side}" in sizes:
                sizes[f"T{side}"] = batch * sizes.pop(f"S{side}")
    queries, keys = (sizes.get(f"T{side}", sizes.get(f"S{side}", 0)) for side in "qk")
    return sizes | {"pairs": batch * queries * keys}


def row_of(rows: Sequence[Row], sizes: Mapping[str, int]) -> Row:
    """The first row whose bounds hold, as an emitted package finds it."""
    return next(row for row in rows if holds(row[0], sizes))


def holds(bounds: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    """Whether sizes are within all bounds; what is not known of them is not."""
    return all(name in sizes and sizes[name] <= most for name, most in bounds.items())


def pick(rows: Sequence[Row], sizes: Mapping[str, int]) -> Config:
    return row_of(rows, sizes)[1]


def _knobs(config: Config) -> Knobs:
    return tuple(sorted(config.items()))


def _cases(
    records: Sequence[Record],
    fallback: Sequence[Row],
    loss: float,
    packed: bool,
    axes: Sequence[str],
) -> list[_Case]:
    """The cases that some config may win, in an order that no order of records changes."""
    broken, winners = _broken(records), certified(records)
    times: dict[tuple[object, ...], dict[Knobs, float]] = {}
    of: dict[tuple[object, ...], Record] = {}
    for record in records:
        of[record.key] = record
        if record.ms is not None:
            times.setdefault(record.key, {})[record.knobs] = record.ms
    cases: list[_Case] = []
    for key, measured in times.items():
        record = of[key]
        sizes = {axis: n for axis, n in sizes_of(record.shape, packed).items() if axis in axes}
        default = _knobs(pick(fallback, sizes))
        usable = {k: ms for k, ms in measured.items() if k in winners or (k == default and k not in broken)}
        if not usable:
            continue
        default_ms = usable.get(default)
        limit = min(min(usable.values()) * (1 + loss), math.inf if default_ms is None else default_ms)
        good = frozenset(k for k, ms in usable.items() if ms <= limit)
        cases.append(_Case(record.shape, record.sparsity, sizes, usable, default_ms, good))
    return sorted(cases, key=lambda c: (sorted(c.shape.items()), repr(c.sparsity)))


def _cover(cases: Sequence[_Case]) -> list[Knobs]:
    """Few configs of which every case has a good one: each the one that is good for most of what is left."""
    few: list[Knobs] = []
    left = list(cases)
    while left:
        few.append(_most_served(left, {k for case in left for k in case.good}))
        left = [case for case in left if few[-1] not in case.good]
    return few


def _most_served(cases: Sequence[_Case], among: Iterable[Knobs]) -> Knobs:
    """The config that is good for most cases; of several the one that takes least time there."""
    return min(among, key=lambda k: (*_badness(cases, k), k))


def _badness(cases: Sequence[_Case], knobs: Knobs) -> tuple[int, float]:
    served = [case.share(knobs) for case in cases if knobs in case.good]
    return len(cases) - len(served), sum(served)


def _rows(cases: Sequence[_Case], few: Sequence[Knobs], bounds: Mapping[str, int]) -> list[Row]:
    """The leaves of the tree over these cases, all of which lie within `bounds`."""
    shared = [k for k in few if all(k in case.good for case in cases)]
    splits = [] if shared else list(_splits(cases))
    if not splits:
        config = _most_served(cases, shared) if shared else _least_loss(cases)
        return [(bounds, dict(config))]
    axis, most = min(splits, key=lambda split: _split_badness(cases, few, *split))
    below = [case for case in cases if case.sizes[axis] <= most]
    above = [case for case in cases if case.sizes[axis] > most]
    return [*_rows(below, few, {**bounds, axis: most}), *_rows(above, few, bounds)]


def _splits(cases: Sequence[_Case]) -> Iterable[tuple[str, int]]:
    """Every upper bound that leaves some of the cases on either side."""
    for axis in AXES:
        if all(axis in case.sizes for case in cases):
            values = sorted({case.sizes[axis] for case in cases})
            yield from ((axis, math.isqrt(a * b)) for a, b in itertools.pairwise(values))


def _split_badness(cases: Sequence[_Case], few: Sequence[Knobs], axis: str, most: int) -> tuple[int, float]:
    sides = ([c for c in cases if c.sizes[axis] <= most], [c for c in cases if c.sizes[axis] > most])
    found = [min(_badness(side, k) for k in few) for side in sides]
    return sum(missed for missed, _ in found), sum(time for _, time in found)


def _least_loss(cases: Sequence[_Case]) -> Knobs:
    """For cases that no bound tells apart: never slower than untuned if that can be, then the smallest loss."""

    def cost(knobs: Knobs) -> tuple[int, float, float, Knobs]:
        shares = [case.share(knobs) for case in cases]
        return sum(case.is_slower(knobs) for case in cases), max(shares), sum(shares), knobs

    return min({k for case in cases for k in case.times}, key=cost)


def _kept(fallback: Sequence[Row], cases: Sequence[_Case], broken: set[Knobs]) -> list[Row]:
    """The fallback's rows with bounds, cut to where no tuned shape speaks."""
    rows: list[Row] = []
    for bounds, config in fallback:
        inside = [c for c in cases if holds(bounds, c.sizes)]
        cut = {name: min([most, *(c.sizes[name] // FAR for c in inside)]) for name, most in bounds.items()}
        if bounds and all(cut.values()) and _knobs(config) not in broken:
            rows.append((cut, config))
    return rows


def _tidy(rows: Sequence[Row]) -> list[Row]:
    """Without rows whose calls the next row would serve by the same config."""
    tidy: list[Row] = []
    for bounds, config in reversed(rows):
        if tidy and tidy[-1][1] == config and all(bounds.get(k, most + 1) <= most for k, most in tidy[-1][0].items()):
            continue
        tidy.append((bounds, config))
    return tidy[::-1]
