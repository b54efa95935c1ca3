"""FlashAttention-4 (CuTe DSL) as a peer, where it is installed: what it does without a mask function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from torch import Tensor

from benchmarks.cases import SCALE, Case

Call = Callable[[], Any]

OPTIONS: Final[dict[str, Callable[[Case], dict[str, Any]]]] = {
    "none": lambda case: {},
    "causal": lambda case: {"causal": True},
    "softcap": lambda case: {"causal": True, "softcap": 30.0},
    "window": lambda case: {"causal": True, "window_size": (case.pattern.window - 1, 0)},
}
"""What its function is told of a variant; others it would need kernel code for."""
WIDEST: Final = 256


def carries(case: Case) -> bool:
    """Whether it is there, and does such a case; what it lacks to run is what its first call says."""
    dims = (case.dqk, case.dv)
    is_here = find_spec("flash_attn") is not None
    return is_here and case.variant in OPTIONS and max(dims) <= WIDEST and all(d % 8 == 0 for d in dims)


def flash4(case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Call:
    """On tensors laid out as it likes them, [b, s, h, d]."""
    tensors = [x.transpose(1, 2).contiguous() for x in qkv]
    options = OPTIONS[case.variant](case)

    def call() -> Any:
        return import_module("flash_attn.cute").flash_attn_func(
            *tensors, softmax_scale=SCALE, return_lse=True, **options
        )

    return call
