"""A bound on formulas: how large and deep one may be when all that it shares is written out."""

from __future__ import annotations

from typing import Final

from attncc.ir.expr import Expr
from attncc.spec.operators import Fault

MAX_DEPTH: Final = 100
MAX_NODES: Final = 2000


class Budget:
    """Measures growing formulas; nodes already measured cost nothing."""

    def __init__(self) -> None:
        self._measured: dict[int, tuple[Expr, int, int]] = {}

    def check(self, e: Expr) -> Expr:
        """`e` itself, refused where it is too large."""
        _, nodes, depth = self._measure(e)
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise Fault(f"the expression is too large; at most {MAX_NODES} operations, {MAX_DEPTH} deep")
        return e

    def _measure(self, e: Expr) -> tuple[Expr, int, int]:
        """Nodes and depth; the node is kept, so that no other takes its id."""
        if id(e) not in self._measured:
            below = [self._measure(a) for a in e.args]
            nodes, depth = 1 + sum(n for _, n, _ in below), 1 + max((d for *_, d in below), default=0)
            self._measured[id(e)] = (e, nodes, depth)
        return self._measured[id(e)]
