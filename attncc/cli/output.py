"""What all commands share: exit codes, errors as text or JSON, tables, and a progress bar for long work."""

from __future__ import annotations

import functools
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final, ParamSpec

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from attncc import driver
from attncc.autotune.store import Store, default_root
from attncc.errors import AttnccError, CheckError, SpecError, Unsupported

FAILED: Final = 1
WRONG: Final = 2
UNSUPPORTED: Final = 3
BUG: Final = 70

EXIT_CODES: Final[dict[type[Exception], int]] = {
    Unsupported: UNSUPPORTED,
    CheckError: FAILED,
    AttnccError: WRONG,
    OSError: WRONG,
}
"""By the first class that fits; any other exception is a bug of ours."""

PATIENCE_S: Final = 1.0
"""Work that is done sooner shows no bar."""

WIDTH: Final = 160
"""Of tables that are piped into something."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="BACKEND", help="What makes kernels for GPUs: triton (default), or tvm, which deploys without it."
    ),
]
StorePath = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Of tuning records. Default: $ATTNCC_STORE, else yours.")
]
DeviceName = Annotated[str | None, typer.Option("--device", help="The GPU here (default), or interpreter.")]
SpecPath = Annotated[str, typer.Argument(metavar="SPEC", help="The variant's YAML file.")]

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """The command with exceptions turned into a message and an exit code; `as_json` is its --json flag."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except Exception as error:
            code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), BUG)
            _complain(error, code, bool(kwargs.get("as_json")))
            raise typer.Exit(code) from None

    return run


def _complain(error: Exception, code: int, as_json: bool) -> None:
    if as_json:
        print_json({"error": _as_data(error), "exit_code": code})
    elif code == BUG:
        traceback.print_exception(error)
        typer.echo("this is a bug in attncc: please report it with the spec", err=True)
    else:
        typer.echo(f"error: {error}", err=True)


def _as_data(error: Exception) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, AttnccError):
        where = asdict(error.location) if error.location else None
        data |= {"message": error.message, "hint": error.hint, "location": where}
    if isinstance(error, Unsupported):
        data["key"] = error.key
    return data


def opened(store: Path | None) -> Store:
    """The store in this folder, or the user's own; what it skips is told on standard error."""
    root = default_root() if store is None else store
    return Store(root, say=lambda message: typer.echo(f"note: {message}", err=True))


def parse_shape(text: str) -> dict[str, int]:
    """`B=2,Sq=100` as sizes by name."""
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        key, equals, number = entry.strip().partition("=")
        if not equals or not number.isdecimal():
            raise SpecError(f"'{entry}' in --shape is no size", hint="write B=2,Sq=100,Sk=300")
        sizes[key] = int(number)
    return sizes


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], wrapped: Sequence[str] = ()) -> None:
    """A table on standard output: numbers stand to the right; the last column is wrapped, and those in `wrapped`."""
    filled = [[_cell(value) for value in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for at, column in enumerate(columns):
        numbers = all(row[at].replace(".", "").replace(",", "").isdigit() for row in filled)
        wraps = column in (*wrapped, columns[-1])
        table.add_column(column, justify="right" if numbers and filled else "left", no_wrap=not wraps)
    for row in filled:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@contextmanager
def progress(as_json: bool) -> Iterator[driver.Progress | None]:
    """A callback for the driver that moves a bar on standard error, shown once the work is a second old."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("")
    timer = threading.Timer(PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
