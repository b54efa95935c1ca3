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

    def make_map(self, at: int, t: torch.Tensor, axes: str, block: list[int]) -> Any:
        view = operand_view(t, axes)
        if view.dtype == torch.uint8:  # what an operand of few bits is stored as
            view = view.view(torch.float8_e4m3fn)
        layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[view.dtype])
        return TensorDescriptor(view, list(view.shape), map_strides(view), block, layout)
