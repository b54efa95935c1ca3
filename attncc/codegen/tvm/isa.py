"""Instruction sets that CPU kernels are built for, and the register tile that suits each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol


class Machine(Protocol):
    """What formulas and tasks want to know of a kernel's machine."""

    @property
    def lanes(self) -> int:
        """Rows that a vector holds; 1 where a value is a number."""
        ...

    @property
    def vectors(self) -> int: ...

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        ...

    @property
    def has_scalef(self) -> bool: ...

    @property
    def has_functions(self) -> bool:
        """Whether exp2 and its like are instructions, or calls as quick."""
        ...


@dataclass(frozen=True, slots=True)
class Isa:
    """What a processor has: `keys` products of `vectors` registers of `lanes` query rows each are summed at once."""

    name: str
    triple: str
    cpu: str
    """What LLVM calls the least processor that has it."""
    lanes: int
    vectors: int
    keys: int
    has_scalef: bool = False
    """Whether one instruction multiplies by a power of two."""
    has_functions: bool = False

    @property
    def machine(self) -> str:
        """What `platform.machine` calls its kind of processor."""
        return self.triple.partition("-")[0]

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return self.lanes * self.vectors


LINUX: Final = "x86_64-unknown-linux-gnu"
ISAS: Final = (
    Isa("avx512", LINUX, "x86-64-v4", lanes=16, vectors=4, keys=4, has_scalef=True),
    Isa("avx2", LINUX, "x86-64-v3", lanes=8, vectors=3, keys=4),
    Isa("neon", "aarch64-unknown-linux-gnu", "generic", lanes=4, vectors=4, keys=4),
)
KEYS: Final = 64
"""Keys of a tile."""
UNROLL: Final = 4
"""Columns that the inner loop of a product takes at once."""
