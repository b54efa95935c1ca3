"""Leaves out of a kernel what nothing uses: bindings that no formula reads, parameters that no statement needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from attncc.ir.build import needed
from attncc.ir.expr import Expr
from attncc.ir.rewrite import names
from attncc.ir.tile import For, If, Let, Param, Statement, block, every, reads

Body = tuple[Statement, ...]


def tidy(params: Iterable[Param], body: Body) -> tuple[tuple[Param, ...], Body]:
    """Parameters and body of a kernel, less what is unused."""
    params = tuple(params)
    extents = {name for p in params if p.extent for name in names(p.extent[0])}
    before: Body = ()
    while body != before:
        before, body = body, tuple(_live(body, extents.union(*map(names, _read(body)))))
    return needed(params, body), body


def _read(body: Body) -> Iterator[Expr]:
    return (e for s in every(body) for e in reads(s))


def _live(body: Body, used: set[str]) -> Iterator[Statement]:
    for s in body:
        if isinstance(s, Let) and str(s.var.attr) not in used:
            continue
        inner = tuple(_live(block(s), used))
        if inner == block(s):
            yield s
        elif inner and isinstance(s, For | If):
            yield replace(s, body=inner)
