"""Causal convolutions over tokens, as compressed convolutional attention has them before its scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncc.ir.attention import Call
from attncc.ir.expr import Expr
from attncc.reference.evaluate import Scope


def convolved(run: Sequence[Call], x: Tensor, heads: slice, scope: Scope) -> Tensor:
    """x [H, S, D] behind `causal_conv` steps that follow each other; `heads` are x's rows of their weights.

    Zeros stand before the first token once, as many as all kernels reach back together: a later convolution sees
    what earlier ones make of the zeros, their bias, and no zeros of its own (Zyphra's CCA, arXiv 2510.04476).
    """
    kernels = [(_kernel(call, x.shape[-1], heads, scope), _bias(call, x.shape[-1], heads, scope)) for call in run]
    x = pad(x, (0, 0, sum(weight.shape[-1] - 1 for weight, _ in kernels), 0))
    for weight, bias in kernels:
        taps = weight.shape[-1]
        tokens = x.shape[1] - taps + 1
        equation = "hsd,hd->hsd" if weight.ndim == 3 else "hsc,hdc->hsd"
        x = sum((torch.einsum(equation, x[:, t : t + tokens], weight[..., t]) for t in range(taps)), bias[:, None])
    return x


def _kernel(call: Call, columns: int, heads: slice, scope: Scope) -> Tensor:
    """Depthwise [H, D, taps], or a matrix a head [H, D, D, taps]; the first tap weighs the oldest token.

    The input may have these axes or those of torch's conv1d: [H * D, 1, taps], [H * D, D, taps].
    """
    options = dict(call.kwargs)
    weight = scope.inputs[call.words[0]].to(scope.dtype)
    said = options.get("kernel")
    if isinstance(said, Expr) and said.value != weight.shape[-1]:
        raise ValueError(f"{call.words[0]}: expected a kernel of {said.value}, got {weight.shape[-1]}")
    inner = (columns,) if options.get("groups", "depthwise") == "heads" else ()
    return weight.reshape(-1, columns, *inner, weight.shape[-1])[heads]


def _bias(call: Call, columns: int, heads: slice, scope: Scope) -> Tensor:
    word = dict(call.kwargs).get("bias")
    if word is None:
        return torch.zeros((), dtype=scope.dtype, device=scope.device).expand(1, columns)
    return scope.inputs[str(word)].to(scope.dtype).reshape(-1, columns)[heads]
