"""The shapes of thread blocks: how many rows and keys a block takes at a time, by head dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attncc.errors import Unsupported
from attncc.ir.attention import Dims

ATOM: Final = 16
"""Rows of a tensor core's product, and its depth; head dims are padded to multiples of it."""
PAD: Final = 8
"""Elements behind each row in shared memory: rows that are read together then lie in other banks."""
STAGES: Final = 2
"""Key tiles in shared memory: one is multiplied while the next is copied."""
ELEMENT: Final = 2
"""Bytes of an operand's element: tensor cores take bf16 and fp16."""


@dataclass(frozen=True, slots=True)
class Warps:
    """A block of `warps` warps with `tiles` x 16 query rows each, which walk `keys` keys at a time."""

    warps: int
    tiles: int
    keys: int
    lanes: int = 1
    has_scalef: bool = False
    has_functions: bool = True

    @property
    def vectors(self) -> int:
        """Rows that a thread has values of."""
        return 2 * self.tiles

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return ATOM * self.tiles * self.warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_bytes(self, dims: Dims) -> int:
        """Q, and STAGES tiles of K and V."""
        qk, v = padded(dims.qk) + PAD, padded(dims.v) + PAD
        return ELEMENT * (self.rows * qk + STAGES * self.keys * (qk + v))


def padded(dim: int) -> int:
    return -(-dim // ATOM) * ATOM


SHAPES: Final = (
    (64, Warps(warps=4, tiles=2, keys=64)),
    (128, Warps(warps=4, tiles=2, keys=64)),
    (256, Warps(warps=8, tiles=1, keys=32)),
    (256, Warps(warps=4, tiles=1, keys=32)),
)
"""The first serves whose bound holds for the larger head dim, and that shared memory holds."""


def choose(dims: Dims, shared_bytes: int) -> Warps:
    """The block for head dims, on a device with so much shared memory for one.

    Raises:
        Unsupported: no block holds such heads.
    """
    widest = max(dims.qk, dims.v)
    for most, warps in SHAPES:
        if widest <= most and warps.shared_bytes(dims) <= shared_bytes:
            return warps
    most = max(bound for bound, _ in SHAPES)
    raise Unsupported(
        f"CUDA kernels of TVM do not carry heads of {dims.qk} and {dims.v}",
        "dims",
        hint=f"supported: up to {most}, where shared memory holds them; or --backend triton",
    )
