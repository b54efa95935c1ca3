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
SPLIT: Final = "split_kv(8)"
"""The fixed split that stream-K is compared with."""


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
    rival: str = ""
    """Another schedule of ours that is measured beside it."""

    @property
    def b(self) -> int:
        return len(self.lengths)

    @property
    def name(self) -> str:
        """Such as decode/B1Hq32Hk8S8192D128."""
        return f"decode/{self.shape}"

    @property
    def shape(self) -> str:
        same = len(set(self.lengths)) == 1
        length = f"S{self.lengths[0]}" if same else f"T{sum(self.lengths)}"
        kind = "" if self.variant == "none" else f"/{self.variant}"
        return f"B{self.b}Hq{self.hq}Hk{self.hk}{length}D{self.d}{f'P{self.page}' if self.page else ''}{kind}"

    @property
    def package(self) -> str:
        return f"decode_{self.variant}_{self.hq}_{self.hk}_{self.d}_{self.page}"

    @property
    def rival_package(self) -> str:
        return f"{self.package}_{self.rival.partition('(')[0]}"

    @property
    def packages(self) -> tuple[str, ...]:
        """All that the case is measured with."""
        return (self.package, self.rival_package) if self.rival else (self.package,)

    @property
    def specs(self) -> tuple[str, ...]:
        plain = self._spec(self.package)
        return (plain, f"{self._spec(self.rival_package)}schedule: {self.rival}\n") if self.rival else (plain,)

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
    out.append(Decode("none", 32, 8, log_uniform(64, 131072), 64, rival=SPLIT))
    out += [Decode("none", 8 * ratio, 8, (131072,)) for ratio in (1, 3, 5, 6, 7, 8, 12, 16)]
    out += [Decode("none", 32, 8, (32768,) * 4, page) for page in (1, 16, 64, 256)]
    return tuple(dict.fromkeys(out))


CASES: Final = _rows()
