"""`attncc check`: a compiled package against the oracle, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from attncc import driver
from attncc.cli.output import FAILED, Backend, Json, SpecPath, guarded, parse_shape, print_json, print_table, progress

Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="B=2,Sq=100,Sk=300", help="Repeatable. Default: shapes known to be hard."),
]
Seed = Annotated[int, typer.Option(help="Of the random operands.")]


Target = Annotated[str | None, typer.Option(help="cpu, interpreter, or the GPU that is here (default; else cpu).")]


@guarded
def command(
    spec: SpecPath,
    shape: Shapes = None,
    seed: Seed = 0,
    target: Target = None,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Compile SPEC for this machine and compare it with the float64 oracle, on hard operands too."""
    shapes = None if shape is None else [parse_shape(s) for s in shape]
    with progress(as_json) as report:
        result = driver.check(spec, shapes, report, seed, target, backend)
    if as_json:
        print_json(result.as_data())
    else:
        print_table(("case", "verdict", "error", "limit", "detail"), map(_row, result.outcomes))
        for note in result.notes:
            typer.echo(f"note: {note}")
        typer.echo(result.summary)
    if not result.passed:
        raise typer.Exit(FAILED)


def _row(outcome: driver.Outcome) -> tuple[str, ...]:
    """A case's worst output, by its share of what is allowed."""
    worst = max(outcome.deviations, key=lambda d: d.error / d.limit, default=None)
    figures = (f"{worst.error:.1e}", f"{worst.limit:.1e}") if worst else ("", "")
    return str(outcome.case), outcome.verdict, *figures, outcome.detail
