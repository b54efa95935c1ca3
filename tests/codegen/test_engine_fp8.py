"""What the Hopper engine is given of quantised variants: values as tensor cores take them, scales, and their ends."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from codegen.emitted import normal
from codegen.test_engine import FP8, HEADS, PLAIN, Pointer, functions, lowered

from attncc import driver, spec
from attncc.check.run import imported
from attncc.codegen.gate import Findings
from attncc.codegen.parameters import constants
from attncc.device import find
from attncc.ir.expr import const
from attncc.passes.lower.defaults import default_configs
from attncc.passes.lower.stored import key_at

TOKENS = "quantize: {q: fp8_e4m3(per=token), k: fp8_e4m3(per=block(64)), v: fp8_e4m3, p: fp8_e4m3}"


def keys_of(positions: int) -> list[int]:
    return [int(key_at(const(at)).value or 0) for at in range(positions)]


def test_each_position_holds_a_key_of_its_16() -> None:
    keys = keys_of(64)
    assert keys[:16] == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert keys == [16 * n + key for n in range(4) for key in keys[:16]]


def test_weights_come_in_the_order_of_values() -> None:
    """As `rounded` of `_steps.py` moves the columns of a tile."""
    p = np.arange(64 * 128).reshape(64, 128)
    parts = p.reshape(64, 8, 2, 4, 2).transpose(0, 1, 3, 2, 4)
    np.testing.assert_array_equal(parts.reshape(64, 128), p[:, keys_of(128)])


def test_a_thread_keeps_its_weights() -> None:
    """Of 16 columns a thread's sums are 2 t, 2 t + 1, and those 8 further on; its operands are 4 t to 4 t + 3."""
    keys = keys_of(16)
    for t in range(4):
        assert keys[4 * t : 4 * t + 4] == [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]


def test_what_is_launched_beside_it() -> None:
    attn, program = lowered(f"{PLAIN}mask: causal\n{FP8}")
    engine = program.engine
    assert engine is not None
    assert engine.replaces == ("variant_store_v", "variant_forward")
    assert [x.kernel for x in engine.before] == ["variant_turn_v"]
    assert (engine.after, engine.turned) == ((), True)
    assert engine.tensors == ("q_stored", "k_stored", "v_turned")
    fixed = constants(attn, engine)
    assert (fixed["OWN_ROOM"], fixed["MARK_LOST"]) == (1, 0)


@pytest.mark.parametrize(("quantizers", "keys"), [(FP8, 128), (TOKENS, 64)])
def test_scales_inside_a_tile_take_smaller_ones(quantizers: str, keys: int) -> None:
    attn, _ = lowered(f"{PLAIN}mask: causal\n{quantizers}")
    assert default_configs(attn, find("sm_90"))[0][-1][1]["E_KEYS"] == keys


# -- the functions -------------------------------------------------------------------------------


def arguments(qk: float, v: float) -> tuple[object, ...]:
    """Of a launch over two batch entries, 300 queries and 400 keys; the scales of entry 1, heads 3 and 1 are given."""
    scales = [np.full((2, heads, 1), 7.0, np.float32) for heads in (6, 2, 2)]
    scales[0][1, 3], scales[1][1, 1], scales[2][1, 1] = qk, 0.5, v
    given = [x for s in scales for x in (Pointer(s), s.shape[1], 1, 1)]
    return (*given, 2, 300, 400, 0.25)


def test_scales_of_heads_join_the_factor() -> None:
    v = functions(f"{PLAIN}mask: causal\n{FP8}")
    args = arguments(3.0, 0.5)
    _, _, s = v.walk((1, 3, 1, 128), args, 128, 128)
    np.testing.assert_allclose(s[v.factor], 0.25 * 1.5 * np.log2(np.e), rtol=1e-6)
    assert v.factor >= len(v.engine.known)
    _, _, s = v.walk((1, 3, 1, 128), arguments(math.nan, 0.5), 128, 128)
    np.testing.assert_allclose(s[v.factor], 0.25 * np.log2(np.e), rtol=1e-6)


