"""Walks over expressions: what they read, and rewriting them bottom-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from attncc.ir.expr import OPS, Expr, Value, broadcast, ew, lift


def walk(e: Expr) -> Iterator[Expr]:
    """Every distinct node of `e`, parents first."""
    seen: set[int] = set()
    stack = [e]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack.extend(reversed(node.args))


def names(e: Expr) -> frozenset[str]:
    """The names `e` reads (buffers are not among them)."""
    return _attributes(e, ("name",))


def buffers(e: Expr) -> frozenset[str]:
    """The tensors `e` reads."""
    return _attributes(e, ("load", "bucket", "qdot", "tile"))


def _attributes(e: Expr, operators: tuple[str, ...]) -> frozenset[str]:
    """What the nodes of these operators are called; asked of every statement many times, and so without `walk`."""
    found: set[str] = set()
    seen: set[int] = set()
    stack = [e]
    while stack:
        node = stack.pop()
        if node.op in operators:
            found.add(str(node.attr))
        for a in node.args:
            if id(a) not in seen:
                seen.add(id(a))
                stack.append(a)
    return frozenset(found)


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """What must all hold for `e` to."""
    return tuple(c for a in e.args for c in conjuncts(a)) if e.op == "and" else (e,)


def rebuild(e: Expr, args: tuple[Expr, ...]) -> Expr:
    """`e` over other arguments: dtype and shape of an elementwise node follow from them."""
    if args == e.args:
        return e
    if e.op in OPS:
        new = ew(e.op, *args)
        return replace(new, attr=e.attr) if new.op == e.op and e.attr is not None else new
    if e.op in ("load", "bucket", "qdot"):
        return Expr(e.op, args, e.attr, e.dtype, broadcast(*(a.shape for a in args)))
    if e.op in ("cast", "rows_min", "rows_max"):
        return Expr(e.op, args, e.attr, e.dtype, args[0].shape)
    return Expr(e.op, args, e.attr, e.dtype, e.shape)


def transform(e: Expr, f: Callable[[Expr], Expr | None]) -> Expr:
    """Bottom-up rewriting: `f` sees each node over its rewritten arguments, None keeps it."""
    memo: dict[int, Expr] = {}

    def go(node: Expr) -> Expr:
        if id(node) not in memo:
            new = rebuild(node, tuple(go(a) for a in node.args))
            memo[id(node)] = f(new) or new
        return memo[id(node)]

    return go(e)


def substitute(e: Expr, values: Mapping[str, Value]) -> Expr:
    """`e` with names replaced."""

    def swap(node: Expr) -> Expr | None:
        if node.op == "name" and node.attr in values:
            return lift(values[str(node.attr)])
        return None

    return transform(e, swap)
