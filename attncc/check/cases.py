"""The calls a package is checked on: shapes that a spec allows, and operands with a trait that has broken kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from attncc.errors import SpecError, nearest
from attncc.ir.attention import Attention
from attncc.ir.primitives import pairs_tokens

Trait = Literal[
    "random",
    "one_hot",
    "uniform",
    "large_logits",
    "nan_around",
    "nan_keys",
    "nan_neighbour",
    "expanded",
    "unaligned",
    "last_axis_strided",
]

TRAITS: Final[Mapping[Trait, str]] = {
    "random": "normal values",
    "one_hot": "each row has one key that takes all of the weight",
    "uniform": "all keys are alike",
    "large_logits": "logits of many hundreds: exp overflows without the running maximum",
    "nan_around": "views into buffers whose other memory is NaN",
    "nan_keys": "a few keys and values are NaN: only the rows that see them are",
    "nan_neighbour": "the last sequence's keys and values are NaN; the others must not notice",
    "expanded": "one sequence repeated by a stride of 0",
    "unaligned": "rows that start off every 16-byte boundary",
    "last_axis_strided": "the last axis is not the dense one",
}

REFUSABLE: Final[frozenset[Trait]] = frozenset({"expanded", "unaligned", "last_axis_strided"})
"""A clear error is a right answer to these."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call; in the layout `varlen` the sizes are those of the longest sequence."""

    B: int
    Sq: int
    Sk: int
    trait: Trait = "random"

    def __str__(self) -> str:
        return f"B{self.B}Sq{self.Sq}Sk{self.Sk} {self.trait}"

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(Sq, Sk) of each packed sequence: shorter and shorter ones, the second of three and more empty."""
        shares = [self.B - n for n in range(self.B)]
        whole = [(self.Sq * share // self.B, self.Sk * share // self.B) for share in shares]
        return tuple((0, 0) if n == 1 and self.B > 2 else pair for n, pair in enumerate(whole))


SMALL: Final = (
    (1, 1, 1),
    (2, 67, 67),
    (1, 37, 130),
    (1, 130, 37),
    (3, 1, 70),
    (1, 0, 16),
    (1, 16, 0),
    (0, 16, 16),
)
"""B, Sq, Sk: ragged tails, Sq below and above Sk, one query, and empty ones."""

LARGE: Final = (*SMALL, (2, 1000, 1000), (1, 129, 2050), (1, 2050, 129), (4, 1, 4097), (1, 2048, 2048))

ODD: Final = (2, 35, 130)
LARGE_ODD: Final = (2, 300, 700)
"""The shapes of the cases with a trait: a ragged query tile, whole and cut key tiles."""


def cases(attn: Attention, shapes: Iterable[Mapping[str, int]] | None = None, large: bool = False) -> tuple[Case, ...]:
    """Every shape with random operands, then every other trait on one shape; all within the spec's bounds."""
    if shapes is None:
        wanted, odd = (LARGE, LARGE_ODD) if large else (SMALL, ODD)
    else:
        wanted = tuple(_shape(s) for s in shapes)
        odd = max(wanted, key=lambda s: s[0] * s[1] * s[2], default=ODD)
    plain = [Case(*_within(attn, shape)) for shape in wanted]
    traits = [Case(*_within(attn, odd), trait) for trait in TRAITS if trait != "random"]
    return tuple(dict.fromkeys([*plain, *traits]))


def _shape(sizes: Mapping[str, int]) -> tuple[int, int, int]:
    for name in sizes:
        if name not in ("B", "Sq", "Sk"):
            raise SpecError(f"unknown size '{name}' in a shape to check", hint=nearest(name, ("B", "Sq", "Sk")))
    return sizes.get("B", 1), sizes.get("Sq", sizes.get("Sk", 1)), sizes.get("Sk", sizes.get("Sq", 1))


def _within(attn: Attention, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    b, q, k = (_fit(attn, name, n) for name, n in zip(("B", "Sq", "Sk"), shape, strict=True))
    return (b, q, q) if pairs_tokens(attn) else (b, q, k)


def _fit(attn: Attention, name: str, n: int) -> int:
    """The allowed value next to n: what the spec fixes, else a multiple below its maximum."""
    size = attn.size(name)
    if size.fixed is not None:
        return size.fixed
    rounded = -(-n // size.multiple) * size.multiple
    return rounded if size.max is None else min(rounded, size.max // size.multiple * size.multiple)
