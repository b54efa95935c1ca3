"""What a package for a GPU with an engine has beside it: the kernels that a package without one has, as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.check.run import check_case, imported

PLAIN = "attncc: 1\nname: variant\nheads: {q: 4, kv: 2}\ndims: 16\ndtype: fp16\n"
TABLE = "inputs: {rel: {shape: [Hq, n]}}\nscore: qk * scale + rel[h, i - j + 5]\n"
BODIES = {
    "causal": "mask: causal",
    "table": TABLE,
    "table under a mask": f"{TABLE}mask: causal",
    "harmonic numbers": "inputs: {x: {shape: [Sk]}}\nscore: qk * scale - x[max(i - j, 0)]\nmask: causal & window(40)",
    "documents": "inputs: {ids: {shape: [B, Sk], dtype: int32}}\nmask: causal & (ids[b, row] == ids[b, j])",
    "packed": "mask: causal\nlayout: varlen",
    "steps": f"{TABLE}mask: causal\nprologue: [rope]",
}


def functions(package: Path) -> dict[str, str]:
    """The text of each function of the kernels."""
    parts = re.split(r"^@triton\.jit.*\n(?=def )", (package / "kernels.py").read_text(), flags=re.MULTILINE)
    return {part.split("(")[0].removeprefix("def "): part.strip() for part in parts[1:]}


@pytest.mark.parametrize("body", BODIES)
def test_kernels_are_the_same(body: str, tmp_path: Path) -> None:
    loaded = spec.loads(PLAIN + BODIES[body] + "\n")
    alone = functions(driver.compile(loaded, tmp_path / "alone", ["interpreter"]))
    beside = functions(driver.compile(loaded, tmp_path / "beside", ["sm_90", "interpreter"]))
    assert "variant_forward" in alone
    assert {name: beside.get(name) for name in alone} == alone


@pytest.mark.parametrize("case", [Case(1, 37, 50), Case(2, 20, 20, "nan_keys")], ids=str)
def test_they_are_right(case: Case, tmp_path: Path) -> None:
    """By a table under a mask, for which the engine has a kernel that reads the table otherwise."""
    loaded = spec.loads(PLAIN + BODIES["table under a mask"] + "\n")
    with imported(driver.compile(loaded, tmp_path, ["sm_90", "interpreter"])) as module:
        assert check_case(loaded.attention, module.attention, case, "cpu").verdict == "ok"
