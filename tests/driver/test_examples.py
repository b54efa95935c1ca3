"""Every example that a lowering carries agrees with the oracle on this machine; the others are refused in one way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from carried import LOWERINGS, carried

from attncc import driver
from attncc.errors import Unsupported

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


LONG = {"natten_2d", "mla_absorbed", "mla_fp8_cache", "mla_paged"}
"""Of a fixed length, or of many wide heads, that take the interpreter many minutes; a GPU checks them."""


PATHS = [pytest.param(p, id=p.stem, marks=[pytest.mark.gpu] if p.stem in LONG else []) for p in EXAMPLES]


FORWARD = {"cpu": "tvm: forward", "interpreter": "triton: forward"}


@pytest.mark.parametrize("target", ["cpu", pytest.param("interpreter", marks=pytest.mark.newest)])
@pytest.mark.parametrize("path", PATHS)
def test_the_example_agrees_with_the_oracle(path: Path, target: str) -> None:
    (last,) = driver.explain(path, driver.PROGRAM_STAGE)
    if FORWARD[target] not in LOWERINGS[path]:
        with pytest.raises(Unsupported) as error:
            driver.check(path, target=target)
        assert error.value.key in (
            last.missing[:1] or ("quantize", "prologue", "epilogue", "kv")
        )  # which TVM's kernels alone lack
        assert error.value.location is not None
        return
    report = driver.check(path, [{"B": 2, "Sq": 20, "Sk": 70}], target=target)
    assert report.device == target
    assert report.passed, [(str(o.case), o.verdict, o.detail, o.deviations) for o in report.outcomes if not o.passed]


@pytest.mark.parametrize("path", PATHS)
def test_all_but_its_backward_compiles(path: Path, tmp_path: Path) -> None:
    """What nothing carries yet is said by the key that lacks a lowering, and not by a fault of ours."""
    loaded = driver.load(path)
    modes = tuple(m for m in loaded.attention.modes if m != "backward") or ("prefill",)
    attn = replace(loaded.attention, modes=modes)
    (last,) = driver.explain(replace(loaded, attention=attn), driver.PROGRAM_STAGE)
    if last.missing:
        with pytest.raises(Unsupported) as error:
            driver.compile(replace(loaded, attention=attn), tmp_path, ["sm_90"])
        assert error.value.key == last.missing[0]
    else:
        driver.compile(replace(loaded, attention=attn), tmp_path, ["sm_90"])


def test_the_dense_family_is_carried() -> None:
    dense = {"dense", "causal_gqa", "softcap", "document_ids", "varlen_causal", "natten_2d", "t5_bias"}
    assert dense <= {path.stem for path in carried()}
