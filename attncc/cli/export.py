"""`attncc export`: what was tuned for a device, as the text of its module of configs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncc.autotune import tuned
from attncc.cli.output import Json, SpecPath, StorePath, guarded, opened, print_json
from attncc.device import find

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: standard output.")]
Card = Annotated[str, typer.Option("--device", metavar="NAME", help="A card, or an architecture.")]


@guarded
def command(spec: SpecPath, device: Card, out: Out = None, store: StorePath = None, as_json: Json = False) -> None:
    """Print the tuned configs of SPEC for a device: the module that a package has of it."""
    text = tuned.export(spec, find(device), opened(store))
    if out is not None:
        out.write_text(text)
    if as_json:
        print_json({"device": device, "file": None if out is None else str(out), "text": text})
    else:
        typer.echo(text.rstrip() if out is None else out)
