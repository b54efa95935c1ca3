"""What comes with a cubin, known without TVM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code of one architecture, and what its launcher has to know."""

    code: bytes
    rows: int
    """Query rows of a block."""
    keys: int
    """That it walks at a time."""
    threads: int
    shared_bytes: int
    """Dynamic shared memory of a block."""
