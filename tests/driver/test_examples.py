"""Every example agrees with the oracle on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncc import driver

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


LONG = {"natten_2d"}
"""Of a fixed length that takes the interpreter many minutes; a GPU checks them."""


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.gpu] if p.stem in LONG else []) for p in EXAMPLES]
)
def test_the_example_agrees_with_the_oracle(path: Path) -> None:
    report = driver.check(path, [{"B": 2, "Sq": 20, "Sk": 70}])
    assert report.passed, [(str(o.case), o.verdict, o.detail, o.deviations) for o in report.outcomes if not o.passed]
