"""Launches of an engine's kernel: persistent blocks, tensor maps that wgmma reads, a counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._launch import Launch

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@dataclass
class EngineLaunch(Launch):
    """As many blocks as there are multiprocessors, which draw programs until there are none."""

    counter_at: int = -1
    args_at: int = -1
    """Where the arguments from `args_from` on stand as a tuple."""
    args_from: int = 0
    drawn: int = 0
    """Programs, of which a block has many."""

    def __post_init__(self) -> None:
        self.drawn, self.options = self.programs, {"num_warps": 4}
        multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        self.programs = min(self.programs, multiprocessors)

    def flat(self, parameters: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """Entries of the tuple stand behind all other parameters until a call puts them together."""
        at = next(n for n, parameter in enumerate(parameters) if parameter[0] == "args")
        self.args_at, self.args_from = at, len(parameters)
        return [*parameters, *parameters[at][1:]]

    def own(self, at: int, kind: str) -> Any:
        """The value of a parameter that only an engine has, or None where each call makes it."""
        if kind == "counter":
            self.counter_at = at
        return self.drawn if kind == "programs" else None

    def prepared(self, tensors: list[Any], scale: float) -> list[Any]:
        arguments = super().prepared(tensors, scale)
        arguments[self.counter_at] = counter()
        arguments[self.args_at] = tuple(arguments[self.args_from :])
        del arguments[self.args_from :]
        return arguments

    def make_map(self, view: torch.Tensor, strides: list[int], block: list[int]) -> Any:
        layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[view.dtype])
        return TensorDescriptor(view, list(view.shape), strides, block, layout)


_counters: dict[tuple[int, int], torch.Tensor] = {}


def counter() -> torch.Tensor:
    """Three zeros that a kernel counts in, and leaves as zeros: three a stream; in a graph, of the launch's own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(3, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream()
    key = (stream.device_index, stream.cuda_stream)
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = torch.zeros(3, dtype=torch.int32, device="cuda")
    return found
