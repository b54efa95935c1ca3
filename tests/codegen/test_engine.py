"""The Hopper engine's functions against brute force, its machine code, and what keeps it from a variant."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc import driver, spec
from attncc.check.run import imported
from attncc.codegen.elsewhere import disassembled
from attncc.codegen.engine import as_gluon, print_engine
from attncc.codegen.gate import Findings, examine, spills
from attncc.codegen.parameters import constants
from attncc.device import find
from attncc.errors import CompilerBug
from attncc.ir.tile import Program
from attncc.passes.lower.defaults import default_configs
from attncc.passes.lower.hopper import engine, gap

HEADS = "heads: {q: 6, kv: 2}\n"
PLAIN = f"{HEADS}dims: 128\n"
FP8 = "quantize: {q: fp8_e4m3(per=head), k: fp8_e4m3(per=head), v: fp8_e4m3(per=head), p: fp8_e4m3}"
MASKS = {
    "none": ("true", lambda i, j: i == i),
    "causal": ("causal", lambda i, j: j <= i),
    "window": ("causal & window(200)", lambda i, j: (j <= i) & (i - j < 200)),
    "two sides": ("window(150, 70)", lambda i, j: (i - j < 150) & (j - i <= 70)),
    "sink and window": ("causal & (sink(5) | window(130))", lambda i, j: (j <= i) & ((j < 5) | (i - j < 130))),
    "prefix": ("causal | prefix(140)", lambda i, j: (j <= i) | (j < 140)),
    "dilated": ("causal & dilated(3)", lambda i, j: (j <= i) & ((i - j) % 3 == 0)),
}


def lowered(body: str) -> tuple[Any, Program]:
    return driver.lower(spec.loads(f"attncc: 1\nname: variant\n{body}\n").attention)


@dataclass(frozen=True)
class Pointer:
    """An array in memory as Triton sees it."""

    array: np.ndarray
    at: Any = 0

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.array, self.at + steps)


class Float(np.ndarray):
    """A tile that knows Triton's way to convert."""

    def to(self, dtype: Any) -> np.ndarray:
        return np.asarray(self, np.float32)


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    flat, mask = pointer.array.reshape(-1), np.asarray(mask)
    inside = np.where(mask, pointer.at, 0)
    assert (inside >= 0).all()
    assert (inside < flat.size).all()
    return np.where(mask, flat[inside], other)


def functions(body: str) -> Any:
    """The variant's functions in NumPy, which computes what Gluon would; the text is attncc's own output."""
    attn = lowered(body)[0]
    made = engine(attn)
    numpy = SimpleNamespace(
        constexpr=int, minimum=np.minimum, maximum=np.maximum, where=np.where, log2=np.log2, exp2=np.exp2, load=load,
        int64=np.int64, float32=np.float32, cast=lambda x, dtype: dtype(x),
    )  # fmt: skip
    scope: dict[str, Any] = {"gl": numpy, "gluon": SimpleNamespace(jit=lambda f: f)}
    exec("\n".join(print_engine(made)), scope)
    return SimpleNamespace(**scope, engine=made, factor=constants(attn, made)["FACTOR"])


