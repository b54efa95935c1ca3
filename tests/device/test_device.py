"""The device table: what it promises, what it refuses, and how an unknown card finds its neighbour."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest

from attncc import device
from attncc.errors import SpecError


def properties(name: str, sms: int, capability: str = "9.0", gcn: str = "") -> SimpleNamespace:
    """What torch says of a card."""
    major, minor = map(int, capability.split("."))
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=sms, gcnArchName=gcn)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942", "cpu", "nvidia_h200"])
def test_find_knows_targets_and_cards(name: str) -> None:
    assert device.find(name).name == name


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("sm_91", "sm_90"),
        ("nvidia_h201", "nvidia_h20"),
        ("gfx940", "gfx942"),
        ("SM_90", "sm_90"),
        ("", "valid: "),
    ],
)
def test_find_names_the_nearest_word(wrong: str, hint: str) -> None:
    with pytest.raises(SpecError) as error:
        device.find(wrong)
    assert f"unknown target '{wrong}'" in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize("d", device.DEVICES.values(), ids=lambda d: d.name)
def test_rows_are_physical(d: device.Device) -> None:
    assert 0 < d.shared_bytes_per_block <= d.shared_bytes_per_sm
    assert d.registers_per_sm >= d.registers_per_thread
    assert min(d.warp_size, d.sms, d.l2_bytes, d.bandwidth_gbps, d.bf16_tflops) > 0
    assert d.is_gpu == (d.arch not in ("cpu", "interpreter"))
    assert d.takes_libraries == (d.arch == "cpu")
    assert len(d.dtypes) == len(set(d.dtypes))


def test_devices_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        device.find("sm_90").sms = 1  # type: ignore[misc]


def test_table_import_needs_no_torch() -> None:
    code = "import sys, attncc.device; sys.exit(any(m in sys.modules for m in ('torch', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("seen", "card"),
    [
        (properties("NVIDIA H100 80GB HBM3", 132), "nvidia_h100"),
        (properties("NVIDIA H100 PCIe", 114), "nvidia_h100_pcie"),
        (properties("NVIDIA H200", 132), "nvidia_h200"),
        (properties("NVIDIA H20", 78), "nvidia_h20"),
        (properties("NVIDIA GH200 480GB", 132), "nvidia_gh200"),
        (properties("NVIDIA GH200 144G HBM3e", 132), "nvidia_gh200_hbm3e"),
        (properties("NVIDIA A100-SXM4-80GB", 108, "8.0"), "nvidia_a100"),
        (properties("AMD MI300X", 304, "9.4", "gfx942:sramecc+:xnack-"), "amd_mi300x"),
    ],
)
def test_probe_recognises_the_table(seen: SimpleNamespace, card: str) -> None:
    assert device.probe(seen) is device.CARDS[card]


def test_a_slice_of_a_card_is_not_the_card() -> None:
    sliced = device.probe(properties("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16))
    assert (sliced.name, sliced.sms) == ("nvidia_h100_80gb_hbm3_mig_1g_10gb", 16)
    assert sliced.bandwidth_gbps == pytest.approx(3350 * 16 / 132)


def test_an_unknown_card_keeps_its_own_facts() -> None:
    seen = properties("NVIDIA GeForce RTX 4090", 128, "8.9")
    seen.shared_memory_per_block_optin = 101376
    seen.L2_cache_size = 72 * 2**20
    card = device.probe(seen)
    assert (card.arch, card.shared_bytes_per_block, card.l2_bytes) == ("sm_89", 101376, 72 * 2**20)
    assert not card.has_tma


def test_nearest_keeps_vendor_and_architecture_first() -> None:
    small_hopper = dataclasses.replace(device.H100, name="x", sms=78, bandwidth_gbps=4000, bf16_tflops=148)
    assert device.nearest(small_hopper).arch == "sm_90"
    assert device.nearest(dataclasses.replace(device.H200, name="x")) == device.H200
    assert device.nearest(dataclasses.replace(device.MI300X, arch="gfx950")) == device.MI300X


def test_here_names_something() -> None:
    found = device.here()
    assert found
    assert len({d.name for d in found}) == len(found)
