"""The peers, each as a call on the tensors of a case: FlexAttention with its block mask, and cuDNN's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.cases import PLAIN_MASKS, SCALE, Case
from benchmarks.operands import Given, mods

Call = Callable[[], Any]
EAGER_LENGTH: Final = 16384
"""Up to here create_block_mask fits the memory uncompiled; compiling it takes minutes at this very length."""


def flex(case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given) -> Call:
    """FlexAttention as torch.compile makes it by default, with a block mask made beforehand."""
    score, mask = mods(case, given)
    block = None if mask is None else block_mask(case, mask, qkv[0].device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = case.hq != case.hk
    return lambda: compiled(*qkv, score_mod=score, block_mask=block, scale=SCALE, enable_gqa=gqa)


def block_mask(case: Case, mask: Any, device: torch.device) -> BlockMask:
    """The same table whether compiled or not: made in the way that takes less to set up."""
    make = create_block_mask if case.s <= EAGER_LENGTH else torch.compile(create_block_mask)
    return make(mask, None, None, case.s, case.s, device)


def cudnn(case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Call:
    gqa = case.hq != case.hk

    def call() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=case.variant == "causal", scale=SCALE, enable_gqa=gqa
            )

    return call


def peers(case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given) -> dict[str, Call]:
    """FlexAttention, and cuDNN where it can do the case."""
    out = {"FlexAttention": flex(case, qkv, given)}
    if case.variant in PLAIN_MASKS:
        out["cuDNN"] = cudnn(case, qkv)
    return out