def pairs_of(v: Any, at: Any, row0: int, args: Any, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and keys of every pair that the engine takes of a query tile, in the sequence."""
    cuts, wholes, s = v.walk(at, args, rows, width)
    assert cuts + wholes > 0
    numbers = dict(zip((str(e.attr) for e in v.engine.tile), s, strict=True))
    known = [numbers[str(e.attr)] for e in v.engine.known]
    assert list(v.known(args)) == known
    r = v.rows(row0 + np.arange(rows), s, args)
    found = []
    for t in range(int(cuts + wholes)):
        n = int(v.cut(t, s, args, width) if t < cuts else v.whole(t - cuts, s, args, width))
        j = n + np.arange(width)
        kept = np.ones((rows, width), bool)
        if t < cuts:
            kept &= (j < numbers["Sk"])[None] & v.keep(np.clip(j, 0, max(numbers["Sk"] - 1, 0)), r, s, args)
        kept &= (row0 + np.arange(rows))[:, None] < numbers["Sq"]
        at_row, key = np.nonzero(kept)
        found.append((row0 + at_row, j[key]))
    return tuple(map(np.concatenate, zip(*found, strict=True)))  # type: ignore[return-value]


def visits(v: Any, args: Any, lengths: tuple[int, int], rows: int, width: int) -> np.ndarray:
    """How often each pair of head 0 is visited, as the engine walks; every tile of every head must turn up once."""
    queries, keys = lengths
    seen = np.zeros((queries, keys), int)
    numbers: set[int] = set()
    tiles = -(-queries // rows) * 6
    for number in range(tiles):
        at, (batch, h, hk, hv, first_query, first_key, row0, again) = v.place(number, args, rows, 4, 64)
        assert (batch, hk, hv, first_key) == (0, h // 3, h // 3, 0)
        assert first_query == row0
        # the kernel that does tiles of 64 rows again finds the head and the rows
        assert divmod(int(again), -(-queries // 64)) == (h, row0 // 64)
        numbers.add(int(again))
        if h == 0:
            np.add.at(seen, pairs_of(v, at, int(row0), args, rows, width), 1)
    assert len(numbers) == tiles
    return seen


@pytest.mark.parametrize("mask", MASKS)
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 700), st.integers(1, 900), st.sampled_from([(128, 128), (192, 112), (128, 80)]))
def test_each_visible_pair_is_visited_once(mask: str, queries: int, keys: int, tile: tuple[int, int]) -> None:
    text, brute = MASKS[mask]
    seen = visits(functions(f"{PLAIN}mask: {text}"), (1, queries, keys, 0.1), (queries, keys), *tile)
    i, j = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None]
    assert (seen == np.broadcast_to(brute(i, j), seen.shape)).all()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 400)), min_size=1, max_size=6),
    st.sampled_from([(128, 128), (192, 112), (128, 80)]),
)
def test_packed_sequences(lengths: list[tuple[int, int]], tile: tuple[int, int]) -> None:
    """Every row of every sequence sees its own keys, all of them, and TMA is sent to where they are."""
    v = functions(f"{PLAIN}layout: varlen\nmask: causal")
    begins = np.cumsum([(0, 0), *lengths], axis=0).astype(np.int32)
    total = int(begins[-1, 0])
    rows, width = tile
    args = (Pointer(begins[:, 0].copy()), 1, Pointer(begins[:, 1].copy()), 1, len(lengths), total, 0, 0.1)
    seen: Counter[tuple[int, int, int]] = Counter()
    for number in range((total // rows + len(lengths)) * 6):
        at, (batch, h, hk, hv, first_query, first_key, row0, again) = v.place(number, args, rows, 4, 64)
        assert (batch, hk, hv) == (0, h // 3, h // 3)
        seq = int(at[0])
        assert (first_query - row0, first_key) == tuple(begins[seq])
        behind = divmod(int(again), total // 64 + len(lengths))
        if row0 < lengths[seq][0]:
            assert behind == (h, begins[seq, 0] // 64 + seq + row0 // 64)
        if h == 5 and lengths[seq][1]:
            at_row, key = pairs_of(v, at, int(row0), args, rows, width)
            seen.update(zip([seq] * len(key), at_row.tolist(), key.tolist(), strict=True))
    wanted = {
        (seq, i, j) for seq, (queries, keys) in enumerate(lengths) for i in range(queries)
        for j in range(keys) if j <= i + keys - queries
    }  # fmt: skip
    assert {*seen} == wanted
    assert {*seen.values()} <= {1}


def test_listed_tiles() -> None:
    """The list's left end is cut tiles, its right end whole ones; a row of it without any entry still has one tile."""
    v = functions(f"{PLAIN}inputs: {{on: {{shape: [m, n], dtype: bool}}}}\nmask: on[i // 64, j // 64]")
    tiles = np.full((3, 8), 10**6, np.int32)
    tiles[1, :2], tiles[1, 5:] = (6, 1), (5, 0, 3)
    counts = np.array([[0, 0], [2, 3], [0, 0]], np.int32)
    on = np.ones((6, 16), bool)
    args = (Pointer(on), 16, 1, Pointer(tiles), 8, 1, Pointer(counts), 2, 1, 1, 384, 1024, 6, 16, 0.1)
    cuts, wholes, s = v.walk((0, 2, 1, 128), args, 128, 128)
    assert (cuts, wholes) == (2, 3)
    assert [int(v.cut(t, s, args, 128)) for t in range(2)] == [768, 128]
    assert [int(v.whole(t, s, args, 128)) for t in range(3)] == [384, 0, 640]
    cuts, wholes, s = v.walk((0, 2, 2, 256), args, 128, 128)
    assert (cuts, wholes, int(v.cut(0, s, args, 128))) == (1, 0, 0)


@pytest.mark.parametrize(("shape", "table"), [("Hq, n", 3), ("n", 0)])
def test_relative_positions_are_read_as_lines(shape: str, table: int) -> None:
    """Scores begin with theirs, or take them from beside."""
    index = "h, i - j + n // 2" if "Hq" in shape else "i - j + n // 2"
    for sign, wanted in (("+", 0.25), ("*", 0.25 * np.arange(256.0).reshape(64, 4))):
        v = functions(f"{PLAIN}inputs: {{w: {{shape: [{shape}]}}}}\nscore: qk * scale {sign} w[{index}]")
        args = (*[0] * (v.engine.args[0].rank + 1), 2, 300, 400, 900, 0.25)
        # lines begin with the last row of 384 and the first key; a box, 64 columns before its first pair's
        assert tuple(map(int, v.beside(128, 192, (1, 3, 0, 0), args))) == (table, 128 + 384 - 64 - 192)
        qk, beside = np.ones((64, 4)), np.asarray(np.arange(256.0).reshape(64, 4), np.float32)
        _, _, s = v.walk((1, 3, 1, 192), args, 64, 128)
        x = v.score(qk, beside.view(Float), np.arange(4), v.rows(192 + np.arange(64), s, args), s, args)
        factor = s[v.factor] / np.log2(np.e)
        np.testing.assert_allclose(np.broadcast_to(x * factor, (64, 4)), np.broadcast_to(wanted, (64, 4)), rtol=1e-6)


@pytest.mark.parametrize("mask", ["causal & window(200)", "window(150, 70)", "causal", "causal & dilated(3)"])
def test_ends_say_what_the_mask_says(mask: str) -> None:
    """Where a mask is no more than two ends of a row's keys, these are told; else nothing is."""
    v = functions(f"{PLAIN}mask: {mask}")
    args = (2, 300, 400, 0.25)
    _, _, s = v.walk((1, 3, 1, 192), args, 64, 128)
    r = v.rows(192 + np.arange(64), s, args)
    ends = v.ends(r, s, args)
    assert len(ends) == (2 if "window" in mask else 0)
    if ends:
        j = np.arange(512)
        first, last = (np.broadcast_to(e, (64,))[:, None] for e in ends)
        np.testing.assert_array_equal((first <= j) & (j <= last), v.keep(j, r, s, args))


def test_value_heads_of_their_own() -> None:
    v = functions("heads: {q: 6, kv: 2, v: 3}\ndims: 64")
    _, (_, h, hk, hv, *_) = v.place(5, (1, 64, 64, 0.1), 64, 8, 64)
    assert (h, hk, hv) == (5, 1, 2)


@pytest.mark.parametrize(
    ("dims", "qk", "v", "own_room"),
    [
        ("128", (128,), (128,), 0), ("80", (64, 16), (64, 16), 0), ("96", (64, 32), (64, 32), 0),
        ("32", (32,), (32,), 0), ("112", (128,), (128,), 0), ("208", (256,), (256,), 0),
        ("{qk: 192, v: 128}", (128, 64), (128,), 0), ("{qk: 128, v: 64}", (128,), (64,), 1),
        ("{qk: 64, v: 128}", (64,), (128,), 1),
    ],
)  # fmt: skip
def test_head_dims_in_pieces(dims: str, qk: tuple[int, ...], v: tuple[int, ...], own_room: int) -> None:
    attn, program = lowered(f"{HEADS}dims: {dims}")
    assert program.engine is not None
    assert (program.engine.qk, program.engine.v) == (qk, v)
    assert constants(attn, program.engine)["OWN_ROOM"] == own_room


def test_scores() -> None:
    v = functions(f"{PLAIN}score: qk * scale + where(j < i - 40, 2.0, 1.0)\nmask: causal")
    args = (2, 300, 400, 0.25)
    _, _, s = v.walk((1, 3, 1, 128), args, 128, 128)
    r = v.rows(128 + np.arange(128), s, args)
    qk = np.random.default_rng(0).standard_normal((128, 128))
    j = 130 + np.arange(128)
    i = 128 + np.arange(128)[:, None] + 100
    want = (qk * 0.25 + np.where(j < i - 40, 2.0, 1.0)) * np.log2(np.e)
    np.testing.assert_allclose(v.score(qk, 0, j, r, s, args) * s[v.factor], want, rtol=1e-6)


@pytest.mark.parametrize("more", ["", " + where(j < i - 40, 2.0, 1.0)", " + 0.5 * i"])
def test_a_line_along_the_keys_is_a_ramp_and_a_shift(more: str) -> None:
    """ALiBi's penalty costs an addition a pair; what a row adds, and where a tile begins, is left to the maximum."""
    v = functions(f"{PLAIN}score: qk * scale - exp2(-8 * (h + 1) / Hq) * (i - j){more}\nmask: causal")
    args = (2, 300, 400, 0.25)
    _, _, s = v.walk((1, 3, 1, 128), args, 128, 128)
    n, u = 130, np.arange(128).view(Float)
    rows = (128 + np.arange(128)).view(Float)
    r = (*v.rows(rows, s, args), *v.ramp(u, s, args))
    (shift,) = v.shift(n, r, s, args)
    qk = np.random.default_rng(0).standard_normal((128, 128))
    i, j = 128 + np.arange(128)[:, None] + 100, n + np.arange(128)
    want = qk * 0.25 - 2.0 ** -(8 * 4 / 6) * (i - j)
    want += np.where(j < i - 40, 2.0, 1.0) if "where" in more else 0.5 * i if more else 0.0
    got = (v.score(qk, 0, np.asarray(j), r, s, args) + np.asarray(shift)[:, None]) * s[v.factor]
    np.testing.assert_allclose(got, want * np.log2(np.e), rtol=1e-5, atol=1e-4)


def test_scores_without_a_line_have_no_shift() -> None:
    v = functions(f"{PLAIN}mask: causal")
    _, _, s = v.walk((1, 3, 1, 128), (2, 300, 400, 0.25), 128, 128)
    assert v.ramp(np.arange(128), s, (2, 300, 400, 0.25)) == ()
    assert v.shift(0, (), s, (2, 300, 400, 0.25)) == ()


def test_scores_that_read_the_row_itself(tmp_path: Path) -> None:
    body = f"{PLAIN}inputs: {{w: {{shape: [Hq, Sq, Sk], dtype: fp16}}}}\nscore: qk * scale + w[h, row, j]\nmask: causal"
    out = driver.compile(spec.loads(f"attncc: 1\nname: by_row\n{body}\n"), tmp_path, ["sm_90"])
    score = (out / "hopper.py").read_text().partition("def score")[2].partition("\ndef ")[0]
    assert "rows, i = r" in score
    assert "gl.minimum(rows, last_row)[:, None] * w_s1" in score


def test_a_row_s_end() -> None:
    v = functions(f"{PLAIN}mask: causal")
    m, total = np.array([1.5, -(2.0**127)]), np.array([2.0, 0.0])
    factor, lse = v.finish(m, total, (), (), ())
    np.testing.assert_allclose(factor, [0.5, 1.0])
    np.testing.assert_allclose(lse, [(1.5 + 1.0) * np.log(2.0), -np.inf])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{HEADS}dims: 320", "wider than 256"),
        (f"{HEADS}dims: {{qk: 64, v: 60}}", "multiple of 16 bytes"),
        (f"{PLAIN}dtype: fp32", "fp32"),
        (f"{PLAIN}normalizer: sigmoid\noutputs: [o]", "softmax"),
        (
            f"{PLAIN}inputs: {{w: {{shape: [Hq, n]}}}}\nscore: qk * scale + w[h, i - j + 9] + w[0, i - j + 8]",
            "several tables",
        ),
        (
            f"{PLAIN}inputs: {{w: {{shape: [n]}}, on: {{shape: [m, m], dtype: bool}}}}\n"
            "score: qk * scale + w[i - j + 9]\nmask: on[i // 64, j // 64]",
            "beside listed",
        ),
        (f"{PLAIN}score: i * 0.1 - j * 0.2", "without qk"),
        (f"{PLAIN}quantize: {{q: fp8_e4m3, k: fp8_e4m3, v: fp8_e4m3}}", "all of fp8_e4m3"),
        (f"{PLAIN}quantize: {{q: fp8_e4m3, k: fp8_e4m3, v: fp8_e5m2, p: fp8_e4m3}}", "all of fp8_e4m3"),
        (f"{PLAIN}quantize: {{q: int8, k: int8}}", "all of fp8_e4m3"),
        (f"{PLAIN}quantize: {{q: fp8_e4m3, k: fp8_e4m3, v: fp8_e4m3(per=channel), p: fp8_e4m3}}", "per channel"),
        (f"{HEADS}dims: 160\n{FP8}", "wider than 128"),
    ],
)
def test_what_keeps_the_engine_out(body: str, why: str) -> None:
    attn, program = lowered(body)
    assert program.engine is None
    assert why in program.engine_gap == gap(attn)
    assert all("ENGINE" not in config for _, config in default_configs(attn, find("sm_90"))[0])


