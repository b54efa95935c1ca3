"""The engine's launches by Triton: tensor maps that wgmma reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._bound import map_strides, operand_view
from ._launch import Launch
from ._persistent import Persistent

DTYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
}  # fmt: skip


@dataclass
class EngineLaunch(Persistent, Launch):
    """Of blocks that are persistent."""

    def first(self, given: list[Any]) -> Any:
        made = self.compile(given)
        made[self.programs, 1, 1](*given)
        return made

    def compile(self, given: list[Any]) -> Any:
        """One kernel for all calls, the one that was looked at when the package was made.

        Triton would make one for each set of numbers that are 1 or multiples of 16: it takes `do_not_specialize` to be
        about arguments, and not about the entries of a tuple.
        """
        pairs = zip(self.function.params, given, strict=True)
        return super().compile([x if p.is_constexpr else neutral(x) for p, x in pairs])

    def make_map(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        view = operand_view(t, axes)
        if view.dtype == torch.uint8:  # what an operand of few bits is stored as
            view = view.view(torch.float8_e4m3fn)
        layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[view.dtype])
        if view.dtype == torch.float32:  # of which threads read numbers of their own
            layout = gl.NVMMASharedLayout(0, 32, len(block))
        return TensorDescriptor(view, list(view.shape), map_strides(view), block, layout)


class Anywhere:
    """Stands for a tensor of which nothing is known but its dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 1


def neutral(value: Any) -> Any:
    """Arguments of which Triton cannot tell more than their types."""
    match value:
        case tuple():
            return tuple(map(neutral, value))
        case bool():
            return value
        case int():
            return 3 if abs(value) < 2**31 else 2**40 + 1
        case torch.Tensor():
            return Anywhere(value.dtype)
        case _:
            return value
