"""The value of an expression over torch tensors: an environment of named tensors in, a tensor out.

Integers are computed in int64, so the oracle never overflows, and floats in the environment's dtype; but what
decides (a comparison, a floor) decides by fp32, or no kernel could agree. A read outside of an input's axis gives
0, so that `where(j < n, x[j], 0)` means what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from attncc.ir.expr import FLOATS, OPS, Dtype, Expr


@dataclass(frozen=True, slots=True)
class Scope:
    """What an expression can read: tensors by name (they broadcast together), and the inputs."""

    names: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    dtype: torch.dtype
    """In which floats are computed."""
    device: torch.device
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict[str, "tuple[int | str, ...]"])
    """Declared shapes of inputs: an axis declared as 1 broadcasts, one that happens to be 1 does not."""
    query: Tensor | None = None
    """Every query of the sequence [H, Sq, D], for `qdot`."""


def _floordiv(a: Tensor, b: Tensor) -> Tensor:
    """Floor division; an integer divided by 0 is 0, as in NumPy."""
    if a.is_floating_point():
        return torch.floor(a / b)
    safe = torch.where(b == 0, 1, b)
    return torch.where(b == 0, 0, torch.div(a, safe, rounding_mode="floor"))


def _mod(a: Tensor, b: Tensor) -> Tensor:
    """Remainder with the divisor's sign; of an integer by 0 it is 0."""
    if a.is_floating_point():
        return torch.remainder(a, b)
    safe = torch.where(b == 0, 1, b)
    return torch.where(b == 0, 0, torch.remainder(a, safe))


TORCH: Final[dict[str, Callable[..., Tensor]]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": torch.pow,
    "neg": torch.neg,
    "abs": torch.abs,
    "min": torch.minimum,
    "max": torch.maximum,
    "where": torch.where,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "floor": torch.floor,
}


DECIDING: Final = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "floor", "floordiv", "mod", "cast"})
"""Operators whose result can jump with their argument's last bit: the bits are those of fp32, as in a kernel."""


def evaluate(e: Expr, scope: Scope) -> Tensor:
    """The value of a scalar-level expression, elementwise over the names of `scope`."""
    memo: dict[int, Tensor] = {}

    def go(node: Expr) -> Tensor:
        if id(node) not in memo:
            memo[id(node)] = (
                _decision(node, scope) if _decides(node) else _node(node, [go(a) for a in node.args], scope)
            )
        return memo[id(node)]

    return go(e)


def _decides(e: Expr) -> bool:
    jumps = e.op in DECIDING and not (e.op == "cast" and e.dtype in FLOATS)
    return jumps and any(a.dtype in FLOATS for a in e.args)


def _decision(e: Expr, scope: Scope) -> Tensor:
    """A deciding operator over arguments in float32."""
    names = {name: x.float() if x.is_floating_point() else x for name, x in scope.names.items()}
    narrow = replace(scope, names=names, dtype=torch.float32)
    return _as(_node(e, [evaluate(a, narrow) for a in e.args], narrow), e.dtype, scope)


def _node(e: Expr, args: list[Tensor], scope: Scope) -> Tensor:
    match e.op:
        case "const":
            return torch.tensor(e.attr, dtype=_torch_dtype(e.dtype, scope), device=scope.device)
        case "name":
            return scope.names[str(e.attr)]
        case "load":
            buffer = str(e.attr)
            return _as(read(scope.inputs[buffer], args, scope.shapes.get(buffer)), e.dtype, scope)
        case "bucket":
            buffer = str(e.attr)
            return count_up_to(scope.inputs[buffer], args[:-1], args[-1], scope.shapes.get(buffer))
        case "qdot":
            return _query_times(scope, scope.inputs[str(e.attr)], args, scope.shapes.get(str(e.attr)))
        case "cast":
            return args[0].to(_torch_dtype(e.dtype, scope))
        case "where":
            return torch.where(args[0], *(_as(a, e.dtype, scope) for a in args[1:]))
        case op if op in TORCH:
            joined = _operand_dtype(e)
            return TORCH[op](*(_as(a, joined, scope) for a in args))
        case op:
            raise NotImplementedError(f"the oracle has no meaning for '{op}'")


def _operand_dtype(e: Expr) -> Dtype:
    """The dtype in which an elementwise operator sees its arguments: theirs joined, and its own if real."""
    if e.dtype in FLOATS or e.op in ("and", "or", "not"):
        return e.dtype
    kinds: tuple[Dtype, ...] = tuple(a.dtype for a in e.args)
    return "bool" if set(kinds) == {"bool"} else OPS["add"].dtype(kinds)


def _torch_dtype(dtype: Dtype, scope: Scope) -> torch.dtype:
    return scope.dtype if dtype in FLOATS else torch.bool if dtype == "bool" else torch.int64


def _as(value: Tensor, dtype: Dtype, scope: Scope) -> Tensor:
    return value.to(_torch_dtype(dtype, scope))


def read(x: Tensor, index: list[Tensor], declared: tuple[int | str, ...] | None = None) -> Tensor:
    """x[index…], the index tensors broadcast together; 0 where one is outside of its axis.

    An axis declared as 1 broadcasts: every index reads its one entry.
    """
    inside: Tensor | None = None
    safe: list[Tensor] = []
    for size, at, entry in zip(x.shape, index, declared or x.shape, strict=True):
        if entry == 1:
            safe.append(torch.zeros((), dtype=torch.int64, device=x.device))
            continue
        good = (at >= 0) & (at < size)
        inside = good if inside is None else inside & good
        safe.append(torch.where(good, at, 0))
    if 0 in x.shape:
        shape = torch.broadcast_shapes(*(at.shape for at in index))
        return torch.zeros(shape, dtype=x.dtype, device=x.device)
    value = x[tuple(safe)]
    return value if inside is None else torch.where(inside, value, torch.zeros((), dtype=x.dtype, device=x.device))


def _query_times(scope: Scope, x: Tensor, index: list[Tensor], declared: tuple[int | str, ...] | None) -> Tensor:
    """The queries at (h, row) times x[index…], whose last axis has their entries."""
    assert scope.query is not None
    column = torch.arange(x.shape[-1], device=x.device)
    rows = read(x, [*(at[..., None] for at in index), column], declared)
    query = scope.query[scope.names["h"], scope.names["row"]]
    return torch.einsum("...d,...d->...", query.to(scope.dtype), rows.to(scope.dtype))


def count_up_to(x: Tensor, row: list[Tensor], value: Tensor, declared: tuple[int | str, ...] | None = None) -> Tensor:
    """How many entries of the sorted row x[row…] are <= value, by bisection; axes as `read` has them."""
    shape = torch.broadcast_shapes(value.shape, *(r.shape for r in row))
    low = torch.zeros(shape, dtype=torch.int64, device=x.device)
    high = torch.full_like(low, x.shape[-1])
    for _ in range(x.shape[-1].bit_length()):
        middle = (low + high) // 2
        after = (read(x, [*row, middle], declared) <= value) & (low < high)
        low, high = torch.where(after, middle + 1, low), torch.where(after, high, middle)
    return low
