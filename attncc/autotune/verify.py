"""Checks a package where it is to be used: its configs, on the device and with the toolchain that are there.

A certificate speaks for the machine code that one toolchain made. Another one makes other code of the same config, so
who installs a package checks it once; nothing is checked inside a user's call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attncc.autotune.toolchain import toolchain
from attncc.autotune.trials import Tried, opened
from attncc.device import Device, here
from attncc.errors import SpecError, TuneError

TOOLS: Final = ("triton", "ptxas", "torch", "driver")


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check of a package found."""

    package: str
    device: str
    rule: str
    """Why the device has these configs."""
    outcomes: tuple[tuple[Mapping[str, int], Tried], ...]
    changed: tuple[str, ...]
    """What of the toolchain is not as it was when the configs were certified."""

    @property
    def passed(self) -> bool:
        return all(tried.certificate is not None for _, tried in self.outcomes)


def verify(
    package: Path,
    device: Device | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Verified:
    """Compares every config that a package has for a device with the oracle, in a process of its own.

    The package is code, and is run. Without a device it is the GPU that is here.

    Raises:
        SpecError: if there is no package of Triton kernels.
        TuneError: if it has no config for the device, or cannot be imported.
    """
    if not (package / "spec.yaml").is_file() or not (package / "_gpu.py").is_file():
        raise SpecError(
            f"'{package}' is no package of Triton kernels", hint="name DIR/<name>, as `attncc compile` does"
        )
    card = device or here()[0]
    with (
        tempfile.TemporaryDirectory(prefix="attncc-verify-") as cache,
        opened(package.resolve(), card, Path(cache), 0, seed, 0.0, True) as trials,
    ):
        found = trials.choices()
        if "configs" not in found:
            raise TuneError(f"'{package}' cannot be used on {card.name}: {found['why']}")
        configs = found["configs"]
        outcomes: list[tuple[Mapping[str, int], Tried]] = []
        for number, config in enumerate(configs):
            progress(f"config {number + 1} of {len(configs)}", number, len(configs))
            outcomes.append((config, trials.certify(config)))
        progress("done", len(configs), len(configs))
    tools, then = toolchain(card), found["certificate"]
    changed = [f"{t} {then[t]} -> {now}" for t in TOOLS if t in then and then[t] != (now := getattr(tools, t))]
    return Verified(package.name, card.name, found["rule"], tuple(outcomes), tuple(changed))
