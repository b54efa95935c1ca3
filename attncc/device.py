"""What attncc knows of machines: architectures to compile for, and physical cards to tune and choose for.

The numbers are the vendors' published ones. An architecture stands for its reference card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from attncc.errors import SpecError
from attncc.errors import nearest as nearest_word

Vendor = Literal["nvidia", "amd", "cpu"]

_KB: Final = 1024
_MB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Device:
    """One machine: the limits kernels must keep, and the rates the roofline needs."""

    name: str
    arch: str
    """What kernels are compiled for: sm_90, gfx942, cpu."""
    vendor: Vendor
    warp_size: int
    sms: int
    """Streaming multiprocessors, or compute units."""
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    """32-bit ones."""
    registers_per_thread: int
    l2_bytes: int
    bandwidth_gbps: float
    """Of the memory, in GB/s."""
    bf16_tflops: float
    """Dense matrix products."""
    has_tma: bool
    has_wgmma: bool
    dtypes: tuple[str, ...]
    """What its matrix unit multiplies."""

    @property
    def is_gpu(self) -> bool:
        return self.vendor != "cpu"

    @property
    def text(self) -> str:
        """All of it on one line, for another process; `parse` reads it."""
        return json.dumps(asdict(self))

    @property
    def caps_registers(self) -> bool:
        """Whether a kernel can be compiled for fewer registers a thread than it would like."""
        return self.vendor == "nvidia"

    @property
    def takes_libraries(self) -> bool:
        """Whether it runs machine code made ahead, rather than Triton kernels."""
        return self.arch == "cpu"


_AMPERE: Final = ("fp32", "fp16", "bf16", "int8", "int4")
_ADA: Final = (*_AMPERE, "fp8_e4m3", "fp8_e5m2")
_HOPPER: Final = ("fp32", "fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2")
_BLACKWELL: Final = (*_HOPPER, "nvfp4")

A100: Final = Device(
    name="nvidia_a100",
    arch="sm_80",
    vendor="nvidia",
    warp_size=32,
    sms=108,
    shared_bytes_per_block=163 * _KB,
    shared_bytes_per_sm=164 * _KB,
    registers_per_sm=65536,
    registers_per_thread=255,
    l2_bytes=40 * _MB,
    bandwidth_gbps=2039,
    bf16_tflops=312,
    has_tma=False,
    has_wgmma=False,
    dtypes=_AMPERE,
)
L40S: Final = replace(
    A100,
    name="nvidia_l40s",
    arch="sm_89",
    sms=142,
    shared_bytes_per_block=99 * _KB,
    shared_bytes_per_sm=100 * _KB,
    l2_bytes=96 * _MB,
    bandwidth_gbps=864,
    bf16_tflops=362,
    dtypes=_ADA,
)
H100: Final = replace(
    A100,
    name="nvidia_h100",
    arch="sm_90",
    sms=132,
    shared_bytes_per_block=227 * _KB,
    shared_bytes_per_sm=228 * _KB,
    l2_bytes=50 * _MB,
    bandwidth_gbps=3350,
    bf16_tflops=989,
    has_tma=True,
    has_wgmma=True,
    dtypes=_HOPPER,
)
H100_PCIE: Final = replace(H100, name="nvidia_h100_pcie", sms=114, bandwidth_gbps=2000, bf16_tflops=756)
H200: Final = replace(H100, name="nvidia_h200", bandwidth_gbps=4800)
H20: Final = replace(H100, name="nvidia_h20", sms=78, l2_bytes=60 * _MB, bandwidth_gbps=4000, bf16_tflops=148)
GH200: Final = replace(H100, name="nvidia_gh200", bandwidth_gbps=4000)
"""With 96 GB of HBM3; torch's name ends in the size of the CPU's memory."""
GH200_HBM3E: Final = replace(H100, name="nvidia_gh200_hbm3e", bandwidth_gbps=4900)
B200: Final = replace(
    H100,
    name="nvidia_b200",
    arch="sm_100",
    sms=148,
    l2_bytes=126 * _MB,
    bandwidth_gbps=8000,
    bf16_tflops=2250,
    has_wgmma=False,
    dtypes=_BLACKWELL,
)
MI300X: Final = Device(
    name="amd_mi300x",
    arch="gfx942",
    vendor="amd",
    warp_size=64,
    sms=304,
    shared_bytes_per_block=64 * _KB,
    shared_bytes_per_sm=64 * _KB,
    registers_per_sm=131072,
    registers_per_thread=512,
    l2_bytes=32 * _MB,
    bandwidth_gbps=5300,
    bf16_tflops=1307,
    has_tma=False,
    has_wgmma=False,
    dtypes=_HOPPER,
)
CPU: Final = Device(
    name="cpu",
    arch="cpu",
    vendor="cpu",
    warp_size=1,
    sms=1,
    shared_bytes_per_block=_MB,
    shared_bytes_per_sm=_MB,
    registers_per_sm=65536,
    registers_per_thread=65536,
    l2_bytes=_MB,
    bandwidth_gbps=50,
    bf16_tflops=1,
    has_tma=False,
    has_wgmma=False,
    dtypes=("fp32", "fp16", "bf16"),
)
INTERPRETER: Final = replace(CPU, name="interpreter", arch="interpreter", dtypes=("fp32", "fp16"))
"""Triton's interpreter, which runs GPU kernels on a CPU: slow, and for tests."""

