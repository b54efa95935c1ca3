"""The peers, each as a call on the tensors of a case: FlexAttention with its block mask, and SDPA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.cases import PLAIN_MASKS, SCALE, Case
from benchmarks.flash4 import carries, flash4
from benchmarks.operands import Given, mods

Call = Callable[[], Any]
EAGER_LENGTH: Final = 16384
"""Up to here create_block_mask fits the memory uncompiled; compiling it takes minutes at this very length."""
FLEX_BLOCK: Final = 128
"""FlexAttention's own choice."""


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
    size = min(case.pattern.block, FLEX_BLOCK) if case.variant == "blocks" else FLEX_BLOCK
    return make(mask, None, None, case.sq, case.s, device, BLOCK_SIZE=size)


def sdpa(case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Call:
    """What torch chooses for a mask that it knows."""
    attention = torch.nn.functional.scaled_dot_product_attention
    causal, gqa = case.variant == "causal", case.hq != case.hk
    return lambda: attention(*qkv, is_causal=causal, scale=SCALE, enable_gqa=gqa)


def masked_sdpa(case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given) -> Call:
    """SDPA with score and mask as one tensor made beforehand, of q's dtype: of a bool one each call makes such."""
    attention, gqa = torch.nn.functional.scaled_dot_product_attention, case.hq != case.hk
    score, mask = mods(case, given)
    q = qkv[0]
    i, j = torch.arange(case.sq)[:, None] + (case.s - case.sq), torch.arange(case.s)[None]
    bias = torch.zeros(case.sq, case.s)
    if score is not None:
        bias = torch.stack([score(bias, 0, h, i, j) for h in range(case.hq)])
    if mask is not None:
        bias = bias.masked_fill(~mask(0, 0, i, j), -math.inf)
    bias = bias.to(q.device, q.dtype).reshape(1, -1, case.sq, case.s)
    return lambda: attention(*qkv, attn_mask=bias, scale=SCALE, enable_gqa=gqa)


def cudnn(case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Call:
    attention = sdpa(case, qkv)

    def call() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attention()

    return call


def answering(
    case: str, ours: Mapping[str, Call], peers: Mapping[str, Call]
) -> tuple[dict[str, Call], list[dict[str, str]]]:
    """Calls everyone once: those that can do a case, and a row for each peer that cannot, with why.

    What ours raises is raised.
    """
    calls = dict(ours)
    absent: list[dict[str, str]] = []
    for call in ours.values():
        call()
    for name, call in peers.items():
        try:
            call()
        except Exception as error:  # whatever a peer raises is why it has no time
            absent.append({"case": case, "impl": name, "missing": f"{type(error).__name__}: {error}".split("\n")[0]})
        else:
            calls[name] = call
    return calls, absent


def gpu_peers(case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given) -> dict[str, Call]:
    """FlexAttention, cuDNN and FlashAttention-4, each where it can do the case."""
    out = {} if case.variant == "sink" else {"FlexAttention": flex(case, qkv, given)}
    if case.variant in PLAIN_MASKS:
        out["cuDNN"] = cudnn(case, qkv)
    if carries(case):
        out["FlashAttention-4"] = flash4(case, qkv)
    return out


def cpu_peers(case: Case, qkv: tuple[Tensor, Tensor, Tensor], given: Given, with_flex: bool) -> dict[str, Call]:
    """SDPA; where it does not know the mask, SDPA with a tensor, and FlexAttention, which takes long to compile."""
    if case.variant in PLAIN_MASKS:
        return {"SDPA": sdpa(case, qkv)}
    out = {"SDPA + mask": masked_sdpa(case, qkv, given)}
    return out | ({"FlexAttention": flex(case, qkv, given)} if with_flex else {})
