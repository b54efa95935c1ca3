"""Every config of a variant's space on every shape, measured once: what searches are replayed on.

A sweep is measured by the tuner's own trials and kept in its store, so that it goes on where it was left. The file has
one config a line; of a sweep that was cut short it has the configs that the model puts first.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from attncc import driver
from attncc.autotune.declared import Shape, sizes_of
from attncc.autotune.model import predict
from attncc.autotune.run import Run
from attncc.autotune.space import Branch, Candidate, branches, candidates
from attncc.autotune.store import Store
from attncc.autotune.task import Options, Task
from attncc.autotune.trials import Legality, Trials, opened
from attncc.errors import SpecError

Config = Mapping[str, int]
PAUSE_S: Final = 5.0
"""Between lines of progress; the file is written as often."""
STRAY: Final = 0.15
"""The deviation of an imagined time's logarithm from the model's, for each choice and for each pair of them."""


@dataclass(frozen=True, slots=True)
class Point:
    """One config, and what came of it on each shape."""

    branch: str
    choice: Config
    config: Config
    status: str
    ms: tuple[float | None, ...]
    predicted_ms: tuple[float, ...]
    seconds: tuple[float, ...] = ()
    """What the run waited for its kernels, and what each shape took; empty if the store knew it."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The configs that were measured, out of a space of so many."""

    meta: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    default_ms: tuple[float, ...]
    axes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """By branch."""
    space: int
    points: tuple[Point, ...]

    @property
    def share(self) -> float:
        """Of the space, how much was covered."""
        return len(self.points) / self.space

    @property
    def best_ms(self) -> tuple[float, ...]:
        times = zip(*(p.ms for p in self.points), strict=True)
        found = [min((t for t in column if t is not None), default=math.inf) for column in times]
        return tuple(min(f, d) for f, d in zip(found or self.default_ms, self.default_ms, strict=True))


class Everything(Run):
    """A run that leaves nothing out, and certifies nothing."""

    def begin(self) -> None:
        legal = self.look_at_shapes()
        self._recall()
        self._measure_defaults(legal)

    @property
    def default_ms(self) -> tuple[float, ...]:
        return tuple(self._default_ms(n) for n in range(len(self.task.shapes)))

    def predicted(self, config: Config) -> tuple[float, ...]:
        return tuple(self._predicted(config))

    def points(self, order: Sequence[Candidate], until: float) -> Iterator[Point]:
        """What comes of these configs, one after another, until a time of time.monotonic()."""
        todo = deque(order)
        ahead: deque[tuple[Candidate, Future[Legality]]] = deque()
        while time.monotonic() < until:
            while todo and len(ahead) < max(1, self.options.compilers):
                candidate = todo.popleft()
                ahead.append((candidate, self._compiled(candidate.config)))
            if not ahead:
                return
            yield self._point(*ahead.popleft())

    def _compiled(self, config: Config) -> Future[Legality]:
        """What the store knows on all shapes is not compiled again."""
        knobs = frozenset(config.items())
        known = [self.known.get((knobs, n)) for n in range(len(self.task.shapes))]
        if knobs not in self.refused and not all(known):
            return self.trials.legality(config)
        found: Future[Legality] = Future()
        found.set_result(Legality(()))
        return found

    def _point(self, candidate: Candidate, legality: Future[Legality]) -> Point:
        config, shapes = candidate.config, range(len(self.task.shapes))
        fresh, clock = len(self.fresh), [time.monotonic()]
        found = legality.result()
        clock.append(time.monotonic())
        knobs = frozenset(config.items())
        if found.reasons:
            self.refused[knobs] = self._keep(config, 0, "illegal", found.reasons[0], found)
        records = [self.refused[knobs]] if knobs in self.refused else []
        while len(records) < len(shapes) and all(r.status == "measured" for r in records):
            records.append(self._measured(config, len(records), found))
            clock.append(time.monotonic())
        ms = [r.ms for r in records] + [None] * (len(shapes) - len(records))
        took = [round(b - a, 4) for a, b in pairwise(clock)]
        return Point(
            candidate.branch, dict(candidate.choice), dict(config), records[-1].status, tuple(ms),
            self.predicted(config), tuple(took) if len(self.fresh) > fresh else (), records[-1].why,
        )  # fmt: skip


def measure(
    what: Task, options: Options, store: Store, file: Path, head: Mapping[str, Any], limit: int | None
) -> Sweep:
    """The sweep of a task, written to `file` as it grows; one that is there gives the seconds of what is known."""
    until = math.inf if options.budget_s is None else time.monotonic() + options.budget_s
    took = {knobs_of(p.config): p.seconds for p in load(file).points} if file.exists() else {}
    with trials_of(what, options) as (_, trials):
        run = Everything(what, options, store, trials, lambda standing: print(standing.doing, flush=True))
        run.begin()
        every = branches(run.attn, run.program, what.device, shortest(what))
        order = in_model_order(candidates(run.attn, every, what.device), run.predicted)
        found = Sweep(head, what.shapes, run.default_ms, {b.name: b.axes for b in every}, len(order), ())
        progress = Progress(file, found, len(order) if limit is None else min(limit, len(order)))
        for point in run.points(order[:limit], until):
            progress.add(point if point.seconds else replace(point, seconds=took.get(knobs_of(point.config), ())))
        return progress.saved()


