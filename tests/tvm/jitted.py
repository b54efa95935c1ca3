"""Small TVM functions, one operation applied to arrays, run in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm import vector
from attncc.codegen.tvm.build import compiled
from attncc.codegen.tvm.isa import ISAS, Isa

BY_NAME: Final = {isa.name: isa for isa in ISAS}
CAPABILITY: Final = torch.backends.cpu.get_cpu_capability()
RUNNABLE: Final = [isa for isa in ISAS if isa.name in {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}[CAPABILITY]]
"""What this processor can run."""


def function(isa: Isa, kinds: Sequence[str], out: str, body: Callable[..., Any], lanes: int) -> Any:
    """out[n] = body(x0[n], x1[n], …), `lanes` of them at once."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("f")
        T.func_attr({"tirx.noalias": True})
        n = tirx.Var("n", "int64")
        handles = [T.arg(f"x{i}", T.handle()) for i in range(len(kinds) + 1)]
        *given, result = (T.match_buffer(h, (n,), k, align=1) for h, k in zip(handles, [*kinds, out], strict=True))
        count, one = tirx.IntImm("int64", lanes), tirx.IntImm("int64", 1)
        with T.serial(0, n // count) as turn:
            at = T.ramp(turn * count, one, lanes) if lanes > 1 else turn
            T.buffer_store(result, body(*(vector.let(x[at]) for x in given)), [at])
    return builder.get()


def jitted(
    isa: Isa, kinds: Sequence[str], out: str, body: Callable[..., Any], lanes: int = 0
) -> Callable[..., np.ndarray[Any, Any]]:
    """The function on NumPy arrays of any one length."""
    lanes = lanes or isa.lanes
    module = compiled({"f": function(isa, kinds, out, body, lanes)}, isa)

    def call(*xs: Any) -> np.ndarray[Any, Any]:
        arrays = [np.asarray(x, kind) for x, kind in zip(xs, kinds, strict=True)]
        room = -len(arrays[0]) % lanes
        padded = [np.concatenate([x, x[:1].repeat(room)]) for x in arrays]
        o = np.zeros(len(padded[0]), out)
        module["f"](*(torch.from_numpy(x) for x in padded), torch.from_numpy(o))
        return o[: len(arrays[0])]

    return call
