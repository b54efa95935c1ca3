"""The golden fixture itself: it accepts, refuses and rewrites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from golden import Golden

from attncc.codegen.aot import Resources

KERNEL = Resources("prefill", "sm_90", "3.6.0", 168, 0, 49152, {"wgmma": 8}, {"wgmma": 8})


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("golden.TESTS", tmp_path)
    return tmp_path / "goldens" / "dense"


def test_update_then_check(at: Path) -> None:
    Golden(at, update=True).check("one\n", ".py")
    Golden(at, update=False).check("one\n", ".py")
    assert at.with_suffix(".py").read_text() == "one\n"


def test_a_difference_is_shown(at: Path) -> None:
    Golden(at, update=True).check("one\ntwo\n")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)differs.*-two.*\+three"):
        Golden(at, update=False).check("one\nthree\n")


def test_a_missing_golden_fails(at: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="--update-golden"):
        Golden(at, update=False).check("one\n")


def test_names_follow_the_test(golden: Golden) -> None:
    assert golden.stem.parts[-4:] == ("goldens", "house", "golden", "names_follow_the_test")


@pytest.mark.parametrize("case", ["causal & window(4)"])
def test_parameters_are_part_of_the_name(golden: Golden, case: str) -> None:
    assert golden.stem.name == "parameters_are_part_of_the_name-causal-window-4"


def test_resources_are_exact_under_the_same_triton(at: Path) -> None:
    Golden(at, update=True).check_resources({"prefill/sm_90": KERNEL})
    fixture = Golden(at, update=False)
    fixture.check_resources({"prefill/sm_90": KERNEL})
    with pytest.raises(pytest.fail.Exception, match="169"):
        fixture.check_resources({"prefill/sm_90": replace(KERNEL, registers=169)})


def test_resources_of_another_triton_only_name_the_kernels(at: Path) -> None:
    Golden(at, update=True).check_resources({"prefill/sm_90": KERNEL})
    newer = replace(KERNEL, triton="3.9.0", registers=100)
    Golden(at, update=False).check_resources({"prefill/sm_90": newer})
    with pytest.raises(AssertionError):
        Golden(at, update=False).check_resources({"prefill/sm_80": newer})
