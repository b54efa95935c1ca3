"""`attncc verify`: the configs of a package against the oracle, on the machine where it is to be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from attncc.autotune.trials import Tried
from attncc.autotune.verify import verify
from attncc.cli.output import FAILED, DeviceName, Json, guarded, print_json, print_table, progress
from attncc.device import find

Package = Annotated[Path, typer.Argument(metavar="PACKAGE", help="Its folder, DIR/<name>. Its code is run.")]
Seed = Annotated[int, typer.Option(help="Of the random operands.")]


@guarded
def command(package: Package, device: DeviceName = None, seed: Seed = 0, as_json: Json = False) -> None:
    """Compare every config that PACKAGE has for this device with the float64 oracle, on hard operands too."""
    with progress(as_json) as report:
        found = verify(package, None if device is None else find(device), seed, report or (lambda *_: None))
    if as_json:
        outcomes = [{"config": dict(config), **_as_data(tried)} for config, tried in found.outcomes]
        print_json({**asdict(found), "outcomes": outcomes, "passed": found.passed})
    else:
        print_table(("config", "verdict", "cases", "worst", "detail"), [_row(*o) for o in found.outcomes])
        typer.echo(f"{found.package} on {found.device}: {found.rule}")
        for change in found.changed:
            typer.echo(f"since the configs were certified: {change}")
    if not found.passed:
        raise typer.Exit(FAILED)


def _as_data(tried: Tried) -> dict[str, object]:
    certificate = None if tried.certificate is None else tried.certificate.model_dump()
    return {"status": tried.status, "why": tried.why, "certificate": certificate}


def _row(config: Mapping[str, int], tried: Tried) -> tuple[str, ...]:
    text = " ".join(f"{k}={v}" for k, v in config.items())
    if tried.certificate is None:
        return text, tried.status, "", "", tried.why
    return text, "ok", str(tried.certificate.cases), f"{tried.certificate.worst:.0%} of the limit", ""
