"""A linear or recurrent part: features, decay and update, token by token or in pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Part
from attncc.reference.rows import Partial, Rows


@dataclass(frozen=True, slots=True)
class Stated:
    """What a state makes of its rows, and the state behind the last key [H, features, Dv]."""

    partial: Partial
    final: Tensor


def attend_state(part: Part, rows: Rows) -> Stated:
    """All rows of a sequence through a state."""
    raise Unsupported("the oracle does not evaluate 'state'", key="state")
