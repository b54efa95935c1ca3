"""The oracle's call: operands in any layout in, outputs in the same layout out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention
from attncc.reference.epilogue import columns
from attncc.reference.operands import Call, Indexing, prepare
from attncc.reference.rows import Numbers
from attncc.reference.sequence import Attended, Selections, attend
from attncc.reference.state import has_lse
from attncc.reference.taps import tapped


@dataclass(frozen=True, slots=True)
class Outputs:
    """`o` in q's layout with Dv columns, or those of an absorbed projection; `lse` and `max_score` as [B, Hq, Sq].

    For varlen lse and max_score are [Hq, T].
    There is no lse where weights may be negative (all but softmax, and sums of positive features), nor for parts
    that are not combined by lse.
    """

    o: Tensor
    lse: Tensor | None
    max_score: Tensor
    taps: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The other outputs by name, a second one of a kind as `name_2`: [B, …], for varlen a tuple with one a sequence."""
    selections: tuple[Selections, ...] = ()
    """What each sequence selected in each part; the next call's `before`."""


def _combines(attn: Attention) -> bool:
    """Whether these parts can be combined as they shall; gate has one factor fewer where the first part has none."""
    parts, args = len(attn.parts), len(attn.combine.args)
    known = {
        "lse": args == 0 and all(map(has_lse, attn.parts)),
        "add": args == 0,
        "lerp": args == 1 and parts == 2,
        "gate": args in (parts, parts - 1),
    }
    return parts == 1 or known.get(attn.combine.name, False)


def attention(
    attn: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    return_lse: bool = False,
    **arguments: Any,
) -> Any:
    """`o`, or (`o`, `lse`): `outputs` with the same arguments."""
    result = outputs(attn, q, k, v, **arguments)
    if not return_lse:
        return result.o
    if result.lse is None:
        raise Unsupported(
            "an lse exists for softmax or positive features, in one part or combined by lse, only", key="outputs"
        )
    return result.o, result.lse


def outputs(
    attn: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    inputs: Mapping[str, Tensor] = {},
    dtype: torch.dtype | None = torch.float64,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    seed: int = 0,
    before: tuple[Selections, ...] = (),
    operands: torch.dtype | None = None,
) -> Outputs:
    """All outputs of a variant on these operands.

    q, k, v have the spec's layout; keys and values in pages are [pages, page_size, H, D]; latent ones leave
    v out. `dtype` is that of the matrix products; the elementwise work between them is done in it too, but
    in float32 at least. None takes q's dtype: the same computation in eager torch. `before` are the selections
    of an earlier call, one entry a sequence, for parts that use them again. `operands` is what steps round q, k and v
    to, where products are of another dtype.
    """
    if not _combines(attn):
        raise Unsupported("the oracle does not combine these parts", key="combine")
    call = prepare(attn, q, k, v, inputs, Indexing(cu_seqlens_q, cu_seqlens_k, block_table, seqused_k))
    matmul = dtype or q.dtype
    elementwise = torch.promote_types(matmul, torch.float32)
    numbers = Numbers(matmul, elementwise, scale, seed, call.sizes, inputs, operands)
    if before and len(before) != len(call.sequences):
        raise ValueError(f"before: expected {len(call.sequences)} entries, one a sequence, got {len(before)}")
    earlier = before or ((),) * len(call.sequences)
    done = [attend(attn, sequence, numbers, some) for sequence, some in zip(call.sequences, earlier, strict=True)]
    join = _packed if attn.layout == "varlen" else _stacked
    made = join(attn, q, call, done, matmul, columns(attn, inputs))
    return replace(made, taps=_taps(attn, done), selections=tuple(a.selections for a in done))


def _taps(attn: Attention, done: list[Attended]) -> dict[str, Any]:
    """The outputs beside o, lse and max_score by name."""
    columns: list[tuple[str, list[Tensor]]] = []
    for n, call in enumerate(tapped(attn)):
        columns.append((call.name, [a.taps[n] for a in done]))
    dv = attn.dims.v
    for n, part in enumerate(part for part in attn.parts if part.state is not None):
        if attn.wants("final_state"):
            columns.append(("final_state", [a.states[n][..., :dv] for a in done]))
        if attn.wants("final_mass") and part.normalizer.kind == "linear":
            columns.append(("final_mass", [a.states[n][..., dv] for a in done]))
    if attn.wants("indices"):
        for n, part in enumerate(attn.parts):
            if part.select is not None:
                columns.append(("indices", [s.classes for a in done if (s := a.selections[n]) is not None]))
    found: dict[str, Any] = {}
    for name, pieces in columns:
        again = sum(key == name or key.startswith(f"{name}_") for key in found)
        key = f"{name}_{again + 1}" if again else name
        found[key] = torch.stack(pieces) if attn.layout != "varlen" and pieces else tuple(pieces)
    return found


def _has_lse(attn: Attention) -> bool:
    merged = len(attn.parts) == 1 or attn.combine.name == "lse"
    return merged and all(map(has_lse, attn.parts))


def _stacked(attn: Attention, q: Tensor, call: Call, done: list[Attended], dtype: torch.dtype, width: int) -> Outputs:
    if not done:
        rows = q.shape[1] if attn.layout == "bshd" else q.shape[2]
        nothing = q.new_zeros((0, attn.heads.q, rows), dtype=torch.promote_types(dtype, torch.float32))
        o = q.new_zeros((*q.shape[:-1], width), dtype=dtype)
        return Outputs(o, nothing if _has_lse(attn) else None, nothing)
    o = torch.stack([p.o for p in done]).to(dtype)
    return Outputs(
        o.transpose(1, 2) if attn.layout == "bshd" else o,
        _all([p.lse for p in done], torch.stack),
        torch.stack([p.top for p in done]),
    )


def _packed(attn: Attention, q: Tensor, call: Call, done: list[Attended], dtype: torch.dtype, width: int) -> Outputs:
    """Sequences one behind the other; packed rows behind the last sequence count as empty."""
    wide = torch.promote_types(dtype, torch.float32)
    behind = (attn.heads.q, call.rows_behind)
    nothing = q.new_full(behind, -math.inf, dtype=wide)
    empty = q.new_zeros((*behind, width), dtype=wide)
    pieces = [*done, Attended(empty, nothing, nothing if _has_lse(attn) else None)]
    return Outputs(
        torch.cat([p.o for p in pieces], 1).to(dtype).transpose(0, 1),
        _all([p.lse for p in pieces], lambda parts: torch.cat(parts, 1)),
        torch.cat([p.top for p in pieces], 1),
    )


def _all(pieces: list[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    known = [p for p in pieces if p is not None]
    return join(known) if len(known) == len(pieces) else None
