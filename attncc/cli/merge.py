"""`attncc merge`: adds the tuning records of other machines to the local store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from attncc.autotune.fleet import collect
from attncc.autotune.storages import is_url, open_storage, without_password
from attncc.autotune.store import Merged, Store
from attncc.cli.output import Json, StorePath, guarded, opened, print_json, print_table

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="Stores' directories, files of records, or storages: journal:FILE, …://…"),
]


@guarded
def command(sources: Sources, root: StorePath = None, as_json: Json = False) -> None:
    """Add the tuning records of every SOURCE to the local store; what is known already is not added twice."""
    store = opened(root)
    merged = [(without_password(source), _merged(store, source)) for source in sources]
    if as_json:
        rows = [{"source": source, **asdict(counts)} for source, counts in merged]
        print_json({"store": str(store.root), "sources": rows})
    else:
        table = [(source, counts.added, counts.known, counts.skipped) for source, counts in merged]
        print_table(("source", "added", "known", "skipped"), table, wrapped=("source",))
        typer.echo(f"store: {store.root}")


def _merged(store: Store, source: str) -> Merged:
    return collect(open_storage(source), store) if is_url(source) else store.merge(Path(source))
