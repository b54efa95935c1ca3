"""The Hopper engine's functions against brute force, its machine code, and what keeps it from a variant."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc import driver, spec
from attncc.check.run import imported
from attncc.codegen.engine import as_gluon, print_engine
from attncc.codegen.gate import Findings, examine
from attncc.device import find
from attncc.errors import CompilerBug
from attncc.ir.tile import Program
from attncc.passes.lower.defaults import default_configs
from attncc.passes.lower.hopper import gap

HEADS = "heads: {q: 6, kv: 2}\n"
PLAIN = f"{HEADS}dims: 128\n"
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


def functions(body: str) -> Any:
    """The variant's functions in NumPy, which computes what Gluon would; the text is attncc's own output."""
    _, program = lowered(body)
    assert program.engine is not None, program.engine_gap
    numpy = SimpleNamespace(constexpr=int, minimum=np.minimum, maximum=np.maximum, where=np.where, log2=np.log2)
    scope: dict[str, Any] = {"gl": numpy, "gluon": SimpleNamespace(jit=lambda f: f)}
    exec("\n".join(print_engine(program.engine)), scope)
    return SimpleNamespace(**scope)


def visits(v: Any, b: int, queries: int, keys: int, rows: int, width: int) -> np.ndarray:
    """How often each pair of head 0 is visited, as the engine walks; every tile of every head must turn up once."""
    args = (b, queries, keys, 0.1)
    seen = np.zeros((queries, keys), int)
    places: set[tuple[int, ...]] = set()
    tiles = -(-queries // rows) * b * 6
    for number in range(tiles):
        where = tuple(map(int, v.place(number, args, rows, 4)))
        places.add(where)
        batch, h, hk, row0 = where
        assert hk == h // 3
        if h or batch:
            continue
        cuts, wholes, s = v.walk(batch, h, row0, args, rows, width)
        assert cuts + wholes > 0
        r = v.rows(row0 + np.arange(rows), s, args)
        for t in range(int(cuts + wholes)):
            n = int(v.cut(t, s, args, width) if t < cuts else v.whole(t - cuts, s, args, width))
            j = n + np.arange(width)
            kept = np.ones((rows, width), bool)
            if t < cuts:
                kept &= (j < keys)[None] & v.keep(np.minimum(j, keys - 1), r, s, args)
            inside = (row0 + np.arange(rows))[:, None] < queries
            at, key = np.nonzero(kept & inside)
            np.add.at(seen, (row0 + at, j[key]), 1)
    assert len(places) == tiles
    return seen


@pytest.mark.parametrize("mask", MASKS)
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 700), st.integers(1, 900), st.sampled_from([(128, 128), (192, 128), (128, 64)]))
def test_each_visible_pair_is_visited_once(mask: str, queries: int, keys: int, tile: tuple[int, int]) -> None:
    text, brute = MASKS[mask]
    seen = visits(functions(f"{PLAIN}mask: {text}"), 1, queries, keys, *tile)
    i, j = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None]
    assert (seen == np.broadcast_to(brute(i, j), seen.shape)).all()


def test_scores() -> None:
    v = functions(f"{PLAIN}score: qk * scale + where(j < i - 40, 2.0, 1.0)\nmask: causal")
    args = (2, 300, 400, 0.25)
    _, _, s = v.walk(1, 3, 128, args, 128, 128)
    r = v.rows(128 + np.arange(128), s, args)
    qk = np.random.default_rng(0).standard_normal((128, 128))
    j = 130 + np.arange(128)
    i = 128 + np.arange(128)[:, None] + 100
    want = (qk * 0.25 + np.where(j < i - 40, 2.0, 1.0)) * np.log2(np.e)
    np.testing.assert_allclose(v.score(qk, j, r, s, args) * s[2], want, rtol=1e-6)


def test_a_row_s_end() -> None:
    v = functions(f"{PLAIN}mask: causal")
    m, total = np.array([1.5, -(2.0**127)]), np.array([2.0, 0.0])
    factor, lse = v.finish(m, total, (), (), ())
    np.testing.assert_allclose(factor, [0.5, 1.0])
    np.testing.assert_allclose(lse, [(1.5 + 1.0) * np.log(2.0), -np.inf])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{HEADS}dims: 96", "head dims other than"),
        (f"{HEADS}dims: {{qk: 128, v: 64}}", "head dims other than"),
        (f"{PLAIN}layout: varlen", "packed sequences"),
        (f"{PLAIN}dtype: fp32", "fp32"),
        (f"{PLAIN}normalizer: sigmoid\noutputs: [o]", "softmax"),
        ("heads: {q: 6, kv: 2, v: 6}\ndims: 64", "value heads"),
        (f"{PLAIN}inputs: {{on: {{shape: [m, n], dtype: bool}}}}\nmask: on[i // 64, j // 64]", "listed"),
        (f"{PLAIN}inputs: {{w: {{shape: [Hq, n]}}}}\nscore: qk * scale + w[h, i - j + n // 2]", "relative positions"),
        (f"{PLAIN}score: i * 0.1 - j * 0.2", "without qk"),
        (f"{HEADS}dims: 256\nmask: causal & window(100)", "wide heads"),
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


def test_softcaps_stay_with_portable_kernels() -> None:
    attn, program = lowered(f"{PLAIN}score: softcap(qk * scale, 30)")
    assert program.engine is not None
    assert all("ENGINE" not in config for _, config in default_configs(attn, find("sm_90"))[0])


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
        f"{HEADS}dims: 256",
        f"{PLAIN}inputs: {{x: {{shape: [Hq]}}}}\nscore: qk * scale + x[h] * (j - i)\nmask: causal\nlayout: bshd",
    ],
)
def test_engines_pass_the_gate(body: str, tmp_path: Path) -> None:
    """No product is serialised, nothing is read undefined, and the main loop keeps to its registers."""
    out = driver.compile(spec.loads(f"attncc: 1\nname: gated\n{body}\n"), tmp_path, ["sm_90"])
    assert (out / "_hopper.py").exists()
    found = examine(out)
    assert found.reasons == ()
    assert found.loop["wgmma"] > 0
    assert found.instructions["wgmma"] == 3 * found.loop["wgmma"] // 2  # the loop, the tile before it, a cut tile
    assert found.loop.get("spill_load", 0) == found.loop.get("spill_store", 0) == 0
    assert found.shared_bytes <= find("sm_90").shared_bytes_per_block


def test_an_engine_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attncc.driver.examine", lambda package: Findings(("it reads what nothing wrote",)))
    out = driver.compile(spec.loads(f"attncc: 1\nname: left_out\n{PLAIN}\n"), tmp_path, ["sm_90"])
    assert not (out / "_hopper.py").exists()
    config = (out / "configs" / "sm_90.py").read_text()
    assert "The engine is left out: it reads what nothing wrote." in config
    assert "ENGINE" not in config
    assert not re.search("_hopper|_engine", (out / "__init__.py").read_text())


@pytest.mark.gate
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
