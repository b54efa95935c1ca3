"""Products in parts: which variants have them, where their operands are in shared memory, and their instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from codegen.engine_source import imported, plain

from attncc import driver, spec
from attncc.codegen.gate import Findings, examine
from attncc.codegen.parameters import constants
from attncc.device import find
from attncc.ir.attention import Attention
from attncc.passes.lower.defaults import default_configs
from attncc.passes.lower.parts import has_parts

HEADS = "heads: {q: 6, kv: 2}\n"
CAP = "score: softcap(qk * scale, 30)\n"
SLOPE = "inputs: {x: {shape: [Hq]}}\nscore: qk * scale + x[h] * (j - i)\n"
TABLE = "inputs: {w: {shape: [Hq, n]}}\nscore: qk * scale + w[h, i - j + n // 2]\n"
LISTED = "inputs: {on: {shape: [m, n], dtype: bool}}\nmask: on[i // 64, j // 64]\n"
FP8 = "quantize: {q: fp8_e4m3(per=head), k: fp8_e4m3(per=head), v: fp8_e4m3(per=head), p: fp8_e4m3}"


def attention(body: str) -> Attention:
    return driver.lower(spec.loads(f"attncc: 1\nname: parts\n{HEADS}{body}\n").attention)[0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        *((f"dims: {dim}", False) for dim in (32, 64, 112, 128, 160)),
        *((f"dims: {dim}", True) for dim in (72, 80, 96, 176, 192, 208, 256)),
        ("dims: {qk: 192, v: 128}", False),
        ("dims: {qk: 192, v: 256}", False),
        ("dims: {qk: 256, v: 192}", True),
        (f"dims: 96\n{CAP}", True),
        (f"dims: 96\n{SLOPE}", False),
        (f"dims: 256\n{SLOPE}", True),
        (f"dims: 192\n{TABLE}", False),
        (f"dims: 192\n{LISTED}", False),
        (f"dims: 96\n{FP8}", False),
    ],
)
def test_which_variants_have_them(body: str, expected: bool) -> None:
    attn, program = driver.lower(spec.loads(f"attncc: 1\nname: parts\n{HEADS}{body}\n").attention)
    assert program.engine is not None
    assert has_parts(attn) == program.engine.parts == bool(constants(attn, program.engine)["PARTS"]) == expected
    keys = next(k for k in program.engine.knobs if k.name == "E_KEYS")
    assert (112 in keys.choices) == expected


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with imported(tmp_path_factory.mktemp("parts"), "_parts", "_gluon") as module:
        yield module


@pytest.mark.newest
@pytest.mark.parametrize("dim", [72, 80, 96, 176, 192, 208, 256])
def test_what_lies_in_the_room(parts: Any, dim: int) -> None:
    """Queries, keys and values follow each other in whole units, begin where a swizzle does, and fit."""
    config = default_configs(attention(f"dims: {dim}"), find("sm_90"))[0][-1][1]
    keys, consumers, stages, q_stages = (config[f"E_{name}"] for name in ("KEYS", "CONSUMERS", "STAGES", "Q_STAGES"))
    unit = plain(parts.unit_of(keys))
    assert keys % unit == 0
    assert unit % 8 == 0
    shape = (dim, dim, keys, consumers, stages, q_stages)
    (q, q_blocks), (k, k_units), (v, v_units), (end, _) = (
        plain(parts.area(what, *shape)) for what in ("q", "k", "v", "end")
    )
    blocks = -(-dim // 64)
    assert (q, q_blocks) == (0, blocks)
    assert k * unit == consumers * q_stages * q_blocks * 64
    assert k_units * unit == v_units * unit == blocks * keys
    assert (v, end) == (k + stages * k_units, k + stages * (k_units + v_units))
    assert end * unit * 128 < find("sm_90").shared_bytes_per_block - 1024


@pytest.mark.newest
@pytest.mark.parametrize(("keys", "dim"), [(112, 80), (96, 96), (80, 256)])
def test_instructions_name_each_operand(parts: Any, keys: int, dim: int) -> None:
    import triton.experimental.gluon.language as gl

    count, steps = keys // 8, dim // 16
    scores = plain(parts._scores_text(count, steps, keys, gl.bfloat16))
    sides = plain(parts._scores_sides(count, steps)).split(",")
    assert scores.count("wgmma.mma_async") == steps
    assert f"m64n{keys}k16.f32.bf16.bf16" in scores
    assert max(map(int, re.findall(r"\$(\d+)", scores))) < len(sides) == 4 * count + 4 * (steps + 1)

    columns, deep = dim // 8, keys // 16
    values = plain(parts._values_text(columns, deep, gl.float16))
    sides = plain(parts._values_sides(columns, deep)).split(",")
    assert values.count("wgmma.mma_async") == deep
    assert f"m64n{dim}k16.f32.f16.f16" in values
    assert sides[-4 * columns :] == [str(n) for n in range(4 * columns)]
    assert max(map(int, re.findall(r"\$(\d+)", values))) == 4 * (columns + deep)


@pytest.mark.gate
@pytest.mark.parametrize(
    "body",
    [
        "dims: 72\nmask: causal\nlayout: varlen",
        pytest.param(f"dims: 96\n{CAP}mask: causal & window(100)\ndtype: fp16", marks=pytest.mark.newest),
        f"dims: 192\n{SLOPE}mask: causal\nlayout: bshd",
        f"dims: 256\n{SLOPE}mask: causal & window(100)",
    ],
)
def test_they_pass_the_gate(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is serialised, and there is one for each step."""
    seen: list[Findings] = []
    monkeypatch.setattr("attncc.driver.examine", lambda *where: seen.append(examine(*where)) or seen[-1])
    out = driver.compile(spec.loads(f"attncc: 1\nname: gated\n{HEADS}{body}\n"), tmp_path, ["sm_90"])
    assert (out / "_parts.py").exists()
    (found,) = seen
    assert found.reasons == ()
    config = default_configs(attention(body), find("sm_90"))[0][-1][1]
    steps = -(-int(re.findall(r"dims: (\d+)", body)[0]) // 16) + config["E_KEYS"] // 16
    assert found.loop["wgmma"] == 2 * config["E_CONSUMERS"] * steps
    assert found.shared_bytes <= find("sm_90").shared_bytes_per_block
