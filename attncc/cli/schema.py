"""`attncc schema`: the JSON Schema of specs, for editors and scripts."""

from __future__ import annotations

import json

import typer

from attncc import driver
from attncc.cli.output import Json, guarded, print_json


@guarded
def command(as_json: Json = False) -> None:
    """Print the JSON Schema of a spec; with --json on one line."""
    schema = driver.schema()
    if as_json:
        print_json(schema)
    else:
        typer.echo(json.dumps(schema, indent=2, ensure_ascii=False))
