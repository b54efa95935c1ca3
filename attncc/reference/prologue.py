"""The steps before attention: per-token maps of q, k and v, one row of `STEPS` each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call
from attncc.ir.expr import Expr
from attncc.ir.primitives import on
from attncc.reference import operands
from attncc.reference.convolution import convolved
from attncc.reference.evaluate import Scope, evaluate
from attncc.reference.rotary import rotate
from attncc.reference.rows import served_by

EPS: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Setting:
    """What a step reads beside its operand: the variant, expressions' names, the sequence before all steps."""

    attn: Attention
    scope: Scope
    entered: operands.Sequence

    def per_head(self, e: Expr, operand: str, count: int) -> Tensor:
        """An expression over `h` and `hk` [H, 1, 1]; a key or value head stands for both of its names."""
        names = self.scope.names
        if operand != "q":
            own = torch.arange(count, device=self.scope.device)[:, None, None]
            names = {**names, "h": own, "hk": own}
        return evaluate(e, replace(self.scope, names=names)).to(self.scope.dtype)

    def input(self, word: str) -> Tensor:
        return self.scope.inputs[word].to(self.scope.dtype)


Step = Callable[[Call, Tensor, str, Setting], Tensor]
"""A step, an operand [H, S, D] and its letter in; the operand behind the step out."""


def prologue(attn: Attention, sequence: operands.Sequence, scope: Scope) -> operands.Sequence:
    """The sequence behind all steps, in their order, but for those that follow a selection.

    Steps (and quantizers after them) compute in the scope's dtype.
    """
    if not attn.prologue and not attn.quantize:
        return sequence
    q, k, v = (x.to(scope.dtype) for x in (sequence.q, sequence.k, sequence.v))
    sequence = replace(sequence, q=q, k=k, v=v)
    setting = Setting(attn, scope, sequence)
    steps = [step for step in attn.prologue if dict(step.kwargs).get("positions") != "packed"]
    for name, run in groupby(steps, key=lambda step: step.name):
        calls = list(run)
        if name not in STEPS and name != "causal_conv":
            raise Unsupported(f"the oracle does not evaluate the step '{name}'", key="prologue")
        for operand in "qkv":
            mine = [call for call in calls if operand in on(call)]
            if mine:
                x = _behind(mine, getattr(sequence, operand), operand, setting)
                sequence = replace(sequence, **{operand: x})
    return sequence


def _behind(run: Sequence[Call], x: Tensor, operand: str, setting: Setting) -> Tensor:
    """One operand behind steps of one name that follow each other."""
    if run[0].name == "causal_conv":
        letters = on(run[0])
        start = sum(getattr(setting.entered, letter).shape[0] for letter in letters[: letters.index(operand)])
        return convolved(run, x, slice(start, start + x.shape[0]), setting.scope)
    for call in run:
        x = STEPS[call.name](call, x, operand, setting)
    return x


def _rope(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    names = setting.scope.names
    return rotate(x, names["i"].flatten() if operand == "q" else names["j"].flatten(), call, setting.scope)


def _rms_norm(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    """x over its root mean square, times a weight [D] or [H, D]."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _option(call, "eps", EPS))
    word = dict(call.kwargs).get("weight")
    return x if word is None else x * _over_tokens(setting.input(str(word)))


def _over_tokens(weight: Tensor) -> Tensor:
    return weight[:, None] if weight.ndim == 2 else weight


def _l2_norm(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    """x with the length `to`; lengths below eps count as eps."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (_option(call, "to", 1.0) / length.clamp(min=_option(call, "eps", EPS)))


def _temperature(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    return x * setting.per_head(call.args[0], operand, x.shape[0])


def _lerp(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    """(1 - w) x + w other; the other is [B, H, S, D], its axes B and H may be 1."""
    other = setting.input(call.words[0])
    other = other[setting.scope.names["b"] if len(other) > 1 else 0]
    return torch.lerp(x, other.expand(x.shape), setting.per_head(call.args[0], operand, x.shape[0]))


def _mean_residual(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    """x plus scaled sums of the query and its key before all steps; a key head takes the mean of its group's sums.

    Method: compressed convolutional attention, arXiv 2510.04476.
    """
    q, k = setting.entered.q, setting.entered.k
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q: expected {k.shape[1]} rows, one a key, for mean_residual, got {q.shape[1]}")
    serving = served_by(setting.attn, torch.arange(q.shape[0], device=q.device), k.shape[0])
    both = _option(call, "scale", 0.5) * (q + k[serving])
    if operand == "q":
        return x + both
    return x + torch.zeros_like(k).index_add(0, serving, both) * (k.shape[0] / q.shape[0])


def _value_shift(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    """The last `fraction` of all heads' columns, one head behind the other, come from the token before; 0 at first."""
    flat = x.transpose(0, 1).flatten(1)
    kept = flat.shape[1] - int(flat.shape[1] * _option(call, "fraction", 0.5))
    shifted = pad(flat, (0, 0, 1, 0))[: len(flat), kept:]
    return torch.cat([flat[:, :kept], shifted], 1).unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def _hadamard(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    """x times the orthonormal Walsh-Hadamard matrix in its natural order: products of q and k stay as they are."""
    columns, width = x.shape[-1], 1
    while width < columns:
        first, second = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return x * columns**-0.5


def _absorb(call: Call, x: Tensor, operand: str, setting: Setting) -> Tensor:
    """The first n columns times a matrix a head [H, n, r], the rest as they are (MLA, DeepSeek-V2)."""
    matrix = setting.input(call.words[0])
    n = matrix.shape[-2]
    return torch.cat([x[..., :n] @ matrix, x[..., n:]], -1)


STEPS: Final[dict[str, Step]] = {
    "rope": _rope,
    "rms_norm": _rms_norm,
    "silu": lambda call, x, operand, setting: silu(x),
    "l2_norm": _l2_norm,
    "temperature": _temperature,
    "lerp": _lerp,
    "mean_residual": _mean_residual,
    "value_shift": _value_shift,
    "smooth": lambda call, x, operand, setting: x - x.mean(1, keepdim=True),
    "hadamard": _hadamard,
    "absorb": _absorb,
}


def _option(call: Call, name: str, default: float) -> float:
    given = dict(call.kwargs).get(name)
    return float(given.value) if isinstance(given, Expr) and given.value is not None else default
