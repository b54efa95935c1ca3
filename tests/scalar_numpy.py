"""The meaning of scalar expressions in numpy, straight from the OPS table; names may be bound to arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attncc.ir.expr import FLOATS, OPS, Expr

NUMPY = {"bool": np.bool_, "i32": np.int64, "i64": np.int64, "f16": np.float32, "f32": np.float32, "f64": np.float64}
"""Integers are wide here, for most tests are about formulas, not about overflow."""


@dataclass(frozen=True)
class Scope:
    """Values of names, tensors, and the rows that `rows_min` and `rows_max` run over."""

    names: Mapping[str, Any]
    buffers: Mapping[str, np.ndarray]
    rows: tuple[np.ndarray, np.ndarray] = (np.zeros(1), np.zeros(1))
    """i and row of every row of the tile."""
    int32: bool = False
    """Whether i32 sums wrap as they do in a kernel."""


def evaluate(e: Expr, scope: Scope) -> Any:
    """The value of `e`; a read outside its tensor gives 0."""
    match e.op:
        case "const":
            return NUMPY[e.dtype](e.attr)
        case "name":
            return np.asarray(scope.names[str(e.attr)]).astype(NUMPY[e.dtype])
        case "load":
            return _load(e, [evaluate(a, scope) for a in e.args], scope)
        case "bucket":
            return _bucket(e, [evaluate(a, scope) for a in e.args], scope)
        case "cast":
            return np.asarray(evaluate(e.args[0], scope)).astype(NUMPY[e.dtype])
        case "rows_min" | "rows_max":
            i, row = scope.rows
            values = evaluate(e.args[0], replace(scope, names={**scope.names, "i": i, "row": row}))
            return np.min(values) if e.op == "rows_min" else np.max(values)
        case _:
            value = _operator(e, [evaluate(a, scope) for a in e.args])
            return value.astype(np.int32).astype(np.int64) if scope.int32 and e.dtype == "i32" else value


def _operator(e: Expr, args: list[Any]) -> Any:
    if any(a.dtype in FLOATS for a in e.args) or e.dtype in FLOATS:
        kinds = [a.dtype for a in e.args if a.dtype in FLOATS] or ["f32"]
        wide = NUMPY[max(kinds, key=FLOATS.index)]
        args = [a if x.dtype == "bool" else np.asarray(a).astype(wide) for a, x in zip(args, e.args, strict=True)]
    with np.errstate(all="ignore"):
        return np.asarray(OPS[e.op].numpy(*args)).astype(NUMPY[e.dtype])


def _load(e: Expr, index: list[Any], scope: Scope) -> Any:
    array = scope.buffers[str(e.attr)]
    nearest = tuple(np.clip(k, 0, n - 1) for k, n in zip(index, array.shape, strict=True))
    inside = np.all(np.broadcast_arrays(*(k == at for k, at in zip(index, nearest, strict=True))), axis=0)
    return np.where(inside, array[nearest], 0).astype(NUMPY[e.dtype])


def _bucket(e: Expr, args: list[Any], scope: Scope) -> Any:
    array = scope.buffers[str(e.attr)]
    *leading, x = np.broadcast_arrays(*args)
    inside = tuple(np.clip(k, 0, n - 1) for k, n in zip(leading, array.shape, strict=False))
    return np.sum(array[inside] <= x[..., None], axis=-1)
