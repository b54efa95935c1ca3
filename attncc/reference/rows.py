"""What parts compute on: some query rows of a sequence with their keys, and what is made of them.

Letters in shapes: H query heads, R rows, K keys (or pooled blocks), D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncc.ir.attention import Attention, Input
from attncc.ir.expr import Expr
from attncc.reference.evaluate import Scope, evaluate, read
from attncc.reference.operands import Sequence


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a call has once: the dtypes it computes in, scale, dropout's seed, sizes and inputs."""

    matmul: torch.dtype
    elementwise: torch.dtype
    scale: float | Tensor | None
    seed: int
    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor]
    operands: torch.dtype | None = None
    """What q, k and v are rounded to behind the prologue; None leaves that to the products."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some query rows of a sequence, one key and value head per query head: q [H, R, D], k and v [H, K, D].

    The scope's positions broadcast to [H, R, K].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scope: Scope
    numbers: Numbers
    row_term: Tensor | None = None
    """What every product of a row gains [H, R]: the means that quantizers took off the keys."""
    key_term: Tensor | None = None
    """What every product of a key gains [H, K]: the means that quantizers took off the queries."""
    chosen: Tensor | None = None
    """Which keys the part's selection leaves each row [H, R, K]; None is all."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]

    def per_row(self, e: Expr) -> Tensor:
        """An expression that does not read `j`, as [H, R]."""
        heads, rows, _ = self.shape
        return evaluate(e, self.scope).to(self.numbers.elementwise).expand(heads, rows, 1)[..., 0]

    def per_key(self, e: Expr) -> Tensor:
        """An expression that does not read `i` or `row`, as [H, K]."""
        heads, _, keys = self.shape
        return evaluate(e, self.scope).to(self.numbers.elementwise).expand(heads, 1, keys)[:, 0]

    def cut(self, start: int, step: int) -> Rows:
        """Rows [start, start + step)."""
        at = slice(start, start + step)
        names = dict(self.scope.names)
        for name in ("row", "i"):
            names[name] = names[name][:, at]
        return replace(
            self,
            q=self.q[:, at],
            scope=replace(self.scope, names=names),
            row_term=None if self.row_term is None else self.row_term[:, at],
            chosen=None if self.chosen is None else self.chosen[:, at],
        )


@dataclass(frozen=True, slots=True)
class Partial:
    """What a part makes of its keys: o [H, R, Dv], its greatest score, lse and sink [H, R].

    The sink's share is not taken off `o` yet.
    """

    o: Tensor
    top: Tensor
    lse: Tensor | None = None
    sink: Tensor | None = None
    p: Tensor | None = None
    """softmax: the weights [H, R, K] that made `o`, for taps."""
    mass: Tensor | None = None
    """A state: the sum of its weights [H, R]; where that is 0, it has no logarithm and `o` is not divided yet."""

    def cut(self, start: int, step: int) -> Partial:
        """Rows [start, start + step)."""
        at = slice(start, start + step)
        mine = lambda x: None if x is None else x[:, at]
        return Partial(self.o[:, at], self.top[:, at], *map(mine, (self.lse, self.sink, self.p, self.mass)))


def scope_of(attn: Attention, sequence: Sequence, numbers: Numbers) -> Scope:
    """What expressions read in a sequence: sizes, inputs, and positions that broadcast to [H, R, K]."""
    device = sequence.q.device
    heads = torch.arange(attn.heads.q, device=device)
    row = torch.arange(sequence.q.shape[1], device=device)
    sizes = {**numbers.sizes, "Sq": sequence.q.shape[1], "Sk": sequence.k.shape[1]}
    names = {name: torch.tensor(n, device=device) for name, n in sizes.items()}
    names["b"] = torch.tensor(sequence.number, device=device)
    match attn.align.kind:
        case "bottom_right":
            offset = names["Sk"] - names["Sq"]
        case "top_left":
            offset = torch.zeros_like(names["b"])
        case "input":
            offset = read(numbers.inputs[attn.align.input], [names["b"]]).long()
    names["h"], names["hk"] = heads[:, None, None], served_by(attn, heads, attn.heads.kv)[:, None, None]
    names["row"], names["i"] = row[None, :, None], (row + offset)[None, :, None]
    names["j"] = torch.arange(sequence.k.shape[1], device=device)[None, None, :]
    inputs = {x.name: _of_sequence(x, numbers.inputs[x.name], sizes) for x in attn.inputs}
    scope = Scope(names, inputs, numbers.elementwise, device, {x.name: x.shape for x in attn.inputs})
    scale = evaluate(attn.scale, scope) if numbers.scale is None else numbers.scale
    names["scale"] = torch.as_tensor(scale, dtype=numbers.elementwise, device=device)
    return scope


def rows_of(attn: Attention, sequence: Sequence, scope: Scope, numbers: Numbers) -> Rows:
    """All rows of a sequence, the key and value heads repeated for the query heads that they serve."""
    heads = torch.arange(attn.heads.q, device=sequence.q.device)
    hk = served_by(attn, heads, attn.heads.kv)
    hv = served_by(attn, heads, sequence.v.shape[0])
    q, k, v = (x.to(numbers.elementwise) for x in (sequence.q, sequence.k, sequence.v))
    return Rows(q, k[hk], v[hv], replace(scope, query=q), numbers)


def _of_sequence(declared: Input, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """An input as a sequence sees it: its rows and keys end where the sequence does, whatever pads them."""
    for axis, entry in enumerate(declared.shape):
        if entry in ("Sq", "Sk"):
            x = x.narrow(axis, 0, min(sizes[entry], x.shape[axis]))
    return x


def served_by(attn: Attention, heads: Tensor, count: int) -> Tensor:
    """The key (or value) head of each query head."""
    return heads % count if attn.heads.map == "tile" else heads // (attn.heads.q // count)
