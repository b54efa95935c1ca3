"""The steps behind attention: maps of the output rows, one row of `STEPS` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call
from attncc.reference.rows import Rows

Step = Callable[[Call, Tensor, Rows], Tensor]
"""The output [H, R, D] and its rows, whose values are the sequence's."""


def epilogue(attn: Attention, o: Tensor, rows: Rows) -> Tensor:
    """The output behind all steps, in their order."""
    for step in attn.epilogue:
        if step.name not in STEPS:
            raise Unsupported(f"the oracle does not evaluate the step '{step.name}'", key="epilogue")
        o = STEPS[step.name](step, o, rows)
    return o


def columns(attn: Attention, inputs: Mapping[str, Tensor]) -> int:
    """How many columns the output has behind all steps."""
    matrices = [inputs[step.words[0]] for step in attn.epilogue if step.name == "absorb"]
    return matrices[-1].shape[-1] if matrices else attn.dims.v


def _own_values(rows: Rows, o: Tensor) -> Tensor:
    """The value at each row's own position [H, R, Dv]; 0 where there is no such key."""
    position, keys = rows.scope.names["i"].flatten(), rows.shape[2]
    inside = (position >= 0) & (position < keys)
    if not keys:
        return torch.zeros_like(o)
    v = rows.v[:, torch.where(inside, position, 0)].to(o.dtype)
    return torch.where(inside[:, None], v, 0.0)


def _factor(call: Call, rows: Rows) -> Tensor:
    return rows.per_row(call.args[0])[..., None]


def _lerp_v(call: Call, o: Tensor, rows: Rows) -> Tensor:
    """(1 - w) o + w v: attention drawn towards the identity (SoftPAG, arXiv 2506.10978)."""
    w = _factor(call, rows)
    return (1 - w) * o + w * _own_values(rows, o)


def _absorb(call: Call, o: Tensor, rows: Rows) -> Tensor:
    """The output times a matrix a head [H, r, Dv] (MLA, DeepSeek-V2)."""
    matmul = rows.numbers.matmul
    return (o.to(matmul) @ rows.scope.inputs[call.words[0]].to(matmul)).to(o.dtype)


STEPS: Final[dict[str, Step]] = {
    "lerp_v": _lerp_v,
    "gate": lambda call, o, rows: _factor(call, rows) * o,
    "skip": lambda call, o, rows: o + _factor(call, rows) * _own_values(rows, o),
    "absorb": _absorb,
}
