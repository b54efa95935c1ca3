"""The launches of a tile program as jobs for the offline compiler: what a device would compile at the first call."""

from __future__ import annotations

from collections.abc import Mapping

from attncc.codegen.aot import Job
from attncc.codegen.signature import types
from attncc.codegen.triton import print_kernels
from attncc.device import Device
from attncc.ir.tile import Launch, Program

OPTIONS = ("num_warps", "num_stages", "maxnreg")
"""Entries of a config that are Triton's; the others are knobs and flags."""


def jobs(program: Program, kernels: str, device: Device, config: Mapping[str, int]) -> dict[str, Job]:
    """A job for each launch of a program, named after its kernel and constants.

    Args:
        kernels: path of the program's emitted `kernels.py`.
        config: as in a package's `configs`: knobs, flags and Triton's options.
    """
    flags = print_kernels(program)[1]
    on = ["TMA"] * bool(config.get("TMA")) + ["WORDS"] + ["PTX"] * (device.vendor == "nvidia")
    on += ["FP8"] * (device.vendor == "nvidia" and "fp8_e4m3" in device.dtypes)
    on += ["EARLY"] * device.has_tma  # both came with sm_90
    found: dict[str, Job] = {}
    for launch in program.launches:
        knobs = {knob.name: knob.choices[0] for knob in program.knobs} | dict(config) | dict(launch.constants)
        given = {**config, **dict(launch.options)}
        options = {name: given[name] for name in OPTIONS if given.get(name)}
        signature, constants = types(program.kernel(launch.kernel), flags[launch.kernel], knobs, on)
        aligned = [name for name, kind in signature.items() if kind.startswith("*") or kind == "i64"]
        found[label(launch)] = Job(kernels, launch.kernel, device.name, signature, constants, options, aligned)
    return found


def label(launch: Launch) -> str:
    """`dense_forward PASS=0`."""
    return " ".join([launch.kernel, *(f"{name}={value}" for name, value in launch.constants)])
