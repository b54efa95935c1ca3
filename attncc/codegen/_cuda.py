"""The CUDA side of an emitted package: checks a call, plans it once, and launches a cubin by the driver's own calls.

The cubins in `cuda/` need a driver, and neither Triton nor a compiler. Nothing here reads device memory, so calls can
be captured in a CUDA graph.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _driver
from ._checks import Sizes, check_scale, check_tensors, default_scale, fill, keep, own_sizes
from ._runtime import Config, Result, Variant

FOLDER = Path(__file__).resolve().parent / "cuda"
LANES_OF_BYTES = 16
"""Bytes that one copy moves; operands that lie on them have a kernel of their own."""
IN_CHUNKS, ANY = "attention", "attention_any"


@dataclass(frozen=True)
class Block:
    """How a cubin's kernels are launched."""

    rows: int
    keys: int
    threads: int
    shared_bytes: int


@dataclass
class Plan:
    """What calls of one combination of shapes, strides and dtypes share."""

    scale: float
    """For calls that give none."""
    output: tuple[int, ...]
    lse: tuple[int, ...] | None
    packed: bool
    device: torch.device
    block: Block
    empty: bool = False
    function: _driver.Function | None = None
    blocks: int = 0
    parameters: bytes = b""
    """As the kernel takes them, pointers and the scale left open."""
    scale_at: int = 0


