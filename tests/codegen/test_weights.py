"""Weights of 16 bits: the assembly that the engine writes for them, carried out in NumPy for a warp's 32 threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from codegen.engine_source import imported, plain

F32 = np.float32
LOWEST = F32(-(2.0**127))
C = F32(0.125)
"""Scores become numbers in units of log 2 by it, without rounding."""
LOOSE = 2.0**9
ROWS = 16
"""Of a warp: those of four threads each, and eight below."""
OPERATIONS: dict[str, Callable[..., Any]] = {
    "mov.f32": lambda a: a,
    "mov.b32": lambda a: a,
    "neg.f32": lambda a: -a,
    "add.f32": lambda a, b: a + b,
    "sub.f32": lambda a, b: a - b,
    "mul.f32": lambda a, b: a * b,
    "max.f32": np.fmax,
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(F32),
    "ex2.approx.ftz.f32": np.exp2,
    "cvt.rn.f16x2.f32": lambda high, low: low.astype(np.float64) + 1j * high.astype(np.float64),
    "setp.gtu.f32": lambda a, b: ~(a <= b),
    "setp.neu.f32": lambda a, b: ~(a == b),
    "setp.neu.or.f32": lambda a, b, p: ~(a == b) | p,
    "setp.ne.s32": lambda a, b: a != b,
    "setp.eq.s32": lambda a, b: a == b,
    "or.pred": np.logical_or,
    "or.b32": np.bitwise_or,
    "selp.s32": lambda a, b, p: np.where(p, a, b),
    "selp.f32": lambda a, b, p: np.where(p, a, b),
    "vote.sync.any.pred": lambda p, _: np.full_like(p, p.any()),
    "shfl.sync.bfly.b32": lambda a, n, *_: a[np.arange(32) ^ int(n[0])],
}
"""On vectors of a number a thread."""


def carried_out(assembly: str, given: dict[str, Any]) -> dict[str, Any]:
    """What registers hold in the end. A branch is taken by all threads or by none."""
    at = dict(given)
    skipped = ""
    for line in filter(None, (x.strip(" {}\n") for x in re.split(r";|(?<=:)\n|(?<=:) ", assembly))):
        if line.endswith(":"):
            skipped = "" if skipped == line[:-1] else skipped
        elif line.startswith(".reg") or skipped:
            continue
        elif line.startswith("@"):
            guard, _, label = line.split()
            taken = at[guard.lstrip("@!")] ^ ("!" in guard)
            assert taken.all() or not taken.any()
            skipped = label if taken.any() else ""
        else:
            opcode, rest = line.split(" ", 1)
            target, *names = (x.strip() for x in rest.split(","))
            with np.errstate(all="ignore"):
                at[target] = OPERATIONS[opcode](*(value(at, n) for n in names))
    assert not skipped
    return at


def value(at: dict[str, Any], text: str) -> Any:
    """A register, or a number in every thread."""
    if text in at:
        return at[text]
    if text.startswith("0f"):
        return np.full(32, np.array(int(text[2:], 16), np.uint32).view(F32), F32)
    return np.full(32, int(text, 0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with imported(tmp_path_factory.mktemp("weights"), "_weights", "_softmax", "_gluon") as module:
        yield module


class Warp:
    """16 rows by so many keys, as a tile or in parts of eight columns."""

    def __init__(self, weights: Any, keys: int, in_parts: bool, guess: bool) -> None:
        import triton.experimental.gluon.language as gl

        self.keys, self.in_parts = keys, in_parts
        count = keys // 8 if in_parts else keys // 4
        named = weights._of_parts if in_parts else weights._of_tile
        self.at = plain(named(count))
        made = weights._part_text if in_parts else weights._tile_text
        self.text = plain(made(count, gl.float16, guess))

    def weigh(self, x: Any, m: Any) -> dict[str, Any]:
        """Weights [16, keys] and, a number a row: sums, peaks, factors; whether anything shrinks."""
        lane = np.arange(32)
        row, column = lane // 4, lane % 4 * 2
        given = {self.at["factor"]: np.full(32, C)}
        for n, (_, a, b, of) in enumerate(self.at["pairs"]):
            given[a], given[b] = (x[row + 8 * of, n // 2 * 8 + column + k] for k in (0, 1))
        given |= {self.at["base"][of]: m[row + 8 * of] for of in (0, 1)}
        out = carried_out(self.text, given)
        p = np.zeros((ROWS, self.keys))
        for n, (packed, _, _, of) in enumerate(self.at["pairs"]):
            p[row + 8 * of, n // 2 * 8 + column] = out[packed].real
            p[row + 8 * of, n // 2 * 8 + column + 1] = out[packed].imag
        found: dict[str, Any] = {"p": p, "answer": out[self.at["answer"]]}
        for what in ("sum", "peak", "shrink"):
            lanes = np.stack([out[self.at[what][of]].reshape(8, 4) for of in (0, 1)]).reshape(ROWS, 4)
            found[what] = lanes.sum(1) if what == "sum" else lanes[:, 0]
            assert what == "sum" or (same(lanes, lanes[:, :1])).all()
        return found


def same(a: Any, b: Any) -> Any:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def exact(x: Any, peak: Any) -> Any:
    return np.exp2(x.astype(np.float64) * C - peak[:, None])


SHAPES = [(128, False), (64, False), (112, True), (80, True)]


@pytest.mark.parametrize(("keys", "in_parts"), SHAPES)
@pytest.mark.parametrize("guess", [False, True])
def test_a_first_tile(weights: Any, keys: int, in_parts: bool, guess: bool) -> None:
    """Peaks of rows that have seen nothing become their maxima, but of those that see nothing now either."""
    x = np.random.default_rng(0).normal(0, 20, (ROWS, keys)).astype(F32)
    x[3], x[9, ::2] = -np.inf, -np.inf
    found = Warp(weights, keys, in_parts, guess).weigh(x, np.full(ROWS, LOWEST))
    assert (found["peak"] == np.fmax(x.max(1) * C, LOWEST)).all()
    assert (found["shrink"] == np.where(np.arange(ROWS) == 3, 1, 0)).all()
    assert (found["answer"] == 1).all()
    assert np.allclose(found["p"], exact(x, found["peak"]), rtol=1e-5, atol=1e-30)
    assert np.allclose(found["sum"], found["p"].sum(1))
    assert found["sum"][3] == 0


@pytest.mark.parametrize(("keys", "in_parts"), SHAPES)
def test_peaks_stay_while_weights_are_light(weights: Any, keys: int, in_parts: bool) -> None:
    x = np.random.default_rng(1).normal(0, 8, (ROWS, keys)).astype(F32)
    m = np.linspace(-1, 5, ROWS).astype(F32)
    x[:, 5] = (m + 8) / C  # 2**8 each, which a maximum would have gone along with
    found = Warp(weights, keys, in_parts, True).weigh(x, m)
    assert (found["peak"] == m).all()
    assert (found["shrink"] == 1).all()
    assert not found["answer"].any()
    assert np.allclose(found["p"], exact(x, m), rtol=1e-5)
    assert np.allclose(found["sum"], found["p"].sum(1))
    assert found["p"].max() > 255


@pytest.mark.parametrize(("keys", "in_parts"), SHAPES)
def test_rows_that_weigh_too_much_get_new_peaks_and_no_others(weights: Any, keys: int, in_parts: bool) -> None:
    """Wherever the key stands that does it; what the others have is as if they were alone."""
    rng = np.random.default_rng(2)
    m = np.zeros(ROWS, F32)
    for column in range(keys):
        x = rng.normal(0, 8, (ROWS, keys)).astype(F32)
        alone = Warp(weights, keys, in_parts, True).weigh(x, m)
        x[column % ROWS, column] = F32(20) / C
        found = Warp(weights, keys, in_parts, True).weigh(x, m)
        grown = np.arange(ROWS) == column % ROWS
        assert (found["peak"] == np.where(grown, 20, 0)).all()
        assert np.allclose(found["shrink"], np.where(grown, 2.0**-20, 1))
        assert (found["answer"] == 1).all()
        assert (found["p"][~grown] == alone["p"][~grown]).all()
        assert (found["sum"][~grown] == alone["sum"][~grown]).all()
        assert np.allclose(found["p"], exact(x, found["peak"]), rtol=1e-5, atol=1e-30)


def test_slow_growth_and_jumps_over_many_tiles(weights: Any) -> None:
    """Whatever peaks did, sums relative to the last one are the exact ones, and fp16 held all weights."""
    rng = np.random.default_rng(3)
    first, rest = (Warp(weights, 128, False, guess) for guess in (False, True))
    steps = np.array([0, 7, 14, 15, 1, 60, 61, 300, 0, 307, 308])[:, None]
    tiles = [(rng.normal(0, 8, (ROWS, 128)) + s / C * np.linspace(0, 1, ROWS)[:, None]).astype(F32) for s in steps]
    m, l, moves = np.full(ROWS, LOWEST), np.zeros(ROWS), 0
    for n, x in enumerate(tiles):
        found = (rest if n else first).weigh(x, m)
        assert found["p"].max() <= LOOSE
        assert np.isfinite(found["p"]).all()
        m, l = found["peak"], l * found["shrink"] + found["sum"]
        moves += int((found["shrink"] != 1).any())
    assert 3 <= moves < len(tiles)
    exactly = sum(exact(x, m).sum(1) for x in tiles)
    assert np.allclose(l, exactly, rtol=1e-4)
    assert (l >= 1).all()


@pytest.mark.parametrize(("keys", "in_parts"), SHAPES)
@pytest.mark.parametrize("ahead", [9.01, 9.6, 11.3, 13.9, 14.2, 40.7])
def test_a_key_that_outweighs_all_others_weighs_one(weights: Any, keys: int, in_parts: bool, ahead: float) -> None:
    """By 2**9 or more, wherever it comes: eager torch rounds its weight to 1 as well, and its row is exact."""
    rng = np.random.default_rng(4)
    first, rest = (Warp(weights, keys, in_parts, guess) for guess in (False, True))
    seen = rng.normal(0, 8, (ROWS, keys)).astype(F32)
    m = first.weigh(seen, np.full(ROWS, LOWEST))["peak"]
    x = rng.normal(0, 8, (ROWS, keys)).astype(F32)
    column = rng.integers(0, keys, ROWS)
    others = exact(seen, m).sum(1) + exact(np.delete(x, 0, 1), m).sum(1)
    x[np.arange(ROWS), column] = (m + np.log2(others) + ahead) / C
    found = rest.weigh(x, m)
    assert (found["p"][np.arange(ROWS), column] == 1).all()


@pytest.mark.parametrize("guess", [False, True])
def test_nan_and_infinite_scores(weights: Any, guess: bool) -> None:
    x = np.zeros((ROWS, 128), F32)
    x[1, 7], x[2, 9], x[4, 11] = np.nan, np.inf, -np.inf
    found = Warp(weights, 128, False, guess).weigh(x, np.zeros(ROWS, F32))
    assert np.isnan(found["sum"][[1, 2]]).all()
    assert np.isnan(found["p"][1, 7])
    assert np.isnan(found["p"][2, 9])
    others = np.delete(np.arange(ROWS), [1, 2])
    assert np.isfinite(found["sum"][others]).all()
    assert found["p"][4, 11] == 0
    assert (found["peak"][others] == 0).all()
    assert found["peak"][2] == np.inf


def test_later_tiles_of_an_infinite_row_do_not_heal_it(weights: Any) -> None:
    x = np.zeros((ROWS, 128), F32)
    found = Warp(weights, 128, False, True).weigh(x, np.where(np.arange(ROWS) == 2, np.inf, 0).astype(F32))
    assert found["peak"][2] == np.inf
    assert found["sum"][2] == 0
    assert found["shrink"][2] == 1  # NaN, which sums are by now, stays


def test_a_step_s_weights_stand_along_rows_first(weights: Any) -> None:
    """Of eight columns a thread has two neighbours of a row, then those of the row eight below; an instruction takes of
    sixteen keys both rows' first pairs, then their second ones."""
    parts = 10
    first = 2 * parts + 16
    expected = [(f"${n}", f"${first + 2 * n}", f"${first + 2 * n + 1}", n % 2) for n in range(2 * parts)]
    assert plain(weights._of_parts(parts))["pairs"] == expected


