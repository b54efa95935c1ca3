"""Calls of few queries, whose keys are shared out to several programs, run by Triton's interpreter; and compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from codegen.emitted import Package, normal, package, passes
from hypothesis import given
from hypothesis import strategies as st

from attncc import driver
from attncc.check.cases import Case
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.ir.attention import Attention
from attncc.ir.expr import const
from attncc.passes.lower.defaults import default_configs
from attncc.passes.lower.partial import Part

EXAMPLES = Path(__file__).parents[2] / "examples"
FP32 = "dims: 16\ndtype: fp32\n"
PLAIN = f"heads: {{q: 4, kv: 2}}\n{FP32}"
FEATURES = {
    "no mask, one head": f"heads: 1\n{FP32}",
    "causal, three heads a key head": f"heads: {{q: 6, kv: 2}}\n{FP32}mask: causal",
    "softcap, eight heads": f"heads: {{q: 8, kv: 1}}\n{FP32}score: softcap(qk * scale, 3)\nmask: causal",
    "alibi in a window, four heads": f"heads: {{q: 8, kv: 2}}\n{FP32}score: qk * scale - 0.1 * (h + 1) * abs(i - j)\n"
    "mask: causal & window(20)",
    "sinks and a window": f"{PLAIN}inputs: {{z: {{shape: [Hq]}}}}\nmask: causal & (window(9) | sink(3))\n"
    "normalizer: softmax(sink=z[h])",
    "ranges by head": f"{PLAIN}mask: (h < 2) & (j < 20) | causal & (i - j < 30 * h)",
    "prefix, a bias for each pair": f"{PLAIN}inputs: {{bias: {{shape: [B, Hq, Sq, Sk]}}}}\n"
    "score: qk * scale + bias[b, h, row, j]\nmask: causal | prefix(7)",
    "along diagonals": f"{PLAIN}inputs: {{rel: {{shape: [Hq, 11]}}}}\n"
    "score: qk * scale + rel[h, i - j + 5]\nmask: causal",
    "tiles skipped": f"{PLAIN}mask: causal & dilated(40)",
    "heads side by side": f"heads: {{q: 6, kv: 2, map: tile}}\n{FP32}mask: causal & (j % (h + 2) > 0)",
    "other value heads": f"heads: {{q: 12, kv: 2, v: 3}}\n{FP32}mask: causal",
    "linear": f"{PLAIN}normalizer: linear(0.1)\noutputs: [o]\nscore: exp(qk * 0.1)\nmask: causal",
    "relu": f"{PLAIN}normalizer: relu\noutputs: [o]",
    "pieces": "heads: {q: 4, kv: 2}\ndims: {qk: 72, v: 40}\ndtype: fp16\nlayout: bshd\nmask: causal",
    "bf16": "heads: {q: 4, kv: 2}\ndims: 40\nmask: causal",
}
FAR = f"{PLAIN}mask: (j >= 3) & (j < 4)"
BATCH = f"{PLAIN}numerics: {{reproducible: batch}}\n"


def programs(p: Package, q: torch.Tensor, k: torch.Tensor) -> list[int]:
    """Of each launch of a call."""
    return [launch.programs for launch in p.module._RUNNER.plan((q, k, k), False, True).launches]


@given(whole=st.integers(0, 40), cut=st.integers(0, 9), stride=st.integers(1, 7))
def test_dealt_shares_have_each_tile_once(whole: int, cut: int, stride: int) -> None:
    """Whole tiles first, then those behind them, as the two loops of a kernel count them."""
    visited: list[int] = []
    for share in range(stride):
        part = Part(const(share), const(whole + cut), stride)
        behind = part.behind(const(whole)).value
        assert isinstance(behind, int)
        visited += range(share, whole, stride)
        visited += (whole + t for t in range(behind, cut, stride))
    assert sorted(visited) == [*range(whole + cut)]


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    p = package(FEATURES[feature])
    passes(p.tiles(16, 16, split=1, fill=6), Case(1, 5, 45), Case(1, 2, 41, "nan_keys"), Case(2, 1, 41, "nan_keys"))
    passes(p.tiles(16, 32, one_pass=1, split=2), Case(2, 1, 70))


@pytest.mark.parametrize("trait", ["large_logits", "nan_around", "nan_neighbour", "unaligned", "one_hot"])
def test_operands(trait: str) -> None:
    passes(package(f"{PLAIN}mask: causal").tiles(16, 16, split=1, fill=12), Case(2, 3, 41, trait))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 17), (1, 5, 3), (1, 20, 40), (1, 0, 16), (1, 16, 0), (0, 16, 16)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    """Fewer keys than shares, rows that see none, several query tiles of a group, and empty calls."""
    passes(package(f"{PLAIN}mask: causal").tiles(16, 16, split=1), Case(*shape))


def test_a_window_far_from_the_end() -> None:
    """One share has the only tile, the others have nothing to do."""
    p = package(FAR).tiles(16, 16, split=1)
    passes(p, Case(1, 1, 200))
    q, k, v = normal(1, 4, 2, 16), normal(1, 2, 200, 16, seed=1), normal(1, 2, 200, 16, seed=2)
    o, lse = p(q, k, v, return_lse=True)
    assert torch.equal(o, v[:, [0, 0, 1, 1], 3:4].expand(1, 4, 2, 16))
    torch.testing.assert_close(lse, (q * k[:, [0, 0, 1, 1], 3:4]).sum(-1) / 4)


def test_rows_that_see_nothing() -> None:
    p = package(f"{PLAIN}inputs: {{lens: {{shape: [B], dtype: int32}}}}\nmask: j < lens[b]").tiles(16, 16, split=1)
    q, k = normal(2, 4, 2, 16), normal(2, 2, 70, 16)
    k[0] = torch.nan
    o, lse = p(q, k, k, lens=torch.tensor([0, 65], dtype=torch.int32), return_lse=True)
    assert (o[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert o[1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("one_pass", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_keys_and_values_do_not_matter(bad: float, one_pass: int) -> None:
    p = package(f"{PLAIN}mask: causal").tiles(16, 16, one_pass, split=1)
    q, k, v = normal(1, 4, 4, 16), normal(1, 2, 40, 16, seed=1), normal(1, 2, 40, 16, seed=2)
    clean = p(q, k, v)
    v[:, :, 38:] = bad
    k[:, :, 39] = bad
    o = p(q, k, v)
    assert torch.equal(o[:, :, :2], clean[:, :, :2])
    assert not o[:, :, 2:].isfinite().any()


def test_the_lse_changes_nothing() -> None:
    p = package(f"{PLAIN}mask: causal").tiles(16, 16, split=1)
    q, k = normal(1, 4, 2, 16), normal(1, 2, 40, 16, seed=1)
    assert torch.equal(p(q, k, k, return_lse=True)[0], p(q, k, k))


def test_shares_do_not_matter_much() -> None:
    p = package(f"{PLAIN}mask: causal & (window(50) | sink(3))")
    q, k, v = normal(1, 4, 2, 16), normal(1, 2, 140, 16, seed=1), normal(1, 2, 140, 16, seed=2)
    whole = p.tiles(16, 16)(q, k, v)
    for split, fill in ((1, 1), (1, 6), (1, 100), (3, 100)):
        torch.testing.assert_close(p.tiles(16, 16, split=split, fill=fill)(q, k, v), whole, rtol=1e-5, atol=1e-6)


def test_shares_fill_the_gpu() -> None:
    p = package(PLAIN)

    def launched(batch: int, rows: int, split: int, fill: int) -> list[int]:
        return programs(p.tiles(16, 16, split=split, fill=fill), normal(batch, 4, rows, 16), normal(batch, 2, 160, 16))

    assert launched(1, 1, split=1, fill=64) == [2 * 10, 4]  # no more shares than key tiles
    assert launched(1, 1, split=4, fill=64) == [2 * 3, 4]  # none of fewer than four
    assert launched(3, 1, split=1, fill=24) == [6 * 4, 12]  # as many as fill it
    assert launched(3, 9, split=1, fill=24) == [6 * 2 * 2, 108]  # two query tiles of nine queries of two heads
    assert launched(3, 1, split=1, fill=1) == [6, 12]
    assert launched(3, 1, split=0, fill=64) == [12]
    masked, q, k = package(f"{PLAIN}mask: causal"), normal(3, 4, 2, 16), normal(3, 2, 160, 16)
    assert programs(masked.tiles(16, 16, split=4), q, k) == [18, 18, 24]  # for tiles lost to NaN once more
    assert programs(masked.tiles(16, 16, one_pass=1, split=4), q, k) == [18, 24]


def test_one_query_s_heads_see_the_same_keys() -> None:
    """What it does not see is left out at once, and no tile is lost to NaN; unless the mask tells heads apart."""
    q, k = normal(3, 4, 1, 16), normal(3, 2, 160, 16)
    for one_pass in (0, 1):
        assert programs(package(f"{PLAIN}mask: causal").tiles(16, 16, one_pass, split=4), q, k) == [18, 12]
    by_head = f"{PLAIN}inputs: {{reach: {{shape: [Hq], dtype: int32}}}}\nmask: i - j < reach[h]"
    p, reach = package(by_head).tiles(16, 16, split=4), torch.full((4,), 9, dtype=torch.int32)
    assert len(p.module._RUNNER.plan((q, k, k, reach), False, True).launches) == 3


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        ("causal & window(9)", lambda j: j > 150),
        ("(i - j) % 3 == 0", lambda j: (159 - j) % 3 == 0),
        ("window(20) & (j % 2 == 1)", lambda j: (j > 139) & (j % 2 == 1)),
    ],
)
def test_what_one_query_does_not_see_may_be_nan(mask: str, seen: Callable[[torch.Tensor], torch.Tensor]) -> None:
    p = package(f"{PLAIN}mask: {mask}").tiles(16, 16, split=1)
    q, k, v = normal(3, 4, 1, 16), normal(3, 2, 160, 16, seed=1), normal(3, 2, 160, 16, seed=2)
    want = p(q, k, v)
    assert torch.isfinite(want).all()
    hidden = ~seen(torch.arange(160))
    for x in (k, v):
        x[:, :, hidden] = torch.nan
    assert torch.equal(p(q, k, v), want)
    v[1, 0, 159] = torch.nan
    assert p(q, k, v).isnan().any(-1).any(-1).tolist() == [[False] * 4, [True, True, False, False], [False] * 4]


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    """Nor on how far the keys of others reach: shares are of so many key tiles."""
    body = f"{BATCH}inputs: {{lens: {{shape: [B], dtype: int32}}}}\nmask: j < lens[b]"
    p = package(body).tiles(16, 16, split=2, fill=1)
    q, k, v = normal(3, 4, 2, 16), normal(3, 2, 150, 16, seed=1), normal(3, 2, 150, 16, seed=2)
    lens = torch.tensor([150, 67, 0], dtype=torch.int32)
    o, lse = p(q, k, v, lens=lens, return_lse=True)
    for n, length in enumerate(lens.tolist()):
        for keys in {max(length, 1), 150}:
            alone = [x[n : n + 1, :, :keys] for x in (k, v)]
            own, own_lse = p(q[n : n + 1], *alone, lens=lens[n : n + 1], return_lse=True)
            assert torch.equal(own, o[n : n + 1])
            assert torch.equal(own_lse, lse[n : n + 1])
    assert programs(package(BATCH).tiles(16, 16, split=2, fill=1), q, k) == [6 * 5, 24]


# -- which calls ---------------------------------------------------------------------------------


def test_which_calls_are_split() -> None:
    p = package("heads: {q: 32, kv: 8}\ndims: 128\nmask: causal", target="sm_90")

    def chosen(Sq: int, Sk: int, B: int = 1) -> tuple[int, int]:
        config = p.module.choose("cpu", B=B, Sq=Sq, Sk=Sk)[0]
        return config["BM"], config["SPLIT"]

    assert [chosen(n, 8192)[0] for n in (1, 4, 5, 8, 9, 16)] == [16, 16, 32, 32, 64, 64]
    assert all(chosen(n, 8192)[1] for n in (1, 16))
    assert chosen(1, 131072, B=64) == chosen(1, 8192)
    assert chosen(1, 512)[1] == chosen(17, 8192)[1] == chosen(2048, 2048)[1] == 0


def test_what_is_reproducible_by_batch_has_no_rows_of_the_batch() -> None:
    table = package(BATCH, target="sm_90").module.VARIANT.configs["sm_90"].TABLE
    assert {size for bounds, _ in table for size in bounds} == {"Sq"}


@pytest.mark.newest
def test_kernels_compile_for_gpus() -> None:
    """Through pointers and tensor maps, one query tile of many heads too; nothing spills."""
    wanted = {}
    for variant in ("causal_gqa", "sink_window"):
        attn, program = driver.lower(driver.load(EXAMPLES / f"{variant}.yaml").attention)
        kernels = package_of(variant)
        for device, row in (("sm_80", 1), ("sm_90", 3)):
            config = short(attn, device)[row - 1]
            found = jobs(program, str(kernels), find(device), config)
            wanted |= {
                f"{variant} {device} {n}": j for n, j in found.items() if n.endswith(("_split PASS=0", "_merge"))
            }
    assert len(wanted) == 8
    for name, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (name, outcome.reason)
        assert outcome.spill_bytes == 0, name
        assert not outcome.notes, (name, outcome.notes)
        assert outcome.shared_bytes <= find(outcome.target).shared_bytes_per_block
        assert ("mma" in outcome.loop or "wgmma" in outcome.loop) == ("_split" in name), name


def short(attn: Attention, device: str) -> list[dict[str, int]]:
    """The configs of calls that are split."""
    return [dict(config) for _, config in default_configs(attn, find(device))[0] if config["SPLIT"]]


def package_of(variant: str) -> Path:
    body = "".join(
        line
        for line in (EXAMPLES / f"{variant}.yaml").read_text().splitlines(keepends=True)
        if not line.startswith(("attncc:", "name:"))
    )
    return package(body, variant, target="sm_90").path / "kernels.py"