class Runner:
    """Calls a variant on an NVIDIA GPU; a cubin is loaded by the first call on a device.

    `heads`: query heads. `blocks`: by architecture, one for each cubin.
    """

    def __init__(self, variant: Variant, heads: int, blocks: Mapping[str, Block]) -> None:
        self.variant, self.heads, self.blocks = variant, heads, blocks
        self.plans: dict[Any, Plan] = {}
        self.functions: dict[tuple[int, str], _driver.Function] = {}

    def __call__(self, tensors: Sequence[torch.Tensor], scale: float | None, with_lse: bool) -> Result:
        key = (
            scale is None,
            *[(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % LANES_OF_BYTES) for t in tensors],
        )
        plan = self.plans.get(key)
        if plan is None:
            plan = keep(self.plans, key, self.plan(tensors, scale is None))
        factor = plan.scale if scale is None else check_scale(self.variant.name, scale)
        q = tensors[0]
        lse = None if plan.lse is None else q.new_empty(plan.lse, dtype=torch.float32)
        if plan.empty or plan.packed:  # packed: rows behind the last sequence are nobody's
            o = q.new_zeros(plan.output)
            lse = None if lse is None else lse.fill_(-math.inf)
        else:
            o = q.new_empty(plan.output)
        if not plan.empty:
            start(plan, [*tensors, o, lse], factor)
        return o, lse if with_lse else None

    # -- once per combination of shapes, strides and dtypes --------------------------------------

    def plan(self, tensors: Sequence[torch.Tensor], with_scale: bool) -> Plan:
        """`with_scale`: the call gives none, so that the spec's own is due."""
        v, q = self.variant, tensors[0]
        sizes = check_tensors(v.name, v.tensors, tensors, v.sizes)
        if not q.is_cuda:
            raise RuntimeError(f"{v.name}: tensors are on {q.device}, the kernels need an NVIDIA GPU")
        packed = "Tq" in sizes
        lse = fill(v.lse, sizes) if v.lse else None
        arch, _ = self.find(q.device)
        plan = Plan(1.0, fill(v.output, sizes), lse, packed, q.device, self.blocks[arch])
        if 0 in plan.output or sizes["Tk" if packed else "Sk"] == 0 or sizes["B"] == 0:
            plan.empty = True
            return plan
        if with_scale:
            plan.scale = default_scale(v.name, v.scale, sizes)
        tiles = (
            sizes["Tq"] // plan.block.rows + sizes["B"] if packed else -(-sizes["Sq"] // plan.block.rows) * sizes["B"]
        )
        plan.blocks = tiles * self.heads
        if plan.blocks >= 2**31:
            raise ValueError(f"{v.name}: {plan.blocks} blocks are more than a GPU launches at once (2**31 - 1)")
        plan.function = self.function(q.device, arch, IN_CHUNKS if self.in_chunks(tensors) else ANY)
        made = [
            *tensors,
            torch.empty(plan.output, device="meta"),
            torch.empty(lse or (1,) * (q.dim() - 1), device="meta"),
        ]
        extents = [n for t in made for side in (t.shape, t.stride()) for n in side or (1,)]
        own = own_sizes(v.sizes, sizes)
        plan.parameters = struct.pack(
            f"={len(made)}Q{len(extents)}qf{len(own)}i", *[0] * len(made), *extents, 0.0, *own
        )
        plan.scale_at = 8 * (len(made) + len(extents))
        return plan

    def in_chunks(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether operands, their rows and the output's lie on 16 bytes."""
        width = self.variant.output[-1]
        assert isinstance(width, int)
        return width * tensors[0].element_size() % LANES_OF_BYTES == 0 and all(map(lies_on_chunks, tensors[:3]))

    def function(self, device: torch.device, arch: str, kernel: str) -> _driver.Function:
        """A kernel's handle on a device, whose module is loaded once."""
        found = self.functions.get((device.index, kernel))
        if found is None:
            block = self.blocks[arch]
            limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
            if block.shared_bytes > limit:
                raise RuntimeError(
                    f"{self.variant.name}: a block takes {block.shared_bytes} bytes of shared memory, this GPU has "
                    f"{limit}: compile the package with --target for it"
                )
            with torch.cuda.device(device):
                _driver.enter_context(device)
                handle = _driver.load((FOLDER / f"{arch}.cubin").read_bytes(), kernel, block.shared_bytes)
            found = _driver.Function(handle, device, block.threads, block.shared_bytes)
            self.functions[device.index, kernel] = found
        return found

    def choose(self, device: torch.device, sizes: Sizes) -> tuple[Config, str]:
        """The block of the cubin for this device; the same for every shape."""
        arch, rule = self.find(device)
        block = self.blocks[arch]
        return {"BM": block.rows, "BN": block.keys, "num_warps": block.threads // 32}, rule

    def find(self, device: torch.device) -> tuple[str, str]:
        """The newest cubin that this GPU runs: of its own major architecture, and no newer."""
        major, minor = torch.cuda.get_device_capability(device)
        known = {int(arch.removeprefix("sm_")): arch for arch in self.blocks}
        runs = [n for n in known if n // 10 == major and n % 10 <= minor]
        if not runs:
            raise RuntimeError(
                f"{self.variant.name} has cubins for {', '.join(sorted(self.blocks))} and cannot run on "
                f"sm_{major}{minor}: compile it with --target sm_{major}{minor}"
            )
        return known[max(runs)], f"the cubin cuda/{known[max(runs)]}.cubin"


def lies_on_chunks(t: torch.Tensor) -> bool:
    """Whether every row of an operand begins on 16 bytes and is a multiple of them."""
    size = t.element_size()
    steps = [step for n, step in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    return all(n * size % LANES_OF_BYTES == 0 for n in (t.shape[-1], *steps)) and t.data_ptr() % LANES_OF_BYTES == 0


def start(plan: Plan, tensors: Sequence[torch.Tensor | None], scale: float) -> None:
    """Launches a plan's kernel on its device, whichever is the current one."""
    if plan.device.index == torch.cuda.current_device():
        launch(plan, tensors, scale)
        return
    with torch.cuda.device(plan.device):
        launch(plan, tensors, scale)


def launch(plan: Plan, tensors: Sequence[torch.Tensor | None], scale: float) -> None:
    """Starts a plan's kernel on the current stream of its device."""
    content = bytearray(plan.parameters)
    struct.pack_into(f"={len(tensors)}Q", content, 0, *[0 if t is None else t.data_ptr() for t in tensors])
    struct.pack_into("=f", content, plan.scale_at, scale)
    _driver.start_packed(plan.function, plan.blocks, torch.cuda.current_stream(plan.device).cuda_stream, content)
