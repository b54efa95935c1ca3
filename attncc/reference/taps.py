"""Outputs beside o: sums of the weights over rows, keys or blocks, without keeping the matrix.

The weights are those that o gives to the sequence's values: several parts count after their merge, and a sink
takes its share. Keys of a part's own (`given`, `pooled`), states, and parts that are no softmax have no columns
here; what they take of a merged row is missing from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Call, Part
from attncc.reference.combine import combine
from attncc.reference.rows import Partial, Rows

PLAIN: Final = ("o", "lse", "max_score", "final_state", "final_mass", "indices")
BLOCK: Final = 64
"""Rows and keys a block, where `block_mass` does not say."""


@dataclass(frozen=True, slots=True)
class Tap:
    """What is made of the weights [H, R, K] of some rows; chunks of rows add up, or stand one behind the other."""

    of: Callable[[Call, Tensor, Rows], Tensor]
    by_row: bool = False


def tapped(attn: Attention) -> tuple[Call, ...]:
    """The outputs that are taps."""
    return tuple(o for o in attn.outputs if o.name not in PLAIN)


def tap(attn: Attention, parts: Sequence[Partial], rows: Rows) -> list[Tensor]:
    """Every tap of some rows."""
    wanted = tapped(attn)
    if not wanted:
        return []
    w = weights(attn, parts, rows)
    return [TAPS[call.name].of(call, w, rows) for call in wanted]


def join(attn: Attention, chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The taps of a sequence from those of its chunks of rows."""
    pieces = zip(tapped(attn), zip(*chunks, strict=True), strict=True)
    return [torch.cat(some, 1) if TAPS[call.name].by_row else torch.stack(some).sum(0) for call, some in pieces]


def weights(attn: Attention, parts: Sequence[Partial], rows: Rows) -> Tensor:
    """[H, R, Sk]: how much of each value some rows take, which is what o would be if value j were the unit vector j."""
    if attn.combine.words:
        raise Unsupported(f"'{attn.combine.name}' with a projection leaves no weights of values", key="outputs")
    none = torch.zeros(rows.shape, dtype=rows.numbers.elementwise, device=rows.q.device)
    units = [
        replace(made, o=none if made.p is None or not _of_sequence(part) else made.p)
        for part, made in zip(attn.parts, parts, strict=True)
    ]
    return combine(attn, units, rows).o


def _of_sequence(part: Part) -> bool:
    """Whether a part's keys are the sequence's."""
    return part.kv.kind not in ("given", "pooled")


# -- one function a tap ------------------------------------------------------------------------------


def _column_mass(call: Call, w: Tensor, rows: Rows) -> Tensor:
    """sum_i x_i w_ij: [H, K], x_i = 1 unless the argument says."""
    return (w * rows.per_row(call.args[0])[:, :, None] if call.args else w).sum(1)


def _row_mass(call: Call, w: Tensor, rows: Rows) -> Tensor:
    """sum_j y_j w_ij: [H, R], y_j = 1 unless the argument says."""
    return (w * rows.per_key(call.args[0])[:, None, :] if call.args else w).sum(2)


def _block_mass(call: Call, w: Tensor, rows: Rows) -> Tensor:
    """Sums over blocks of rows and keys [H, ⌈Sq / q⌉, ⌈Sk / k⌉]; other chunks' rows count as 0."""
    sizes = [int(e.value or BLOCK) for e in call.args]
    bq, bk = (sizes + [BLOCK] * 2)[:2]
    names = rows.scope.names
    total = int(names["Sq"])
    padded = torch.nn.functional.pad(w, (0, -w.shape[2] % bk))
    columns = padded.unflatten(2, (-1, bk)).sum(3) if w.shape[2] else padded
    blocks = columns.new_zeros((w.shape[0], -(-total // bq), columns.shape[2]))
    return blocks.index_add(1, names["row"].flatten() // bq, columns)


def _pair_value(call: Call, w: Tensor, rows: Rows) -> Tensor:
    """sum_j w_ij z_bijc: [H, R, C], z [B, Sq, Sk, C]."""
    (name,) = call.words
    z, names = rows.scope.inputs[name], rows.scope.names
    mine = z[names["b"] if len(z) > 1 else 0].to(w.dtype)
    if len(mine) == 1:
        return torch.einsum("hrk,kc->hrc", w, mine[0].expand(w.shape[2], -1))
    return torch.einsum("hrk,rkc->hrc", w, mine[names["row"].flatten()].expand(-1, w.shape[2], -1))


TAPS: Final[dict[str, Tap]] = {
    "column_mass": Tap(_column_mass),
    "row_mass": Tap(_row_mass, by_row=True),
    "block_mass": Tap(_block_mass),
    "pair_value": Tap(_pair_value, by_row=True),
}
