"""Rotary positions: pairs of columns turned by an angle that grows with the position."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Call
from attncc.ir.expr import Expr
from attncc.reference.evaluate import Scope, read

BASE: Final = 10000.0


def rotate(x: Tensor, positions: Tensor, call: Call, scope: Scope) -> Tensor:
    """x […, D] turned by a `rope` step; positions are whole numbers […], which broadcast with x's leading axes.

    The first `dims` columns (all, unless said) are `dims / 2` pairs: halves apart, or neighbours if interleaved.
    Pair t turns by position * base^(-2 t / dims); or `cos` and `sin` are tables [P, dims / 2], also [B, P, dims / 2].
    Method: RoFormer, arXiv 2104.09864.
    """
    options = dict(call.kwargs)
    cos, sin = _tables(positions, options, x.shape[-1], scope)
    dims = 2 * cos.shape[-1]
    turned, rest = x[..., :dims].to(scope.dtype), x[..., dims:].to(scope.dtype)
    if options.get("pairs", "half") == "half":
        first, second = turned.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], -1)


def _tables(positions: Tensor, options: dict[str, Expr | str], width: int, scope: Scope) -> tuple[Tensor, Tensor]:
    """Cosines and sines […, dims / 2] of every position."""
    dims = _number(options.get("dims"), width)
    if "cos" in options:
        cos, sin = (_looked_up(str(options[word]), positions, scope) for word in ("cos", "sin"))
        if "dims" in options and 2 * cos.shape[-1] != dims:
            raise ValueError(f"{options['cos']}: expected {dims / 2:g} columns, got {cos.shape[-1]}")
        return cos, sin
    pair = torch.arange(int(dims) // 2, device=positions.device, dtype=scope.dtype)
    angle = positions[..., None].to(scope.dtype) * _number(options.get("base"), BASE) ** (-2 * pair / dims)
    return torch.cos(angle), torch.sin(angle)


def _looked_up(word: str, positions: Tensor, scope: Scope) -> Tensor:
    table = scope.inputs[word]
    at = [positions[..., None], torch.arange(table.shape[-1], device=table.device)]
    batch = [scope.names["b"]] if table.ndim == 3 else []
    return read(table, batch + at, scope.shapes.get(word)).to(scope.dtype)


def _number(given: Expr | str | None, default: float) -> float:
    return float(given.value) if isinstance(given, Expr) and given.value is not None else default
