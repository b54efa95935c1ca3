"""Caches of packages that are written by calls of theirs, and what the oracle has in their place."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from codegen.emitted import Package, normal
from torch import Tensor

from attncc.check.cached import Places, hold_all
from attncc.check.pages import Pages, poison

LENGTHS = [37, 0, 20, 1]


def sequences(p: Package, lengths: list[int]) -> list[dict[str, Tensor]]:
    """Keys and values [S, H, D] of each sequence."""
    heads = {"k": (p.attn.heads.kv, p.attn.dims.qk), "v": (p.attn.heads.v, p.attn.dims.v)}
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[p.attn.dtype]
    drawn = [
        {x: normal(n, *heads[x], seed=2 * at + (x == "v"), dtype=dtype) for x in heads} for at, n in enumerate(lengths)
    ]
    return [{x: t for x, t in s.items() if x == "k" or not p.attn.is_latent} for s in drawn]


def expected(p: Package, rows: list[dict[str, Tensor]], pages: Pages | None) -> dict[str, Tensor]:
    """The cache that holds them, and poison where none is."""
    place = Places(
        p.attn, max(map(len, (s["k"] for s in rows))), pages, torch.device("cpu"), torch.clone, rows[0]["k"].dtype
    )
    if not p.attn.quantize:
        heads = {x: (t.shape[1], t.shape[2]) for x, t in rows[0].items()}
        return {x: place.of([s[x].transpose(0, 1) for s in rows], heads[x], place.dtype) for x in rows[0]}
    return hold_all(p.attn, [s if "v" in s else {**s, "v": s["k"]} for s in rows], place)[2]


def empty(wanted: Mapping[str, Tensor], p: Package) -> dict[str, Tensor]:
    """The same with nothing in it; scales that are given stay."""
    per = p.attn.quantize[0].per if p.attn.quantize else None
    found = per is not None and per.name in ("token", "group")

    def nothing(name: str, t: Tensor) -> Tensor:
        if name.endswith(("scales", "zeros")) and not found:
            return t.clone()
        stored = t.view(torch.uint8) if t.dtype.itemsize == 1 and t.dtype != torch.int8 else t
        return torch.empty_like(t.contiguous()) if 0 in t.shape else _strided_like(stored).view(t.dtype)

    return {name: nothing(name, t) for name, t in wanted.items()}


def _strided_like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(poison(t.shape, t.dtype, t.device))


def bits(t: Tensor) -> Tensor:
    return t.nan_to_num(nan=12345.0) if t.dtype.itemsize > 1 else t.view(torch.uint8)


def same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, t in wanted.items():
        assert torch.equal(bits(got[name]), bits(t)), name


def write(
    p: Package, rows: list[dict[str, Tensor]], pages: Pages | None, into: dict[str, Tensor], *cuts: int, **more: Tensor
) -> None:
    """All tokens, those up to a cut of each sequence in a call before the others; `more` is given to all calls."""
    for lo, hi in pairwise((0, *cuts, max(len(s["k"]) for s in rows))):
        part = [{x: t[lo:hi] for x, t in s.items()} for s in rows]
        where = [torch.arange(lo, lo + len(s["k"]), dtype=torch.int32) for s in part]
        p.module.append(**given(p, part, where, [len(s["k"]) for s in rows], pages), **into, **more)


def given(
    p: Package, part: list[dict[str, Tensor]], where: list[Tensor], lengths: list[int], pages: Pages | None
) -> dict[str, Tensor]:
    """A call's tokens; those that pad a sequence go nowhere."""
    table = {} if pages is None else {"block_table": pages.table}
    if p.attn.layout == "varlen":
        starts = [0, *accumulate(lengths)]
        new = {f"{x}_new": torch.cat([s[x] for s in part]) for x in part[0]}
        cuts = offsets([len(s["k"]) for s in part])
        if pages is None:
            named = {t.name for t in p.module.APPENDING.tensors}
            known = {"cu_seqlens_new": cuts, "cu_seqlens_k": offsets(lengths)}
            new |= {name: t for name, t in known.items() if name in named}
            return {**new, "positions": torch.cat([w + a for w, a in zip(where, starts[:-1], strict=True)]).int()}
        return {**new, "positions": torch.cat(where), "cu_seqlens_new": cuts, **table}
    most = max(len(w) for w in where)
    padded = {x: torch.stack([_padded(s[x], most, torch.nan) for s in part]) for x in part[0]}
    new = {f"{x}_new": t if p.attn.layout == "bshd" else t.transpose(1, 2) for x, t in padded.items()}
    return {**new, "positions": torch.stack([_padded(w, most, -1) for w in where]), **table}


def offsets(lengths: list[int]) -> Tensor:
    """Where sequences of these lengths begin, one behind the other."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _padded(t: Tensor, length: int, value: float) -> Tensor:
    return torch.cat([t, torch.full((length - len(t), *t.shape[1:]), value, dtype=t.dtype)])
