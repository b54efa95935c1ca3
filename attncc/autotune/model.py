"""How long a config will take, from published rates alone: good for an order of configs, not for their times.

A tile pays for its two products and for its exponentials; programs that share a multiprocessor overlap the two, and so
do an engine's consumers. Keys and values come through the L2 cache once a query tile, everything else from memory
once. The last wave of programs takes as long as a full one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final

from attncc.autotune.work import BYTES, work
from attncc.device import Device
from attncc.ir.attention import Attention
from attncc.passes.lower.group import groups, members

FLOPS_PER_EXP: Final = 256
"""Of the matrix unit, in the time of one exponential: 4096 and 16 a clock on a Hopper multiprocessor."""
L2_RATE: Final = 2.5
"""Of the cache over the memory."""
UNSPECIALISED: Final = 0.7
"""Of the rate of asynchronous products, what kernels reach whose warps all load, multiply and weigh: the best of 36
configs takes 1.4 times as long as the engine (`benchmarks/results/tuning-compare-nvidia_h200.json`)."""
LAUNCH_MS: Final = 0.004
REGISTERS_BESIDE: Final = 56
"""Of a thread, beside accumulators and scores."""
ROWS_OF_GROUP: Final = 64
"""Of an engine's consumer."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What the model sees of a config."""

    rows: int
    keys: int
    groups: int
    """Of warps that multiply while others do something else, on one multiprocessor."""
    slots: int
    """Programs at once, on the whole device."""


def predict(attn: Attention, device: Device, shape: Mapping[str, int], config: Mapping[str, int], kept: float) -> float:
    """Milliseconds of a call of this shape whose mask keeps a share `kept` of the pairs."""
    tile, keys = tile_of(attn, device, config), shape["Sk"]
    tiles, programs, partial = _programs(attn, tile, shape, config)
    cut = (tile.rows + tile.keys) / 2 / max(keys, 1) if kept < 1 else 0.0  # masks cut tiles, which are computed whole
    share = min(1.0, kept + cut)
    pairs = tiles * tile.rows * ceil(keys * share / tile.keys) * tile.keys
    reached = UNSPECIALISED if device.has_wgmma and not config.get("ENGINE") else 1.0
    peak = device.bf16_tflops * 1e9 * reached  # a millisecond's flops
    products = 2 * pairs * (attn.dims.qk + attn.dims.v) / peak
    exponentials = pairs * FLOPS_PER_EXP / peak
    overlap = 1 - 1 / tile.groups
    compute = max(products, exponentials) + (1 - overlap) * min(products, exponentials)
    rate = device.bandwidth_gbps * 1e6
    width = BYTES[attn.dtype]
    through_cache = pairs / tile.rows * (attn.dims.qk + attn.dims.v) * width / (L2_RATE * rate)
    waves = programs / tile.slots
    full = ceil(waves) / waves if waves else 1.0
    busy = min(1.0, programs / device.sms)  # a multiprocessor has loads of its own in flight, and no more
    from_memory = work(attn, shape, kept).bytes / (rate * busy) + 2 * partial / rate
    return LAUNCH_MS + max(compute * full, through_cache / busy, from_memory)


def _programs(
    attn: Attention, tile: Tile, shape: Mapping[str, int], config: Mapping[str, int]
) -> tuple[int, int, float]:
    """Query tiles, programs, and bytes of partial states that are written to be merged."""
    batch, queries = shape["B"], shape["Sq"]
    if not config.get("SPLIT"):
        tiles = batch * attn.heads.q * ceil(queries / tile.rows)
        return tiles, tiles, 0.0
    tiles = batch * groups(attn) * ceil(queries * members(attn) / tile.rows)
    shares = min(ceil(shape["Sk"] / tile.keys / config["SPLIT"]), max(1, config["FILL"] // tiles))
    return tiles, tiles * shares, 4.0 * batch * attn.heads.q * queries * shares * (attn.dims.v + 2)


def tile_of(attn: Attention, device: Device, config: Mapping[str, int]) -> Tile:
    """The tile of a config, and how many of its programs run at once."""
    if config.get("L_WIDTH"):  # of the latent engine
        return Tile(ROWS_OF_GROUP, config["BN"], 2, device.sms)
    if config.get("ENGINE"):
        consumers = config["E_CONSUMERS"]
        return Tile(consumers * ROWS_OF_GROUP, config["E_KEYS"], consumers, device.sms)
    rows, keys, warps = config["BM"], config["BN"], config.get("num_warps", 4)
    threads = warps * device.warp_size
    wanted = rows * (attn.dims.v + keys) / threads + REGISTERS_BESIDE
    registers = min(config.get("maxnreg") or device.registers_per_thread, device.registers_per_thread, wanted)
    stages = max(1, config.get("num_stages", 1))
    width = BYTES[attn.dtype]
    held = stages * (attn.dims.qk + attn.dims.v) if stages > 1 else max(attn.dims.qk, attn.dims.v)
    shared = width * (rows * attn.dims.qk + keys * held)  # of one stage, values take the place of keys
    resident = min(device.registers_per_sm // int(registers * threads), device.shared_bytes_per_sm // shared)
    return Tile(rows, keys, max(1, resident), device.sms * max(1, resident))
