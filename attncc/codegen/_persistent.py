"""Launches of persistent blocks, whatever starts them: they draw programs from a counter until there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ._bound import Binding, Bound, ToMap, current_stream


@dataclass
class Persistent(Binding):
    """As many blocks as there are multiprocessors."""

    drawn: int = 0
    """Programs, of which a block has many."""

    def __post_init__(self) -> None:
        self.drawn = self.programs
        self.options = {"num_warps": 4} | {k: n for k, n in self.options.items() if k == "launch_pdl"}
        multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        self.programs = min(self.programs, multiprocessors)

    def flat(self, parameters: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """Entries of the tuple stand behind all other parameters until a call puts them together."""
        at = next(n for n, parameter in enumerate(parameters) if parameter[0] == "args")
        self.bound.at |= {"args": at, "args_from": len(parameters)}
        return [*parameters, *parameters[at][1:]]

    def own(self, at: int, kind: str) -> Any:
        """The value of a parameter that only an engine has, or None where each call makes it."""
        if kind == "counter":
            self.bound.at["counter"] = at
        return self.drawn if kind == "programs" else None

    def prepared(self, bound: Bound, tensors: list[Any], scale: float, to_map: ToMap) -> list[Any]:
        arguments = super().prepared(bound, tensors, scale, to_map)
        if "counter" in bound.at:
            arguments[bound.at["counter"]] = counter()
        for at, number in bound.tensors:
            if tensors[number] is None:  # not written then; none at all would make another kernel
                arguments[at] = nowhere()
        behind = bound.at["args_from"]
        arguments[bound.at["args"]] = tuple(arguments[behind:])
        del arguments[behind:]
        return arguments


_counters: dict[tuple[int, int], torch.Tensor] = {}


def counter() -> torch.Tensor:
    """Three zeros that a kernel counts in, and leaves as zeros: three a stream; in a graph, of the launch's own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(3, dtype=torch.int32, device="cuda")
    device = torch.cuda.current_device()
    key = (device, current_stream(device))
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = torch.zeros(3, dtype=torch.int32, device="cuda")
    return found


@cache
def nowhere() -> torch.Tensor:
    """What stands for an lse that is not wanted."""
    return torch.empty(1, dtype=torch.float32, device="cuda")
