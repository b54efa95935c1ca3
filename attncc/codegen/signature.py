"""The types a kernel's parameters have for Triton, in the order of its signature; offline builds need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attncc.codegen.triton import handles, strides
from attncc.ir.expr import Dtype
from attncc.ir.tile import Kernel, Param, extent_of

POINTEE: Mapping[Dtype, str] = {
    "bool": "i1", "i8": "i8", "u8": "u8", "i16": "i16", "i32": "i32", "i64": "i64", "f8e4m3": "u8", "f8e5m2": "u8",
    "f16": "fp16", "bf16": "bf16", "f32": "fp32", "f64": "fp64",
}  # fmt: skip


def types(
    kernel: Kernel, flags: Sequence[str], config: Mapping[str, int], on: Iterable[str]
) -> tuple[dict[str, str], dict[str, int | bool]]:
    """Triton's type of every run-time parameter, and the value of every constexpr.

    Args:
        flags: the device flags the kernel takes; `on` are those that are true.
    """
    tensors = [p for p in kernel.params if p.role in ("operand", "buffer")]
    tma = "TMA" in on
    signature: dict[str, str] = {}
    for p in tensors:
        signature |= dict(zip(handles(p), _handle_types(p, config, tma), strict=True))
    for p in tensors:
        signature |= dict.fromkeys(strides(p), "i64")
    for p in kernel.params:
        if p.role == "scalar":
            signature[p.name] = POINTEE[p.dtype]
    constants: dict[str, int | bool] = {p.name: config[p.name] for p in kernel.params if p.role == "constexpr"}
    return signature, constants | {flag: flag in on for flag in flags}


def _handle_types(p: Param, config: Mapping[str, int], tma: bool) -> list[str]:
    kind = POINTEE[p.dtype]
    if p.role == "operand" and p.tiles and tma:
        blocks = [", ".join(str(extent_of(d, config)) for d in (1, 1, *tile)) for tile in p.tiles]
        return [f"tensordesc<{kind}[{block}]>" for block in blocks]
    return [f"*{kind}"] * len(handles(p))
