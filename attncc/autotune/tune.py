"""Tuning one variant on one device: tries configs within a budget, and certifies those that win.

What is measured goes into the store as soon as it is known, so a run that is interrupted or killed loses at most the
trial in flight, and the next one goes on from there.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from optuna.storages import BaseStorage

from attncc import driver
from attncc.autotune.declared import Shape
from attncc.autotune.run import Run, Watch
from attncc.autotune.store import Store, default_root
from attncc.autotune.task import Options, Tuned, task
from attncc.autotune.trials import opened
from attncc.device import Device
from attncc.spec import Spec, document

DEFAULTS: Final = Options()


def tune(
    source: Spec | str | os.PathLike[str],
    shapes: Iterable[Shape] | None = None,
    device: Device | None = None,
    options: Options = DEFAULTS,
    store: Store | None = None,
    storage: BaseStorage | None = None,
    watch: Watch = lambda standing: None,
) -> Tuned:
    """Tunes a variant on the GPU that is here, or in Triton's interpreter, and stores what was measured.

    `storage` is where several runs, on several machines, share their trials. `watch` hears of every trial. Ctrl-C ends
    the run early, and what was measured until then is kept.

    Raises:
        SpecError, Unsupported: as `task`.
        TuneError: if the default config does not run, or computes something wrong.
    """
    begun = time.monotonic()
    what = task(source, shapes, device)
    with tempfile.TemporaryDirectory(prefix="attncc-tune-") as folder:
        as_run = replace(what.spec, attention=what.attn, text=document(what.attn))
        package, cache = Path(folder, what.attn.name), Path(folder, "cache")
        with opened(
            package, what.device, cache, options.compilers, options.seed, options.seconds, options.cold
        ) as trials:
            driver.compile(as_run, folder, [what.device], cache=cache)  # while the processes of the trials start
            has_engine = (package / "_engine.py").exists()  # it is left out where its machine code is wrong
            run = Run(what, options, store or Store(default_root()), trials, watch, has_engine, begun)
            return run.tune(storage)
