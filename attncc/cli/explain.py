"""`attncc explain`: how a spec changes on its way to tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer

from attncc import driver
from attncc.autotune import tuned
from attncc.cli.output import Json, SpecPath, StorePath, guarded, opened, parse_shape, print_json
from attncc.device import Device
from attncc.errors import SpecError

Pass = Annotated[
    str | None, typer.Option("--pass", metavar="NAME", help=f"One stage only: {', '.join(driver.STAGES)}.")
]


Shape = Annotated[
    str | None, typer.Option("--shape", metavar="B=2,Sq=100,Sk=300", help="Which config these sizes get, instead.")
]
Card = Annotated[str | None, typer.Option("--device", metavar="NAME", help="For --shape. Default: what is here.")]


@guarded
def command(
    spec: SpecPath,
    pass_name: Pass = None,
    shape: Shape = None,
    device: Card = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Print the IR of SPEC behind each pass, then its skeleton, the reason for it, and the tile program.

    With --shape: which config a call of these sizes gets on a device, by which rule, and what was measured of it.
    """
    if shape is not None:
        _print_choice(tuned.choose(spec, parse_shape(shape), _device(device), opened(store)), as_json)
        return
    if device is not None:
        raise SpecError("--device without --shape", hint="add --shape B=2,Sq=4096,Sk=4096")
    stages = driver.explain(spec, pass_name)
    if as_json:
        print_json({"stages": [asdict(s) for s in stages]})
        return
    for stage in stages:
        if pass_name is None:
            typer.secho(f"── {stage.name} ".ljust(100, "─"), bold=True)
        typer.echo(stage.text.rstrip() + ("\n" if pass_name is None else ""))


def _device(name: str | None) -> Device:
    return driver.resolve(None if name is None else [name])[0]


def _print_choice(choice: tuned.Choice, as_json: bool) -> None:
    if as_json:
        print_json(asdict(choice))
        return
    lines = {
        "device": choice.device,
        "sizes": _numbers(choice.sizes),
        "config": _numbers(choice.config),
        "rule": choice.rule,
        "from": choice.origin,
        "time": _time(choice.ms),
        "untuned": _time(choice.default_ms),
    }
    for title, text in lines.items():
        typer.echo(f"{title:8}{text}")


def _numbers(mapping: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={number}" for name, number in mapping.items())


def _time(ms: float | None) -> str:
    return "not measured" if ms is None else f"{ms:.6g} ms, measured"
