"""The space of configs: complete ones, the default among them, and nothing that cannot hold its accumulators."""

from __future__ import annotations

import pytest
from carried import carried

from attncc import driver
from attncc.autotune.model import predict, tile_of
from attncc.autotune.space import PRODUCER, branches, candidates
from attncc.autotune.table import pick, sizes_of
from attncc.device import A100, B200, H100, H200, INTERPRETER, MI300X, Device
from attncc.ir.attention import Attention
from attncc.passes.lower.defaults import default_configs

CARRIED = [path.name for path in carried("triton: forward")]
SOME = CARRIED[::4]
LONG = {"B": 1, "Sq": 16384, "Sk": 16384}
FEW = {"B": 1, "Sq": 1, "Sk": 65536}


def space(name: str, device: Device, queries: int = 4096) -> tuple[Attention, list[dict[str, int]]]:
    attn, program = driver.lower(driver.load(driver.EXAMPLES / name).attention)
    return attn, [dict(c.config) for c in candidates(attn, branches(attn, program, device, queries), device)]


@pytest.mark.parametrize("device", [A100, H200, B200, MI300X, INTERPRETER], ids=lambda d: d.name)
@pytest.mark.parametrize("name", SOME)
def test_the_default_is_in_the_space_and_every_config_has_its_knobs(name: str, device: Device) -> None:
    attn, configs = space(name, device)
    default = dict(default_configs(attn, device)[0][-1][1])
    assert default in configs
    plain = {k for k in default if not k.startswith("E_") and k != "ENGINE"}
    assert {frozenset(c) for c in configs} <= {frozenset(plain), frozenset(default)}
    assert len({frozenset(c.items()) for c in configs}) == len(configs)


def test_programs_hold_their_accumulators() -> None:
    attn, configs = space("causal_gqa.yaml", H200)
    for config in configs:
        if config.get("ENGINE"):
            registers = config["E_CONSUMERS"] * config["E_REGISTERS"] + PRODUCER
            assert registers * 128 <= 65536
            assert attn.dims.v + config["E_KEYS"] < 2 * config["E_REGISTERS"]
        else:
            words = config["BM"] * (attn.dims.v + config["BN"]) / (32 * config["num_warps"])
            assert words < (config["maxnreg"] or 255)


def test_an_engine_is_in_the_space_of_its_architecture_alone() -> None:
    for device, has_it in ((H100, True), (H200, True), (A100, False), (B200, False), (MI300X, False)):
        assert any(c.get("ENGINE") for c in space("causal_gqa.yaml", device)[1]) == has_it


def test_registers_are_capped_where_that_can_be() -> None:
    assert all("maxnreg" in c and c["maxnreg"] == 0 for c in space("causal_gqa.yaml", MI300X)[1])
    assert {c["maxnreg"] for c in space("causal_gqa.yaml", A100)[1]} == {0, 128, 160, 168}


def test_longer_calls_and_fuller_masks_take_longer() -> None:
    attn, configs = space("causal_gqa.yaml", H200)
    config = configs[-1]
    times = [predict(attn, H200, {"B": 1, "Sq": n, "Sk": n}, config, 0.5) for n in (1024, 4096, 16384)]
    assert times == sorted(times)
    assert times[2] > 10 * times[1]
    assert predict(attn, H200, LONG, config, 1.0) > 1.8 * predict(attn, H200, LONG, config, 0.5)


def test_no_call_is_faster_than_its_card() -> None:
    attn, configs = space("dense.yaml", H200)
    flops = 4 * LONG["Sq"] * LONG["Sk"] * attn.heads.q * attn.dims.qk
    assert min(predict(attn, H200, LONG, c, 1.0) for c in configs) >= flops / (H200.bf16_tflops * 1e9)


def test_tall_tiles_win_where_keys_are_read_again_and_not_where_rows_are_few() -> None:
    attn, configs = space("dense.yaml", A100)

    def least(rows: int, shape: dict[str, int]) -> float:
        return min(predict(attn, A100, shape, c, 1.0) for c in configs if c["BM"] == rows)

    assert least(64, LONG) < least(16, LONG)
    assert least(16, FEW) <= least(128, FEW)


def test_fewer_registers_make_room_for_more_programs() -> None:
    attn, _ = space("dense.yaml", H200)
    config = {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 1, "maxnreg": 0}
    assert tile_of(attn, H200, {**config, "maxnreg": 128}).slots > tile_of(attn, H200, config).slots


def test_keys_are_shared_out_where_queries_are_few_and_a_default_does() -> None:
    attn, configs = space("causal_gqa.yaml", H200, queries=1)
    default = pick(default_configs(attn, H200)[0], sizes_of(FEW))
    assert default["SPLIT"] > 0
    assert dict(default) in configs
    assert not [c for c in space("causal_gqa.yaml", H200, queries=64)[1] if c.get("SPLIT")]


def test_a_card_is_filled_by_shares_of_one_long_row() -> None:
    attn, configs = space("causal_gqa.yaml", H200, queries=1)
    best = min(configs, key=lambda c: predict(attn, H200, FEW, c, 1.0))
    assert best["SPLIT"] > 0
    whole = min((c for c in configs if not c["SPLIT"]), key=lambda c: predict(attn, H200, FEW, c, 1.0))
    assert predict(attn, H200, FEW, whole, 1.0) > 2 * predict(attn, H200, FEW, best, 1.0)
    least = 2 * FEW["Sk"] * attn.heads.kv * attn.dims.qk * 2 / (H200.bandwidth_gbps * 1e6)
    assert least < predict(attn, H200, FEW, best, 1.0) < 2 * least
