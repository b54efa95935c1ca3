"""Calls of one query that are measured: each with its spec, its lengths and the bytes of its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from random import Random
from typing import Final

from benchmarks.cases import SCALE

BODIES: Final[Mapping[str, str]] = {
    "none": "",
    "causal": "mask: causal",
    "softcap": "score: softcap(qk * scale, 30)",
    "sink": "inputs: {sinks: {shape: [Hq]}}\nnormalizer: softmax(sink=sinks[h])",
}
BYTES: Final = 2
SPLITS: Final = ("split_kv(1)", "split_kv(2)", "split_kv(8)")
"""Fixed splits that stream-K is compared with: 8 is near the best there is for these lengths, which a batch that has
others would not know; 1 is what FlashAttention-2's rule says, for the batch fills the GPU."""
PACKED: Final = "FlashAttention-2, packed"
PEERS: Final = ("cuDNN", "FlexAttention", "bytes")


@dataclass(frozen=True, slots=True)
class Decode:
    """One row of a table: a query a sequence, over keys in rows or in pages."""

    variant: str
    hq: int
    hk: int
    lengths: tuple[int, ...]
    page: int = 0
    """Keys of a page; 0: sequences of one length, in rows."""
    d: int = 128
    rivals: tuple[str, ...] = ()
    """Other schedules of ours that are measured beside it."""
    peers: tuple[str, ...] = PEERS
    """By the names that `decode_measure.PEER` has, and what only reads the bytes."""
    table: str = "decode"

    @property
    def b(self) -> int:
        return len(self.lengths)

    @property
    def name(self) -> str:
        """Such as decode/B1Hq32Hk8S8192D128."""
        return f"{self.table}/{self.shape}"

    @property
    def shape(self) -> str:
        same = len(set(self.lengths)) == 1
        length = f"S{self.lengths[0]}" if same else f"T{sum(self.lengths)}"
        kind = "" if self.variant == "none" else f"/{self.variant}"
        return f"B{self.b}Hq{self.hq}Hk{self.hk}{length}D{self.d}{f'P{self.page}' if self.page else ''}{kind}"

    @property
    def package(self) -> str:
        return f"{self.table}_{self.variant}_{self.hq}_{self.hk}_{self.d}_{self.page}"

    def rival_package(self, schedule: str) -> str:
        return f"{self.package}_{schedule.replace('(', '_').rstrip(')')}"

    @property
    def packages(self) -> tuple[str, ...]:
        """All that the case is measured with."""
        return (self.package, *map(self.rival_package, self.rivals))

    @property
    def specs(self) -> tuple[str, ...]:
        rivals = (f"{self._spec(self.rival_package(x))}schedule: {x}\n" for x in self.rivals)
        return (self._spec(self.package), *rivals)

    def _spec(self, name: str) -> str:
        head = f"attncc: 1\nname: {name}\nheads: {{q: {self.hq}, kv: {self.hk}}}\ndims: {self.d}\nscale: {SCALE}\n"
        pages = f"kv: paged({self.page})\n" if self.page else ""
        return f"{head}{pages}{BODIES[self.variant]}\n"

    @property
    def bytes(self) -> int:
        """Of the keys and values that are used, each read once."""
        return sum(self.lengths) * self.hk * 2 * self.d * BYTES


def log_uniform(count: int, most: int) -> tuple[int, ...]:
    """Lengths of a batch of which each order of magnitude has as many."""
    chance = Random(0)
    return tuple(round(exp(chance.uniform(0.0, log(most)))) for _ in range(count))


def _rows() -> tuple[Decode, ...]:
    dense = (
        (32, 8, (8192,)), (32, 8, (131072,)), (32, 32, (65536,)), (64, 8, (32768,) * 8), (32, 8, (524288,)),
        (32, 8, (8192,) * 64),
    )  # fmt: skip
    out = [Decode("none", *row) for row in dense]
    out += [Decode(variant, 32, 8, (length,)) for variant in ("causal", "softcap", "sink") for length in (8192, 131072)]
    out.append(Decode("none", 32, 8, log_uniform(64, 131072), 64, rivals=SPLITS, peers=(PACKED, "bytes")))
    out += [Decode("none", 8 * ratio, 8, (131072,)) for ratio in (1, 3, 5, 6, 7, 8, 12, 16)]
    out += [Decode("none", 32, 8, (32768,) * 4, page) for page in (1, 16, 64, 256)]
    return tuple(dict.fromkeys(out))


@dataclass(frozen=True, slots=True)
class Series:
    """Cases of the same packages, measured by one process after the other: a process takes longer than a case."""

    cases: tuple[Decode, ...]

    @property
    def shape(self) -> str:
        """The first one's, for all."""
        return self.cases[0].shape

    @property
    def packages(self) -> tuple[str, ...]:
        return self.cases[0].packages


LENGTHS: Final = (16384, 65536, 262144, 524288)
LEAN_PEERS: Final = ("FlashAttention-2", "FlashAttention-2, split", "cuDNN")
"""Without a split, as LeanAttention was compared with it first; and as torch's SDPA has it, which splits by itself."""


def _lean(heads: int, d: int, *several: tuple[int, int]) -> Series:
    """LeanAttention's kind: heads of their own keys, too few for a GPU, and long contexts; `several`: (B, length)."""
    return Series(
        tuple(
            Decode("none", heads, heads, (s,) * b, d=d, rivals=("stream_k", "tile"), peers=LEAN_PEERS, table="lean")
            for b, s in (*((1, s) for s in LENGTHS), *several)
        )
    )


LEAN: Final = (
    _lean(8, 128, (4, 16384), (4, 131072)), _lean(56, 128, (4, 16384), (4, 65536)), _lean(32, 128), _lean(8, 64),
    _lean(16, 128),
)  # fmt: skip
CASES: Final = _rows()
