"""What a call has to compute and to move at least: the two numbers that a roofline is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attncc.autotune.record import Sparsity
from attncc.errors import SpecError
from attncc.ir.attention import Attention

TILE: Final = 128
"""Rows and keys of the tiles that `Sparsity` counts."""
BYTES: Final = {"bf16": 2, "fp16": 2, "fp32": 4}
LSE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Of one call, whatever the config."""

    flops: float
    """Of the two matrix products; a multiplication and an addition are two."""
    bytes: float
    """Of the operands and results, each moved once."""

    @property
    def intensity(self) -> float:
        """FLOP per byte: below the card's own ratio of rates, memory bounds the call, above it arithmetic does."""
        return self.flops / self.bytes


def work(attn: Attention, shape: Mapping[str, int], kept: float = 1.0) -> Work:
    """The forward of `attn` on a shape that has B, Sq and Sk, sizes that the spec fixes aside.

    `kept` is the share of (query, key) pairs that the mask keeps. Extra inputs are left out: they are small beside q,
    k and v, or broadcast. Sequences of a packed batch count as B of Sq queries and Sk keys each.
    """
    b, sq, sk = (_size(attn, shape, name) for name in ("B", "Sq", "Sk"))
    heads, dims = attn.heads, attn.dims
    pairs = sq * sk * kept
    flops = 2 * b * heads.q * pairs * (dims.qk + dims.v)
    queries = heads.q * sq * (dims.qk + dims.v)  # q and o
    keys = sk * (heads.kv * dims.qk + (0 if attn.is_latent else heads.v * dims.v))
    lse = LSE_BYTES * heads.q * sq if attn.wants("lse") else 0
    return Work(flops, b * (BYTES[attn.dtype] * (queries + keys) + lse))


def kept(sparsity: Sparsity | None, keys: int) -> float:
    """The share of pairs that a mask keeps, by its tiles: half of those in a tile that it cuts, as a diagonal does."""
    if sparsity is None or keys == 0:
        return 1.0
    return min(1.0, sparsity.tiles * TILE / keys * (1 + sparsity.full) / 2)


def _size(attn: Attention, shape: Mapping[str, int], name: str) -> int:
    size = shape.get(name, attn.size(name).fixed)
    if not size:
        sizes = " ".join(f"{k}={v}" for k, v in shape.items()) or "nothing"
        raise SpecError(
            f"the shape of '{attn.name}' has {name}={size} in {sizes}", hint=f"{name} must be 1 or more there"
        )
    return size
