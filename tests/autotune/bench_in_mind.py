"""Trials whose outcome is a formula, in place of processes that run kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from attncc.autotune.declared import Shape
from attncc.autotune.record import Certificate, Resources, Sparsity
from attncc.autotune.sparsity import Kept
from attncc.autotune.trials import Legality, Tried

Config = Mapping[str, int]
SPARSITY = Sparsity(tiles=4.0, variance=0.1, full=0.5, skew=1.0)


def always(config: Config) -> bool:
    return False


@dataclass
class Imagined:
    """What trials would say, and how often they were asked."""

    ms: Callable[[Config, Shape], float]
    is_illegal: Callable[[Config], bool] = always
    is_wrong: Callable[[Config], bool] = always
    """Seen by the certificate alone."""
    is_off: Callable[[Config], bool] = always
    """Seen by a look at the output."""
    hangs: Callable[[Config], bool] = always
    noise: Sequence[float] = (1.0,)
    """Factors on the times of a comparison's rounds."""
    stop_after: int = 10**9
    measured: list[tuple[object, ...]] = field(default_factory=list)
    """Every config and shape that was timed, in order."""
    asked: Counter[str] = field(default_factory=Counter)

    def describe(self, shape: Shape) -> Kept:
        return Kept(0.5, SPARSITY)

    def legality(self, config: Config) -> Future[Legality]:
        self.asked["legality"] += 1
        found: Future[Legality] = Future()
        resources = Resources(registers=128, shared_bytes=65536)
        found.set_result(Legality(("it takes too much",) if self.is_illegal(config) else (), resources))
        return found

    def measure(self, shape: Shape, config: Config, trusted: Config) -> Tried:
        self.asked["measure"] += 1
        if self.asked["measure"] > self.stop_after:
            raise KeyboardInterrupt
        self.measured.append((frozenset(config.items()), *shape.items()))
        if self.hangs(config):
            return Tried("hung", "no answer within 60 s")
        if self.is_off(config):
            return Tried("wrong", "the output holds NaN or infinity")
        ms = self.ms(config, shape)
        return Tried("measured", ms=ms, spread=(ms, ms))

    def certify(self, config: Config) -> Tried:
        self.asked["certify"] += 1
        if self.is_wrong(config):
            return Tried("wrong", "B1Sq1Sk1 random: o 1.0e-01 > 1.0e-02")
        return Tried("measured", certificate=Certificate(cases=3, inputs=("random",), worst=0.5))

    def compare(self, shape: Shape, configs: Sequence[Config]) -> list[list[float]]:
        self.asked["compare"] += 1
        return [[self.ms(c, shape) * f for f in self.noise] for c in configs]
