"""Tuning on the GPU that is here: short, but real."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncc import driver
from attncc.autotune.store import Store
from attncc.autotune.task import Options
from attncc.autotune.tune import tune
from attncc.autotune.tuned import from_store
from attncc.autotune.verify import verify
from attncc.device import here

SPEC = driver.EXAMPLES / "causal_gqa.yaml"
SHAPES = ({"B": 2, "Sq": 1024, "Sk": 1024}, {"B": 1, "Sq": 4096, "Sk": 4096})


@pytest.mark.gpu
def test_a_short_run_finds_certified_configs_that_are_no_slower(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    found = tune(SPEC, SHAPES, options=Options(budget_s=90.0), store=store)
    assert found.standing.statuses["measured"] >= 8
    for outcome in found.decision.outcomes:
        assert outcome.ms is not None
        assert outcome.default_ms is not None
        assert outcome.ms <= outcome.default_ms
    assert all(r.certificate is not None for r in found.decision.used)
    said: list[str] = []
    package = driver.compile(SPEC, tmp_path, [here()[0]], tuned=from_store(store, said.append))
    assert "configs measured on" in said[0]
    assert verify(package).passed
