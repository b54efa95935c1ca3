"""The cubins of a variant, one an architecture, and how their blocks are launched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from attncc.codegen.cpu import check_carried
from attncc.codegen.cuda import Cubin
from attncc.codegen.tvm.cuda import cubin, forward, warps
from attncc.codegen.tvm.cuda.fragments import NAMES
from attncc.codegen.tvm.cuda.shared import CHUNK
from attncc.codegen.tvm.formulas import unknown_operators
from attncc.device import Device
from attncc.errors import Unsupported
from attncc.ir.attention import Attention

LEAST: Final = 80
"""Compute capability, times 10: asynchronous copies, and products of bf16."""


def cubins(attn: Attention, devices: Iterable[Device]) -> Mapping[str, Cubin]:
    """By architecture, for a variant that left the passes.

    Raises:
        Unsupported: names the spec's key that these kernels do not carry, or says why the target is not theirs.
    """
    check_carried(attn)
    for key, e in (("score", attn.part.score), ("mask", attn.part.mask)):
        if unknown := unknown_operators(e):
            raise Unsupported(f"TVM's kernels have no '{min(unknown)}'", key)
    if attn.dtype not in NAMES:
        hint = f"supported: {', '.join(NAMES)}; or --backend triton"
        raise Unsupported(
            f"CUDA kernels of TVM run on tensor cores, which do not multiply {attn.dtype}", "dtype", hint=hint
        )
    return {device.arch: _built(attn, device) for device in devices}


def _built(attn: Attention, device: Device) -> Cubin:
    if device.vendor != "nvidia" or int(device.arch.removeprefix("sm_")) < LEAST:
        hint = "sm_80 or newer; or --backend triton"
        raise Unsupported(f"CUDA kernels of TVM are not for '{device.name}'", hint=hint)
    block = warps.choose(attn.dims, device.shared_bytes_per_block)
    text = cubin.source({name: forward.forward(attn, block, name) for name in kernels(attn)}, device.arch)
    shared = block.shared_bytes(attn.dims)
    return Cubin(cubin.cubin(text, device.arch), block.rows, block.keys, block.threads, shared)


def kernels(attn: Attention) -> tuple[str, ...]:
    """The names of a cubin's kernels: where no row can lie on 16 bytes there is one."""
    aligned = attn.dims.qk % CHUNK == 0 and attn.dims.v % CHUNK == 0
    return (forward.IN_CHUNKS, forward.ANY) if aligned else (forward.ANY,)
