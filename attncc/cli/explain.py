"""`attncc explain`: how a spec changes on its way to tiles."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from attncc import driver
from attncc.cli.output import Json, SpecPath, guarded, print_json

Pass = Annotated[
    str | None, typer.Option("--pass", metavar="NAME", help=f"One stage only: {', '.join(driver.STAGES)}.")
]


@guarded
def command(spec: SpecPath, pass_name: Pass = None, as_json: Json = False) -> None:
    """Print the IR of SPEC behind each pass, then its skeleton, the reason for it, and the tile program."""
    stages = driver.explain(spec, pass_name)
    if as_json:
        print_json({"stages": [asdict(s) for s in stages]})
        return
    for stage in stages:
        if pass_name is None:
            typer.secho(f"── {stage.name} ".ljust(100, "─"), bold=True)
        typer.echo(stage.text.rstrip() + ("\n" if pass_name is None else ""))
