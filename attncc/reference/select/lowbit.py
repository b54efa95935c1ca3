"""Scores of every pair at a few bits: integers as SALE's tensor cores multiply them, in groups that share a scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Call, Part
from attncc.ir.expr import Expr
from attncc.reference.evaluate import evaluate
from attncc.reference.pairs import scores as pair_scores
from attncc.reference.rows import Rows
from attncc.reference.select.blocks import Blocks, reduced

BITS: Final = 4
QUERY_ROWS: Final = 16
"""Rows of a matrix instruction, of which a thread holds two."""
KEY_TILE: Final = 32
"""Keys that a warp holds at once, of which a thread holds two in each 8."""


def lowbit_qk(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """The greatest estimated score of a block's visible pairs [H, nq, nk]."""
    return blocks.over_pairs(estimate(call, part, rows, blocks), "amax")


def anchored(call: Call, part: Part, rows: Rows, blocks: Blocks, forced: Tensor) -> Tensor:
    """The greatest estimate of a block relative to what its row makes of the forced blocks [H, nq, nk].

    forced [H, nq, nk]: the blocks whose exact scores give each row its m and l. The result is the logarithm of
    SALE's relative score exp(estimate - m) / l, so it competes with log(tau): estimate > log(tau * l) + m. (The
    paper's equation 4 prints log(tau * l + m); the kernels compute the former.)
    """
    near = blocks.spread(forced) & blocks.seen
    lse = torch.logsumexp(pair_scores(part, rows, near, -math.inf), -1)
    relative = torch.where(blocks.seen, estimate(call, part, rows, blocks) - lse[..., None], -math.inf)
    return blocks.over_pairs(relative, "amax")


def estimate(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """The part's score of each pair [H, Sq, Sk], made of q · k at few bits; -inf where a pair is not seen.

    With `smooth=mean` the operands' means over the sequence are taken off before and come back exactly:
    q k^T = q' k'^T + qm k'^T + q km^T. (SALE's kernel rounds the second term to an integer; this does not.)
    """
    options = dict(call.kwargs)
    bits, per = options.get("bits"), str(options.get("per", "token"))
    levels = 2 ** ((int(bits.value or BITS) if isinstance(bits, Expr) else BITS) - 1) - 1
    q, k, terms = rows.q, rows.k, 0.0
    if "smooth" in options:
        q_mean, k_mean = (x.mean(1, keepdim=True) for x in (rows.q, rows.k))
        q, k = rows.q - q_mean, rows.k - k_mean
        terms = q_mean @ k.transpose(1, 2) + rows.q @ k_mean.transpose(1, 2)
    q_ints, q_scale = integers(q, GROUPS[per](blocks.q_block, "q"), levels)
    k_ints, k_scale = integers(k, GROUPS[per](blocks.k_block, "k"), levels)
    product = q_ints @ k_ints.transpose(1, 2) * q_scale[:, :, None] * k_scale[:, None, :] + terms
    names = {**rows.scope.names, "qk": product.to(rows.numbers.elementwise)}
    value = evaluate(part.score, replace(rows.scope, names=names)).to(rows.numbers.elementwise)
    return torch.where(blocks.seen, value.expand(rows.shape), -math.inf)


def integers(x: Tensor, group: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """x [H, N, D] as integers of at most `levels`, and the scale of each row [H, N]; group [H, N] shares one."""
    count = int(group.max()) + 1 if group.numel() else 0
    most = reduced(x.abs().amax(-1)[..., None], group, count, "amax")[..., 0].gather(1, group)
    scale = torch.where(most == 0, 1.0, most / levels)
    return torch.round(x / scale[..., None]).clamp(-levels, levels), scale


def _tokens(block: Tensor) -> Tensor:
    return torch.arange(block.shape[1], device=block.device).expand_as(block)


def _threads(block: Tensor, operand: str) -> Tensor:
    """The groups that one thread of a matrix instruction holds: rows r, r + 8; keys (j mod 8) // 2 of a tile."""
    at = _tokens(block)
    return at // QUERY_ROWS * 8 + at % 8 if operand == "q" else at // KEY_TILE * 4 + at % 8 // 2


GROUPS: Final[dict[str, Callable[[Tensor, str], Tensor]]] = {
    "tensor": lambda block, operand: torch.zeros_like(block),
    "block": lambda block, operand: block,
    "token": lambda block, operand: _tokens(block),
    "thread": _threads,
}
"""The blocks [H, N] of an operand's tokens in, which of its scales each token has [H, N] out."""
