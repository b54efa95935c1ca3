"""Checks a call's tensors against the variant, and cuts them into sequences.

Whatever the layout and the storage, a `Sequence` has heads first and no batch axis; what follows works on
one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from attncc.errors import Unsupported, nearest
from attncc.ir.attention import Attention, Input, Storage

INT_DTYPES: Final = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
AXES: Final[dict[str, tuple[str, str, str]]] = {
    "bhsd": ("B", "H", "S"),
    "bshd": ("B", "S", "H"),
    "varlen": ("T", "H", ""),
    "paged": ("pages", "page_size", "H"),
}


@dataclass(frozen=True, slots=True)
class Indexing:
    """The tensors that say where sequences lie."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    seqused_k: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence: q [Hq, Sq, Dqk], k [Hk, Sk, Dqk], v [Hv, Sk, Dv], and its number."""

    number: int
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """The checked operands of one call."""

    sequences: tuple[Sequence, ...]
    rows_behind: int
    """varlen: how many packed rows lie behind the last sequence."""
    sizes: Mapping[str, int]
    """Sizes that all sequences share; B, and names of the spec's own."""


def prepare(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor | None, inputs: Mapping[str, Tensor], where: Indexing
) -> Call:
    """The call's sequences; TypeError or ValueError names the argument that does not fit."""
    storage = memory(attn)
    if storage.kind == "latent":
        if v is not None:
            raise TypeError("v: kv is latent, so values are the first columns of k; got a tensor, expected None")
        _tensor("k", k)
        v = k[..., : attn.dims.v]
    for name, x in (("q", q), ("k", k), ("v", v)):
        _tensor(name, x)
    assert v is not None
    _operand(attn, "q", q, attn.layout, attn.heads.q, attn.dims.qk + _absorbed(attn, "q", inputs))
    kv_layout = "paged" if storage.page_size else attn.layout
    _operand(attn, "k", k, kv_layout, attn.heads.kv, attn.dims.qk + _absorbed(attn, "k", inputs))
    v_heads = attn.heads.kv if storage.kind == "latent" else attn.heads.v
    absorbed_v = 0 if storage.kind == "latent" else _absorbed(attn, "v", inputs)
    _operand(attn, "v", v, kv_layout, v_heads, attn.dims.v + absorbed_v)
    _same_places(attn, q, k, v, inputs, where)

    queries, behind = _queries(attn, q, where.cu_seqlens_q)
    keys = _keys(attn, k, len(queries), where)
    values = _keys(attn, v, len(queries), where)
    if kv_layout != "paged":
        for number, (x, y) in enumerate(zip(keys, values, strict=True)):
            if x.shape[1] != y.shape[1]:
                raise ValueError(f"v: expected {x.shape[1]} keys as k has (sequence {number}), got {y.shape[1]}")
    sequences = tuple(Sequence(n, *parts) for n, parts in enumerate(zip(queries, keys, values, strict=True)))
    ragged = attn.layout == "varlen" or where.seqused_k is not None or not sequences
    return Call(sequences, behind, _sizes(attn, sequences, inputs, ragged))


def memory(attn: Attention) -> Storage:
    """How the keys lie in memory: the parts agree on it, but for those that read lists, means, or keys of their own."""
    kinds = {part.kv for part in attn.parts if part.kv.kind not in ("gathered", "given", "pooled")} or {Storage()}
    if len(kinds) > 1:
        raise Unsupported("the oracle reads one kind of key storage in all parts", key="parts")
    return kinds.pop()


def _absorbed(attn: Attention, operand: str, inputs: Mapping[str, Tensor]) -> int:
    """How many columns more an operand has before its `absorb` steps: each makes r columns of n, W [H, n, r]."""
    steps = [step for step in attn.prologue if step.name == "absorb"]
    words = [step.words[0] for step in steps if operand in str(dict(step.kwargs).get("on", "q"))]
    for word in words:
        if word not in inputs:
            raise TypeError(f"{word}: the input is missing")
    return sum(inputs[word].shape[-2] - inputs[word].shape[-1] for word in words)


# -- one check each ------------------------------------------------------------------------------


