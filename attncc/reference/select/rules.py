"""Which of the scored blocks are taken: one row of `RULES` each, as classes 1 (taken), 0 (not taken), -1 (negligible).

Blocks rank by their score, forced ones first, those that do not compete last; of equal scores the lower block
wins. Published methods: topk NSA, Quest, TokenSelect; topk_ratio AdaSpa and SLA; mass XAttention (crossing in) and
SpargeAttn (out); any_above SALE; bernoulli PrFlashAttention; ternary SLA and RetroInfer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from attncc.ir.attention import Call
from attncc.ir.expr import Expr
from attncc.reference.evaluate import evaluate
from attncc.reference.rows import Rows


@dataclass(frozen=True, slots=True)
class Contest:
    """Scores [H, nq, nk], which of them compete, and which are forced within the rule's budget."""

    scores: Tensor
    competing: Tensor
    forced: Tensor
    rows: Rows
    logarithmic: bool = False
    """Whether scores are logarithms of what thresholds speak of."""

    @property
    def order(self) -> Tensor:
        """The blocks [H, nq, nk] from the first rank to the last."""
        ranked = torch.where(self.competing, self.scores, -math.inf)
        # two stable sorts: a score of -inf still ranks before a block that does not compete
        first = ranked.sort(dim=-1, descending=True, stable=True).indices
        tier = (self.competing.int() + 2 * self.forced.int()).clamp(max=2).gather(-1, first)
        return first.gather(-1, tier.sort(dim=-1, descending=True, stable=True).indices)

    def first(self, count: Tensor | int) -> Tensor:
        """bool [H, nq, nk]: the `count` first ranks, as far as they compete."""
        return (self.ranks < count) & (self.competing | self.forced)

    @property
    def ranks(self) -> Tensor:
        """[H, nq, nk]: the rank of each block."""
        order = self.order
        return torch.empty_like(order).scatter(-1, order, _places(order).expand_as(order))

    def number(self, e: Expr) -> Tensor:
        """A number of a rule, in double: one for all [] or one a head [H, 1, 1]."""
        if e.value is not None:
            return torch.tensor(float(e.value), dtype=torch.float64, device=self.scores.device)
        return evaluate(e, self.rows.scope).double()


Rule = Callable[[Call, Contest], Tensor]


def topk(rule: Call, contest: Contest) -> Tensor:
    """The k first; k may depend on the head."""
    return contest.first(contest.number(rule.args[0])).to(torch.int8)


def topk_ratio(rule: Call, contest: Contest) -> Tensor:
    """The first share r of all key blocks, rounded, at least `least` (1)."""
    options = dict(rule.kwargs)
    count = contest.number(rule.args[0]) * contest.scores.shape[-1]
    count = torch.floor(count + 0.5) if options.get("round") == "nearest" else torch.floor(count)
    return contest.first(count.clamp(min=_option(options.get("least"), 1))).to(torch.int8)


def mass(rule: Call, contest: Contest) -> Tensor:
    """The first blocks that hold the share tau of their row's scores; the block that crosses it is in, or out."""
    options = dict(rule.kwargs)
    order = contest.order
    held = torch.where(contest.competing, contest.scores, 0.0).double().gather(-1, order)
    up_to = held.cumsum(-1)
    need = contest.number(rule.args[0]) * up_to[..., -1:]
    inside = up_to <= need if options.get("crossing") == "out" else up_to - held < need
    least = max(1, int(_option(options.get("least"), 0.0) * order.shape[-1]))
    inside = torch.zeros_like(inside).scatter(-1, order, inside | (_places(order) < least))
    return (inside & (contest.competing | contest.forced)).to(torch.int8)


def any_above(rule: Call, contest: Contest) -> Tensor:
    """The blocks with a score above tau."""
    tau = contest.number(rule.args[0])
    above = contest.scores > (tau.log() if contest.logarithmic else tau)
    return (above & contest.competing).to(torch.int8)


def bernoulli(rule: Call, contest: Contest) -> Tensor:
    """The blocks whose score, uniform in [0, 1), is less than p(i, j), an expression over block numbers."""
    queries, keys = (torch.arange(n, device=contest.scores.device) for n in contest.scores.shape[1:])
    numbers = {"i": queries[None, :, None], "row": queries[None, :, None], "j": keys[None, None, :]}
    scope = contest.rows.scope
    p = evaluate(rule.args[0], replace(scope, names={**scope.names, **numbers}))
    return ((contest.scores < p) & contest.competing).to(torch.int8)


def ternary(rule: Call, contest: Contest) -> Tensor:
    """Of all n key blocks the first max(1, int(hi * n)) as 1, the last int(lo * n) as -1, those between as 0."""
    n = contest.scores.shape[-1]
    most, least = (torch.floor(contest.number(e) * n) for e in rule.args)
    taken = contest.first(most.clamp(min=1))
    return taken.to(torch.int8) - ((contest.ranks >= n - least) & ~taken).to(torch.int8)


RULES: Final[dict[str, Rule]] = {
    "topk": topk,
    "topk_ratio": topk_ratio,
    "mass": mass,
    "any_above": any_above,
    "bernoulli": bernoulli,
    "ternary": ternary,
}


def _places(order: Tensor) -> Tensor:
    return torch.arange(order.shape[-1], device=order.device)


def _option(e: Expr | str | None, default: float) -> float:
    return float(e.value) if isinstance(e, Expr) and e.value is not None else default
