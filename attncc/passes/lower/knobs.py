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

SPLIT: Final = Knob(
    "SPLIT",
    (0, 4, 8, 16, 2),
    "0: one program walks all key tiles of its rows; else they are shared out, so many or more to a program; exactly "
    "so many for `reproducible: batch`: shares then begin at the same keys, whatever stands beside a sequence",
)
FILL: Final = Knob(
    "FILL", (528, 264, 1056, 132), "programs that fill the GPU: where shares would be more in all, they are larger"
)

E_KEYS: Final = Knob("E_KEYS", (64, 80, 96, 112, 128), "keys of its tiles")
E_POLY: Final = Knob("E_POLY", (0, 1, 2, 3), "of eight exponentials, how many are polynomials")
E_TURNS: Final = Knob("E_TURNS", (0, 1, 2), "consumers take turns: 1: to issue products; 2: until scores are there")
E_GROUP: Final = Knob("E_GROUP", (8, 1, 4, 16), "heads whose keys and values share the L2 cache")

ENGINE_KNOBS: Final = (
    E_KEYS,
    Knob("E_CONSUMERS", (2, 3), "warpgroups that multiply, of 64 rows each"),
    Knob("E_STAGES", (2, 3), "key tiles in shared memory"),
    Knob("E_Q_STAGES", (1, 2), "query tiles in shared memory"),
    E_GROUP,
    E_TURNS,
    Knob("E_REGISTERS", (240, 160), "of a consumer's thread"),
    E_POLY,
    Knob("E_DRAWN", (1, 0), "1: blocks draw query tiles from a counter; 0: they are dealt out beforehand"),
)
LATENT_KNOBS: Final = (Knob("L_WIDTH", (128, 64, 256), "columns of the pieces in which key tiles are copied"),)


def largest(knob: str) -> int:
    """The greatest value a knob may take."""
    return max(next(k for k in KNOBS if k.name == knob).choices)
