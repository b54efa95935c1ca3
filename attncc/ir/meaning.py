"""What an expression of tile IR means: its value as a NumPy array, given the values of its names.

Values of dtype f8, f16, bf16 and f32 are float32 arrays, all but the last rounded to their dtype after every
operation. An access outside of its tensor raises `CompilerBug`: no target defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from attncc.errors import CompilerBug
from attncc.ir.expr import OPS, Dtype, Expr, Shape
from attncc.ir.fields import FIELDS
from attncc.ir.rules import HALVES
from attncc.ir.tile import Param, extent_of

Array = np.ndarray[Any, Any]

NUMPY: Final[Mapping[Dtype, type[np.generic]]] = {
    "bool": np.bool_,
    "i8": np.int8,
    "u8": np.uint8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "f8e4m3": np.float32,
    "f8e5m2": np.float32,
    "f16": np.float32,
    "bf16": np.float32,
    "f32": np.float32,
    "f64": np.float64,
}

FP8: Final[Mapping[Dtype, tuple[int, int, float]]] = {"f8e4m3": (3, -6, 448.0), "f8e5m2": (2, -14, 57344.0)}
"""Bits of the mantissa, the exponent of the least normal number, and the greatest number."""

REDUCTIONS: Final[Mapping[str, Callable[..., Any]]] = {"max": np.max, "min": np.min, "sum": np.sum}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array and what the kernel knows of it."""

    param: Param
    data: Array


@dataclass(frozen=True, slots=True)
class Frame:
    """The values of a body's names, the tensors it sees, and the number of its program."""

    values: dict[str, Array]
    tensors: Mapping[str, Tensor]
    number: int

    def shape(self, shape: Shape) -> tuple[int, ...]:
        """Dims as numbers; knobs are among the values."""
        return tuple(int(extent_of(dim, cast(Mapping[str, int], self.values))) for dim in shape)


def convert(x: Any, dtype: Dtype) -> Array:
    """`x` as a value of `dtype`; narrow floats round to nearest even."""
    if dtype in FP8:
        return _round_f8(np.asarray(x).astype(np.float32), *FP8[dtype])
    if dtype == "f16":
        return np.asarray(x).astype(np.float16).astype(np.float32)
    if dtype == "bf16":
        return _round_bf16(np.asarray(x).astype(np.float32))
    return np.asarray(x).astype(NUMPY[dtype])


def _round_bf16(x: Array) -> Array:
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), x, rounded.astype(np.uint32).view(np.float32))


def _round_f8(x: Array, mantissa: int, least: int, greatest: float) -> Array:
    """Numbers within the format's range; what is beyond it is the program's fault, and becomes no number."""
    exponent = np.maximum(np.frexp(x)[1] - 1, least) - mantissa
    rounded = np.ldexp(np.rint(np.ldexp(x, -exponent)), exponent)
    return np.where(np.abs(rounded) <= greatest, rounded, np.float32(np.nan)).astype(np.float32)


def evaluate(e: Expr, frame: Frame) -> Array:
    """The value of an expression, of its dtype and shape."""
    args = [evaluate(a, frame) for a in e.args]
    if e.op in OPS:
        operand = _operand_dtype(e)
        first = [args[0]] if e.op == "where" else []
        value = OPS[e.op].numpy(*first, *(convert(a, operand) for a in args[len(first) :]))
    elif e.op in MEANING:
        value = MEANING[e.op](e, frame, args)
    else:
        raise CompilerBug(f"tile IR has no meaning for '{e.op}'")
    return convert(value, e.dtype)


def _operand_dtype(e: Expr) -> Dtype:
    """The dtype in which an elementwise operator sees its arguments."""
    if e.dtype != "bool" or e.op in ("and", "or", "not", "where"):
        return e.dtype
    dtypes: tuple[Dtype, ...] = tuple(a.dtype for a in e.args)
    return "bool" if set(dtypes) == {"bool"} else OPS["add"].dtype(dtypes)


# -- names, constants, shapes --------------------------------------------------------------------


def _name(e: Expr, frame: Frame, args: list[Array]) -> Array:
    if e.attr not in frame.values:
        raise CompilerBug(f"'{e.attr}' has no value here")
    return frame.values[str(e.attr)]


def _full(e: Expr, frame: Frame, args: list[Array]) -> Array:
    return np.broadcast_to(args[0], frame.shape(e.shape))


def _iota(e: Expr, frame: Frame, args: list[Array]) -> Array:
    return np.arange(frame.shape(e.shape)[0])


def _expand(e: Expr, frame: Frame, args: list[Array]) -> Array:
    assert isinstance(e.attr, int)
    return np.expand_dims(args[0], e.attr)


def _half(e: Expr, frame: Frame, args: list[Array]) -> Array:
    x, which = args[0], HALVES.index(cast(int, e.attr))
    return x[:, which - 2 :: 2] if which > 1 else np.split(x, 2, axis=1)[which]


