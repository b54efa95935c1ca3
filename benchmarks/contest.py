"""What tuning gains: its winners against those of `triton.autotune`, and those of a real map against a full one's.

Whatever is compared runs as a config of one package, in alternation, in the process in which the tuner measures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from attncc.autotune.declared import Shape, sizes_of
from attncc.autotune.store import Store
from attncc.autotune.table import pick
from attncc.autotune.table import sizes_of as call_sizes
from attncc.autotune.task import Options, Standing, Task, Tuned
from attncc.autotune.trials import Trials
from attncc.autotune.tune import tune
from attncc.driver import default_config, lower
from attncc.errors import SpecError
from benchmarks import report
from benchmarks.hand_list import autotuned
from benchmarks.sweep import PAUSE_S, Sweep, knobs_of, trials_of
from benchmarks.timing import Timing

Config = Mapping[str, int]
Row = dict[str, Any]
PEER: Final = "triton.autotune"
DECLARED, FULL, UNTUNED = "tuned on the declared map", "tuned on full rows", "untuned"


def compare(what: Task, options: Options, budgets: Sequence[float]) -> tuple[list[Row], list[Row]]:
    """Rows of each shape and budget against Triton's own tuning of our portable kernel; and what there is not."""
    with trials_of(what, options) as (package, trials):
        begun = time.monotonic()
        hand = autotuned(package, what, options.seed)
        made = {PEER: (hand, time.monotonic() - begun)}
        for budget in sorted(budgets):
            found = tuned(what, replace(options, budget_s=budget))
            made[f"attncc, {budget:g} s"] = (winners(what, found), found.seconds)
        made[UNTUNED] = (defaults(what), 0.0)
        rows: list[Row] = []
        without: list[Row] = []
        for number, shape in enumerate(what.shapes):
            case = named(what, shape)
            configs = {impl: picked[number] for impl, (picked, _) in made.items()}
            tried = trials.measure(shape, configs[PEER], configs[UNTUNED])
            if tried.status != "measured":
                without.append({"case": case, "impl": PEER, "missing": f"{tried.status}: {tried.why}"})
                del configs[PEER]
            seconds = {impl: round(made[impl][1], 1) for impl in configs}
            rows += against(case, alternated(trials, shape, configs), configs, PEER, seconds)
    return rows, without


def sparsity(what: Task, options: Options) -> list[Row]:
    """Rows of the config tuned on the declared map, against that tuned on full rows, both on the declared map.

    Raises:
        SpecError: for a shape that says nothing of sparsity.
    """
    rows: list[Row] = []
    for shape in what.shapes:
        full = filled(shape)
        found = {DECLARED: tuned(alone(what, shape), options), FULL: tuned(alone(what, full), options)}
        configs = {impl: winners(alone(what, shape), f)[0] for impl, f in found.items()}
        configs[UNTUNED] = defaults(alone(what, shape))[0]
        seconds = {impl: round(f.seconds, 1) for impl, f in found.items()}
        with trials_of(what, options) as (_, trials):
            times = alternated(trials, shape, configs)
        for peer in (FULL, UNTUNED):
            rows += against(named(what, shape), times, configs, peer, seconds, ours=(DECLARED,))
    return rows


def shares(what: Task, swept: Sweep, configs: Sequence[Config], impl: str, seconds: float) -> list[Row]:
    """Rows of what a run of so many seconds chose for each shape of a sweep: how near the sweep's best it comes.

    Raises:
        SpecError: if the sweep has other shapes, or no time of a config.
    """
    if [dict(s) for s in what.shapes] != [dict(s) for s in swept.shapes]:
        raise SpecError("the sweep has other shapes", hint=f"its own are {[dict(s) for s in swept.shapes]}")
    times, every_best = {knobs_of(p.config): p.ms for p in swept.points}, swept.best_ms
    rows: list[Row] = []
    for number, (shape, config) in enumerate(zip(what.shapes, configs, strict=True)):
        ms = times.get(knobs_of(config), (None,) * len(configs))[number]
        if ms is None:
            raise SpecError(f"the sweep has no time of {dict(config)} on {dict(shape)}", hint="let it go on for longer")
        best, default = every_best[number], swept.default_ms[number]
        row: Row = {"case": named(what, shape), "impl": impl, "ms": round(ms, 5), "best_ms": round(best, 5)}
        rows.append(row | {"share": round(best / ms, 4), "default_share": round(best / default, 4), "seconds": seconds})
        rows[-1]["config"] = dict(config)
    return rows


