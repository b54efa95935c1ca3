"""`attncc package`: an emitted package as a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncc.cli.output import Json, guarded, print_json
from attncc.codegen.wheel import wheel

Package = Annotated[Path, typer.Argument(metavar="PACKAGE", help="Its folder, DIR/<name>.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The wheel is written there.")]
Version = Annotated[str, typer.Option("--version", help="Of the wheel.")]


@guarded
def command(package: Package, out: Out = Path("dist"), version: Version = "1.0", as_json: Json = False) -> None:
    """Build the wheel of PACKAGE: with its spec, configs and cubins, and needing neither attncc nor tuning."""
    made = wheel(package, out, version)
    if as_json:
        print_json({"wheel": str(made)})
    else:
        typer.echo(made)
