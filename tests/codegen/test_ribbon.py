"""Ribbons: which scores begin with one, and that every pair finds its own number in the lines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from codegen.test_engine import FP8, HEADS, PLAIN, functions, lowered

from attncc import driver, spec
from attncc.check.run import imported
from attncc.codegen.gate import Findings
from attncc.codegen.parameters import constants
from attncc.passes.lower import ribbon

TABLE = "inputs: {w: {shape: [Hq, n]}}\n"


@pytest.mark.parametrize(
    ("score", "opens"),
    [
        ("qk * scale + w[h, i - j + 9]", True),
        ("w[h, j - i + 9] * 2 + qk / 8", True),
        ("softcap(qk * scale - w[h, i - j + 9], 30)", True),
        ("qk * scale * w[h, i - j + 9]", False),
        ("qk * -scale + w[h, i - j + 9]", False),
        ("w[h, i - j + 9] - qk * scale", False),
        ("qk * scale + w[h, i - j + 9] * i", False),
        ("max(qk + w[h, i - j + 9], qk)", False),
        ("qk * w[h, i - j + 9] + w[h, i - j + 9]", False),
    ],
)
def test_which_scores_begin_with_it(score: str, opens: bool) -> None:
    attn, program = lowered(f"{PLAIN}{TABLE}score: {score}")
    _, found = ribbon.split(attn)
    assert found is not None
    assert found.opens == opens
    assert program.engine is not None
    assert constants(attn, program.engine)["OPENS"] == opens


def test_no_products_of_few_bits_do() -> None:
    _, found = ribbon.split(lowered(f"{PLAIN}{TABLE}{FP8}\nscore: qk * scale + w[h, i - j + 9]")[0])
    assert found is not None
    assert not found.opens


def test_what_is_launched() -> None:
    """Lines in place of skewed copies, which no kernel beside the engine reads either."""
    _, program = lowered(f"{PLAIN}{TABLE}score: qk * scale + w[h, i - j + 9]\nmask: causal")
    engine = program.engine
    assert engine is not None
    assert [x.kernel for x in engine.before] == ["variant_ribbon"]
    assert "variant_skew_0" in engine.replaces
    again = program.kernel("variant_again")
    assert not {p.name for p in again.params} & {"skew_0", "ribbon"}
    assert [f.name for f in again.functions] == ["unskewed_key_tile"]
    assert [f.name for f in program.kernel("variant_forward").functions] == ["key_tile"]


def pairs(line: torch.Tensor, column: int) -> np.ndarray:
    """[64, 128] of two lines as `read_ribbon` of `_ribbon.py` reads them, from a column on."""
    box = np.zeros((2, ribbon.LINE), np.float32)
    inside = line[:, column : column + ribbon.LINE].numpy()
    box[:, : inside.shape[1]] = inside
    numbers = box.reshape(-1)
    out = np.zeros((64, 128), np.float32)
    for row in range(64):
        upper = row // 16 * 16 + row % 8
        for place in range(4):
            pair = (ribbon.LINE + ribbon.STAGGER) // 2 * (upper % 2) + 32 - upper // 2 + place - (row - upper) // 2
            for eighth in range(16):
                at = 2 * pair + 8 * eighth
                out[row, 8 * eighth + 2 * place : 8 * eighth + 2 * place + 2] = numbers[at : at + 2]
    return out


@pytest.mark.parametrize(("queries", "keys", "n"), [(150, 300, 401), (64, 64, 9)])
@pytest.mark.parametrize("shape", ["Hq, n", "B, n"])
def test_every_pair_finds_its_number(
    queries: int, keys: int, n: int, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = "h" if "Hq" in shape else "b"
    body = f"inputs: {{w: {{shape: [{shape}]}}}}\nscore: qk * scale + w[{of}, i - j + n // 2]"
    text = f"attncc: 1\nname: ribbon_{of}_{n}\n{HEADS}dims: 64\ndtype: fp16\n{body}\n"
    monkeypatch.setattr("attncc.driver.examine", lambda *where: Findings(()))
    w = torch.randn((6, n) if of == "h" else (2, n), generator=torch.Generator().manual_seed(n))
    with imported(driver.compile(spec.loads(text), tmp_path, ["sm_90", "interpreter"])) as module:
        q, k = torch.zeros(2, 6, queries, 64, dtype=torch.float16), torch.zeros(2, 2, keys, 64, dtype=torch.float16)
        numbers = {"B": 2, "Sq": queries, "Sk": keys, "n": n, "ENGINE": 1, "SPLIT": 0, "BM": 64, "E_CONSUMERS": 2}
        due = [x for x in module.VARIANT.kernels if x.when(numbers) and x.launcher is None]
        assert len(due) == 1
        runner = module._RUNNER
        shapes = runner.shapes([q, k, k, w], SimpleNamespace(output=q.shape, lse=None), numbers, due)
        lines = torch.full(shapes["ribbon"].shape, torch.nan)
        bound = runner.bind(due[0], shapes, numbers, {"TMA": False}, {})
        bound([q, k, k, w, q, None, lines], 0.25, 0)
    assert not lines.isnan().any()
    v = functions(f"{HEADS}dims: 64\n{body}")
    args = (*[0] * (v.engine.args[0].rank + 1), 2, queries, keys, n, 0.25)
    for row0 in range(0, queries, 64):
        for first in range(0, keys, 128):
            table, column = map(int, v.beside(first, row0, (1, 3, 0, 0), args))
            i = row0 + np.arange(64)[:, None] + keys - queries
            at = i - (first + np.arange(128)[None, :]) + n // 2
            inside = (at >= 0) & (at < n)
            wanted = np.where(inside, w[3 if of == "h" else 1].numpy()[np.clip(at, 0, n - 1)], 0.0) / 0.25
            np.testing.assert_allclose(pairs(lines[0, table], column), wanted, rtol=1e-6)
