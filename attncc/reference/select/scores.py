"""What a block of keys is worth to a block of queries: one row of `SCORES` each.

A score is finite where a pair of blocks competes, -inf where it does not (the rule cannot take it; it may be
forced), and +inf where it is taken without competing. Published methods: pooled_dot NSA and SpargeAttn,
antidiagonal XAttention, token_dot TokenSelect, minmax_bound Quest and LServe, centroid_dot SVG2 and RetroInfer,
exact_mass AdaSpa, DELTA and MInference, relu_indexer DeepSeek-V3.2, lowbit_qk SALE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from attncc.ir.attention import Call, Part
from attncc.ir.expr import Expr
from attncc.reference.normalize import softmax
from attncc.reference.pairs import scores as pair_scores
from attncc.reference.pairs import seen_keys
from attncc.reference.philox import drawn
from attncc.reference.rows import Rows
from attncc.reference.select.blocks import Blocks, How, reduced, sizes
from attncc.reference.select.lowbit import lowbit_qk

Score = Callable[[Call, Part, Rows, Blocks], Tensor]
"""All rows of a sequence and their blocks in; scores [H, nq, nk] out."""


def pooled_dot(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """pool(queries) · pool(keys) * scale; a block whose members are no more alike than `gate` is taken whole.

    Alike is the mean cosine of all pairs of members, which is the squared length of their mean direction. Where
    queries are single tokens and probabilities are compared, only blocks that are visible whole compete (NSA).
    """
    options = dict(call.kwargs)
    how: How = "amax" if options.get("pool") == "max" else "mean"
    s = _scaled(rows, blocks.over_queries(rows.q, how), blocks.over_keys(rows.k, how))
    tokens = part.select is not None and part.select.block[0] == "token" and part.select.normalize == "softmax"
    s = torch.where(blocks.whole if tokens else blocks.visible, s, -math.inf)
    gate = options.get("gate")
    if not isinstance(gate, Expr):
        return s
    alike_q, alike_k = (
        over(normalize(x, dim=-1), "mean").square().sum(-1) > float(gate.value or 0)
        for over, x in ((blocks.over_queries, rows.q), (blocks.over_keys, rows.k))
    )
    return torch.where(alike_q[:, :, None] & alike_k[:, None, :], s, math.inf)


def antidiagonal(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """Sums over the antidiagonals of stride x stride cells, softmax over cells, summed over the cells of a block.

    A cell counts where any of its pairs is visible, so cells on the diagonal of a causal mask count whole.
    """
    stride = _count(dict(call.kwargs)["stride"])
    q, k = (pad(x, (0, 0, 0, -x.shape[1] % stride)).unflatten(1, (-1, stride)) for x in (rows.q, rows.k))
    s = _scaled(rows, q.flip(2).flatten(2), k.flatten(2)) / stride
    edges = (0, -rows.shape[2] % stride, 0, -rows.shape[1] % stride)
    seen = pad(blocks.seen, edges).unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).any(4).any(2)
    if part.select is not None and part.select.normalize == "softmax":
        s = softmax(torch.where(seen, s, -math.inf))[0]
    s = reduced(torch.where(seen, s, 0.0), blocks.q_block[:, ::stride], blocks.nq, "sum")
    return reduced(s.transpose(1, 2), blocks.k_block[:, ::stride], blocks.nk, "sum").transpose(1, 2)


def token_dot(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """The mean of a block's queries times each key, without the scale."""
    return _product(rows, blocks.over_queries(rows.q, "mean"), blocks.over_keys(rows.k, "mean"))


