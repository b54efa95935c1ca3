"""The libraries of a variant for the processors that share this machine's architecture."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from attncc.codegen import _cpu
from attncc.codegen.cpu import check_carried, decodes
from attncc.codegen.tvm import decode, forward
from attncc.codegen.tvm.build import library
from attncc.codegen.tvm.formulas import unknown_operators
from attncc.codegen.tvm.isa import ISAS, Isa
from attncc.errors import Unsupported
from attncc.ir.attention import Attention


def libraries(attn: Attention, portable: bool = True) -> Mapping[str, bytes]:
    """Machine code by instruction set, of a variant that left the passes; what this processor chooses, or all it may.

    Raises:
        Unsupported: names the spec's key that CPU kernels do not carry.
    """
    check_carried(attn)
    for key, e in (("score", attn.part.score), ("mask", attn.part.mask)):
        if unknown := unknown_operators(e):
            raise Unsupported(f"CPU kernels have no '{min(unknown)}'", key)
    here = platform.machine()
    suits = [isa for isa in ISAS if isa.machine == here]
    if not portable:
        suits = [isa for isa in suits if isa.name in _cpu.suited()[:1]] or suits
    built = {isa.name: library(kernels(attn, isa), isa) for isa in suits}
    if not built:
        known = ", ".join(dict.fromkeys(isa.machine for isa in ISAS))
        raise Unsupported(f"no CPU library is built for {here}", hint=f"it is for {known}")
    return built


def kernels(attn: Attention, isa: Isa) -> Mapping[str, Any]:
    """The functions of a library by name: one for any call, and one for few queries where there is one."""
    found = {forward.FUNCTION: forward.forward(attn, isa)}
    return found | ({decode.FUNCTION: decode.decode(attn, isa)} if decodes(attn) else {})
