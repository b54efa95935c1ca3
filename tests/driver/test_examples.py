"""Every example that a lowering carries agrees with the oracle on this machine; the others are refused in one way."""

from __future__ import annotations

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


def test_the_dense_family_is_carried() -> None:
    dense = {"dense", "causal_gqa", "softcap", "document_ids", "varlen_causal", "natten_2d", "t5_bias"}
    assert dense <= {path.stem for path in carried()}