def minmax_bound(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """The most that a key of the block can score: its keys' greatest and least by column, `sub` keys at a time."""
    sub, most = dict(call.kwargs).get("sub"), int(blocks.k_sizes.max()) if blocks.nk else 1
    step = most if sub is None else _count(sub)
    pages = -(-most // step)
    keys = torch.arange(rows.shape[2], device=rows.k.device).expand_as(blocks.k_block)
    first = blocks.over_keys(keys[..., None].double(), "amin")[..., 0].long().gather(1, blocks.k_block)
    page = blocks.k_block * pages + (keys - first) // step
    empty = (sizes(page, blocks.nk * pages) == 0)[:, None]
    top, least = (reduced(rows.k, page, blocks.nk * pages, how) for how in ("amax", "amin"))
    top, least = (torch.where(empty[:, 0, :, None], 0.0, x) for x in (top, least))
    q = blocks.over_queries(rows.q, "mean")
    bound = _scaled(rows, q.clamp_min(0), top) + _scaled(rows, q.clamp_max(0), least)
    return torch.where(empty, -math.inf, bound).unflatten(2, (blocks.nk, pages)).amax(-1)


def centroid_dot(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """Centroid of the queries · centroid of the keys * scale."""
    assert blocks.q_centers is not None
    assert blocks.k_centers is not None
    return _scaled(rows, blocks.q_centers, blocks.k_centers)


def voting(call: Call, part: Part, rows: Rows) -> tuple[Tensor, Rows]:
    """The weights [H, R, Sk] of the rows that vote, reduced over heads pair by pair, and those rows."""
    options = dict(call.kwargs)
    total = rows.shape[1]
    first = max(0, total - _count(options["last"])) if "last" in options else 0
    some = rows.cut(first, max(1, total - first))
    s = pair_scores(part, some, seen_keys(part, some), -math.inf)
    if "lse" in options:
        lse = _own(rows, str(options["lse"]))[:, first:total, None].to(s.dtype)
        p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse))
    else:
        p = softmax(s)[0]
    return over_heads(p, part.select.heads if part.select else "none", rows), some


def exact_mass(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """The sum of exp(s - lse) over the pairs of two blocks; with `last`, one vote of the last rows for all blocks."""
    p = voting(call, part, rows)[0]
    if "last" in dict(call.kwargs):
        return blocks.over_keys(p.sum(1)[..., None])[..., 0][:, None].expand(-1, blocks.nq, -1)
    return blocks.over_pairs(p)


def relu_indexer(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """Sum over the indexer's heads of w * relu(q · k), the same for all heads; by default of the part's own heads.

    Inputs: q [B, Hi, Sq, d], k [B, Sk, d], w [B, Sq, Hi].
    """
    names = dict(call.kwargs)
    q = _own(rows, str(names["q"])) if "q" in names else rows.q
    k = _own(rows, str(names["k"]))[None] if "k" in names else rows.k
    each = _product(rows, q, k).relu()
    if each.shape[1:] != rows.shape[1:]:
        wanted, got = list(rows.shape[1:]), list(each.shape[1:])
        raise ValueError(f"{', '.join(map(str, names.values()))}: expected {wanted} queries and keys, got {got}")
    if "w" in names:
        each = each * _own(rows, str(names["w"])).to(each.dtype).T[..., None]
    return blocks.over_pairs(each.sum(0, keepdim=True).expand(rows.shape), "mean")


def random(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """Uniform in [0, 1), by the counter (batch, head, query block, key block): multiples of 2^-24, exact in fp32."""
    seed = dict(call.kwargs).get("seed")
    at = lambda n: torch.arange(n, device=rows.q.device)
    i, j = at(blocks.nq)[None, :, None], at(blocks.nk)[None, None, :]
    word = drawn(
        rows.numbers.seed if seed is None else _count(seed), rows.scope.names["b"], rows.scope.names["h"], i, j
    )
    return (word >> 8).to(rows.numbers.elementwise) / 2**24


def given(call: Call, part: Part, rows: Rows, blocks: Blocks) -> Tensor:
    """Scores that the caller brings: an input [nq, nk], by head or by sequence and head."""
    name = call.words[0]
    x = rows.scope.inputs[name]
    if x.ndim == 4 or (x.ndim == 3 and rows.scope.shapes[name][0] == "B"):
        x = _own(rows, name)
    if x.shape[-2:] != (blocks.nq, blocks.nk):
        raise ValueError(f"{name}: expected scores of [{blocks.nq}, {blocks.nk}] blocks, got {list(x.shape[-2:])}")
    heads = rows.scope.names["h"].flatten()
    if x.ndim == 3:
        x = x[heads if len(x) == len(heads) else rows.scope.names["hk"].flatten() if len(x) > 1 else heads * 0]
    return x.to(rows.numbers.elementwise).expand(len(heads), blocks.nq, blocks.nk)


def over_heads(x: Tensor, how: str, rows: Rows) -> Tensor:
    """x [H, …] reduced over heads and given back to each: the sum of its group, the greatest of all, or their sum."""
    if how == "max":
        return x.amax(0, keepdim=True).expand_as(x)
    if how == "soft_vote":
        return x.sum(0, keepdim=True).expand_as(x)
    if how == "group_sum":
        group = rows.scope.names["hk"].flatten()
        return torch.zeros_like(x).index_add(0, group, x)[group]
    return x


def _product(rows: Rows, q: Tensor, k: Tensor) -> Tensor:
    """q [H, nq, D] times k [H, nk, D]."""
    matmul = rows.numbers.matmul
    return (q.to(matmul) @ k.to(matmul).transpose(-1, -2)).to(rows.numbers.elementwise)


def _scaled(rows: Rows, q: Tensor, k: Tensor) -> Tensor:
    return _product(rows, q, k) * rows.scope.names["scale"]


def _own(rows: Rows, name: str) -> Tensor:
    """The sequence's entry of an input [B, …]; an axis of 1 serves all."""
    x = rows.scope.inputs[name]
    return x[rows.scope.names["b"] if len(x) > 1 else 0]


def _count(e: Expr | str) -> int:
    assert isinstance(e, Expr)
    return int(e.value or 0)


SCORES: Final[dict[str, Score]] = {
    "pooled_dot": pooled_dot,
    "antidiagonal": antidiagonal,
    "lowbit_qk": lowbit_qk,
    "token_dot": token_dot,
    "minmax_bound": minmax_bound,
    "centroid_dot": centroid_dot,
    "exact_mass": exact_mass,
    "relu_indexer": relu_indexer,
    "random": random,
    "given": given,
}
REDUCED: Final = frozenset({"exact_mass"})
"""Those that reduce over heads themselves, pair by pair."""
NORMALISED: Final = frozenset({"antidiagonal", "exact_mass"})
"""Those that `normalize: softmax` normalises pair by pair or cell by cell, before blocks are summed."""
