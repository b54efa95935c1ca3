"""`attncc worker`: tunes what others left in a storage for cards like the one here."""

from __future__ import annotations

from typing import Annotated

import typer

from attncc.autotune.fleet import work
from attncc.autotune.storages import open_storage
from attncc.cli.output import DeviceName, Json, StorePath, guarded, opened, print_json
from attncc.cli.tune import INTERRUPTED, as_data, shown
from attncc.device import find

Url = Annotated[
    str, typer.Option("--storage", metavar="URL", help="Where the work lies: postgresql://…, grpc://…, a file.")
]
Once = Annotated[
    bool, typer.Option("--once", help="End when nothing is left for this card, rather than wait for more.")
]


@guarded
def command(
    storage: Url, once: Once = False, device: DeviceName = None, store: StorePath = None, as_json: Json = False
) -> None:
    """Tune what was left by `attncc tune --for CARD`, beside other workers, until nothing is left for this card.

    A worker that is killed loses the trial in flight; another one takes it up.
    """
    place = opened(store)
    card = None if device is None else find(device)
    with shown(as_json) as watch:
        say = lambda text: typer.echo(text, err=True)
        ended = work(open_storage(storage), place, card, once=once, watch=watch, say=say)
    if as_json:
        print_json([as_data(found) for found in ended])
    else:
        typer.echo(f"{len(ended)} jobs done; kept in {place.root}")
    if any(found.interrupted for found in ended):
        raise typer.Exit(INTERRUPTED)
