"""The benchmark of calls of one query checks what it times: on the CPU, by Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from attncc import driver, spec
from benchmarks import decode_measure
from benchmarks.decode_cases import CASES, SPLIT, Decode, log_uniform


def test_rows_are_told_apart() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    specs = [text for case in CASES for text in case.specs]
    assert len(set(specs)) == len({spec.loads(text).attention.name for text in specs})


def test_lengths_are_of_every_order_of_magnitude() -> None:
    lengths = log_uniform(64, 131072)
    assert min(lengths) < 10
    assert max(lengths) > 50_000
    assert all(1 <= n <= 131072 for n in lengths)


@pytest.mark.parametrize(
    "case",
    [Decode("none", 4, 2, (70, 1, 33), 16, 16, rival=SPLIT), Decode("sink", 2, 2, (40, 40), d=16)],
    ids=["pages", "rows"],
)
def test_results_are_checked(case: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in case.specs:
        driver.compile(spec.loads(text), tmp_path, ["interpreter"])
    importlib.invalidate_caches()
    given = decode_measure.operands(case, "cpu")
    for package in case.packages:
        o, lse = decode_measure.call_of(package, given)()
        assert decode_measure.errors(case, given, o, lse).ok
        sys.modules.pop(package)
    for wrong, wrong_lse in ((o * 1.02, lse), (o, lse + 0.01), (o.clone().fill_(torch.nan), lse)):
        assert not decode_measure.errors(case, given, wrong, wrong_lse).ok
