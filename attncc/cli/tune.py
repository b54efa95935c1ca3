"""`attncc tune`: the fastest configs of a variant on the GPU that is here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from optuna.storages import BaseStorage
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from attncc.autotune.declared import named
from attncc.autotune.fleet import submit
from attncc.autotune.run import Watch
from attncc.autotune.storages import open_storage
from attncc.autotune.store import Store
from attncc.autotune.task import Options, Standing, Tuned
from attncc.autotune.tune import tune
from attncc.cli.output import DeviceName, Json, SpecPath, StorePath, guarded, opened, print_json, print_table
from attncc.device import find
from attncc.errors import SpecError

INTERRUPTED: Final = 130
UNITS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
REASONS: Final = 4
"""Of rejected configs, the most frequent, that are shown."""

Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="B=2,Sq=4096", help="Repeatable. Default: the spec's `tune`, else the family's."),
]
Budget = Annotated[str, typer.Option(metavar="5m", help="Time for all: 90s, 5m, 1h; 0 for no limit.")]
Trials = Annotated[int | None, typer.Option(help="Configs to try; default: as many as the budget allows.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Whether what the store has counts as tried.")]
StorageUrl = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="URL", help="Shared trials: a journal file, postgresql://…, sqlite:///…, grpc://…"
    ),
]
For = Annotated[
    list[str] | None,
    typer.Option("--for", metavar="CARD", help="Repeatable: leave it to workers on such cards, --trials on each."),
]
Sampler = Annotated[str, typer.Option(help="tpe or random.")]
Warm = Annotated[bool, typer.Option("--warm", help="Time calls with what the last one left in the L2 cache.")]
Seed = Annotated[int, typer.Option(help="Of operands and sampler.")]


@guarded
def command(
    spec: SpecPath,
    shape: Shapes = None,
    budget: Budget = "5m",
    trials: Trials = None,
    resume: Resume = True,
    storage: StorageUrl = None,
    store: StorePath = None,
    device: DeviceName = None,
    cards: For = None,
    sampler: Sampler = "tpe",
    warm: Warm = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find the fastest right configs of SPEC on the GPU that is here, and keep them for `attncc compile`.

    Ctrl-C ends it early; what was measured is kept, and the next run goes on from there.
    """
    options = Options(seconds_of(budget), trials, resume, sampler, seed, cold=not warm)
    shapes = None if shape is None else [shape_of(s) for s in shape]
    place = opened(store)
    shared = None if storage is None else open_storage(storage)
    if cards:
        _leave(spec, cards, shared, trials, shapes, as_json)
        return
    with shown(as_json) as watch:
        found = tune(spec, shapes, None if device is None else find(device), options, place, shared, watch)
    if as_json:
        print_json(as_data(found))
    else:
        _print(found, spec, place)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def _leave(
    spec: str,
    cards: list[str],
    storage: BaseStorage | None,
    trials: int | None,
    shapes: list[dict[str, int | float]] | None,
    as_json: bool,
) -> None:
    """To the workers of a storage."""
    if storage is None or trials is None:
        raise SpecError("--for leaves work in a storage", hint="name it by --storage, and how much by --trials")
    names = submit(storage, spec, [find(card) for card in cards], trials, shapes)
    if as_json:
        print_json({"studies": names})
    else:
        typer.echo("\n".join(f"left to workers: {name}" for name in names))


def seconds_of(text: str) -> float | None:
    """`90s`, `5m` or `1h` in seconds; None for 0, which is no limit."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(s|m|h)?", text.strip())
    if found is None:
        raise SpecError(f"'{text}' in --budget is no time", hint="write 90s, 5m or 1h")
    return float(found[1]) * UNITS[found[2] or ""] or None


def shape_of(text: str) -> dict[str, int | float]:
    """`B=2,Sq=4096,sparsity=0.9` as numbers by name."""
    numbers: dict[str, int | float] = {}
    for entry in text.split(","):
        key, equals, number = entry.strip().partition("=")
        if not equals or not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", number):
            raise SpecError(f"'{entry}' in --shape is no size", hint="write B=2,Sq=4096,Sk=4096")
        numbers[key] = float(number) if "." in number else int(number)
    return numbers


@contextmanager
def shown(as_json: bool) -> Iterator[Watch]:
    """A watch that draws how the run stands on standard error, where that is a terminal."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield lambda standing: None
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield lambda standing: live.update(_drawn(standing))


def _drawn(s: Standing) -> Group:
    table = Table(box=None, pad_edge=False)
    for column in ("shape", "default ms", "best ms", "faster"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for shape, default, best in zip(s.shapes, s.default_ms, s.best_ms, strict=False):
        table.add_row(named(shape), f"{default:.4g}", f"{best:.4g}", f"{default / best:.2f} x")
    statuses = ", ".join(f"{n} {status}" for status, n in s.statuses.items())
    left = "" if s.left_s is None else f", {s.left_s:.0f} s left"
    often = sorted(s.reasons.items(), key=lambda r: -r[1])[:REASONS]
    rejected = [Text(f"  {n} x {why}", style="dim") for why, n in often]
    return Group(Text(f"{s.tried} configs tried ({statuses}){left}"), table, Text(s.doing, "dim"), *rejected)


def as_data(found: Tuned) -> dict[str, Any]:
    """The result for scripts."""
    outcomes = [
        {"shape": dict(o.shape), "ms": o.ms, "best_ms": o.best_ms, "default_ms": o.default_ms}
        for o in found.decision.outcomes
    ]
    return {
        "variant": found.variant,
        "card": found.card,
        "seconds": round(found.seconds, 1),
        "tried": found.standing.tried,
        "statuses": dict(found.standing.statuses),
        "rank_correlation": found.rank_correlation,
        "interrupted": found.interrupted,
        "shapes": outcomes,
        "table": [[dict(bounds), dict(config)] for bounds, config in found.decision.rows],
    }


def _print(found: Tuned, spec: str, store: Store) -> None:
    rows = [
        (
            named(o.shape),
            "" if o.default_ms is None else f"{o.default_ms:.4g}",
            "" if o.ms is None else f"{o.ms:.4g}",
            "" if o.default_ms is None or o.ms is None else f"{o.default_ms / o.ms:.2f} x",
        )
        for o in found.decision.outcomes
    ]
    print_table(("shape", "default ms", "tuned ms", "faster"), rows)
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(found.standing.statuses.items()))
    model = "" if found.rank_correlation is None else f"; the model's rank correlation {found.rank_correlation:.2f}"
    typer.echo(f"{found.standing.tried} configs tried in {found.seconds:.0f} s ({statuses}){model}")
    typer.echo(f"kept in {store.root}; next: attncc compile {spec} --target {found.card}")
