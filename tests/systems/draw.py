"""Operands for one call of any spec: q, k, v in its layout and storage, its inputs with values that mean something.

What the language says of an input (features of a state, blocks of a selection, lists of keys, logs of decays) is
said here once, so that a test can draw for a spec it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from attncc import reference
from attncc.check.inputs import draw_inputs
from attncc.ir.attention import Attention, Call, Part

LIST: Final = 4
"""Keys that a gathered list names."""
GIVEN: Final = 5
"""Keys of a part's own."""
OWN: Final = 3
"""A size of a spec's own that nothing else tells."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The arguments of one call of the oracle."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    arguments: Mapping[str, Any]
    lengths: tuple[tuple[int, int], ...]
    """Queries and keys of each sequence."""

    def with_inputs(self, **changes: Tensor) -> Drawn:
        return replace(self, arguments={**self.arguments, "inputs": {**self.arguments["inputs"], **changes}})


def outputs(attn: Attention, drawn: Drawn, **more: Any) -> reference.Outputs:
    """The oracle's outputs; a selection that must be an earlier one is made by the same call first."""
    if any(p.select is not None and p.select.reuse.name == "given" for p in attn.parts) and "before" not in more:
        parts = tuple(p if p.select is None else _each_call(p) for p in attn.parts)
        more["before"] = outputs(replace(attn, parts=parts), drawn).selections
    return reference.outputs(attn, drawn.q, drawn.k, drawn.v, **drawn.arguments, **more)


def _each_call(part: Part) -> Part:
    assert part.select is not None
    return replace(part, select=replace(part.select, reuse=Call("every_call")))


def draw(
    attn: Attention, batch: int = 2, queries: int = 5, keys: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Drawn:
    """A call with `batch` sequences of up to so many queries and keys; what the spec fixes wins."""
    generator = torch.Generator().manual_seed(seed)
    batch, queries, keys = (attn.size(n).fixed or m for n, m in (("B", batch), ("Sq", queries), ("Sk", keys)))
    if any(step.name == "mean_residual" for step in attn.prologue):
        keys = queries
    by_block = any(p.select is not None and p.select.score.name == "given" for p in attn.parts)
    ragged = attn.layout == "varlen" and attn.size("Sq").fixed is None and queries != keys and not by_block
    lengths = tuple((max(0, queries - n % 2), max(0, keys - n)) if ragged else (queries, keys) for n in range(batch))
    sizes = {"B": batch, "Sq": queries, "Sk": keys, "Hq": attn.heads.q, "Hk": attn.heads.kv, "Hv": attn.heads.v}
    sizes |= {"Dqk": attn.dims.qk, "Dv": attn.dims.v} | {s.name: s.fixed for s in attn.sizes if s.fixed is not None}
    sizes |= {name: n for name, n in _own_sizes(attn, sizes).items() if name not in sizes}
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in draw_inputs(attn, sizes, generator).items()}
    for name, meant in _meanings(attn, keys):
        inputs[name] = meant(inputs[name])

    def operand(letter: str, heads: int, columns: int) -> list[Tensor]:
        more = sum(inputs[w].shape[-2] - inputs[w].shape[-1] for w in _absorbed(attn, letter))
        shapes = [(heads, pair["qkv".index(letter) > 0], columns + more) for pair in lengths]
        return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]

    q = operand("q", attn.heads.q, attn.dims.qk)
    k, v = operand("k", attn.heads.kv, attn.dims.qk), operand("v", attn.heads.v, attn.dims.v)
    storage = next((p.kv for p in attn.parts if p.kv.kind in ("paged", "latent")), None)
    arguments: dict[str, Any] = {"inputs": inputs}
    if attn.layout == "varlen":
        arguments["cu_seqlens_q"] = _starts(n for n, _ in lengths)
    latent = storage is not None and storage.kind == "latent"
    if storage is not None and storage.page_size:
        arguments |= _pages(lengths, storage.page_size)
        pools = [_pooled(x, storage.page_size) for x in (k, v)]
        return Drawn(_packed(q, attn.layout), pools[0], None if latent else pools[1], arguments, lengths)
    if attn.layout == "varlen":
        arguments["cu_seqlens_k"] = _starts(n for _, n in lengths)
    packed = [_packed(x, attn.layout) for x in (q, k, v)]
    return Drawn(packed[0], packed[1], None if latent else packed[2], arguments, lengths)


def _absorbed(attn: Attention, letter: str) -> list[str]:
    """The matrices by which the columns of an operand change before attention."""
    steps = (step for step in attn.prologue if step.name == "absorb")
    return [step.words[0] for step in steps if letter in str(dict(step.kwargs).get("on", "q"))]


# -- layouts -------------------------------------------------------------------------------------


def _packed(sequences: list[Tensor], layout: str) -> Tensor:
    if layout == "varlen":
        return torch.cat([x.transpose(0, 1) for x in sequences])
    rows = torch.stack(sequences)
    return rows.transpose(1, 2) if layout == "bshd" else rows


