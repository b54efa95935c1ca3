"""A worker of a fleet whose trials are imagined: `python -m autotune.imagined_worker URL STORE CARD SECONDS`.

A trial takes SECONDS; with heartbeats of a second, the others soon know of a worker that was killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autotune.bench_in_mind import Config, Imagined

from attncc import driver
from attncc.autotune import fleet, storages, task, tune
from attncc.autotune.declared import Shape
from attncc.autotune.store import Store
from attncc.codegen.gate import Findings
from attncc.device import find


def by_rows(config: Config, shape: Shape) -> float:
    return 1.0 + abs(config["BM"] - 16) / 100 + config["GROUP"] / 1000


def slowly(seconds: float) -> Imagined:
    def ms(config: Config, shape: Shape) -> float:
        time.sleep(seconds)
        return by_rows(config, shape)

    return Imagined(ms)


def main(url: str, store: str, card: str, seconds: str) -> None:
    storages.HEARTBEAT_S, storages.GRACE_S = 1, 3  # type: ignore[misc]
    device = find(card)

    @contextmanager
    def opened(*_: Any) -> Iterator[Any]:
        yield slowly(float(seconds))

    tune.opened = opened  # type: ignore[assignment]
    driver.examine = lambda *where: Findings(())  # compiling an engine takes seconds
    task.here = lambda: (device,)
    options = task.Options(sampler="random", compilers=1)
    ended = fleet.work(storages.open_storage(url), Store(Path(store)), device, options, once=True, say=print)
    print(f"{len(ended)} ended", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
