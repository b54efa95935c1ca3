"""`attncc compile`: a spec becomes a package on disk."""

from __future__ import annotations

from typing import Annotated

import typer

from attncc import driver
from attncc.cli.output import Backend, Json, SpecPath, guarded, print_json, progress

Out = Annotated[str, typer.Option("-o", "--out", metavar="DIR", help="The package is written to DIR/<name>.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("-t", "--target", metavar="TARGET", help="Repeatable. Default: the GPUs here, else the CPU."),
]
Aot = Annotated[
    str | None,
    typer.Option(metavar="ARCH[,ARCH…]", help="Cubins for these GPUs come with it: a first call compiles nothing."),
]


@guarded
def command(
    spec: SpecPath,
    out: Out = ".",
    target: Targets = None,
    backend: Backend = None,
    aot: Aot = None,
    as_json: Json = False,
) -> None:
    """Compile SPEC into an importable package that needs torch and triton, never attncc."""
    ahead = None if aot is None else [name.strip() for name in aot.split(",")]
    with progress(as_json) as report:
        package = driver.compile(spec, out, target, report, backend, ahead)
    if as_json:
        names = [d.name for d in driver.resolve(target, ahead)]
        print_json({"package": str(package), "targets": names})
    else:
        typer.echo(package)
