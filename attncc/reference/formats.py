"""Formats of few bits: what each of them keeps of a tensor, read back as numbers.

A symmetric format scales the greatest magnitude of a group to its own greatest number and rounds half to even; an
asymmetric integer spreads its 2^b levels from a group's least to its greatest, and its zero point is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncc.ir.attention import Call
from attncc.ir.expr import Expr

BITS: Final = {"int8": 8, "int4": 4, "int2": 2}
FP8: Final = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
WIDE: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GREATEST: Final[dict[str, float]] = {
    **{name: 2.0 ** (bits - 1) - 1 for name, bits in BITS.items()},
    **{name: torch.finfo(dtype).max for name, dtype in FP8.items()},
    "nvfp4": 6.0,
}


@dataclass(frozen=True, slots=True)
class Codes:
    """A tensor as a format holds it: `codes * scale + zero`, where scales and zero points broadcast against codes."""

    codes: Tensor
    """Numbers of the format, in the dtype of the tensor."""
    scale: Tensor
    zero: Tensor | None = None
    """Of asymmetric integers."""

    def read_back(self) -> Tensor:
        kept = self.codes * self.scale
        return kept if self.zero is None else kept + self.zero


def read_back(x: Tensor, dtype: str, per: Call | None, symmetric: bool = True, operand: str = "k") -> Tensor:
    """x [H, S, D] as `dtype` holds it, one scale for each group of entries that `per` names."""
    if dtype in WIDE:
        return x.to(WIDE[dtype]).to(x.dtype)
    return encode(x, dtype, per, symmetric, operand).read_back() if x.numel() else x


def encode(x: Tensor, dtype: str, per: Call | None, symmetric: bool = True, operand: str = "k") -> Codes:
    """The numbers by which a format of few bits holds x [H, S, D], which is not empty."""
    per = per or Call("group" if dtype == "nvfp4" else "tensor")
    if not symmetric and dtype in BITS:
        low, high = -greatest(-x, per, operand), greatest(x, per, operand)
        step = _nonzero(_over(high - low, 2 ** BITS[dtype] - 1))
        return Codes(torch.round((x - low) / step), step, low)
    most = GREATEST[dtype]
    scale = _over(greatest(x.abs(), per, operand), most)
    scale = _nonzero(_cast(scale, "fp8_e4m3") if dtype == "nvfp4" else scale)
    return Codes(_rounded((x / scale).clamp(-most, most), dtype), scale)


def _over(x: Tensor, n: float) -> Tensor:
    """x / n; by a Python number, a GPU would multiply by a rounded 1 / n."""
    return x / torch.full_like(x, n)


def _nonzero(scale: Tensor) -> Tensor:
    """A group of zeros has any scale."""
    return torch.where(scale == 0, 1.0, scale)


def _rounded(x: Tensor, dtype: str) -> Tensor:
    """x, no greater than the format's greatest, as its nearest number."""
    if dtype in BITS:
        return torch.round(x)
    if dtype in FP8:
        return _cast(x, dtype)
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))  # e2m1: 0 .5 1 1.5 2 3 4 6
    return torch.round(x / step) * step


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.clamp(-GREATEST[dtype], GREATEST[dtype]).to(FP8[dtype]).to(x.dtype)


# -- the greatest entry of each group, so that it broadcasts against x [H, S, D] ---------------------


def greatest(x: Tensor, per: Call, operand: str) -> Tensor:
    """The greatest entry of each entry's group."""
    n = per.args[0].value if per.args and isinstance(per.args[0], Expr) else None
    return GROUPS[per.name](x, None if n is None else int(n), operand)


def _of_tokens(x: Tensor, group: Tensor) -> Tensor:
    """Groups of tokens: `group` [S] numbers them."""
    at = group.to(x.device).expand(x.shape[:2])
    least = x.new_full((len(x), int(group.max()) + 1), -torch.inf)
    return least.scatter_reduce(1, at, x.amax(2), "amax").gather(1, at)[..., None]


def _of_columns(x: Tensor, n: int | None, operand: str) -> Tensor:
    """Groups of n columns of a token; the last may have fewer."""
    n = n or NVFP4_GROUP
    columns = x.shape[-1]
    groups = pad(x, (0, -columns % n), value=-torch.inf).unflatten(-1, (-1, n))
    return groups.amax(-1).repeat_interleave(n, -1)[..., :columns]


def _blocks(x: Tensor, n: int | None, operand: str) -> Tensor:
    return _of_tokens(x, torch.arange(x.shape[1]) // (n or BLOCK.get(operand, 64)))


def _threads(x: Tensor, n: int | None, operand: str) -> Tensor:
    return _of_tokens(x, thread_groups(x.shape[1], operand))


def thread_groups(tokens: int, operand: str) -> Tensor:
    """Which tokens share a scale because one thread of a matrix instruction holds them all (SageAttention 2).

    Of 32 queries those with the same place mod 8; of 64 keys those with the same pair of places mod 8.
    """
    at = torch.arange(tokens)
    return at // 32 * 8 + at % 8 if operand == "q" else at // 64 * 4 + at % 8 // 2


NVFP4_GROUP: Final = 16
BLOCK: Final = {"q": 128}
"""Tokens a block where `per=block` does not say; 64 for other operands."""
GROUPS: Final[dict[str, Callable[[Tensor, int | None, str], Tensor]]] = {
    "tensor": lambda x, n, operand: x.amax(),
    "head": lambda x, n, operand: x.amax((1, 2), keepdim=True),
    "channel": lambda x, n, operand: x.amax(1, keepdim=True),
    "token": lambda x, n, operand: x.amax(2, keepdim=True),
    "block": _blocks,
    "thread": _threads,
    "group": _of_columns,
}
