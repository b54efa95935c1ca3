"""What is to be tuned, how, and what comes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from attncc import driver
from attncc.autotune.declared import Shape, shapes_of
from attncc.autotune.search import SAMPLERS
from attncc.autotune.table import Decision
from attncc.check.stand_in import stand_in
from attncc.device import Device, here
from attncc.errors import SpecError, Unsupported, nearest
from attncc.ir.attention import Attention
from attncc.ir.text import digest
from attncc.spec import Spec


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is given beside the variant."""

    budget_s: float | None = 300.0
    """Seconds; None for as long as there is something to try."""
    trials: int | None = None
    """Configs to try in this run; None for as many as the budget allows."""
    resume: bool = True
    """Whether what the store has of the variant, card and toolchain counts as tried."""
    sampler: str = "tpe"
    seed: int = 0
    cold: bool = True
    """Whether the L2 cache is emptied before each call that is timed."""
    seconds: float = 0.1
    """Of timing, for each config and shape."""
    compilers: int = field(default_factory=lambda: max(1, (os.cpu_count() or 2) - 1))
    """Processes that compile while another one measures."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise SpecError(f"unknown sampler '{self.sampler}'", hint=nearest(self.sampler, SAMPLERS))
        if self.trials is not None and self.trials < 1:
            raise SpecError(f"{self.trials} trials are none", hint="name one at least, or a budget of time")


@dataclass(frozen=True, slots=True)
class Standing:
    """How a run stands."""

    doing: str
    tried: int
    statuses: Mapping[str, int]
    """How trials ended, by status."""
    reasons: Mapping[str, int]
    """What kept configs from being measured, by its first words."""
    shapes: tuple[Shape, ...]
    default_ms: tuple[float, ...]
    best_ms: tuple[float, ...]
    """By shape; of what was measured, certified or not."""
    left_s: float | None


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a run found."""

    variant: str
    card: str
    shapes: tuple[Shape, ...]
    decision: Decision
    standing: Standing
    rank_correlation: float | None
    """Spearman's, between predicted and measured times of all configs; None for less than three."""
    interrupted: bool
    exhausted: bool
    """Whether there is nothing left to try."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Task:
    """A variant on a device, and the shapes it is tuned on."""

    spec: Spec
    attn: Attention
    """As the device runs it, which for Triton's interpreter is a stand-in."""
    device: Device
    shapes: tuple[Shape, ...]

    @property
    def program(self) -> str:
        return digest(self.spec.attention)

    @property
    def name(self) -> str:
        """Of the study that all who work on it share."""
        shapes = sha256(json.dumps(self.shapes, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.spec.attention.name}-{self.program}-{self.device.name}-{shapes}"


def task(source: Spec | str | os.PathLike[str], shapes: Iterable[Shape] | None, device: Device | None) -> Task:
    """What is to be tuned; on the first GPU that is here where no device is named.

    Raises:
        SpecError: for wrong shapes, or a device that is not here.
        Unsupported: for devices that have nothing to tune, and specs whose tensors live in Python.
    """
    loaded = driver.load(source)
    chosen = device or here()[0]
    if chosen.takes_libraries:
        raise Unsupported("libraries for CPUs have no configs to tune", hint="tune on a GPU, or --device interpreter")
    if chosen.is_gpu and chosen.name not in {d.name for d in here()}:
        found = ", ".join(d.name for d in here())
        raise SpecError(f"'{chosen.name}' is not here, but {found}", hint="run it there, or a worker")
    if loaded.captured:
        raise Unsupported("a spec whose tensors were captured from Python is not tuned", hint="declare them as inputs")
    attn, _ = stand_in(loaded.attention, chosen)
    return Task(loaded, attn, chosen, shapes_of(attn, shapes, chosen.is_gpu))
