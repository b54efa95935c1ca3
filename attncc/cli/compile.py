"""`attncc compile`: a spec becomes a package on disk."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from attncc import driver
from attncc.autotune import tuned
from attncc.cli.output import Backend, Json, SpecPath, StorePath, guarded, opened, print_json, progress

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
    store: StorePath = None,
    aot: Aot = None,
    as_json: Json = False,
) -> None:
    """Compile SPEC into an importable package that needs torch and triton, never attncc.

    Devices that the store has certified records for get tuned configs, which standard error tells.
    """
    known = tuned.from_store(opened(store), partial(typer.echo, err=True))
    ahead = None if aot is None else [name.strip() for name in aot.split(",")]
    with progress(as_json) as report:
        package = driver.compile(spec, out, target, report, backend, known, ahead)
    if as_json:
        names = [d.name for d in driver.resolve(target, ahead)]
        print_json({"package": str(package), "targets": names})
    else:
        typer.echo(package)