def filled(shape: Shape) -> Shape:
    """The same sizes with nothing hidden."""
    says = {"sparsity": 0, "documents": 1}
    if all(shape.get(word, plain) == plain for word, plain in says.items()):
        raise SpecError(f"the shape {dict(shape)} says nothing of sparsity", hint="add sparsity=0.95, or documents=8")
    return {k: says.get(k, n) for k, n in shape.items()}


def alone(what: Task, shape: Shape) -> Task:
    return replace(what, shapes=(shape,))


def tuned(what: Task, options: Options) -> Tuned:
    """By a run that knows nothing yet."""
    said = time.monotonic()

    def watch(s: Standing) -> None:
        nonlocal said
        if time.monotonic() - said > PAUSE_S:
            said = time.monotonic()
            gains = ", ".join(f"{d / b:.2f} x" for d, b in zip(s.default_ms, s.best_ms, strict=False))
            print(f"    {s.tried} tried: {gains}; {s.doing}"[:150], flush=True)

    print(f"tuning {what.spec.attention.name} on {len(what.shapes)} shapes, {options.budget_s} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder:
        return tune(what.spec, what.shapes, what.device, options, Store(Path(folder)), watch=watch)


def winners(what: Task, found: Tuned) -> list[Config]:
    """Of each shape."""
    packed = what.attn.layout == "varlen"
    return [pick(found.decision.rows, call_sizes(sizes_of(s), packed)) for s in what.shapes]


def defaults(what: Task) -> list[Config]:
    rows = default_config(lower(what.attn)[0], what.device).rows
    packed = what.attn.layout == "varlen"
    return [pick(rows, call_sizes(sizes_of(s), packed)) for s in what.shapes]


def alternated(trials: Trials, shape: Shape, configs: Mapping[str, Config]) -> dict[str, Timing]:
    """Times by impl; of configs that are the same, the same.

    Raises:
        SpecError: if one of them does not run any more.
    """
    apart = {tuple(sorted(c.items())): c for c in configs.values()}
    rounds = trials.compare(shape, [*apart.values()])
    if not rounds:
        raise SpecError(f"a config failed in the comparison on {dict(shape)}: {configs}", hint="run it once more")
    times = {key: Timing(tuple(found)) for key, found in zip(apart, rounds, strict=True)}
    return {impl: times[tuple(sorted(c.items()))] for impl, c in configs.items()}


def against(
    case: str,
    times: Mapping[str, Timing],
    configs: Mapping[str, Config],
    peer: str,
    seconds: Mapping[str, float],
    ours: Sequence[str] | None = None,
) -> list[Row]:
    """A row for each impl, with the ratio of the peer's time to its own."""
    rows: list[Row] = []
    for impl, t in times.items():
        if ours is not None and impl not in (*ours, peer):
            continue
        row: Row = {"case": case, "impl": impl, "ms": round(t.ms, 5), "spread": t.spread, "config": dict(configs[impl])}
        if impl in seconds:
            row["seconds"] = seconds[impl]
        if impl != peer and peer in times:
            row |= report.ratio(peer, t.against(times[peer])) | {"work": impl}
        rows.append(row)
    return rows


def named(what: Task, shape: Shape) -> str:
    sizes = "".join(f"{k}{n}" for k, n in shape.items() if k != "weight")
    return f"fwd/{what.spec.attention.name}/{sizes}"
