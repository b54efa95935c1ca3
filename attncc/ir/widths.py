"""How wide a call's tensors are where steps change that: matrices of `absorb` make r columns of n."""

from __future__ import annotations

from attncc.ir.attention import Attention, Call
from attncc.ir.primitives import on


def entry_width(attn: Attention, operand: str) -> int:
    """Columns of q, k or v as a call has them, before the steps of the prologue.

    Raises:
        ValueError: a matrix has an axis that is not known when compiled.
    """
    width = attn.dims.v if operand == "v" else attn.dims.qk
    if operand == "v" and attn.is_latent:
        return width
    steps = [step for step in attn.prologue if step.name == "absorb" and operand in on(step)]
    return width + sum(n - r for n, r in (matrix(attn, step) for step in steps))


def exit_width(attn: Attention) -> int:
    """Columns of the output behind the steps of the epilogue.

    Raises:
        ValueError: as above.
    """
    steps = [step for step in attn.epilogue if step.name == "absorb"]
    return matrix(attn, steps[-1])[1] if steps else attn.dims.v


def matrix(attn: Attention, step: Call) -> tuple[int, int]:
    """Rows and columns of the matrix that an `absorb` step reads."""
    rows, columns = (axis_size(attn, entry) for entry in attn.input(step.words[0]).shape[-2:])
    if rows is None or columns is None:
        raise ValueError(f"{step.words[0]}: the sizes of a matrix must be known when compiled")
    return rows, columns


def axis_size(attn: Attention, entry: int | str) -> int | None:
    """The length of an axis by its entry in a shape; None where only a call tells."""
    if isinstance(entry, int):
        return entry
    heads, dims = attn.heads, attn.dims
    known = {"Hq": heads.q, "Hk": heads.kv, "Hv": heads.v, "Dqk": dims.qk, "Dv": dims.v}
    return known.get(entry, attn.size(entry).fixed)