@pytest.mark.parametrize(("keys", "in_parts"), SHAPES)
@pytest.mark.parametrize("guess", [False, True])
def test_all_operands_are_named(weights: Any, keys: int, in_parts: bool, guess: bool) -> None:
    count = keys // 8 if in_parts else keys // 4
    sides = plain((weights._part_sides if in_parts else weights._tile_sides)(count)).split(",")
    warp = Warp(weights, keys, in_parts, guess)
    written = set(re.findall(r"\w+(?:\.\w+)+ (\$\d+),", warp.text))
    assert all(sides[int(x[1:])].startswith("=&") for x in written)
    assert max(int(x) for x in re.findall(r"\$(\d+)", warp.text)) < len(sides)
    if in_parts:
        assert len(written) == sum(side.startswith("=") for side in sides)


@pytest.mark.parametrize(("tensors", "pack"), [(1, 64), (32, 4)])
@pytest.mark.parametrize("answer", [0, 1])
def test_accumulators_are_multiplied_where_the_answer_says_so(
    weights: Any, tensors: int, pack: int, answer: int
) -> None:
    count = tensors * pack
    text = plain(weights._scaling(tensors, pack))
    sides = plain(weights._scaling_sides(tensors, pack)).split(",")
    assert sides[count : 2 * count] == [str(n) for n in range(count)]
    assert len(sides) == 2 * count + 2 * pack
    given = {f"${n}": np.full(32, F32(n + 1)) for n in range(count)}
    given |= {f"${2 * count + n}": np.full(32, F32(0.5 if n // 2 % 2 else 0.25)) for n in range(pack)}
    given |= {f"${2 * count + pack + n}": np.full(32, answer) for n in range(pack)}
    out = carried_out(text, given)
    for n in range(count):
        factor = (0.5 if n // 2 % 2 else 0.25) if answer else 1
        assert (out[f"${n}"] == (n + 1) * factor).all()
