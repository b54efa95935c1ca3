"""When an earlier call's selection serves again, and what it comes to where keys have been added since."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncc.ir.attention import Call
from attncc.ir.expr import Expr
from attncc.reference.select.blocks import Blocks


@dataclass(frozen=True, slots=True)
class Selection:
    """Classes of blocks, and which block each query and key lies in."""

    classes: Tensor
    """int8 [H, query blocks, key blocks]: 1 selected, 0 in between (or just not selected), -1 negligible or hidden."""
    q_block: Tensor
    """[H, Sq]: the block of each query."""
    k_block: Tensor
    """[H, Sk]: the block of each key; -1 where a key lies in none."""
    picked: Tensor
    """int8, like classes: what the rule chose, without blocks that are forced beside its budget or hidden."""
    pairs: Tensor | None = None
    """bool [H, Sq, Sk]: which pairs are selected, where that is finer than blocks."""
    queries: Tensor | None = None
    """[H, Dqk]: the mean query it was made for, by which `cosine` judges it."""
    age: int = 1
    """How many calls it has served."""


def serves(reuse: Call, before: Selection | None, queries: Tensor) -> bool:
    """Whether an earlier selection is used for these queries (their mean [H, Dqk])."""
    if before is None:
        if reuse.name == "given":
            raise ValueError("before: missing; the selection is one of an earlier call")
        return False
    match reuse.name:
        case "every":
            return before.age < _number(reuse.args[0])
        case "cosine":
            return _alike(queries, before.queries) >= _number(reuse.args[0])
        case _:
            return reuse.name in ("given", "across_layers")


def _alike(queries: Tensor, then: Tensor | None) -> float:
    """The cosine of all heads' mean queries, now and then; two of no length are alike (TokenSelect, algorithm 1)."""
    assert then is not None
    a, b = queries.flatten().double(), then.flatten().double()
    lengths = a.norm() * b.norm()
    return float(a @ b / lengths) if lengths > 0 else 1.0


def extended(before: Selection, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
    """The earlier rule's choice [H, nq, nk] and pairs [H, Sq, Sk]; keys since then, and their blocks, are not in it."""
    later = blocks.k_block.shape[1] - before.k_block.shape[1]
    grown = blocks.nk - before.picked.shape[2]
    alike = before.picked.shape[1] == blocks.nq and later >= 0 and grown >= 0
    if not alike or (before.pairs is not None and before.pairs.shape[1] != blocks.q_block.shape[1]):
        raise _unlike(before, blocks.q_block, blocks.k_block.shape[1])
    pairs = None if before.pairs is None else pad(before.pairs, (0, later), value=False)
    return pad(before.picked, (0, grown), value=0), pairs


def labels(before: Selection, q_block: Tensor, keys: int, clustered: bool) -> tuple[Tensor, Tensor]:
    """The earlier clusters of keys [H, Sk], and those of queries where they are `clustered`, else q_block [H, Sq].

    Keys since then lie in no cluster.
    """
    later = keys - before.k_block.shape[1]
    if later < 0 or (clustered and before.q_block.shape != q_block.shape):
        raise _unlike(before, q_block, keys)
    return before.q_block if clustered else q_block, pad(before.k_block, (0, later), value=-1)


def _unlike(before: Selection, q_block: Tensor, keys: int) -> ValueError:
    then = f"{before.k_block.shape[1]} keys for {before.q_block.shape[1]} queries"
    return ValueError(f"before: selects among {then}, this call has {keys} keys and {q_block.shape[1]} queries")


def _number(e: Expr) -> float:
    assert e.value is not None
    return float(e.value)


def mean_queries(q: Tensor) -> Tensor:
    """The mean of queries [H, Sq, D] by head."""
    return q.mean(1) if q.shape[1] else torch.zeros_like(q[:, :0].sum(1))
