"""A tensor of a call that the variant has derived: its axes, its dtype, what it says."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor of a call: a name or number per axis, and its dtype as the spec's inputs have them."""

    name: str
    axes: tuple[int | str, ...]
    dtype: str
    doc: str
    contiguous: bool = False
    """Whether it must be: its strides are known when kernels are compiled."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a tensor that is contiguous, of which all axes but the first are numbers; else none."""
        return tuple(prod(map(int, self.axes[n + 1 :])) for n in range(len(self.axes))) if self.contiguous else ()
