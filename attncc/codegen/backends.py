"""Which back-end makes the kernels for which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from attncc.device import Device
from attncc.errors import SpecError, nearest

BACKENDS: Final = ("triton", "tvm")


@dataclass(frozen=True, slots=True)
class Shares:
    """The devices of a package by what they are given."""

    kernels: tuple[Device, ...]
    """Triton kernels."""
    cubins: tuple[Device, ...]
    """CUDA machine code, through TVM."""
    libraries: tuple[Device, ...]
    """Machine code for CPUs, through TVM."""


def share_out(devices: Sequence[Device], backend: str | None = None) -> Shares:
    """Devices by back-end: CPUs have TVM's libraries, all else Triton kernels unless `backend` says otherwise.

    Raises:
        SpecError: there is no such back-end, or it makes nothing for one of the devices.
    """
    if backend is not None and backend not in BACKENDS:
        raise SpecError(f"unknown back-end '{backend}'", hint=nearest(backend, BACKENDS))
    cpus = tuple(d for d in devices if d.takes_libraries)
    rest = tuple(d for d in devices if not d.takes_libraries)
    if backend == "triton" and cpus:
        raise SpecError("Triton makes no kernels for target 'cpu'", hint="leave --backend out, or --target interpreter")
    if backend != "tvm":
        return Shares(rest, (), cpus)
    for device in rest:
        if device.vendor != "nvidia":
            raise SpecError(f"TVM makes no kernels for target '{device.name}'", hint="leave --backend out")
    return Shares((), rest, cpus)
