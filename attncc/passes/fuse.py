"""The place where prologue and epilogue steps join the loads and stores of the main kernel; none can yet."""

from __future__ import annotations

from attncc.errors import Unsupported
from attncc.ir.attention import Attention


def fuse(attn: Attention) -> Attention:
    """The same variant; refuses steps that nothing carries out yet."""
    for key, steps in (("prologue", attn.prologue), ("epilogue", attn.epilogue)):
        if steps:
            names = ", ".join(step.name for step in steps)
            raise Unsupported(f"no {key} step can be fused yet: {names}", key=key, hint=f"leave out '{key}'")
    return attn
