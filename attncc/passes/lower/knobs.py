"""The tunable constants of the dense skeletons."""

from __future__ import annotations

from typing import Final

from attncc.ir.tile import Knob

KNOBS: Final = (
    Knob("BM", (64, 16, 32, 128), "rows of a query tile"),
    Knob("BN", (64, 16, 32, 128), "keys of a key tile"),
    Knob("GROUP", (8, 1, 2, 4, 16), "heads whose keys and values share the L2 cache"),
)

WRITE_LSE: Final = Knob("WRITE_LSE", (1, 0), "0: the caller wants the output alone")
ONE_PASS: Final = Knob("ONE_PASS", (0, 1), "1: tiles lost to NaN are redone by the program that finds them")


def largest(knob: str) -> int:
    """The greatest value a knob may take."""
    return max(next(k for k in KNOBS if k.name == knob).choices)
