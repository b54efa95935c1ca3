"""TVM functions in, CUDA source and its cubin out: neither needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import tvm
from tvm import tirx

PASSES: Final = (tirx.transform.FlattenBuffer, tirx.transform.LowerIntrin)
"""TVM's default ones are left out, as for CPUs."""


def source(functions: Mapping[str, Any], arch: str) -> str:
    """CUDA C++ of kernels by name."""
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    module = tirx.transform.BindTarget(target)(tvm.IRModule(dict(functions)))
    for step in PASSES:
        module = step()(module)
    return str(tvm.get_global_func("target.build.cuda")(module, target).inspect_source())
