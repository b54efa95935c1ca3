"""One run: what is known of each config on each shape, and how to learn more within the budget."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import takewhile
from math import inf, log
from statistics import median
from typing import Any, Final
from uuid import uuid4

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial
from pydantic import ValidationError

from attncc import driver
from attncc.autotune.declared import named, sizes_of
from attncc.autotune.model import predict
from attncc.autotune.ranks import rank_correlation
from attncc.autotune.record import Card, Certificate, Record, Status
from attncc.autotune.search import Search
from attncc.autotune.space import Candidate, branches, candidates
from attncc.autotune.sparsity import Kept
from attncc.autotune.store import Store
from attncc.autotune.table import LOSS, Decision, axes_of, decide, pick
from attncc.autotune.table import sizes_of as call_sizes
from attncc.autotune.task import Options, Standing, Task, Tuned
from attncc.autotune.toolchain import toolchain
from attncc.autotune.trials import Legality, Trials
from attncc.codegen.package import without_engine
from attncc.errors import TuneError
from attncc.passes.lower.defaults import default_configs

Config = Mapping[str, int]
Knobs = frozenset[tuple[str, int]]
Watch = Callable[[Standing], None]

LAST_SHARE: Final = 0.2
"""Of the budget, for certificates and comparisons at the end."""
HOPELESS: Final = log(2.0)
"""A config this far behind the default on the shapes so far is not measured on the others."""
NOISE: Final = 0.005
"""A winner must be this much faster than the default, in most rounds of an alternation."""
LEAD: Final = 0.01
"""What leads the default by less is not certified."""
ASSUMED: Final = Certificate(cases=1, inputs=(), worst=0.0)
"""Of what is fast enough to win, and therefore still to be certified."""
CERTIFIED: Final = "certified-"
"""How attributes of a shared study begin that hold what a run certified."""
REPORT: Final = "this is a bug in attncc, or a broken toolchain: attncc check says more"


class Run:
    """One run: what is known of each config on each shape, and how to learn more."""

    def __init__(
        self,
        what: Task,
        options: Options,
        store: Store,
        trials: Trials,
        watch: Watch,
        has_engine: bool = True,
        begun: float | None = None,
    ) -> None:
        """`has_engine`: whether the package that is tried has the engine that the device could use.

        `begun`: when the budget began, on the monotonic clock; now, if not given.
        """
        self.task, self.options, self.store, self.trials, self.watch = what, options, store, trials, watch
        self.begun = time.monotonic() if begun is None else begun
        self.attn, program = driver.lower(what.attn)
        self.program = program if has_engine else without_engine(program)
        self.card, self.tools = Card.of(what.device), toolchain(what.device)
        self.rows = default_configs(self.attn, what.device, has_engine)[0]
        packed = what.attn.layout == "varlen"
        self.defaults = [pick(self.rows, call_sizes(sizes_of(s), packed)) for s in what.shapes]
        self.kept: list[Kept] = []
        self.known: dict[tuple[Knobs, int], Record] = {}
        self.refused: dict[Knobs, Record] = {}
        """Configs that run on no shape."""
        self.search: Search | None = None
        self.fresh: list[Record] = []
        """What this run put into the store."""
        self.tried = 0
        self.others = 0
        """Trials that others of a fleet carried out."""
        self.statuses: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    # -- the run -------------------------------------------------------------------------------

    def tune(self, storage: BaseStorage | None) -> Tuned:
        interrupted = False
        try:
            legal = self.look_at_shapes()
            if self.options.resume:
                self._recall()
            self._measure_defaults(legal)
            self._search(storage)
        except KeyboardInterrupt:
            interrupted = True
            if not all(self._record(c, n) for n, c in enumerate(self.defaults)):
                raise
        decision = self._decide(certify=not interrupted)
        if self.search is not None:
            certified = [r.model_dump(mode="json") for r in self.fresh if r.certificate is not None]
            self.search.share(f"{CERTIFIED}{uuid4().hex}", certified)
        return Tuned(
            self.task.spec.attention.name,
            self.card.name,
            self.task.shapes,
            decision,
            self._standing("done"),
            self._correlation(),
            interrupted,
            self.search is not None and not self.search.left,
            time.monotonic() - self.begun,
        )

    def look_at_shapes(self) -> dict[Knobs, Future[Legality]]:
        """What masks leave of each; meanwhile the default configs are compiled, each once."""
        once = {frozenset(config.items()): config for config in self.defaults}
        legal = {knobs: self.trials.legality(config) for knobs, config in once.items()}
        self._say("looking at the shapes")
        self.kept = [self.trials.describe(shape) for shape in self.task.shapes]
        return legal

    def _recall(self) -> None:
        """What earlier runs found by the same toolchain on the same shapes."""
        for record in self.store.records(program=self.task.program, card=self.card.name):
            self._remember(record)

    def _measure_defaults(self, legal: Mapping[Knobs, Future[Legality]]) -> None:
        """The config that each shape has untuned: it must run, and be right."""
        for number, config in enumerate(self.defaults):
            self._say(f"the default config, {named(self.task.shapes[number])}")
            record = self._measured(config, number, legal[frozenset(config.items())].result())
            if record.status != "measured":
                raise TuneError(f"the default config {dict(config)} is {record.status}: {record.why}", hint=REPORT)

    def _search(self, storage: BaseStorage | None) -> None:
        shortest = min(sizes_of(shape)["Sq"] for shape in self.task.shapes)
        every = branches(self.attn, self.program, self.task.device, shortest)
        space = candidates(self.attn, every, self.task.device)
        options = self.options
        search = self.search = Search(
            every, space, self._predicted, options.sampler, options.seed, storage, self.task.name
        )
        for knobs, value in self._values():
            search.know(dict(knobs), value)
        ahead: deque[tuple[Trial, Candidate, Future[Legality]]] = deque()
        with search.heartbeat:
            try:
                while self._ask_ahead(search, ahead):
                    trial, candidate, legality = ahead[0]
                    records = self._try(candidate.config, legality.result())
                    value = self._mean(records) if records[-1].status == "measured" else None
                    notes = {f"record{n}": r.model_dump(mode="json") for n, r in enumerate(records)}
                    search.tell(trial, candidate, value, notes)
                    ahead.popleft()
            finally:
                for trial, candidate, _ in ahead:
                    search.leave(trial, candidate)

    def _ask_ahead(self, search: Search, ahead: deque[tuple[Trial, Candidate, Future[Legality]]]) -> bool:
        """Has as many configs compiled as there are compilers; whether there is one, and time, to try it."""
        self._absorb(search.catch_up())
        while len(ahead) < max(1, self.options.compilers) and self._may_ask(len(ahead)):
            found = search.ask()
            if found is None:
                break
            ahead.append((*found, self.trials.legality(found[1].config)))
        return bool(ahead) and self._left_s() > 0

    def _may_ask(self, ahead: int) -> bool:
        limit = self.options.trials
        return self._left_s() > 0 and (limit is None or self.tried + self.others + ahead < limit)

    def _absorb(self, trials: Iterable[FrozenTrial]) -> None:
        """What others of a fleet found, as if it had been found here; records that do not fit are left out."""
        for trial in trials:
            self.others += 1
            for name, note in trial.user_attrs.items():
                if name.startswith("record") and (record := _valid(note)) and self._remember(record):
                    self.store.add([record])

    def _remember(self, record: Record) -> bool:
        """Whether a record is of this variant, card and toolchain, and so counts as tried."""
        if (record.program, record.card, record.toolchain) != (self.task.program, self.card, self.tools):
            return False
        knobs = frozenset(record.config.items())
        if record.status == "illegal":
            self.refused[knobs] = record
        for number, shape in enumerate(self.task.shapes):
            if record.shape == sizes_of(shape) and record.sparsity == self.kept[number].sparsity:
                self.known[knobs, number] = record
        return True

    def _try(self, config: Config, legality: Legality) -> list[Record]:
        """What comes of a config on the shapes, up to the one that says enough."""
        self.tried += 1
        if legality.reasons:
            record = self._keep(config, 0, "illegal", legality.reasons[0], legality)
            self.refused[frozenset(config.items())] = record
            self._say(f"illegal: {legality.reasons[0]}")
            return [record]
        found: list[Record] = []
        for number in range(len(self.task.shapes)):
            found.append(self._measured(config, number, legality))
            if found[-1].status != "measured" or self._mean(found) > HOPELESS:
                break
        self._say(" ".join(f"{k}={v}" for k, v in config.items()))
        return found

    # -- one config on one shape ---------------------------------------------------------------

    def _measured(self, config: Config, number: int, legality: Legality) -> Record:
        known = self._record(config, number)
        if known is not None:
            return known
        found = self.trials.measure(self.task.shapes[number], config, self.defaults[number])
        return self._keep(config, number, found.status, found.why, legality, ms=found.ms, spread=found.spread)

    def _keep(self, config: Config, number: int, status: Status, why: str, legality: Legality, **more: Any) -> Record:
        """Into the store, at once."""
        record = Record(
            variant=self.task.spec.attention.name,
            program=self.task.program,
            card=self.card,
            toolchain=self.tools,
            shape=sizes_of(self.task.shapes[number]),
            sparsity=self.kept[number].sparsity,
            config=dict(config),
            status=status,
            why=why[:2000],
            predicted_ms=self._predicted(config)[number],
            resources=legality.resources,
            **more,
        )
        self.store.add([record])
        self.fresh.append(record)
        self.known[frozenset(config.items()), number] = record
        self.statuses[status] += 1
        if why:
            self.reasons[f"{status}: {why.partition(':')[0][:60]}"] += 1
        return record

    def _record(self, config: Config, number: int) -> Record | None:
        return self.known.get((frozenset(config.items()), number))

    # -- figures -------------------------------------------------------------------------------

    def _predicted(self, config: Config) -> list[float]:
        device = self.task.device
        pairs = zip(self.task.shapes, self.kept, strict=True)
        return [predict(self.attn, device, sizes_of(shape), config, kept.share) for shape, kept in pairs]

    def _mean(self, records: Sequence[Record]) -> float:
        """Of log(time / default's), weighted as the shapes are."""
        weights = [float(s.get("weight", 1)) for s in self.task.shapes[: len(records)]]
        ratios = [log((r.ms or 0.0) / self._default_ms(n)) for n, r in enumerate(records)]
        return sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights)

    def _default_ms(self, number: int) -> float:
        record = self._record(self.defaults[number], number)
        assert record is not None
        assert record.ms is not None
        return record.ms

    def _values(self) -> Iterator[tuple[Knobs, float | None]]:
        """What is known of whole configs already."""
        yield from ((knobs, None) for knobs in self.refused)
        for knobs in {knobs for knobs, _ in self.known} - self.refused.keys():
            found = [self.known.get((knobs, n)) for n in range(len(self.task.shapes))]
            records = [r for r in takewhile(lambda r: r is not None, found) if r is not None]
            if not records:
                continue
            if any(r.status != "measured" for r in records):
                yield knobs, None
            elif len(records) == len(found) or self._mean(records) > HOPELESS:
                yield knobs, self._mean(records)

    def _correlation(self) -> float | None:
        pairs = [(r.predicted_ms, r.ms) for r in self.known.values() if r.ms and r.predicted_ms]
        return rank_correlation(*zip(*pairs, strict=True)) if len(pairs) >= 3 else None

    def _left_s(self, share: float = 1 - LAST_SHARE) -> float:
        """Seconds of this share of the budget."""
        budget = self.options.budget_s
        return inf if budget is None else budget * share - (time.monotonic() - self.begun)

    # -- the end -------------------------------------------------------------------------------

    def _decide(self, certify: bool) -> Decision:
        """The table of what is certified; what would win is certified first, and compared with the default."""
        packed, axes = self.task.attn.layout == "varlen", axes_of(self.task.attn)
        while certify and self._left_s(1.0) > 0:
            worth = {knobs for knobs, n in self.known if self._is_ahead(knobs, n)}
            assumed = [_assumed(r) if frozenset(r.config.items()) in worth else r for r in self.known.values()]
            wanted = decide(assumed, self.rows, LOSS, packed, axes)
            due = [r for r in wanted.used if r.certificate == ASSUMED]
            if not due:
                break
            self._certify(due[0].config)
        return decide([*self.known.values()], self.rows, LOSS, packed, axes)

    def _is_ahead(self, knobs: Knobs, number: int) -> bool:
        """Whether a config may be worth a certificate: the default rule has it, or it leads the default here."""
        ms = self.known[knobs, number].ms
        untuned = any(knobs == frozenset(config.items()) for _, config in self.rows)
        return untuned or (ms is not None and ms < self._default_ms(number) * (1 - LEAD))

    def _certify(self, config: Config) -> None:
        """Its records get times measured in alternation with the default's, then a certificate; or it is wrong.

        The certificate comes last: what has one may win, also in the next run if this one is killed here.
        """
        self._say(f"certifying {' '.join(f'{k}={v}' for k, v in config.items())}")
        found = self.trials.certify(config)
        shapes = [n for n in range(len(self.task.shapes)) if (r := self._record(config, n)) and r.ms]
        if found.certificate is not None:
            for number in shapes:
                if config != self.defaults[number]:
                    self._compare(number, config)
        right = {"certificate": found.certificate}
        wrong = {"status": found.status, "why": found.why, "ms": None, "spread": None}
        for number in shapes:
            self._replace(number, config, **(right if found.certificate is not None else wrong))

    def _compare(self, number: int, config: Config) -> None:
        """Both times anew, in alternation; a lead within the noise is none, and the config then counts as no faster."""
        default = self.defaults[number]
        rounds = self.trials.compare(self.task.shapes[number], [default, config])
        if not rounds:
            return
        ours, theirs = median(rounds[1]), median(rounds[0])
        ahead = sum(b < a * (1 - NOISE) for a, b in zip(*rounds, strict=True))
        if ours < theirs and ahead * 2 <= len(rounds[0]):
            ours = theirs
        self._replace(number, default, ms=theirs)
        self._replace(number, config, ms=ours)

    def _replace(self, number: int, config: Config, **changes: Any) -> None:
        record = self.known[frozenset(config.items()), number]
        fields = {name: getattr(record, name) for name in Record.model_fields if name not in ("schema_", "when")}
        fresh = Record(**(fields | changes))
        self.store.add([fresh])
        self.fresh.append(fresh)
        self.known[frozenset(record.config.items()), number] = fresh

    # -- how it stands -------------------------------------------------------------------------

    def _say(self, doing: str) -> None:
        self.watch(self._standing(doing))

    def _standing(self, doing: str) -> Standing:
        shapes = range(len(self.task.shapes))
        times = [[r.ms for (_, n), r in self.known.items() if n == number and r.ms] for number in shapes]
        defaults = [self._record(self.defaults[n], n) for n in shapes]
        left = self._left_s(1.0)
        return Standing(
            doing,
            self.tried,
            dict(self.statuses),
            dict(self.reasons),
            self.task.shapes,
            tuple(r.ms for r in defaults if r is not None and r.ms),
            tuple(min(t) for t in times if t),
            None if left == inf else max(0.0, left),
        )


def _assumed(record: Record) -> Record:
    if record.certificate is not None or record.status != "measured":
        return record
    return record.model_copy(update={"certificate": ASSUMED})


def _valid(note: Any) -> Record | None:
    """A record from elsewhere, if it is one."""
    try:
        return Record.model_validate(note)
    except ValidationError:
        return None
