"""Which configs a device gets: the file of the card, of the one nearest to it, or of its architecture.

Files of tuned cards have DEVICE, by which others are found to be like them, CERTIFICATE and MEASURED beside TABLE.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ._checks import Sizes
from ._runtime import Config

Bounds = Mapping[str, int]


@dataclass(frozen=True)
class Found:
    """A file, why it is that one, and whether it was made for the device."""

    name: str
    rule: str
    is_own: bool = True


@dataclass(frozen=True)
class Here:
    """What is known of the GPU of a call; 0 is what nothing says."""

    name: str
    arch: str
    sms: int = 0
    shared_bytes: int = 0
    l2_bytes: int = 0

    @classmethod
    def of(cls, device: torch.device) -> Here:
        p = torch.cuda.get_device_properties(device)
        arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
        shared = getattr(p, "shared_memory_per_block_optin", 0) or getattr(p, "shared_memory_per_block", 0)
        return cls(p.name, arch, p.multi_processor_count, shared, getattr(p, "L2_cache_size", 0))

    def like(self, names: Iterable[str]) -> str:
        """The longest of the names whose words are all in the card's: nvidia_h100 for NVIDIA H100 80GB HBM3."""
        return max((n for n in names if words(n) <= words(self.name)), key=len, default="")

    def far(self, card: Mapping[str, Any]) -> float:
        """How unlike another card it is, by sizes, and by rates where its name tells those."""
        sms, *rates = card["cards"].get(self.like(card["cards"]), (0,))
        here = (self.sms, self.shared_bytes, self.l2_bytes, *(rates if sms == self.sms else ()))
        other = (card[k] for k in ("sms", "shared_bytes_per_block", "l2_bytes", "bandwidth_gbps", "bf16_tflops"))
        return sum(abs(math.log(a / b)) for a, b in zip(here, other, strict=False) if a)

    def takes(self, module: Any) -> bool:
        """Whether every config fits; default rules always do."""
        certificate = getattr(module, "CERTIFICATE", None)
        return certificate is None or certificate.get("shared_bytes", math.inf) <= self.shared_bytes


def words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower()))


def find_file(configs: Mapping[str, Any], device: torch.device) -> Found | None:
    """The file for a device, if one can serve it; for the interpreter, any."""
    if device.type == "cuda":
        return find_card(configs, Here.of(device))
    if device.type in configs:
        return Found(device.type, "the device's own file")
    name = min(configs)
    return Found(name, f"interpreted with the config of {name}") if device.type == "cpu" else None


def find_card(configs: Mapping[str, Any], here: Here) -> Found | None:
    """The file for a GPU: its own, that of the nearest tuned card, of its architecture, or of an older one."""
    cards = {name: m.DEVICE for name, m in configs.items() if hasattr(m, "DEVICE")}
    own = here.like(name for name in configs if name not in cards or cards[name]["sms"] == here.sms)
    if own:
        return Found(own, "the card's own file")
    near = [name for name in cards if cards[name]["arch"] == here.arch and here.takes(configs[name])]
    missing = f"no config for {here.name}, using that of"
    if near:
        name = min(near, key=lambda n: (here.far(cards[n]), n))
        return Found(name, f"{missing} {name}, the nearest card", False)
    if here.arch in configs:
        return Found(here.arch, "the architecture's file")
    if here.arch.startswith("sm_"):
        names = [n for n in configs if n.startswith("sm_") and number(n) < number(here.arch) and here.takes(configs[n])]
        if names:
            name = max(names, key=number)
            return Found(name, f"{missing} {name}, the nearest older architecture", False)
    return None


def number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def counted(sizes: Sizes) -> Sizes:
    """Sizes with the number of their (query, key) pairs, where they tell it."""
    batch = sizes.get("B")
    queries, keys = sizes.get("Tq", sizes.get("Sq")), sizes.get("Tk", sizes.get("Sk"))
    return sizes if None in (batch, queries, keys) else {**sizes, "pairs": batch * queries * keys}


def row(module: Any, sizes: Sizes) -> tuple[Bounds, Config]:
    """The first row of a decision table whose bounds hold."""
    for bounds, config in module.TABLE:
        for name, most in bounds.items():
            if sizes.get(name, math.inf) > most:
                break
        else:
            return bounds, config
    raise RuntimeError(f"{module.__name__}: no row of TABLE is without bounds")


def told(module: Any, bounds: Bounds, sizes: Sizes, triton: str) -> str:
    """What is known of a tuned table's row, and of these sizes if they were measured; `triton` is the version here."""
    certificate = getattr(module, "CERTIFICATE", None)
    if certificate is None:
        return ""
    text = f", measured on {certificate['card']} {certificate['date']}; row: {bounds_text(bounds)}"
    if certificate["triton"] != triton:
        text += f"; certified with Triton {certificate['triton']}, this is {triton}: `attncc verify` checks again"
    for shape, ms, default in getattr(module, "MEASURED", ()):
        if all(sizes.get(name) == size for name, size in shape.items()):
            untuned = "" if default is None else f" (untuned {default:g} ms)"
            return f"{text}; these sizes took {ms:g} ms there{untuned}"
    return text


def bounds_text(bounds: Bounds) -> str:
    return ", ".join(f"{name} <= {most}" for name, most in bounds.items()) or "all other sizes"
