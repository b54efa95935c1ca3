"""Configs compiled for a GPU that is not here: what they take, and why some must not run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attncc import driver, spec
from attncc.autotune.child import Child
from attncc.device import A100, L40S, Device

SPEC = "attncc: 1\nname: judged\nheads: 2\ndims: 64\nmask: causal\n"
CONFIG = {
    "BM": 64, "BN": 64, "GROUP": 1, "ONE_PASS": 0, "TMA": 0, "SPLIT": 0, "FILL": 1, "num_warps": 4, "num_stages": 2,
    "maxnreg": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver.compile(spec.loads(SPEC), tmp_path_factory.mktemp("legality"), ["sm_80"])


def judge(folder: Path, device: Device) -> Iterator[Any]:
    """A process that judges configs for a device."""
    environment = {"TRITON_CACHE_DIR": str(folder.parent / "cache"), "TRITON_INTERPRET": ""}
    with Child("attncc.codegen.legality", [str(folder), device.text], environment) as child:
        yield lambda **changes: child.ask({"config": CONFIG | changes}, 120)


@pytest.fixture(scope="module")
def a100(folder: Path) -> Iterator[Any]:
    yield from judge(folder, A100)


@pytest.fixture(scope="module")
def l40s(folder: Path) -> Iterator[Any]:
    yield from judge(folder, L40S)


def test_a_config_that_fits_has_no_reasons_and_its_figures(a100: Any) -> None:
    found = a100()
    assert found["reasons"] == []
    assert 64 <= found["registers"] <= 255
    assert found["spill_bytes"] < 64
    assert found["shared_bytes"] >= 2 * 64 * 64 * 2


def test_what_takes_too_much_shared_memory_is_refused_where_there_is_less(a100: Any, l40s: Any) -> None:
    wide = {"num_stages": 8}
    assert a100(**wide)["reasons"] == []
    reasons = l40s(**wide)["reasons"]
    assert any("bytes of shared memory, nvidia_l40s has 101376" in reason for reason in reasons)


def test_registers_that_do_not_fit_a_main_loop_are_refused(a100: Any) -> None:
    (reason,) = a100(BM=128, BN=128, num_stages=1)["reasons"]
    assert "words a turn" in reason


def test_what_does_not_compile_is_a_reason_and_the_next_is_judged(a100: Any) -> None:
    (reason,) = a100(BM=48)["reasons"]
    assert "it does not compile" in reason
    assert a100()["reasons"] == []


@pytest.mark.parametrize(
    "more",
    [
        *("kv: paged(64)", "kv: paged(24)", "kv: paged(16)\nlayout: varlen"),
        *("kv: latent(rope=16)", "kv: latent(rope=16, page_size=64)", "kv: latent(rope=16, page_size=1)"),
    ],
)
def test_packages_of_other_storage_are_judged(more: str, tmp_path: Path) -> None:
    """Their operands are others: pages and a table, or keys that hold the values."""
    package = driver.compile(spec.loads(f"{SPEC}{more}\n"), tmp_path, ["sm_80"])
    split = 0 if "varlen" in more else 4
    for judged in judge(package, A100):
        assert judged(BM=16, BN=32, num_stages=1, SPLIT=split)["reasons"] == []
