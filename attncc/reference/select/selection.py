"""The selection of a part: blocks scored, made comparable, chosen by a rule, and what is forced."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Call, Part, Select
from attncc.reference.normalize import softmax
from attncc.reference.pairs import seen_keys
from attncc.reference.rows import Rows
from attncc.reference.select.blocks import Blocks, blocks_of, cut
from attncc.reference.select.clusters import clustered
from attncc.reference.select.forced import ANCHORS, forced
from attncc.reference.select.lines import lines
from attncc.reference.select.lowbit import anchored
from attncc.reference.select.reuse import Selection, extended, labels, mean_queries, serves
from attncc.reference.select.rules import RULES, Contest
from attncc.reference.select.scores import NORMALISED, REDUCED, SCORES, over_heads


@torch.no_grad()
def select(part: Part, rows: Rows, before: Selection | None = None) -> Selection:
    """The selection for all rows of a sequence, or `before` where it is to be used again.

    Forced blocks are those of this call even where the rule's choice is an earlier one.
    """
    assert part.select is not None
    queries = mean_queries(rows.q)
    again = before if serves(part.select.reuse, before, queries) else None
    blocks = _blocks(part, rows, again)
    if again is None:
        picked, pairs = _picked(part, rows, blocks)
        age = 1
    else:
        picked, pairs = extended(again, blocks)
        queries, age = again.queries, again.age + 1
    always = forced(part.select.force, rows, blocks)
    if pairs is not None:
        pairs = (pairs | blocks.spread(always)) & blocks.seen
    classes = torch.where(always, 1, torch.where(blocks.visible, picked, -1)).to(torch.int8)
    return Selection(classes, blocks.q_block, blocks.k_block, picked, pairs, queries, age)


def _blocks(part: Part, rows: Rows, again: Selection | None) -> Blocks:
    """The blocks of a part; clusters of an earlier call stay as they were."""
    assert part.select is not None
    q, k = part.select.block
    if k != "cluster" and q != "cluster":
        return cut(part, rows, _size(part, q), _size(part, k))
    if part.select.score.name != "centroid_dot":
        raise Unsupported("the oracle has clusters of centroid_dot only", key="select.block")
    seen = seen_keys(part, rows)
    if again is None:
        return clustered(part.select.score, part, rows, seen)
    size = 1 if q == "cluster" else _size(part, q)
    run = (torch.arange(rows.shape[1], device=seen.device) // size).expand(rows.shape[0], -1)
    q_block, k_block = labels(again, run, rows.shape[2], q == "cluster")
    nq = again.classes.shape[1] if q == "cluster" else -(-rows.shape[1] // size)
    return blocks_of(q_block, k_block, nq, again.classes.shape[2], seen)


def _size(part: Part, block: int | str) -> int:
    sizes = {"token": 1, "page": part.kv.page_size or 1}
    return block if isinstance(block, int) else sizes[block]


def _picked(part: Part, rows: Rows, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
    """What the rule chooses: classes [H, nq, nk], and pairs [H, Sq, Sk] where it chooses by pair."""
    assert part.select is not None
    chosen = part.select
    if chosen.rule.name == "lines":
        pairs = lines(chosen.rule, part, rows, blocks) & blocks.seen
        return (blocks.over_pairs(pairs.double()) > 0).to(torch.int8), pairs
    charged = forced(chosen.force, rows, blocks)
    beside = torch.zeros_like(charged) if chosen.charge else charged
    scores = _scores(part, rows, blocks)
    whole = (scores == math.inf) & blocks.visible
    competing = blocks.visible & ~whole & ~beside & (scores > -math.inf)
    scores, competing = _over_heads(chosen, rows, _normalised(chosen, rows, blocks, scores, competing), competing)
    contest = Contest(scores, competing, charged & ~beside, rows, chosen.normalize == "anchor")
    return torch.where(whole, 1, RULES[chosen.rule.name](chosen.rule, contest)).to(torch.int8), None


def _scores(part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """The scores [H, nq, nk]; those of single pairs are anchored before the greatest of a block is known."""
    assert part.select is not None
    score = part.select.score
    if score.name == "lowbit_qk" and part.select.normalize == "anchor":
        return anchored(score, part, rows, blocks, _anchors(part.select.force, rows, blocks))
    return SCORES[score.name](score, part, rows, blocks)


def _anchors(calls: Sequence[Call], rows: Rows, blocks: Blocks) -> Tensor:
    return forced([call for call in calls if call.name in ANCHORS], rows, blocks)


def _normalised(select: Select, rows: Rows, blocks: Blocks, scores: Tensor, competing: Tensor) -> Tensor:
    """The scores made comparable among those that compete."""
    score = select.score.name
    if select.normalize == "none" or score in NORMALISED or (score == "lowbit_qk" and select.normalize == "anchor"):
        return scores
    if select.normalize == "anchor":
        near = _anchors(select.force, rows, blocks) & (scores < math.inf)
        return scores - softmax(torch.where(near, scores, -math.inf))[1][..., None]
    s = torch.where(competing, scores, -math.inf)
    if select.normalize == "weighted_softmax":
        s = s + blocks.k_sizes.to(s.dtype).log()[:, None, :]
    return softmax(s)[0]


def _over_heads(select: Select, rows: Rows, scores: Tensor, competing: Tensor) -> tuple[Tensor, Tensor]:
    """Scores reduced over heads, unless they are already, and what competes in any of the heads."""
    if select.heads == "none" or select.score.name in REDUCED:
        return scores, competing
    vote = torch.where(competing, scores, -math.inf if select.heads == "max" else 0.0)
    return over_heads(vote, select.heads, rows), over_heads(competing.double(), select.heads, rows) > 0
