"""The oracle beside a definition in plain torch: the output and the gradient of every float tensor that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from smaller import close
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention

OPERANDS: Final = ("q", "k", "v")


def agree(
    attn: Attention,
    define: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor] = {},
    **arguments: Any,
) -> None:
    """`define` takes q, k, v and the float inputs by name and returns o; `fixed` are inputs without a gradient."""
    ours, theirs = ({n: x.clone().requires_grad_() for n, x in tensors.items()} for _ in range(2))
    inputs = {n: x for n, x in ours.items() if n not in OPERANDS} | dict(fixed)
    got = reference.attention(attn, *(ours[n] for n in OPERANDS), inputs=inputs, **arguments)
    want = define(**theirs)
    close(got, want)
    along = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad(o, list(x.values()), along, allow_unused=True) for o, x in ((got, ours), (want, theirs))
    ]
    for name, mine, other in zip(tensors, *grads, strict=True):
        zero = torch.zeros_like(tensors[name])
        near = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda m, name=name: f"gradient of {name}: {m}"}
        torch.testing.assert_close(zero if mine is None else mine, zero if other is None else other, **near)