def _tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _operand(attn: Attention, name: str, x: Tensor, layout: str, heads: int, dim: int) -> None:
    axes = [axis for axis in AXES[layout] if axis]
    form = f"[{', '.join([*axes, 'D'])}]"
    if x.ndim != len(axes) + 1:
        raise ValueError(f"{name}: expected {len(axes) + 1} axes {form}, got shape {list(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.shape[axes.index("H")] != heads:
        raise ValueError(f"{name}: expected {heads} heads in {form}, got shape {list(x.shape)}")
    if x.shape[-1] != dim:
        raise ValueError(f"{name}: expected a last axis of {dim}, got shape {list(x.shape)}")
    page_size = memory(attn).page_size
    if layout == "paged" and x.shape[1] != page_size:
        raise ValueError(f"{name}: expected pages of {page_size} keys in {form}, got shape {list(x.shape)}")


def _same_places(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], where: Indexing
) -> None:
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} as q has, got {x.dtype}")
    declared = {i.name for i in attn.inputs}
    for name in inputs:
        if name not in declared:
            raise TypeError(f"{name}: not an input of '{attn.name}'; {nearest(name, declared)}")
    for name in sorted(declared - set(inputs)):
        raise TypeError(f"{name}: the input is missing")
    named = {"k": k, "v": v, **inputs}
    for field in ("cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k"):
        x = getattr(where, field)
        if x is not None:
            _tensor(field, x)
            if x.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{field}: expected int32 or int64, got {x.dtype}")
            named[field] = x
    for name, x in named.items():
        _tensor(name, x)
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q has, got {x.device}")


def _offsets(name: str, x: Tensor | None, total: int) -> list[int]:
    if x is None:
        raise TypeError(f"{name}: missing; the layout is varlen")
    if x.ndim != 1 or len(x) < 1:
        raise ValueError(f"{name}: expected shape [B + 1], got {list(x.shape)}")
    values = [int(n) for n in x.tolist()]
    if values[0] != 0:
        raise ValueError(f"{name}: expected 0 at its start, got {values[0]}")
    for at, (a, b) in enumerate(pairwise(values)):
        if b < a:
            raise ValueError(f"{name}: expected non-decreasing offsets, got {a} and then {b} at entry {at + 1}")
    if values[-1] > total:
        raise ValueError(f"{name}: ends at {values[-1]}, behind the {total} packed rows")
    return values


def _queries(attn: Attention, q: Tensor, cu_seqlens: Tensor | None) -> tuple[list[Tensor], int]:
    if attn.layout == "varlen":
        cuts = _offsets("cu_seqlens_q", cu_seqlens, len(q))
        pieces = [q[a:b].transpose(0, 1) for a, b in pairwise(cuts)]
        return pieces, len(q) - cuts[-1]
    if cu_seqlens is not None:
        raise TypeError(f"cu_seqlens_q: the layout is {attn.layout}, which has no packed rows")
    return list(_heads_first(attn, q)), 0


def _heads_first(attn: Attention, x: Tensor) -> Tensor:
    return x.transpose(1, 2) if attn.layout == "bshd" else x


def _keys(attn: Attention, x: Tensor, batch: int, where: Indexing) -> list[Tensor]:
    """Each sequence's keys or values as [H, Sk, D]."""
    if memory(attn).page_size:
        return _paged(x, batch, where)
    if where.block_table is not None:
        raise TypeError("block_table: kv is not paged")
    if attn.layout == "varlen":
        cuts = _offsets("cu_seqlens_k", where.cu_seqlens_k, len(x))
        if len(cuts) != batch + 1:
            raise ValueError(f"cu_seqlens_k: expected {batch + 1} offsets as cu_seqlens_q has, got {len(cuts)}")
        pieces = [x[a:b].transpose(0, 1) for a, b in pairwise(cuts)]
    elif where.cu_seqlens_k is not None:
        raise TypeError(f"cu_seqlens_k: the layout is {attn.layout}, which has no packed rows")
    elif len(x) != batch:
        raise ValueError(f"k, v: expected a batch of {batch} as q has, got {len(x)}")
    else:
        pieces = list(_heads_first(attn, x))
    if where.seqused_k is None:
        return pieces
    lengths = _lengths(where.seqused_k, [piece.shape[1] for piece in pieces])
    return [piece[:, :n] for piece, n in zip(pieces, lengths, strict=True)]