def _unpack(e: Expr, frame: Frame, args: list[Array]) -> Array:
    assert isinstance(e.attr, tuple)
    what, bit = str(e.attr[0]), int(e.attr[1])
    code = args[0].view(np.uint16) >> bit & (1 << FIELDS[what]) - 1
    match what:
        case "i8":
            return code.astype(np.uint8).view(np.int8)
        case "u8":
            return code.astype(np.float32) - 128.0
        case "u4":
            return code.astype(np.float32) - 8.0
        case _:
            size, exponent = code & 0x7F, code >> 3 & 0xF
            number = np.where(exponent == 0, (size & 7) * 2.0**-9, (8 + (size & 7)) * 2.0 ** (exponent - 10.0))
            return np.where(code & 0x80, -number, number)


def _dot(e: Expr, frame: Frame, args: list[Array]) -> Array:
    a, b = (convert(x, e.dtype) for x in args[:2])
    return np.matmul(a, b) + (args[2] if len(args) == 3 else 0)


def _reduce(e: Expr, frame: Frame, args: list[Array]) -> Array:
    assert isinstance(e.attr, tuple)
    kind, axis = e.attr
    return REDUCTIONS[str(kind)](args[0], axis=None if axis == "all" else int(axis))


# -- tensors -------------------------------------------------------------------------------------


def place(frame: Frame, tensor: str, index: list[Array], mask: Array | None) -> tuple[Array, tuple[Array, ...]]:
    """Which lanes of an elementwise access are active, and their index; it must lie inside the tensor."""
    data = frame.tensors[tensor].data
    if len(index) != data.ndim:
        raise CompilerBug(f"'{tensor}' has {data.ndim} axes, an access has {len(index)} indices")
    lanes = np.broadcast_arrays(*index, np.asarray(True) if mask is None else mask)
    active = lanes[-1]
    for axis, (at, size) in enumerate(zip(lanes[:-1], data.shape, strict=True)):
        wrong = active & ((at < 0) | (at >= size))
        if wrong.any():
            raise CompilerBug(f"'{tensor}' has {size} entries along axis {axis}, entry {int(at[wrong][0])} is accessed")
    return active, tuple(np.where(active, at, 0) for at in lanes[:-1])


def _load(e: Expr, frame: Frame, args: list[Array]) -> Array:
    tensor = str(e.attr)
    masked = e.args[-1].dtype == "bool"
    active, at = place(frame, tensor, args[:-1] if masked else args, args[-1] if masked else None)
    data = frame.tensors[tensor].data
    return np.where(active, data[at] if data.size else 0, data.dtype.type(0))


def _bucket(e: Expr, frame: Frame, args: list[Array]) -> Array:
    *lead, x, entries = args
    n = int(entries)
    row = np.arange(n)
    _, at = place(frame, str(e.attr), [*(np.expand_dims(a, -1) for a in lead), row], None)
    return (frame.tensors[str(e.attr)].data[at] <= np.expand_dims(x, -1)).sum(-1)


def window(frame: Frame, operand: str, index: list[Array], shape: tuple[int, ...]) -> tuple[Array, tuple[slice, slice]]:
    """A tile of an operand clipped to its extent: that part of the operand, and where it lies in the tile."""
    tensor = frame.tensors[operand]
    b, h, *first = (int(x) for x in index)
    if not (0 <= b < tensor.data.shape[0] and 0 <= h < tensor.data.shape[1]):
        raise CompilerBug(f"operand '{operand}' has shape {list(tensor.data.shape)}, b = {b}, h = {h} is accessed")
    extent = tensor.param.extent
    sizes = tensor.data.shape[2:] if extent is None else (int(evaluate(extent[0], frame)), extent[1])
    if any(size > room for size, room in zip(sizes, tensor.data.shape[2:], strict=True)):
        raise CompilerBug(f"operand '{operand}' has shape {list(tensor.data.shape)}, its extent is {list(sizes)}")
    outer: list[slice] = []
    inner: list[slice] = []
    for start, length, size in zip(first, shape, sizes, strict=True):
        lo, hi = min(max(start, 0), size), max(min(start + length, size), 0)
        outer.append(slice(lo, max(hi, lo)))
        inner.append(slice(lo - start, max(hi, lo) - start) if hi > lo else slice(0, 0))
    return tensor.data[b, h, outer[0], outer[1]], (inner[0], inner[1])


def _tile(e: Expr, frame: Frame, args: list[Array]) -> Array:
    shape = frame.shape(e.shape)
    source, where = window(frame, str(e.attr), args, shape)
    out = np.zeros(shape, source.dtype)
    out[where] = source
    return out


MEANING: Final[Mapping[str, Callable[[Expr, Frame, list[Array]], Any]]] = {
    "const": lambda e, frame, args: e.attr,
    "name": _name,
    "load": _load,
    "bucket": _bucket,
    "program": lambda e, frame, args: frame.number,
    "iota": _iota,
    "full": _full,
    "expand": _expand,
    "reshape": lambda e, frame, args: args[0].reshape(frame.shape(e.shape)),
    "trans": lambda e, frame, args: args[0].T,
    "half": _half,
    "joined": lambda e, frame, args: np.stack(args, 2 if e.attr else 1).reshape(frame.shape(e.shape)),
    "cast": lambda e, frame, args: args[0],
    "unpack": _unpack,
    "dot": _dot,
    "reduce": _reduce,
    "cumsum": lambda e, frame, args: np.cumsum(args[0], axis=0),
    "tile": _tile,
}
