"""The oracle's call: operands in any layout in, outputs in the same layout out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Part
from attncc.reference.operands import Call, Indexing, prepare
from attncc.reference.sequence import Numbers, Partial, attend


@dataclass(frozen=True, slots=True)
class Outputs:
    """`o` in q's layout with Dv columns; `lse` and `max_score` as [B, Hq, Sq], for varlen [Hq, T].

    There is no lse for other normalizers than softmax, nor for parts that are not combined by lse.
    """

    o: Tensor
    lse: Tensor | None
    max_score: Tensor


def _combines(attn: Attention) -> bool:
    """Whether these parts can be combined as they shall; gate has one factor fewer where the first part has none."""
    parts, args = len(attn.parts), len(attn.combine.args)
    known = {
        "lse": args == 0 and all(p.normalizer.kind == "softmax" for p in attn.parts),
        "add": args == 0 and not attn.combine.words,
        "lerp": args == 1 and parts == 2,
        "gate": args in (parts, parts - 1),
    }
    return parts == 1 or known.get(attn.combine.name, False)


REFUSED_PART: Final[dict[str, Callable[[Part], bool]]] = {
    "select": lambda part: part.select is not None,
    "state": lambda part: part.state is not None,
}

REFUSED: Final[dict[str, Callable[[Attention], bool]]] = {
    "quantize": lambda attn: bool(attn.quantize),
    "prologue": lambda attn: bool(attn.prologue),
    "epilogue": lambda attn: bool(attn.epilogue),
    "outputs": lambda attn: any(o.name not in ("o", "lse", "max_score") for o in attn.outputs),
    "combine": lambda attn: not _combines(attn),
}


def refusals(attn: Attention) -> Iterator[str]:
    """The keys of the spec that the oracle does not evaluate, as `Unsupported.key` spells them."""
    for n, part in enumerate(attn.parts):
        prefix = f"parts[{n}]." if len(attn.parts) > 1 else ""
        yield from (prefix + key for key, hit in REFUSED_PART.items() if hit(part))
    yield from (key for key, hit in REFUSED.items() if hit(attn))


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
        raise Unsupported("an lse exists for softmax parts combined by lse only", key="outputs")
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
) -> Outputs:
    """All outputs of a variant on these operands.

    q, k, v have the spec's layout; paged keys and values are [pages, page_size, H, D]; latent ones leave
    v out. `dtype` is that of the matrix products; the elementwise work between them is done in it too, but
    in float32 at least. None takes q's dtype: the same computation in eager torch.
    """
    for key in refusals(attn):
        raise Unsupported(f"the oracle does not evaluate '{key}'", key=key)
    call = prepare(attn, q, k, v, inputs, Indexing(cu_seqlens_q, cu_seqlens_k, block_table, seqused_k))
    matmul = dtype or q.dtype
    elementwise = torch.promote_types(matmul, torch.float32)
    numbers = Numbers(matmul, elementwise, scale, seed, call.sizes, inputs)
    done = [attend(attn, sequence, numbers) for sequence in call.sequences]
    if attn.layout == "varlen":
        return _packed(attn, q, call, done, matmul)
    return _stacked(attn, q, done, matmul)


def _has_lse(attn: Attention) -> bool:
    merged = len(attn.parts) == 1 or attn.combine.name == "lse"
    return merged and all(part.normalizer.kind == "softmax" for part in attn.parts)


def _stacked(attn: Attention, q: Tensor, done: list[Partial], dtype: torch.dtype) -> Outputs:
    if not done:
        rows = q.shape[1] if attn.layout == "bshd" else q.shape[2]
        nothing = q.new_zeros((0, attn.heads.q, rows), dtype=torch.promote_types(dtype, torch.float32))
        o = q.new_zeros((*q.shape[:-1], attn.dims.v), dtype=dtype)
        return Outputs(o, nothing if _has_lse(attn) else None, nothing)
    o = torch.stack([p.o for p in done]).to(dtype)
    return Outputs(
        o.transpose(1, 2) if attn.layout == "bshd" else o,
        _all([p.lse for p in done], torch.stack),
        torch.stack([p.top for p in done]),
    )


def _packed(attn: Attention, q: Tensor, call: Call, done: list[Partial], dtype: torch.dtype) -> Outputs:
    """Sequences one behind the other; packed rows behind the last sequence count as empty."""
    wide = torch.promote_types(dtype, torch.float32)
    behind = (attn.heads.q, call.rows_behind)
    nothing = q.new_full(behind, -math.inf, dtype=wide)
    empty = q.new_zeros((*behind, attn.dims.v), dtype=wide)
    pieces = [*done, Partial(empty, nothing, nothing if _has_lse(attn) else None)]
    return Outputs(
        torch.cat([p.o for p in pieces], 1).to(dtype).transpose(0, 1),
        _all([p.lse for p in pieces], lambda parts: torch.cat(parts, 1)),
        torch.cat([p.top for p in pieces], 1),
    )


def _all(pieces: list[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    known = [p for p in pieces if p is not None]
    return join(known) if len(known) == len(pieces) else None
