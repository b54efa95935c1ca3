"""The steps behind attention: maps of the output rows, one row of `STEPS` each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call
from attncc.reference.rows import Rows

Step = Callable[[Call, Tensor, Rows], Tensor]
"""The output [H, R, D] and its rows, whose values are the sequence's."""

STEPS: Final[dict[str, Step]] = {}


def epilogue(attn: Attention, o: Tensor, rows: Rows) -> Tensor:
    """The output behind all steps, in their order."""
    for step in attn.epilogue:
        if step.name not in STEPS:
            raise Unsupported(f"the oracle does not evaluate the step '{step.name}'", key="epilogue")
        o = STEPS[step.name](step, o, rows)
    return o
