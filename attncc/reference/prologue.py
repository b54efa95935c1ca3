"""The steps before attention: per-token maps of q, k and v, one row of `STEPS` each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call
from attncc.reference.evaluate import Scope
from attncc.reference.operands import Sequence

Step = Callable[[Call, Sequence, Attention, Scope], Sequence]

STEPS: Final[dict[str, Step]] = {}


def prologue(attn: Attention, sequence: Sequence, scope: Scope) -> Sequence:
    """The sequence behind all steps, in their order."""
    for step in attn.prologue:
        if step.name not in STEPS:
            raise Unsupported(f"the oracle does not evaluate the step '{step.name}'", key="prologue")
        sequence = STEPS[step.name](step, sequence, attn, scope)
    return sequence
