"""How the tensors and sizes of a call stand in an emitted package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from attncc.codegen.call import tuple_text
from attncc.codegen.host import host_expr
from attncc.codegen.triton import lower_name
from attncc.ir.attention import Attention, Input, Layout, Size
from attncc.ir.expr import Dtype
from attncc.ir.tile import Scratch

TORCH_DTYPE: Final[Mapping[str, str]] = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int32": "int32", "int64": "int64", "int8": "int8",
    "uint8": "uint8", "bool": "bool", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2",
}  # fmt: skip
SCRATCH_DTYPE: Final[Mapping[Dtype, str]] = {
    "i32": "int32", "i64": "int64", "i8": "int8", "u8": "uint8", "f16": "float16", "bf16": "bfloat16", "f32": "float32",
    "bool": "bool", "f8e4m3": "uint8", "f8e5m2": "uint8",
}  # fmt: skip
STRIDED: Final[Mapping[Layout, str]] = {"bhsd": "bhsd", "bshd": "bshd", "varlen": "shd"}


def strided(layout: Layout) -> str:
    """Where the b, h, s, d axes of an operand are."""
    return STRIDED[layout]


def axes_of(axes: Iterable[int | str]) -> str:
    """Names and numbers of axes as text of a tuple."""
    return tuple_text(f'"{a}"' if isinstance(a, str) else str(a) for a in axes)


def size_bounds(size: Size, least: int = 0) -> str:
    """What a call's size may be, as text."""
    fixed = "" if size.fixed is None else f", fixed={size.fixed}"
    more = f", multiple={size.multiple}" * (size.multiple > 1) + f", least={least}" * (least > 0)
    return f"Size({size.most}{fixed}{more})"


def input_tensor(attn: Attention, x: Input) -> str:
    """An input as a call must give it, as text."""
    known = {"Hq": attn.heads.q, "Hk": attn.heads.kv, "Hv": attn.heads.v, "Dqk": attn.dims.qk, "Dv": attn.dims.v}
    shape = [known.get(s, s) if isinstance(s, str) else s for s in x.shape]
    return f'Tensor("{x.name}", {axes_of(shape)}, torch.{TORCH_DTYPE[x.dtype]}),'


def scratch_entry(s: Scratch) -> str:
    """A temporary as a package knows it, as text."""
    shape = tuple_text(map(host_expr, s.shape))
    return f'Scratch("{lower_name(s.name)}", lambda n: {shape}, torch.{SCRATCH_DTYPE[s.dtype]})'
