"""Configs of one package, tried in processes of their own: several that compile, and one that runs."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from attncc.autotune.child import Child, ChildDied
from attncc.autotune.declared import Shape
from attncc.autotune.record import Certificate, Resources, Sparsity, Status
from attncc.autotune.sparsity import Kept
from attncc.device import Device
from attncc.errors import TuneError

Config = Mapping[str, int]

COMPILE_S: Final = 120.0
RUN_S: Final = 60.0
CERTIFY_S: Final = 600.0
"""How long a child may take for an answer."""


@dataclass(frozen=True, slots=True)
class Tried:
    """How a trial went."""

    status: Status
    why: str = ""
    ms: float | None = None
    spread: tuple[float, float] | None = None
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Legality:
    """What a config's kernels take, and why they must not run; empty if they may."""

    reasons: tuple[str, ...]
    resources: Resources | None = None


class Trials:
    """Asks the children, and starts new ones for those that die."""

    def __init__(self, runner: Child, compilers: Sequence[Child], seconds: float, cold: bool) -> None:
        self.runner, self.seconds, self.cold = runner, seconds, cold
        self.idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in compilers:
            self.idle.put(child)
        self.pool = ThreadPoolExecutor(max(1, len(compilers)))
        self.compiles = bool(compilers)

    def describe(self, shape: Shape) -> Kept:
        """What the masks leave of a shape's call.

        Raises:
            TuneError: if its operands cannot be made or looked at.
        """
        found = self._ask({"do": "describe", "shape": dict(shape)}, RUN_S)
        if "kept" not in found:
            raise TuneError(f"the shape {dict(shape)} cannot be tuned on: {found['why']}", hint="try a smaller one")
        return Kept(found["kept"], Sparsity(**found["sparsity"]))

    def legality(self, config: Config) -> Future[Legality]:
        """Compiled and looked at, beside others; what is interpreted is always legal."""
        return self.pool.submit(self._legality, config)

    def measure(self, shape: Shape, config: Config, trusted: Config) -> Tried:
        """The time of a config on a shape; what computes something else than the trusted config is wrong."""
        return self._tried({
            "do": "measure", "shape": dict(shape), "config": dict(config), "trusted": dict(trusted),
            "seconds": self.seconds, "cold": self.cold,
        }, RUN_S)  # fmt: skip

    def certify(self, config: Config) -> Tried:
        """Against fp64, on hard shapes and operands; with a certificate if all agree."""
        return self._tried({"do": "certify", "config": dict(config)}, CERTIFY_S)

    def choices(self) -> dict[str, Any]:
        """The `configs` that the package has for the device, the `rule` why, and their `certificate`; or `why` not."""
        return self._ask({"do": "choices"}, RUN_S)

    def compare(self, shape: Shape, configs: Sequence[Config]) -> list[list[float]]:
        """Milliseconds of each config, a number a round, in alternation; empty if one does not run any more."""
        question = {"do": "compare", "shape": dict(shape), "configs": [dict(c) for c in configs]}
        found = self._ask(question | {"seconds": 4 * self.seconds, "cold": self.cold}, RUN_S)
        return found.get("rounds", [])

    def _legality(self, config: Config) -> Legality:
        if not self.compiles:
            return Legality(())
        child = self.idle.get()
        try:
            found = child.ask({"config": dict(config)}, COMPILE_S)
        except ChildDied as died:
            return Legality((f"its compiler {died.status}: {died.message}"[:1000],))
        finally:
            self.idle.put(child)
        return Legality(tuple(found.pop("reasons")), Resources(**found))

    def _tried(self, question: dict[str, Any], patience: float) -> Tried:
        found = self._ask(question, patience)
        spread = found.get("spread")
        certificate = found.get("certificate")
        return Tried(
            found["status"],
            found.get("why", ""),
            found.get("ms"),
            None if spread is None else (spread[0], spread[1]),
            None if certificate is None else Certificate(**certificate),
        )

    def _ask(self, question: dict[str, Any], patience: float) -> dict[str, Any]:
        try:
            found = self.runner.ask(question, patience)
        except ChildDied as died:
            return {"status": died.status, "why": died.message[:1500]}
        if found.get("status") == "failed":
            self.runner.stop()  # an error may have poisoned what the process has of the GPU
        return found


@contextmanager
def opened(
    package: Path, device: Device, cache: Path, compilers: int, seed: int, seconds: float, cold: bool
) -> Iterator[Trials]:
    """Trials of a package on a device of this machine; `cache` is where compilers and runner meet.

    The package is read when the first trial asks for it: it may be written while processes start.
    """
    environment = {"TRITON_CACHE_DIR": str(cache)} | ({} if device.is_gpu else {"TRITON_INTERPRET": "1"})
    arguments = [str(package), device.text]
    runner = Child("attncc.autotune.trial", [*arguments, str(seed)], environment)
    count = compilers if device.is_gpu else 0
    others = [Child("attncc.codegen.legality", arguments, environment) for _ in range(count)]
    with ExitStack() as stack:
        for child in (runner, *others):
            stack.enter_context(child)
            child.start()
        trials = Trials(runner, others, seconds, cold)
        try:
            yield trials
        finally:
            trials.pool.shutdown(wait=False, cancel_futures=True)
            for child in others:
                child.kill()
            trials.pool.shutdown()