@pytest.mark.parametrize("device", ["sm_80", "sm_100", "gfx942", "interpreter"])
def test_other_architectures_have_no_engine(device: str) -> None:
    attn, _ = lowered(f"{PLAIN}mask: causal")
    assert all("ENGINE" not in config for _, config in default_configs(attn, find(device))[0])


@pytest.mark.parametrize(("numerics", "helper"), [("fast", "tanh_approx"), ("exact", "tanh")])
def test_softcaps_use_the_gpu_s_tanh_unless_they_must_be_exact(numerics: str, helper: str) -> None:
    _, program = lowered(f"{PLAIN}score: softcap(qk * scale, 30)\nnumerics: {{exp: {numerics}}}")
    assert program.engine is not None
    text = "\n".join(print_engine(program.engine))
    assert f"x = {helper}(qk * " in text
    assert ("tanh.approx.f32" in text) == (numerics == "fast")


@pytest.mark.parametrize(
    ("score", "base"),
    [
        ("softcap(qk * scale, 30)", (30 / np.log(2),)),
        ("qk * scale", ()),
        ("softcap(qk * scale, 30) + x[h] * (j - i)", ()),
    ],
)
def test_scores_with_limits_have_a_base_for_all_weights(score: str, base: tuple[float, ...]) -> None:
    given = "inputs: {x: {shape: [Hq]}}\n" if "x[" in score else ""
    v = functions(f"{PLAIN}dtype: bf16\n{given}score: {score}\nmask: causal")
    assert v.base() == pytest.approx(base)
    if base:  # and rows end with it as they do with a maximum, those that see no key, too
        weights = np.exp2(np.array([-3.0, 2.5]) - base[0])
        factor, lse = v.finish(
            np.full(2, base[0]), np.array([weights.sum(), 0.0]), (np.arange(2),), None, (1, 2, 2, 1.0)
        )
        assert lse[0] == pytest.approx(np.log(np.exp2(-3.0) + np.exp2(2.5)))
        assert (weights * factor[0]).sum() == pytest.approx(1)
        assert (factor[1], lse[1]) == (1, -np.inf)


