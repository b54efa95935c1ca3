"""What TVM makes kernels of, known without TVM."""

from __future__ import annotations

from attncc.errors import Unsupported
from attncc.ir.attention import Attention


def is_carried(attn: Attention) -> bool:
    """Whether a variant that has a skeleton has TVM's kernels too: they read dense operands as they come."""
    return not (attn.quantize or attn.prologue or attn.epilogue) and attn.part.kv.kind == "dense"


def check_carried(attn: Attention) -> None:
    """Raises Unsupported for what TVM's kernels would compute as if it were not there."""
    hint = "Triton's kernels do: choose a GPU, or --target interpreter"
    if attn.quantize:
        raise Unsupported("TVM's kernels, which CPUs have, do not quantise operands", "quantize", hint=hint)
    for key, steps in (("prologue", attn.prologue), ("epilogue", attn.epilogue)):
        if steps:
            raise Unsupported("TVM's kernels, which CPUs have, have no steps beside attention", key, hint=hint)
    if not is_carried(attn):
        raise Unsupported(
            "TVM's kernels, which CPUs have, do not read keys from pages, nor values from keys, nor write caches",
            "kv",
            hint=hint,
        )


def decodes(attn: Attention) -> bool:
    """Whether there is a kernel for few queries beside the general one."""
    part = attn.part
    listed = part.key_tiles is not None and part.key_tiles.listed
    packed = attn.layout == "varlen"
    return part.normalizer.kind == "softmax" and attn.heads.v == attn.heads.kv and not packed and not listed