def _starts(lengths: Iterator[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _pages(lengths: tuple[tuple[int, int], ...], size: int) -> dict[str, Tensor]:
    """Pages in the order of the sequences, from the last page back."""
    counts = [-(-keys // size) for _, keys in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    at = sum(counts)
    for number, count in enumerate(counts):
        table[number, :count] = torch.arange(at - 1, at - 1 - count, -1)
        at -= count
    return {"block_table": table, "seqused_k": torch.tensor([keys for _, keys in lengths], dtype=torch.int32)}


def _pooled(sequences: list[Tensor], size: int) -> Tensor:
    """[pages, size, H, D] with NaN behind the last token of a sequence."""
    pages: list[Tensor] = []
    for x in sequences:
        tokens = x.transpose(0, 1)
        room = torch.full((-len(tokens) % size, *tokens.shape[1:]), torch.nan, dtype=x.dtype)
        pages += list(torch.cat([tokens, room]).unflatten(0, (-1, size)))
    return (
        torch.stack(pages[::-1]) if pages else sequences[0].new_zeros(0, size, len(sequences[0]), sequences[0].shape[2])
    )


# -- what inputs mean ----------------------------------------------------------------------------


def _own_sizes(attn: Attention, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the spec's own that a primitive tells, by what stands at an axis."""
    found: dict[str, int] = {}
    for name, last in _tails(attn, sizes):
        shape = attn.input(name).shape
        found |= {entry: n for entry, n in zip(shape[-len(last) :], last, strict=True) if isinstance(entry, str)}
    return found


def _tails(attn: Attention, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Inputs with the lengths of their last axes."""
    positions = sizes["Sq"] + sizes["Sk"]
    for step in attn.prologue:
        options = dict(step.kwargs)
        width = sizes["Dqk"] // 2
        yield from ((str(options[w]), (positions, width)) for w in ("cos", "sin") if w in options)
    for part in attn.parts:
        if part.kv.kind == "gathered":
            yield part.kv.index, (LIST,)
        if part.kv.kind == "given":
            yield from ((name, (GIVEN, width)) for name, width in _given(attn, part))
        if part.state is not None:
            features = _features(part, attn)
            yield from ((n, (features, sizes["Dv"])) for n in [part.state.initial] if n)
            yield from ((n, (features,)) for n in [part.state.initial_mass] if n)
        if part.select is not None:
            yield from _of_selection(part, sizes)
    yield from ((o.words[0], (OWN,)) for o in attn.outputs if o.name == "pair_value")


def _given(attn: Attention, part: Part) -> tuple[tuple[str, int], tuple[str, int]]:
    columns = attn.dims.qk if part.columns is None else part.columns[1] - part.columns[0]
    return (part.kv.index, columns), (part.kv.values, attn.dims.v)


def _features(part: Part, attn: Attention) -> int:
    lo, hi = part.columns or (0, attn.dims.qk)
    columns = hi - lo
    return 1 + columns + columns**2 if part.state and part.state.feature == "taylor2" else columns


def _of_selection(part: Part, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert part.select is not None
    score, block = part.select.score, part.select.block
    widths = {"token": 1, "page": part.kv.page_size or 1, "cluster": 1}
    q, k = (b if isinstance(b, int) else widths[b] for b in block)
    keys = GIVEN if part.kv.kind == "given" else -(-sizes["Sk"] // (part.kv.block or 1))
    if score.name == "given":
        yield score.words[0], (-(-sizes["Sq"] // q), -(-keys // k))
    if score.name == "centroid_dot":
        names = [score.words[0], *(str(v) for o, v in score.kwargs if o == "q")]
        yield from ((name, (OWN, sizes["Dqk"])) for name in names)
    if score.name == "relu_indexer":
        options = {o: str(v) for o, v in score.kwargs}
        yield from ((options[o], (OWN,)) for o in ("q", "k", "w") if o in options)


Meaning = Callable[[Tensor], Tensor]


def _meanings(attn: Attention, keys: int) -> Iterator[tuple[str, Meaning]]:
    """Inputs whose values are more than any numbers: what is drawn for them in, what they hold out."""
    for part in attn.parts:
        if part.kv.kind == "gathered":
            yield part.kv.index, lambda x: (x * 31 + torch.arange(x.numel()).reshape(x.shape) * 7) % (keys + 1) - 1
        if part.state is not None:
            decay, update = part.state.decay, part.state.update
            yield from ((word, lambda x: -x.abs() / 4) for word in decay.words)
            yield from ((word, torch.sigmoid) for word in update.words)
            yield from ((word, lambda x: x.abs() + 1) for word in [part.state.initial_mass] if word)
        if part.select is not None and part.select.score.name == "exact_mass":
            yield from ((str(v), lambda x: x.abs() + 3) for o, v in part.select.score.kwargs if o == "lse")
