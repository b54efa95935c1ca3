"""The call of an emitted package that writes new keys and values into a cache, in place.

It reads nothing of the device on the host, so that it can be captured in a CUDA graph with the calls that follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._bound import current_stream
from ._checks import check_tensors, keep
from ._gpu import Plan, Runner, made, seen, views, widened

OPTIONS = {"num_warps": 4}
"""Triton's, of its one kernel."""
EXACT = {"enable_fp_fusion": False}
"""A product and a sum are rounded each, so that what is stored has the same bits everywhere."""


class Appender:
    """Plans a call once for a combination of shapes, strides and dtypes, and launches its kernel."""

    def __init__(self, make: Callable[[], Runner], written: Sequence[str]) -> None:
        self.make, self.written = make, written
        self.runner: Runner | None = None
        self.plans: dict[Any, Plan] = {}

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Runs on `tensors`, which stand in the order of the variant's."""
        key = tuple((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors)
        plan = self.plans.get(key)
        if plan is None:
            plan = keep(self.plans, key, self.plan(tensors))
        if plan.empty:
            return
        if plan.device >= 0 and plan.device != torch.cuda.current_device():
            with torch.cuda.device(plan.device):
                self.run(plan, [*tensors])
        else:
            self.run(plan, [*tensors])

    def plan(self, tensors: Sequence[torch.Tensor]) -> Plan:
        runner = self.runner = self.runner or self.make()
        v, first = runner.variant, tensors[0]
        sizes = check_tensors(v.name, v.tensors, tensors, v.sizes)
        if not first.is_cuda and not (runner.way.interpreted and first.is_cpu):
            raise RuntimeError(f"{v.name}: tensors are on {first.device}, the kernel needs a GPU")
        device = first.device.index if first.is_cuda else -1
        plan = Plan(1.0, (0,), None, [], [], device, interpreted=runner.way.interpreted)
        plan.viewed = views(runner.variant, tensors)
        plan.empty = first.numel() == 0
        if not plan.empty:
            plan.launches = runner.launches(plan, tensors, sizes, OPTIONS, with_lse=False, with_maps=False)
            for launch in () if plan.interpreted else plan.launches:
                launch.options |= EXACT
        return plan

    def run(self, plan: Plan, tensors: list[Any]) -> None:
        given = tensors = seen(tensors, plan.viewed)
        if plan.interpreted:  # the kernel's BF16 is fp32 then
            tensors = [widened(t) if t.dtype == torch.bfloat16 else t for t in tensors]
        arguments = [*tensors, None, None, *made(plan, tensors[0])]
        stream = current_stream(plan.device) if plan.device >= 0 else 0
        for launch in plan.launches:
            launch(arguments, 1.0, stream)
        assert self.runner is not None
        for known, t, wide in zip(self.runner.variant.tensors, given, tensors, strict=True):
            if t is not wide and known.name in self.written:
                t.copy_(wide)


def register(package: str, appender: Appender, names: Sequence[str]) -> Any:
    """The call as a torch operator `attncc_<package>::append`, which writes tensors that it is given."""
    arguments = ", ".join(
        f"Tensor({chr(97 + n)}!) {name}" if name in appender.written else f"Tensor {name}"
        for n, name in enumerate(names)
    )
    op = torch.library.custom_op(
        f"attncc_{package}::append",
        lambda *tensors: appender(tensors),
        mutates_args=tuple(appender.written),
        schema=f"({arguments}) -> ()",
    )
    op.register_fake(lambda *tensors: None)
    return op


def call(name: str, appender: Appender, op: Any, named: dict[str, torch.Tensor]) -> None:
    """Straight to the kernel for plain tensors; through the operator while torch traces."""
    for text, t in named.items():
        if not isinstance(t, torch.Tensor):
            got = "nothing" if t is None else type(t).__name__
            raise TypeError(f"{name}: {text} must be a tensor, got {got}")
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: {text} requires a gradient, but a cache has none: call it under no_grad()")
    if torch.compiler.is_compiling():
        op(*named.values())
    else:
        appender(tuple(named.values()))
