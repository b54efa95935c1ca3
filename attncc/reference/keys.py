"""The keys that a part attends to: its own or the sequence's, some columns of them, pooled or selected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Part
from attncc.ir.primitives import on
from attncc.reference.pairs import LOG_MEMBERS, seen_keys
from attncc.reference.rotary import rotate
from attncc.reference.rows import Rows, served_by
from attncc.reference.select import Selection, select
from attncc.reference.select.blocks import reduced, sizes

NO_BLOCK: Final = -2
"""The class of a key that lies in no block."""


@dataclass(frozen=True, slots=True)
class View:
    """A part's rows with its keys, and the selection that left them."""

    rows: Rows
    selection: Selection | None = None


def view(attn: Attention, part: Part, whole: Rows, before: Selection | None = None, exact: Rows | None = None) -> View:
    """All rows of a sequence as one part sees them; `before` is the part's selection in an earlier call.

    `exact` are the rows before they were quantised, where they are: selections look at those.
    """
    rows = _keys_of(attn, part, whole)
    if part.select is None:
        return View(_renumbered(attn, rows))
    selection = select(part, rows if exact is None else _keys_of(attn, part, exact), before)
    if part.kv.kind == "pooled" and part.kv.block is None:
        return View(_pooled(part, rows, selection), selection)
    chosen = taken(part.select.take, selection)
    return View(_renumbered(attn, replace(rows, chosen=chosen)), selection)


def _keys_of(attn: Attention, part: Part, rows: Rows) -> Rows:
    """The columns that a part multiplies, and its keys: the sequence's, given ones, or means over runs of them."""
    if part.columns is not None:
        lo, hi = part.columns
        rows = replace(rows, q=rows.q[..., lo:hi], k=rows.k[..., lo:hi])
    if part.kv.kind == "given":
        return _given(attn, part, rows)
    if part.kv.block is None:
        return rows
    heads, _, keys = rows.shape
    run = (torch.arange(keys, device=rows.k.device) // part.kv.block).expand(heads, -1)
    return _means(part, rows, run, -(-keys // part.kv.block))


def _given(attn: Attention, part: Part, rows: Rows) -> Rows:
    """The part's own keys and values: inputs [B, H, N, D], the axes B and H as many as declared, or 1."""
    heads = torch.arange(attn.heads.q, device=rows.q.device)
    k = _own(attn, part.kv.index, rows.q.shape[-1], heads, rows)
    v = _own(attn, part.kv.values, attn.dims.v, heads, rows)
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"{part.kv.values}: expected {k.shape[1]} keys as {part.kv.index} has, got {v.shape[1]}")
    at = torch.arange(k.shape[1], device=k.device)[None, None, :]
    names = {**rows.scope.names, "j": at, "Sk": torch.tensor(k.shape[1], device=k.device)}
    return replace(rows, k=k, v=v, scope=replace(rows.scope, names=names))


def _own(attn: Attention, word: str, width: int, heads: Tensor, rows: Rows) -> Tensor:
    """[H, N, D] of the sequence, one head per query head."""
    x, batch = rows.scope.inputs[word], rows.numbers.sizes["B"]
    if len(x) not in (1, batch) or attn.heads.q % x.shape[1] or x.shape[-1] != width:
        expected = f"[1 or {batch}, a divisor of {attn.heads.q}, keys, {width}]"
        raise ValueError(f"{word}: expected shape {expected}, got {list(x.shape)}")
    mine = x[rows.scope.names["b"] if len(x) > 1 else 0].to(rows.numbers.elementwise)
    return mine[served_by(attn, heads, mine.shape[0])]


# -- selected keys -----------------------------------------------------------------------------------


def taken(take: str, selection: Selection) -> Tensor:
    """bool [H, Sq, Sk]: the pairs in blocks of the class that a part takes."""
    if selection.pairs is not None:
        return _of_class(take, selection.pairs.int())
    classes, n = pad(_row_classes(selection), (0, 1), value=NO_BLOCK), selection.classes.shape[2]
    of_key = torch.where(selection.k_block < 0, n, selection.k_block)
    return _of_class(take, classes.gather(2, of_key[:, None, :].expand(-1, classes.shape[1], -1)))


def _row_classes(selection: Selection) -> Tensor:
    """The classes of the key blocks for each query [H, Sq, nk]."""
    blocks = selection.classes.shape[2]
    return selection.classes.gather(1, selection.q_block[..., None].expand(-1, -1, blocks))


def _of_class(take: str, classes: Tensor) -> Tensor:
    """`rest` is all but the selected, keys that lie in no block among them."""
    return {"selected": classes == 1, "marginal": classes == 0, "rest": classes != 1}[take]


def _renumbered(attn: Attention, rows: Rows) -> Rows:
    """Rope by positions among the chosen keys, the last queries behind them all: `positions=packed` (TokenSelect)."""
    for step in attn.prologue:
        if step.name != "rope" or dict(step.kwargs).get("positions") != "packed":
            continue
        heads, queries, keys = rows.shape
        every = torch.ones(1, 1, keys, dtype=torch.bool, device=rows.k.device)
        chosen = every if rows.chosen is None or not queries else rows.chosen
        if bool((chosen != chosen[:, :1]).any()):
            raise Unsupported("packed positions need one list of keys for all queries of a call", key="prologue")
        rank = chosen[:, 0].long().cumsum(-1)
        at = chosen[:, 0].sum(-1, keepdim=True) - queries + torch.arange(queries, device=rank.device)
        letters = on(step)
        q = rotate(rows.q, at.expand(heads, -1), step, rows.scope) if "q" in letters else rows.q
        k = rotate(rows.k, (rank - 1).expand(heads, -1), step, rows.scope) if "k" in letters else rows.k
        rows = replace(rows, q=q, k=k)
    return rows


# -- means of keys -----------------------------------------------------------------------------------


def _means(part: Part, rows: Rows, block: Tensor, count: int) -> Rows:
    """Keys and values as means over the members of blocks (labels [H, Sk], -1 for none); `j` then counts blocks.

    Weighted, each mean counts as often as its block has members.
    """
    k, v = (reduced(x, block, count, "mean") for x in (rows.k, rows.v))
    at = torch.arange(count, device=k.device)[None, None, :]
    names = {**rows.scope.names, "j": at, "Sk": torch.tensor(count, device=k.device)}
    if part.kv.weighted:
        names[LOG_MEMBERS] = sizes(block, count).clamp(min=1).to(rows.numbers.elementwise).log()[:, None, :]
    return replace(rows, k=k, v=v, scope=replace(rows.scope, names=names))


def _pooled(part: Part, rows: Rows, selection: Selection) -> Rows:
    """Keys and values as means over the selection's blocks, of those keys that the mask shows to any row.

    The mask speaks of these members: a row sees a mean where it sees all that went into it.
    """
    assert part.select is not None
    seen, count = seen_keys(part, rows), selection.classes.shape[2]
    members = torch.where(seen.any(1), selection.k_block, -1)
    shown = reduced(seen.double().transpose(1, 2), members, count, "sum").transpose(1, 2)
    size = sizes(members, count)[:, None, :]
    chosen = _of_class(part.select.take, _row_classes(selection)) & (shown == size) & (size > 0)
    return replace(_means(part, rows, members, count), chosen=chosen)
