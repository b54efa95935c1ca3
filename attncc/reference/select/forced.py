"""Blocks that are always taken: one row of `FORCED` each, counted in key blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Call
from attncc.ir.expr import Expr
from attncc.reference.evaluate import evaluate
from attncc.reference.rows import Rows
from attncc.reference.select.blocks import Blocks

ANCHORS: Final = ("sink", "local")
"""The forced blocks whose scores `normalize: anchor` measures by."""
IN_ORDER: Final = ("sink", "local", "first_column", "last_pages")
"""These count blocks along the keys, so clusters have none."""


def forced(calls: Sequence[Call], rows: Rows, blocks: Blocks) -> Tensor:
    """bool [H, nq, nk]: the visible blocks that any of these forces."""
    found = torch.zeros_like(blocks.visible)
    for call in calls:
        if call.name in IN_ORDER and blocks.k_centers is not None:
            raise Unsupported(f"the oracle does not force '{call.name}' among clusters", key="select.force")
        found = found | FORCED[call.name](call, rows, blocks)
    return found & blocks.visible


def _sink(call: Call, rows: Rows, blocks: Blocks) -> Tensor:
    return _keys(blocks) < _count(call)


def _first_column(call: Call, rows: Rows, blocks: Blocks) -> Tensor:
    return _keys(blocks) < 1


def _last_pages(call: Call, rows: Rows, blocks: Blocks) -> Tensor:
    return _keys(blocks) >= blocks.nk - _count(call)


def _local(call: Call, rows: Rows, blocks: Blocks) -> Tensor:
    """The last n key blocks up to the one at the query block's last position.

    With `segment` the scan begins at whole segments of m blocks, as in SALE's kernel: n plus up to m - 1 blocks, by
    the phase of the query block.
    """
    last = _diagonal_end(rows, blocks)
    n: Tensor | int = _count(call)
    segment = dict(call.kwargs).get("segment")
    if isinstance(segment, Expr):
        m = int(segment.value or 1)
        phase = last - -(-last // m) * m
        n = m * -((phase - n) // m) + phase
    return (_keys(blocks) > last - n) & (_keys(blocks) <= last)


def _diagonal_end(rows: Rows, blocks: Blocks) -> Tensor:
    """[H, nq, 1]: the key block in which the query block's last position lies, or the last one there is."""
    if not blocks.nk:
        return blocks.visible.new_zeros((*blocks.visible.shape[:2], 1), dtype=torch.int64)
    position = rows.scope.names["i"].expand(*blocks.q_block.shape, 1).double()
    last = blocks.over_queries(position, "amax").clamp(0, blocks.k_block.shape[1] - 1)
    return blocks.k_block.gather(1, last[..., 0].long())[..., None]


def _diagonal(call: Call, rows: Rows, blocks: Blocks) -> Tensor:
    """The blocks that hold the position of one of their queries as a key."""
    names = rows.scope.names
    return blocks.over_pairs((names["i"] == names["j"]).expand(rows.shape).double()) > 0


def _rows(call: Call, rows: Rows, blocks: Blocks) -> Tensor:
    """Every block of queries that hold one for which the expression is true."""
    true = evaluate(call.args[0], rows.scope).expand(*blocks.q_block.shape, 1)
    return blocks.over_queries(true.double()) > 0


def _columns(call: Call, rows: Rows, blocks: Blocks) -> Tensor:
    """Every block of keys that hold one for which the expression is true."""
    heads, _, keys = rows.shape
    true = evaluate(call.args[0], rows.scope).expand(heads, 1, keys).transpose(1, 2)
    return (blocks.over_keys(true.double()) > 0).transpose(1, 2)


FORCED: Final[dict[str, Callable[[Call, Rows, Blocks], Tensor]]] = {
    "sink": _sink,
    "local": _local,
    "diagonal": _diagonal,
    "first_column": _first_column,
    "last_pages": _last_pages,
    "rows": _rows,
    "columns": _columns,
}


def _keys(blocks: Blocks) -> Tensor:
    """The numbers of the key blocks [1, 1, nk]."""
    return torch.arange(blocks.nk, device=blocks.seen.device)[None, None, :]


def _count(call: Call) -> int:
    value = call.args[0].value
    assert value is not None
    return int(value)
