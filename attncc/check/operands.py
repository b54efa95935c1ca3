"""q, k, v and the rest of a call: drawn sequence by sequence, packed in the variant's layout, placed in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from attncc.check.cached import Places, hold_all
from attncc.check.cases import Case, Trait
from attncc.check.inputs import draw_inputs
from attncc.check.pages import lay_out, pack, poison
from attncc.ir.attention import Attention
from attncc.ir.cache import quantizer
from attncc.ir.widths import entry_width

LARGE_GAIN: Final = 64.0


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of one call; keys and values of a quantised cache as the numbers that they stand for, in fp32."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    """None where values are a part of the keys."""
    inputs: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    """What says where sequences lie: cu_seqlens_q and cu_seqlens_k, block_table and seqused_k."""
    compared: int
    """How many sequences' results are to be compared, or packed rows of them."""
    cache: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What a package is given in place of the numbers: codes by the names k and v, and what is beside them."""

    @property
    def positional(self) -> tuple[Tensor, ...]:
        """What a call of a package has by position."""
        k, v = self.cache.get("k", self.k), self.cache.get("v", self.v)
        return (self.q, k) if v is None else (self.q, k, v)

    @property
    def keywords(self) -> dict[str, Tensor]:
        """What it has by name."""
        beside = {name: x for name, x in self.cache.items() if name not in ("k", "v")}
        return {**beside, **self.inputs, **self.offsets}


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence: q [Sq, Hq, Dqk], k [Sk, Hk, Dqk], v [Sk, Hv, Dv]."""

    q: Tensor
    k: Tensor
    v: Tensor


def draw(attn: Attention, case: Case, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """The operands of `case`, on the generator's device."""
    packed = attn.layout == "varlen"
    lengths = _lengths(attn, case)
    sequences = [_sequence(attn, case.trait, pair, generator) for pair in lengths]
    if case.trait == "nan_neighbour" and len(sequences) > 1:
        last = sequences[-1]
        sequences[-1] = Sequence(last.q, torch.full_like(last.k, torch.nan), torch.full_like(last.v, torch.nan))
    if case.trait == "expanded":
        sequences = sequences[:1] * len(sequences)
    compared = len(sequences) - (case.trait == "nan_neighbour" and len(sequences) > 1)
    count = {"q": attn.heads.q, "k": attn.heads.kv, "v": attn.heads.v}
    heads = {x: (n, entry_width(attn, x)) for x, n in count.items()}
    place = PLACEMENTS.get(case.trait, _as_is)

    def in_rows(x: str, length: int) -> Tensor:
        rows = [getattr(s, x) for s in sequences]
        return place(pack(rows, attn.layout, length, heads[x], generator.device).to(dtype))

    q, offsets, room = in_rows("q", case.Sq), {}, case.Sk
    if packed:
        offsets["cu_seqlens_q"] = _starts([len(s.q) for s in sequences], generator.device)
        compared = int(offsets["cu_seqlens_q"][compared])
    pages = None
    if attn.page_size:
        place = _as_is if case.trait == "expanded" else place  # a page repeated is another cache
        pages = lay_out([len(s.k) for s in sequences], _table_pages(attn, case.Sk), attn.page_size, generator)
        offsets |= {"block_table": pages.table, "seqused_k": pages.used}
        room = pages.room
    elif packed:
        offsets |= {"cu_seqlens_k": _starts([len(s.k) for s in sequences], generator.device)}
    stored: dict[str, Tensor] = {}
    if quantizer(attn) is not None:
        rows = [{x: getattr(s, x).to(dtype) for x in "kv"} for s in sequences]
        k, v, stored = hold_all(attn, rows, Places(attn, case.Sk, pages, generator.device, place, dtype))
    elif pages is not None:
        k, v = (place(pages.fill([getattr(s, x) for s in sequences], heads[x]).to(dtype)) for x in "kv")
    else:
        k, v = (in_rows(x, case.Sk) for x in "kv")
    sizes = {"B": case.B, "Sq": case.Sq, "Sk": room, "Hq": attn.heads.q, "Hk": attn.heads.kv}
    sizes |= {"Hv": attn.heads.v, "Dqk": attn.dims.qk, "Dv": attn.dims.v}
    v = None if attn.is_latent else v
    return Operands(q, k, v, draw_inputs(attn, sizes, generator), offsets, compared, stored)


def _lengths(attn: Attention, case: Case) -> tuple[tuple[int, int], ...]:
    """(Sq, Sk) of each sequence: packed ones differ in both, those in pages in their keys."""
    if attn.layout == "varlen":
        pairs = case.lengths
    elif attn.page_size:
        pairs = tuple((case.Sq, keys) for _, keys in case.lengths)
    else:
        return ((case.Sq, case.Sk),) * case.B
    most = _table_pages(attn, case.Sk) * attn.page_size if attn.page_size else case.Sk
    return tuple((queries, min(keys, most)) for queries, keys in pairs)


def _table_pages(attn: Attention, keys: int) -> int:
    """Entries of a sequence's row of the table: one more than its keys need, if the spec allows that."""
    return min(-(-keys // attn.page_size) + 1, attn.size("Sk").most // attn.page_size)


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


# -- values of one sequence ----------------------------------------------------------------------


def _sequence(attn: Attention, trait: Trait, lengths: tuple[int, int], generator: torch.Generator) -> Sequence:
    queries, keys = lengths
    heads = attn.heads
    dims = {x: entry_width(attn, x) for x in "qkv"}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    q, k, v = normal(queries, heads.q, dims["q"]), normal(keys, heads.kv, dims["k"]), normal(keys, heads.v, dims["v"])
    if trait == "large_logits":
        q = q * LARGE_GAIN
    if trait == "uniform":
        k = k[:1].expand_as(k)
    if trait == "one_hot" and keys and dims["q"] == dims["k"]:
        k = k.sign()
        q = 4 * k[torch.arange(queries, device=k.device) % keys][:, _serving(attn)]
    if trait == "nan_keys" and keys:
        k[[keys * 3 // 4, -1]], v[[keys * 3 // 4, -1]] = torch.nan, torch.nan  # late ones: causal rows before see none
    return Sequence(q, k, v)


def _serving(attn: Attention) -> list[int]:
    """The key head of each query head."""
    q, kv = attn.heads.q, attn.heads.kv
    return [h % kv if attn.heads.map == "tile" else h // (q // kv) for h in range(q)]


# -- layouts and memory --------------------------------------------------------------------------


def _as_is(x: Tensor) -> Tensor:
    return x


def _nan_around(x: Tensor) -> Tensor:
    """In the middle of NaN along every axis; rows still start on 16 bytes."""
    room = poison([n + 16 for n in x.shape], x.dtype, x.device)
    view = room[tuple(slice(8, 8 + n) for n in x.shape)]
    return view.copy_(x)


def _unaligned(x: Tensor) -> Tensor:
    room = torch.zeros((*x.shape[:-1], x.shape[-1] + 3), dtype=x.dtype, device=x.device)
    return room[..., 1 : 1 + x.shape[-1]].copy_(x)


def _last_axis_strided(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _expanded(x: Tensor) -> Tensor:
    """The first sequence at all places; packed rows have no axis for it."""
    return x[:1].expand_as(x) if x.ndim == 4 and len(x) > 1 else x


PLACEMENTS: Final[Mapping[Trait, Callable[[Tensor], Tensor]]] = {
    "nan_around": _nan_around,
    "unaligned": _unaligned,
    "last_axis_strided": _last_axis_strided,
    "expanded": _expanded,
}