CARDS: Final = {d.name: d for d in (A100, L40S, H100, H100_PCIE, H200, H20, GH200, GH200_HBM3E, B200, MI300X)}
"""Physical cards by name."""

ARCHITECTURES: Final = {d.arch: replace(d, name=d.arch) for d in (A100, H100, B200, MI300X, CPU, INTERPRETER)}
"""What can be compiled for without naming a card."""

DEVICES: Final = ARCHITECTURES | CARDS


def find(name: str) -> Device:
    """The device of this name."""
    if name not in DEVICES:
        raise SpecError(f"unknown target '{name}'", hint=nearest_word(name, DEVICES))
    return DEVICES[name]


def parse(text: str) -> Device:
    """The device that `Device.text` wrote."""
    fields = json.loads(text)
    return Device(**(fields | {"dtypes": tuple(fields["dtypes"])}))


def here() -> tuple[Device, ...]:
    """The GPUs of this machine, one entry a kind, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return (ARCHITECTURES["cpu"],)
    found = [probe(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    return tuple(dict.fromkeys(found))


def probe(properties: Any) -> Device:
    """The card that torch's device properties speak of: from the table, else made of what they say."""
    words = set(_words(properties.name))
    named = [c for c in CARDS.values() if words.issuperset(_words(c.name))]
    card = max(named, key=lambda c: len(c.name), default=None)
    if card and card.sms == properties.multi_processor_count:
        return card
    return _describe(properties, card or nearest(_unknown(properties)))


def nearest(device: Device, among: Iterable[Device] = tuple(CARDS.values())) -> Device:
    """The physically closest device: same vendor and architecture first, then by sizes and rates."""

    def distance(other: Device) -> tuple[bool, bool, float]:
        pairs = (
            (device.sms, other.sms),
            (device.shared_bytes_per_block, other.shared_bytes_per_block),
            (device.bandwidth_gbps, other.bandwidth_gbps),
            (device.bf16_tflops, other.bf16_tflops),
        )
        apart = sum(abs(math.log(a / b)) for a, b in pairs)
        return other.vendor != device.vendor, other.arch != device.arch, apart

    return min(among, key=distance)


def _words(name: str) -> tuple[str, ...]:
    """`NVIDIA A100-SXM4-80GB` -> nvidia, a100, sxm4, 80gb."""
    return tuple("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _arch(properties: Any) -> str:
    amd = str(getattr(properties, "gcnArchName", "")).split(":")[0]
    return amd if amd.startswith("gfx") else f"sm_{properties.major}{properties.minor}"


def _unknown(properties: Any) -> Device:
    """A stand-in of the right vendor and size, to find the nearest card by."""
    arch = _arch(properties)
    base = MI300X if arch.startswith("gfx") else A100
    return replace(base, arch=arch, sms=properties.multi_processor_count)


def _describe(properties: Any, base: Device) -> Device:
    """A device made of torch's properties; what they do not say is `base`'s, rates by the number of SMs."""
    share = properties.multi_processor_count / base.sms
    return replace(
        base,
        name="_".join(_words(properties.name)),
        arch=_arch(properties),
        sms=properties.multi_processor_count,
        shared_bytes_per_block=getattr(properties, "shared_memory_per_block_optin", 0) or base.shared_bytes_per_block,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or base.l2_bytes,
        bandwidth_gbps=base.bandwidth_gbps * share,
        bf16_tflops=base.bf16_tflops * share,
    )
