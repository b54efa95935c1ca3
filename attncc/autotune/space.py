"""The configs a variant may have on a device, read off the knobs of its tile program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

from attncc.device import Device
from attncc.ir.attention import Attention
from attncc.ir.tile import Program
from attncc.passes.lower import latent
from attncc.passes.lower.defaults import Config, beside_engine, beside_latent, default_configs, filling
from attncc.passes.lower.knobs import FILL, SPLIT

WARPS: Final = (4, 8)
FEW_WARPS: Final = (1, 2, 4, 8)
"""Of query tiles of few rows."""
STAGES: Final = (1, 2, 3)
REGISTERS: Final = (0, 128, 160, 168)
"""Caps of a thread's registers, 0 for none: for two programs of 8 warps on a multiprocessor, or three of 4."""
PRODUCER: Final = 24
"""Registers of a thread of the engine's warpgroup that loads."""
SHARED_OUT: Final = (SPLIT.name, FILL.name)
"""How keys are shared out to programs, in calls of few queries."""
FILLINGS: Final = (1, 2, 4, 8)
"""Programs a multiprocessor that fill it."""
FILLED: Final = (1, 2)
"""The same where each multiprocessor is to have as many: of shares of rows, and of the latent engine, whose blocks have
one each, and may do two items, one after the other."""
FEW: Final = 16
"""Queries; calls of no more are tried with their keys shared out."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Configs for one kind of kernel: a choice for each axis, then completed by what follows from it."""

    name: str
    axes: Mapping[str, tuple[int, ...]]
    complete: Callable[[Config], Config]

    def configs(self) -> Iterator[tuple[Config, Config]]:
        """Every choice, and the config that it makes."""
        for values in product(*self.axes.values()):
            choice = dict(zip(self.axes, values, strict=True))
            yield choice, self.complete(choice)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One config, and where it stands in the space."""

    branch: str
    choice: Config
    config: Config


def branches(attn: Attention, program: Program, device: Device, queries: int) -> tuple[Branch, ...]:
    """The portable kernels' branch, that of the engine where the device has one that carries the variant, and that of
    shared keys where the shortest call has so few queries that it may be worth it.

    Raises:
        Unsupported: if nothing is known of launches on the device.
    """
    rows, _ = default_configs(attn, device, with_engine=False)
    base = rows[-1][1]
    knobs = {k.name: k.choices for k in program.knobs if k.name in base}
    plain = {name: choices for name, choices in knobs.items() if name not in SHARED_OUT}
    found = [Branch("portable", plain | _options(device), lambda choice: {**base, **choice})]
    if program.engine is not None and program.engine.name == latent.NAME:
        if device.has_wgmma and queries <= FEW:
            engine = {k.name: k.choices for k in program.engine.knobs}
            engine |= {SPLIT.name: SPLIT.choices[1:], FILL.name: tuple(n * device.sms for n in FILLED)}
            found.append(Branch(latent.NAME, engine, lambda choice: {**base, **beside_latent(choice)}))
    elif program.engine is not None and device.has_wgmma:
        around = {**base, "TMA": 1}
        engine = {k.name: k.choices for k in program.engine.knobs}
        found.append(Branch(program.engine.name, engine, lambda choice: {**around, **beside_engine(attn, choice)}))
    if SPLIT.name in knobs and queries <= FEW:
        fill = *(filling(device, n) for n in FILLINGS), *(n * device.sms for n in FILLED)
        shares = {SPLIT.name: SPLIT.choices[1:], FILL.name: tuple(dict.fromkeys(fill))}
        shares |= {"num_warps": FEW_WARPS} if device.is_gpu else {}
        found.append(Branch("split", plain | _options(device) | shares, lambda choice: {**base, **choice}))
    return tuple(found)


def _options(device: Device) -> dict[str, tuple[int, ...]]:
    """What Triton chooses among; its interpreter has nothing to choose."""
    if not device.is_gpu:
        return {}
    caps = {"maxnreg": REGISTERS} if device.caps_registers else {}
    return {"num_warps": WARPS, "num_stages": STAGES, **caps, "TMA": (1, 0) if device.has_tma else (0,)}


def candidates(attn: Attention, branches: tuple[Branch, ...], device: Device) -> list[Candidate]:
    """Every config of the space whose accumulators can be held in registers."""
    return [
        Candidate(branch.name, choice, config)
        for branch in branches
        for choice, config in branch.configs()
        if not device.is_gpu or _holds_accumulators(attn, config, device)
    ]


def _holds_accumulators(attn: Attention, config: Config, device: Device) -> bool:
    """Whether a program's fp32 sums and scores fit its threads' registers, and those a multiprocessor's."""
    if config.get("L_WIDTH"):
        return True  # its halves are what a consumer's registers hold
    if config.get("ENGINE"):
        threads = 4 * device.warp_size
        granted = config["E_CONSUMERS"] * config["E_REGISTERS"] + PRODUCER
        words = 64 * (attn.dims.v + config["E_KEYS"]) / threads
        return granted * threads <= device.registers_per_sm and words < config["E_REGISTERS"]
    threads = config["num_warps"] * device.warp_size
    words = config["BM"] * (attn.dims.v + config["BN"]) / threads
    return words < (config.get("maxnreg") or device.registers_per_thread)