def test_listed_tiles_are_those_of_the_kernel_that_does_them_again() -> None:
    attn, _ = lowered(f"{PLAIN}inputs: {{on: {{shape: [m, n], dtype: bool}}}}\nmask: on[i // 64, j // 64]")
    config = default_configs(attn, find("sm_90"))[0][-1][1]
    assert (config["BM"], config["BN"]) == (64 * config["E_CONSUMERS"], config["E_KEYS"])


def test_only_elementwise_code_becomes_gluon() -> None:
    assert as_gluon("@triton.jit\nx = tl.where(a, tl.exp2(b), 0.0)") == "@gluon.jit\nx = gl.where(a, gl.exp2(b), 0.0)"
    with pytest.raises(CompilerBug, match="layout"):
        as_gluon("x = tl.arange(0, 8)")


# -- the gate ------------------------------------------------------------------------------------


@pytest.mark.gate
@pytest.mark.parametrize(
    "body",
    [
        f"{PLAIN}mask: causal & window(100)",
        f"{HEADS}dims: 64\ninputs: {{z: {{shape: [Hq]}}}}\nmask: causal & window(90)\nnormalizer: softmax(sink=z[h])",
        f"{HEADS}dims: 256\nmask: causal & window(100)",
        f"{HEADS}dims: {{qk: 192, v: 128}}\nmask: causal",
        f"{HEADS}dims: 80\ninputs: {{w: {{shape: [Hq, n], dtype: bf16}}}}\nscore: qk * scale + w[h, i - j + n // 2]",
        f"{PLAIN}inputs: {{on: {{shape: [m, n], dtype: bool}}}}\nmask: on[i // 64, j // 64]",
        f"{PLAIN}inputs: {{x: {{shape: [Hq]}}}}\nscore: qk * scale + x[h] * (j - i)\nmask: causal\nlayout: bshd",
        f"{PLAIN}mask: causal\n{FP8}",
        pytest.param(f"{PLAIN}score: softcap(qk * scale, 30)\nmask: causal\ndtype: bf16", marks=pytest.mark.newest),
        f"{PLAIN}score: 8 * sigmoid(qk * scale)\nmask: causal\ndtype: bf16",
        f"{HEADS}dims: 64\nscore: softcap(qk * scale, 50)\nmask: causal & window(90)\ndtype: bf16",
        f"{HEADS}dims: 256\nscore: softcap(qk * scale, 50)\nmask: causal\ndtype: bf16",
        f"{HEADS}dims: 96\nmask: causal & window(100)\nlayout: bshd\n{FP8}",
    ],
)
def test_engines_pass_the_gate(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is serialised, nothing is read undefined, and the main loop keeps to its registers."""
    seen: list[Findings] = []
    monkeypatch.setattr("attncc.driver.examine", lambda *where: seen.append(examine(*where)) or seen[-1])
    out = driver.compile(spec.loads(f"attncc: 1\nname: gated\n{body}\n"), tmp_path, ["sm_90"])
    assert (out / "_hopper.py").exists()
    (found,) = seen
    assert found.reasons == ()
    assert found.loop["wgmma"] > 0
    assert 2 * found.instructions["wgmma"] == 3 * found.loop["wgmma"]  # two loops; first scores, last values
    assert found.shared_bytes <= find("sm_90").shared_bytes_per_block


@pytest.mark.gate
def test_weights_are_made_while_short_products_run(tmp_path: Path) -> None:
    """The exponentials of whole tiles stand between the wait for their scores and that for the product before."""
    body = f"{HEADS}dims: 128\nmask: causal"
    driver.compile(spec.loads(f"attncc: 1\nname: short\n{body}\n"), tmp_path, ["sm_90"], cache=tmp_path / "cache")
    (cubin,) = (tmp_path / "cache").rglob("forward.cubin")
    text = disassembled(SimpleNamespace(asm={"cubin": cubin.read_bytes()}))
    under = re.findall(r"gsb0, 0x1 ;(.*?)WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", text, re.S)
    assert [x.count("MUFU.EX2") >= 64 for x in under].count(True) == 2  # the other two loops are over cut tiles
    assert len(under) == 4


def test_an_engine_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attncc.driver.examine", lambda *where: Findings(("it reads what nothing wrote",)))
    out = driver.compile(spec.loads(f"attncc: 1\nname: left_out\n{PLAIN}\n"), tmp_path, ["sm_90"])
    assert not (out / "_hopper.py").exists()
    config = (out / "configs" / "sm_90.py").read_text()
    assert "The engine is left out: it reads what nothing wrote." in config
    assert "ENGINE" not in config
    assert not re.search("_hopper|_engine", (out / "__init__.py").read_text())


def test_an_engine_that_does_not_compile(tmp_path: Path) -> None:
    out = driver.compile(spec.loads(f"attncc: 1\nname: broken\n{PLAIN}\n"), tmp_path, ["sm_90"])
    (out / "hopper.py").write_text((out / "hopper.py").read_text().replace("return x", "return nothing_of_this_name"))
    (reason,) = examine(out).reasons
    assert reason.startswith("it does not compile")


def test_another_triton_runs_portable_kernels(tmp_path: Path) -> None:
    out = driver.compile(spec.loads(f"attncc: 1\nname: examined\n{PLAIN}\n"), tmp_path, ["sm_90", "interpreter"])
    with imported(out) as module:
        runner = module._RUNNER
        assert runner.is_examined()
        runner.variant = replace(runner.variant, examined="3.1.4")
        with pytest.warns(UserWarning, match=r"examined: the engine was examined with Triton 3\.1\.4, this is"):
            assert not runner.is_examined()
        runner.variant = replace(runner.variant, on_miss="error")
        with pytest.raises(RuntimeError, match="on_miss is 'error'"):
            runner.is_examined()


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((), False),
        (((820, 0), (450, 6), (815, 0), (455, 6)), False),
        (((820, 0), (450, 7), (815, 0), (455, 0)), True),
        (((820, 40), (450, 0), (815, 0), (455, 0)), False),
        (((820, 42), (450, 0), (815, 0), (455, 0)), True),
    ],
)
def test_loops_over_cut_tiles_may_reload_more(turns: tuple[tuple[int, int], ...], expected: bool) -> None:
    assert spills(turns) == expected


@pytest.mark.parametrize(("engine", "steps"), [("_hopper", "_products"), ("_latent", "_latent_steps")])
def test_what_a_launch_fixes_travels_in_the_order_of_its_names(engine: str, steps: str) -> None:
    """Consumers find each number by its name; the tuples, which stand in the call as Gluon wants it, have them so."""
    folder = Path(driver.__file__).parent / "codegen"
    (table,) = re.findall(r"FIXED = gl\.constexpr\((\{[^}]*\})\)", (folder / f"{steps}.py").read_text())
    names = ast.literal_eval(table)
    assert [*names.values()] == [*range(len(names))]
    text = (folder / f"{engine}.py").read_text()
    tuples = re.findall(r"\(consume, \(\d, .*?,\s+\(([A-Z_, \n]+|[^()]*)\)\)\)", text, flags=re.DOTALL)
    travelling = [[part.strip() for part in t.split(",")] for t in tuples]
    assert travelling
    for parts in travelling:
        assert [p if p.isupper() and " " not in p else "HAS_REST" for p in parts] == [*names]


def test_query_tiles_are_drawn_without_fences_while_the_rings_are_full() -> None:
    """Fences in front of a tile's first keys kept consumers waiting for 1,500 cycles."""
    text = (Path(driver.__file__).parent / "codegen" / "_hopper.py").read_text()
    (produce,) = (f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef) and f.name == "produce")
    (tiles,) = (s for s in produce.body if isinstance(s, ast.While))
    (draw,) = (n for n in ast.walk(produce) if isinstance(n, ast.Call) and "atomic_add" in ast.unparse(n.func))
    early, rest = (s.lineno for s in tiles.body if isinstance(s, ast.For))
    assert early < draw.lineno < rest
    assert [ast.unparse(k) for k in draw.keywords] == ["sem='relaxed'"]