@contextmanager
def trials_of(what: Task, options: Options) -> Iterator[tuple[Path, Trials]]:
    """The package of a task, and the trials of its configs."""
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder:
        package, cache = Path(folder, what.attn.name), Path(folder, "cache")
        with opened(
            package, what.device, cache, options.compilers, options.seed, options.seconds, options.cold
        ) as trials:
            driver.compile(replace(what.spec, attention=what.attn), folder, [what.device], cache=cache)
            yield package, trials


class Progress:
    """Says how far a sweep is, and writes what there is of it."""

    def __init__(self, file: Path, so_far: Sweep, wanted: int) -> None:
        self.file, self.so_far, self.wanted = file, so_far, wanted
        self.points: list[Point] = []
        self.begun = self.said = time.monotonic()

    def add(self, point: Point) -> None:
        self.points.append(point)
        if time.monotonic() - self.said > PAUSE_S:
            self.said = time.monotonic()
            self.saved()
            print(self.line(), flush=True)

    def line(self) -> str:
        statuses = ", ".join(f"{n} {status}" for status, n in Counter(p.status for p in self.points).items())
        elapsed = time.monotonic() - self.begun
        return f"{elapsed:4.0f} s  {len(self.points)} of {self.wanted} configs ({statuses})"

    def saved(self) -> Sweep:
        found = replace(self.so_far, points=tuple(self.points))
        save(self.file, found)
        return found


def in_model_order(every: Sequence[Candidate], predicted: Callable[[Config], Sequence[float]]) -> list[Candidate]:
    """The most promising first, by the mean of their predicted times over the best ones'."""
    times = [predicted(c.config) for c in every]
    best = [min(column) for column in zip(*times, strict=True)]
    cost = [sum(t / b for t, b in zip(row, best, strict=True)) for row in times]
    return [every[n] for n in sorted(range(len(every)), key=lambda n: cost[n])]


def imagine(what: Task, head: Mapping[str, Any], seed: int, kept: float = 0.5) -> Sweep:
    """A sweep by the model, with what it does not know: an effect of each choice, of each pair of them, and noise."""
    attn, program = driver.lower(what.attn)
    every = branches(attn, program, what.device, shortest(what))
    space = candidates(attn, every, what.device)
    chance = random.Random(seed)
    effects: dict[object, float] = {}

    def effect(key: object) -> float:
        return effects.setdefault(key, chance.gauss(0, STRAY))

    def predicted(config: Config) -> tuple[float, ...]:
        return tuple(predict(attn, what.device, sizes_of(s), config, kept) for s in what.shapes)

    def unknown(c: Candidate, shape: int) -> float:
        choice = [*c.choice.items()]
        pairs = [(a, b) for n, a in enumerate(choice) for b in choice[:n]]
        alone = sum(effect((c.branch, x)) for x in choice) / math.sqrt(len(choice))
        together = sum(effect((c.branch, x, shape)) for x in pairs) / math.sqrt(len(pairs))
        return math.exp(alone + together + chance.gauss(0, 0.005))

    points: list[Point] = []
    for c in in_model_order(space, predicted):
        ms = tuple(t * unknown(c, n) for n, t in enumerate(predicted(c.config)))
        points.append(Point(c.branch, c.choice, c.config, "measured", ms, predicted(c.config)))
    defaults = tuple(1.3 * min(column) for column in zip(*(p.ms for p in points), strict=True))
    return Sweep(head, what.shapes, defaults, {b.name: b.axes for b in every}, len(space), tuple(points))


def save(file: Path, sweep: Sweep) -> None:
    """One config a line."""
    facts = {"shapes": sweep.shapes, "default_ms": sweep.default_ms, "axes": sweep.axes, "space": sweep.space}
    lines = ",\n".join(json.dumps(asdict(p)) for p in sweep.points)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(f'{{"meta": {json.dumps(dict(sweep.meta) | facts)},\n"rows": [\n{lines}\n]}}\n')
    partial.replace(file)


def load(file: Path) -> Sweep:
    """A sweep's file.

    Raises:
        SpecError: if it is none.
    """
    try:
        data = json.loads(file.read_text())
        meta = dict(data["meta"])
        shapes, defaults = tuple(meta.pop("shapes")), tuple(meta.pop("default_ms"))
        axes = {b: {a: tuple(ns) for a, ns in axes.items()} for b, axes in meta.pop("axes").items()}
        tuples = ("ms", "predicted_ms", "seconds")
        points = tuple(Point(**row | {name: tuple(row[name]) for name in tuples}) for row in data["rows"])
        return Sweep(meta, shapes, defaults, axes, meta.pop("space"), points)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise SpecError(f"{file} is no sweep: {why}", hint="`python -m benchmarks.tuning sweep` makes one") from None


def branches_of(sweep: Sweep) -> tuple[Branch, ...]:
    return tuple(Branch(name, axes, dict) for name, axes in sweep.axes.items())


def knobs_of(config: Config) -> frozenset[tuple[str, int]]:
    return frozenset(config.items())


def shortest(what: Task) -> int:
    """The fewest queries of its shapes."""
    return min(sizes_of(shape)["Sq"] for shape in what.shapes)