@pytest.mark.parametrize(
    ("qk", "values", "factor", "lse"),
    [
        (3.0, 0.5, 0.5 / 448 * 0.5, 2.5 * np.log(2.0)),
        (3.0, math.nan, math.nan, 2.5 * np.log(2.0)),
        (math.nan, 0.5, math.nan, math.nan),
    ],
)
def test_a_row_s_end(qk: float, values: float, factor: float, lse: float) -> None:
    """What is no number reaches the rows that saw a key, and no other."""
    v = functions(f"{PLAIN}mask: causal\n{FP8}")
    args = arguments(qk, values)
    _, _, s = v.walk((1, 3, 1, 128), args, 128, 128)
    m, total = np.array([1.5, -(2.0**127), 1.0]), np.array([2.0, 0.0, math.nan])
    factors, logs = v.finish(m, total, (), s, args)
    np.testing.assert_allclose(factors, [factor, 1.0, math.nan], rtol=1e-6)
    np.testing.assert_allclose(logs, [lse, -np.inf, math.nan], rtol=1e-6)


def test_a_sink_s_end() -> None:
    v = functions(f"{PLAIN}inputs: {{z: {{shape: [Hq]}}}}\nnormalizer: softmax(sink=z[h])\nmask: causal\n{FP8}")
    args = (Pointer(np.zeros(6, np.float32)), 1, *arguments(3.0, 0.5))
    _, _, s = v.walk((1, 3, 1, 128), args, 128, 128)
    r = v.rows(128 + np.arange(2), s, args)
    factors, logs = v.finish(np.array([1.0, -(2.0**127)]), np.array([2.0, 0.0]), r, s, args)
    np.testing.assert_allclose(factors, [2 / 5 * 0.5 / 448, 0.0], rtol=1e-6)
    np.testing.assert_allclose(logs, [2.0 * np.log(2.0), -np.inf], rtol=1e-6)


# -- turned values -------------------------------------------------------------------------------


def turned(out: Path, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the kernels before the engine make of values, run by Triton's interpreter."""
    with imported(out) as module:
        runner, sizes = module._RUNNER, {"B": v.shape[0], "Sq": 5, "Sk": v.shape[2]}
        q, k = (torch.zeros(v.shape[0], heads, n, v.shape[3], dtype=v.dtype) for heads, n in ((6, 5), (2, v.shape[2])))
        numbers = sizes | {"ENGINE": 1, "BM": 64, "E_CONSUMERS": 2}
        due = [x for x in module.VARIANT.kernels if x.when(numbers) and x.launcher is None]
        shapes = runner.shapes([q, k, v], SimpleNamespace(output=q.shape, lse=None), numbers, due)
        assert "v_stored" not in shapes
        made = {"o": q, "lse": None}
        scratch = [s for s in module.VARIANT.scratch if s.name in shapes]
        made |= {s.name: torch.full(shapes[s.name].shape, 77, dtype=s.dtype) for s in scratch}
        for kernel in due:
            runner.bind(kernel, shapes, numbers, dict.fromkeys(("TMA", "PTX", "FP8"), False), {})(
                [q, k, v, *made.values()], 1.0, 0
            )
        return made


@pytest.mark.parametrize(("dim", "keys"), [(128, 300), (40, 128), (64, 1)])
def test_values_are_turned(dim: int, keys: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = spec.loads(f"attncc: 1\nname: turned_{dim}\n{HEADS}dims: {dim}\ndtype: fp16\n{FP8}\n")
    monkeypatch.setattr("attncc.driver.examine", lambda *where: Findings(()))
    out = driver.compile(loaded, tmp_path, ["sm_90", "interpreter"])
    v = normal(2, 2, keys, dim, dtype=torch.float16)
    made = turned(out, v)
    scales = v.float().abs().amax((2, 3)) / 448
    torch.testing.assert_close(made["v_scales"][..., 0], scales)
    width, positions = -(-dim // 16) * 16, -(-keys // 128) * 128
    held = torch.zeros(2, 2, positions, width)
    held[:, :, :keys, :dim] = v.float() / scales[..., None, None]
    want = held.to(torch.float8_e4m3fn).view(torch.uint8)[:, :, keys_of(positions)].transpose(2, 3)
    assert torch.equal(made["v_turned"], want)
