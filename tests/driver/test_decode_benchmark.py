"""The benchmark of calls of one query checks what it times: on the CPU, by Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from attncc import driver, spec
from benchmarks import decode_measure, lean
from benchmarks.decode_cases import CASES, LEAN, SPLITS, Decode, log_uniform


def test_rows_are_told_apart() -> None:
    cases = [*CASES, *(case for series in LEAN for case in series.cases)]
    assert len({case.name for case in cases}) == len(cases)
    specs = [text for case in cases for text in case.specs]
    assert len(set(specs)) == len({spec.loads(text).attention.name for text in specs})


def test_lengths_are_of_every_order_of_magnitude() -> None:
    lengths = log_uniform(64, 131072)
    assert min(lengths) < 10
    assert max(lengths) > 50_000
    assert all(1 <= n <= 131072 for n in lengths)


@pytest.mark.parametrize(
    "case",
    [Decode("none", 4, 2, (70, 1, 33), 16, 16, rivals=SPLITS), Decode("sink", 2, 2, (40, 40), d=16)],
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


def test_claims_are_read_off_the_file(tmp_path: Path) -> None:
    """A row a case that was measured, and means over those that a peer could do."""
    first, *_, last = LEAN[0].cases[:4]
    times = {"attncc": 0.5, "attncc, stream_k": 0.25, "attncc, tile": 1.0, "cuDNN": 0.5}
    rows = [{"case": case.name, "impl": impl, "ms": ms} for case in (first, last) for impl, ms in times.items()]
    rows.append({"case": last.name, "impl": "FlashAttention-2", "ms": 2.0})
    meta = dict.fromkeys(("device", "torch", "triton", "driver", "date"), "x")
    file = tmp_path / "lean.json"
    file.write_text(json.dumps({"meta": meta, "rows": rows}))
    text = lean.page(file)
    assert "| 8 | 1 | 16384 | 128 | 0.2500 ms | 0.5000 ms | 4.00 × | – | – | 2.00 × |" in text
    assert "| 8 | 1 | 524288 | 128 | 0.2500 ms | 0.5000 ms | 4.00 × | 8.00 × | – | 2.00 × |" in text
    assert "- against cuDNN: 2.00 × on average (geometric mean 2.00), 2.00 to 2.00; at 524288 keys 2.00 to 2.00" in text
    assert "- against FlashAttention-2, no split: 8.00 × on average" in text
    assert "FlashAttention-2 in SDPA:" not in text
    assert "- against split-KV: 2.00 × on average" in text