def _lengths(seqused_k: Tensor, most: list[int]) -> list[int]:
    if list(seqused_k.shape) != [len(most)]:
        raise ValueError(f"seqused_k: expected shape [{len(most)}], got {list(seqused_k.shape)}")
    lengths = [int(n) for n in seqused_k.tolist()]
    for number, (n, room) in enumerate(zip(lengths, most, strict=True)):
        if not 0 <= n <= room:
            raise ValueError(f"seqused_k: sequence {number} has {n} keys, expected 0 to {room}")
    return lengths


def _paged(x: Tensor, batch: int, where: Indexing) -> list[Tensor]:
    table, used = where.block_table, where.seqused_k
    if table is None or used is None:
        raise TypeError(f"{'block_table' if table is None else 'seqused_k'}: missing; kv is paged")
    if where.cu_seqlens_k is not None:
        raise TypeError("cu_seqlens_k: kv is paged; seqused_k says how many keys each sequence has")
    if table.ndim != 2 or len(table) != batch:
        raise ValueError(f"block_table: expected shape [{batch}, pages], got {list(table.shape)}")
    page_size = x.shape[1]
    lengths = _lengths(used, [table.shape[1] * page_size] * batch)
    pieces: list[Tensor] = []
    for number, n in enumerate(lengths):
        pages = table[number, : -(-n // page_size)].long()
        if bool(((pages < 0) | (pages >= len(x))).any()):
            raise ValueError(f"block_table: sequence {number} uses a page outside of 0 to {len(x) - 1}")
        pieces.append(x[pages].flatten(0, 1)[:n].transpose(0, 1))
    return pieces


# -- sizes and extra inputs ----------------------------------------------------------------------


def _sizes(
    attn: Attention, sequences: tuple[Sequence, ...], inputs: Mapping[str, Tensor], ragged: bool
) -> dict[str, int]:
    """The sizes that the inputs' shapes must agree with; own names are learnt from the first that has them."""
    sizes = {
        "B": len(sequences),
        "Hq": attn.heads.q,
        "Hk": attn.heads.kv,
        "Hv": attn.heads.v,
        "Sq": max((s.q.shape[1] for s in sequences), default=0),
        "Sk": max((s.k.shape[1] for s in sequences), default=0),
        "Dqk": attn.dims.qk,
        "Dv": attn.dims.v,
    }
    for declared in attn.inputs:
        _input(declared, inputs[declared.name], sizes, ragged)
    for size in attn.sizes:
        unknown = not sequences and size.name in ("Sq", "Sk")  # an empty batch has no lengths
        got = None if unknown else sizes.get(size.name)
        if got is not None and size.fixed not in (None, got):
            raise ValueError(f"{size.name}: the spec fixes it to {size.fixed}, got {got}")
    return {name: n for name, n in sizes.items() if name not in ("Sq", "Sk")}


def _input(declared: Input, x: Tensor, sizes: dict[str, int], ragged: bool) -> None:
    name = declared.name
    form = f"[{', '.join(map(str, declared.shape))}]"
    if x.ndim != len(declared.shape):
        raise ValueError(f"{name}: expected {len(declared.shape)} axes {form}, got shape {list(x.shape)}")
    _input_dtype(declared, x)
    for axis, (entry, got) in enumerate(zip(declared.shape, x.shape, strict=True)):
        expected = entry if isinstance(entry, int) else sizes.setdefault(entry, got)
        # where sequences differ in length, rows and keys are padded to the longest at least
        fits = got >= expected if ragged and entry in ("Sq", "Sk") else got == expected
        if not fits:
            raise ValueError(f"{name}: expected {expected} at axis {axis} of {form}, got shape {list(x.shape)}")
    if declared.sorted and x.shape[-1] > 1 and bool((x[..., 1:] < x[..., :-1]).any()):
        raise ValueError(f"{name}: declared sorted, but decreases along its last axis")


def _input_dtype(declared: Input, x: Tensor) -> None:
    if declared.dtype.startswith(("fp", "bf")):
        fits, expected = x.dtype.is_floating_point, "a floating-point dtype"
    elif declared.dtype == "bool":
        fits, expected = x.dtype == torch.bool, "torch.bool"
    else:
        fits, expected = x.dtype in INT_DTYPES, "an integer dtype"
    if not fits:
        raise TypeError(f"{declared.name}: expected {expected}, got {x.dtype}")
