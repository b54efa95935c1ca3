"""What makes and runs kernels on this machine, for the records."""

from __future__ import annotations

import subprocess
from importlib import import_module
from importlib.metadata import version
from shutil import which
from typing import Any

from attncc.autotune.record import Toolchain
from attncc.device import Device
from attncc.version import VERSION


def toolchain(device: Device) -> Toolchain:
    """The versions here; those of ptxas and the driver where the device needs them."""
    ptxas, driver = (_ptxas(), _driver()) if device.is_gpu else ("", "")
    return Toolchain(attncc=VERSION, torch=version("torch"), triton=version("triton"), ptxas=ptxas, driver=driver)


def _ptxas() -> str:
    triton: Any = import_module("triton")
    return triton.knobs.nvidia.ptxas.version


def _driver() -> str:
    """Of NVIDIA's cards, as their tool tells it; empty where there is none."""
    tool = which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return said[0].strip()[:64] if said else ""
