"""The selection of a part: blocks scored, made comparable, chosen by a rule, and what is forced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Part
from attncc.reference.rows import Rows


@dataclass(frozen=True, slots=True)
class Selection:
    """Classes of blocks, and which block each query and key lies in."""

    classes: Tensor
    """int8 [H, query blocks, key blocks]: 1 selected, 0 in between (or just not selected), -1 negligible."""
    q_block: Tensor
    """[H, Sq]: the block of each query."""
    k_block: Tensor
    """[H, Sk]: the block of each key; -1 where a key lies in none."""
    pairs: Tensor | None = None
    """bool [H, Sq, Sk]: which pairs are selected, where that is finer than blocks."""
    queries: Tensor | None = None
    """[H, Dqk]: the mean query it was made for, by which `cosine` judges it."""
    age: int = 0
    """How many calls it has served."""


def select(part: Part, rows: Rows, before: Selection | None = None) -> Selection:
    """The selection for all rows of a sequence, or `before` where it is to be used again.

    `rows` hold every query and key of the sequence, their keys not yet pooled.
    """
    raise Unsupported("the oracle does not evaluate 'select'", key="select")
