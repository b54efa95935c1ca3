"""`attncc report`: what tuning found, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncc.autotune.report import write_report
from attncc.cli.output import Json, SpecPath, StorePath, guarded, print_json

Out = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE.html", help="Default: NAME-CARD.html, in this directory.")
]
Card = Annotated[
    str | None, typer.Option("--device", metavar="CARD", help="Needed where the spec was tuned on several cards.")
]


@guarded
def command(
    spec: SpecPath, out: Out = None, store: StorePath = None, device: Card = None, as_json: Json = False
) -> None:
    """Write what tuning SPEC found on a card as an HTML page that needs no network."""
    page = write_report(spec, out, store, device)
    if as_json:
        print_json({"report": str(page)})
    else:
        typer.echo(page)
