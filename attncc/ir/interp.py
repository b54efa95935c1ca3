"""The living definition of tile IR: runs a program with NumPy, one program of a launch after the other.

`ir.meaning` has the expressions; here are statements and launches. What no target defines raises
`CompilerBug`: accesses out of bounds, names without a value, a value of another type than its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from attncc.errors import CompilerBug
from attncc.ir.expr import FLOATS, STORED, Expr
from attncc.ir.meaning import NUMPY, Array, Frame, Tensor, convert, evaluate, place, window
from attncc.ir.tile import (
    AtOnce,
    Barrier,
    CallFn,
    For,
    Function,
    If,
    Kernel,
    Let,
    Note,
    Program,
    Statement,
    Store,
    StoreTile,
)

Number = bool | int | float

POISON: Final = 0x6BADF00D
"""What fresh scratch memory holds where it holds integers; floats are NaN."""


def run(
    program: Program,
    operands: Mapping[str, Array],
    scalars: Mapping[str, Number],
    config: Mapping[str, int],
) -> None:
    """Runs all launches in order; outputs are written into the arrays given for them.

    Args:
        operands: operands as [b, h, row, column] views, buffers as they are; bf16 ones as float32.
        scalars: the run-time numbers.
        config: the knobs.
    """
    tensors = dict(operands)
    with np.errstate(all="ignore"):
        for scratch in program.scratch:
            shape = [int(_number(n, {**scalars, **config})) for n in scratch.shape]
            fill = math.nan if scratch.dtype in (*FLOATS, *STORED) else POISON
            tensors[scratch.name] = np.full(shape, fill).astype(NUMPY[scratch.dtype])
        for launch in program.launches:
            if launch.when is not None and not _number(launch.when, {**scalars, **config}):
                continue
            kernel = program.kernel(launch.kernel)
            _launch(kernel, tensors, {**scalars, **config, **dict(launch.constants)})


def _number(e: Expr, numbers: Mapping[str, Number]) -> Array:
    """A formula of the launcher, over sizes and knobs."""
    return evaluate(e, Frame({name: np.asarray(x) for name, x in numbers.items()}, {}, 0))


def _launch(kernel: Kernel, tensors: Mapping[str, Array], numbers: Mapping[str, Number]) -> None:
    for p in kernel.params:
        if p.name not in (tensors if p.role in ("operand", "buffer") else numbers):
            raise CompilerBug(f"kernel {kernel.name}: nothing given for its {p.role} '{p.name}'")
    known = {p.name: Tensor(p, tensors[p.name]) for p in kernel.params if p.role in ("operand", "buffer")}
    functions = {f.name: f for f in kernel.functions}
    for number in range(int(_number(kernel.grid, numbers))):
        values = {p.name: convert(numbers[p.name], p.dtype) for p in kernel.params if p.name not in known}
        _block(kernel.body, Frame(values, known, number), functions)


def _block(body: tuple[Statement, ...], frame: Frame, functions: Mapping[str, Function]) -> None:
    for s in body:
        _statement(s, frame, functions)


def _statement(s: Statement, frame: Frame, functions: Mapping[str, Function]) -> None:
    match s:
        case Note() | Barrier():
            pass
        case Let(var, value):
            _bind(frame, var, evaluate(value, frame))
        case Store():
            _store(s, frame)
        case StoreTile(operand, index, value):
            tile = evaluate(value, frame)
            target, where = window(frame, operand, [evaluate(e, frame) for e in index], tile.shape)
            target[...] = convert(tile[where], frame.tensors[operand].param.dtype)
        case For():
            _loop(s, frame, functions)
        case If(condition, body):
            if bool(evaluate(condition, frame)):
                _block(body, frame, functions)
        case CallFn(targets, function, args):
            results = _call(functions[function], args, frame, functions)
            for target, result in zip(targets, results, strict=True):
                _bind(frame, target, result)
        case AtOnce(calls):
            _block(calls, frame, functions)


def _loop(s: For, frame: Frame, functions: Mapping[str, Function]) -> None:
    first, last, by = (int(evaluate(e, frame)) for e in (s.lo, s.hi, s.step))
    if by <= 0:
        raise CompilerBug(f"the loop over '{s.var.attr}' steps by {by}")
    for n in range(first, last, by):
        _bind(frame, s.var, convert(n, s.var.dtype))
        _block(s.body, frame, functions)


def _bind(frame: Frame, var: Expr, value: Array) -> None:
    expected = frame.shape(var.shape)
    if value.shape != expected or value.dtype != NUMPY[var.dtype]:
        got = f"{value.dtype}{list(value.shape)}"
        raise CompilerBug(f"'{var.attr}' is {var.dtype}{list(expected)}, its value {got}")
    frame.values[str(var.attr)] = value


def _store(s: Store, frame: Frame) -> None:
    index = [evaluate(e, frame) for e in s.index]
    value = convert(evaluate(s.value, frame), frame.tensors[s.buffer].param.dtype)
    mask = np.asarray(True) if s.mask is None else evaluate(s.mask, frame)
    active, at = place(frame, s.buffer, index, np.broadcast_to(mask, np.broadcast_shapes(mask.shape, value.shape)))
    value = np.broadcast_to(value, active.shape)
    frame.tensors[s.buffer].data[tuple(a[active] for a in at)] = value[active]


def _call(function: Function, args: tuple[Expr, ...], frame: Frame, functions: Mapping[str, Function]) -> list[Array]:
    """The results of a device function, which sees its parameters alone."""
    values: dict[str, Array] = {}
    tensors: dict[str, Tensor] = {}
    for p, a in zip(function.params, args, strict=True):
        if p.role in ("operand", "buffer"):
            tensors[p.name] = Tensor(p, frame.tensors[str(a.attr)].data)
        else:
            values[p.name] = evaluate(a, frame)
    inner = Frame(values, tensors, frame.number)
    _block(function.body, inner, functions)
    return [evaluate(result, inner) for result in function.results]
