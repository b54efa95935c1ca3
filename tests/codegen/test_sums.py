"""Sums of weights as products take them: the assembly that the engine writes, carried out for a warp's 32 threads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from codegen.engine_source import imported, plain

ROWS = 16
"""Of a warp: those of four threads each, and eight below."""
LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4 * 2
WEIGHTS = np.random.default_rng(0).integers(0, 256, (ROWS, 129)).astype(float)


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with imported(tmp_path_factory.mktemp("limits"), "_limits", "_weights", "_softmax", "_gluon") as module:
        yield module


def multiplied(a: list[Any], before: list[Any]) -> list[Any]:
    """What `mma.m16n8k16` makes of a thread's four pairs, ones, and four sums: pairs are of rows 8 apart, then of
    columns 8 apart."""
    matrix = np.zeros((ROWS, 16))
    for n, pairs in enumerate(a):
        for k in (0, 1):
            matrix[ROW + n % 2 * 8, COLUMN + n // 2 * 8 + k] = pairs[:, k]
    sums = matrix.sum(1)
    return [before[n] + sums[ROW + n // 2 * 8] for n in range(4)]


def carried_out(text: str, registers: dict[str, Any]) -> dict[str, Any]:
    at = dict(registers)
    for line in filter(None, (x.strip(" {}\n") for x in text.split(";"))):
        opcode, rest = line.split(" ", 1)
        if opcode == "mov.f32":
            target, source = rest.split(", ")
            at[target] = np.zeros(32) if source == "0f00000000" else at[source]
        elif opcode == "add.f32":
            target, x, y = rest.split(", ")
            at[target] = at[x] + at[y]
        elif opcode == "mov.b32":
            assert rest.split(", ") == ["ones", "0x3F803F80"]  # 1 and 1 as bf16
        elif opcode != ".reg":
            assert opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
            to, a, b, c = (group.split(", ") for group in re.findall(r"\{?([^{}]+)\}(?:, )?", rest + "}"))
            assert b == ["ones", "ones"]
            at |= zip(to, multiplied([at[x] for x in a], [at[x] for x in c]), strict=True)
    return at


def same_rows(found: Any, rows: Any, first: int) -> bool:
    """Whether each thread has its row's number."""
    return bool((found == rows[ROW + first]).all())


def pairs_of(p: Any) -> list[Any]:
    """A thread's, as the first product leaves them: rows 8 apart, then columns 8 apart."""
    places = [(ROW + n % 2 * 8, COLUMN + n // 2 * 8) for n in range(p.shape[1] // 4)]
    return [np.stack([p[row, column], p[row, column + 1]], 1) for row, column in places]


def numbered(first: int, registers: list[Any]) -> dict[str, Any]:
    return {f"${first + n}": x for n, x in enumerate(registers)}


@pytest.mark.newest
@pytest.mark.parametrize("keys", [64, 128])
def test_sums_of_a_tile_are_added_in_each_of_a_row_s_threads(limits: Any, keys: int) -> None:
    p, before = WEIGHTS[:, :keys], WEIGHTS[:, -1]
    count = keys // 4
    given = numbered(count, pairs_of(p)) | numbered(2 * count, [before[ROW], before[ROW + 8]])
    out = carried_out(plain(limits._tile_text(count)), given)
    assert [same_rows(out[f"${n}"], before + p.sum(1), 8 * n) for n in (0, 1)] == [True, True]
    assert plain(limits._sides(count, count, count)).split(",") == ["=&f"] * count + ["r"] * count + ["f"] * count


@pytest.mark.newest
@pytest.mark.parametrize("count", [1, 5])
def test_sums_of_parts(limits: Any, count: int) -> None:
    p, before = WEIGHTS[:, : 16 * count], WEIGHTS[:, -1]
    given = numbered(4, pairs_of(p)) | numbered(4 * count + 4, [before[ROW + n // 2 * 8] for n in range(4)])
    out = carried_out(plain(limits._part_text(count)), given)
    assert [same_rows(out[f"${n}"], before + p.sum(1), n // 2 * 8) for n in range(4)] == [True] * 4
