"""`attncc list`: the specs of a directory, what they use, and what carries them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from attncc import driver
from attncc.cli.output import WRONG, Json, guarded, print_json, print_table

Folder = Annotated[str | None, typer.Argument(metavar="[DIR]", help="Where specs are. Default: the examples.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown page.")]

COLUMNS = ("system", "family", "source", "lowering", "primitives")
PREFACE = """\
# Systems

Each is one file in `examples/`, and evaluates in the oracle. A row names the primitives its file uses, by the key they
stand under; plain dense attention uses none. Written by `attncc list examples --markdown`.
"""


@guarded
def command(folder: Folder = None, markdown: Markdown = False, as_json: Json = False) -> None:
    """List the specs of a directory: family, source, the primitives they use, and which lowerings there are."""
    systems = driver.systems(folder)
    if as_json:
        print_json({"systems": [asdict(s) for s in systems]})
    elif markdown:
        typer.echo("\n".join((PREFACE, *_page(systems))))
    else:
        print_table(COLUMNS, map(_row, systems), wrapped=("source", "lowering"))
        carried, broken = sum(bool(s.lowerings) for s in systems), sum(bool(s.error) for s in systems)
        typer.echo(f"{len(systems)} specs: {carried} with a lowering, {broken} that do not load")
    if any(s.error for s in systems):
        raise typer.Exit(WRONG)


def _row(s: driver.System) -> tuple[str, ...]:
    """A spec's cells; in place of its primitives the error that it does not load for."""
    used = " ".join(f"{key}({', '.join(words)})" for key, words in s.primitives.items()) or "–"
    missing = f"not yet: {', '.join(dict.fromkeys(s.missing))}" if s.missing else ""
    return s.name, s.family, s.source, ", ".join(s.lowerings) or missing, s.error or used


def _page(systems: Sequence[driver.System]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield _line(COLUMNS)
    yield _line("---" for _ in COLUMNS)
    for system in systems:
        cells = [re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in _row(system)]
        cells[2] = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", cells[2])
        yield _line([f"`{cells[0]}`", *cells[1:]])


def _line(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"
