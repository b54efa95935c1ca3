"""The oracle: what an attention variant computes, in plain torch, straight from its `ir.attention` form.

It shares no code with the passes or the kernels, works in float64 when asked to, and autograd goes
through it.
"""

from attncc.reference.acceptance import Agreement, Deviation, acceptance
from attncc.reference.forward import Outputs, attention, outputs

__all__ = ["Agreement", "Deviation", "Outputs", "acceptance", "attention", "outputs"]
