"""Arithmetic on TVM expressions: scalars and vectors of query rows, which join as in NumPy.

TVM's own exp and log of a vector are a call a lane; those here stay in vector registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.isa import Machine

Value = Any
"""A TVM expression; TVM ships no types for them."""

LOG2E: Final = 1.4426950408889634
LN2: Final = 0.6931471805599453
LN2_PARTS: Final = (0.693359375, LN2 - 0.693359375)
"""The first in so few bits that small whole numbers times it are exact."""


def lanes(x: Value) -> int:
    """1 for a scalar."""
    _, _, count = str(x.ty).partition("x")
    return int(count or 1)


def kind(x: Value) -> str:
    """The dtype of one lane."""
    return str(x.ty).partition("x")[0]


def real(x: float) -> Value:
    return tirx.FloatImm("float32", x)


def whole(x: int, dtype: str = "int32") -> Value:
    return tirx.IntImm(dtype, x)


def let(x: Value) -> Value:
    """The expression under a name: computed once, here.

    An integer's name is a register that TVM's passes do not look through, and so is a condition's: they put the values
    of integers in place of their names, over and over, and take minutes for what divisions are nested in.
    """
    if isinstance(x, tirx.Var | tirx.FloatImm | tirx.IntImm):
        return x
    if kind(x) == "bool":
        return tirx.NE(let(cast(x, "int32")), widened(whole(0), lanes(x)))
    return opaque(x) if kind(x).startswith("int") else T.Bind(x)


def opaque(x: Value) -> Value:
    """The value in a register that TVM's passes do not look through."""
    register = registers(lanes(x), kind(x))
    at = T.ramp(whole(0), 1, lanes(x)) if lanes(x) > 1 else whole(0)
    T.buffer_store(register, x, [at])
    return register[at]


def registers(count: int, dtype: str) -> Any:
    """A few values that LLVM can keep in registers: on the stack, where TVM by itself calls for memory each time."""
    return T.alloc_buffer((count,), dtype, scope="local", annotations={"disable_lower_builtin": True})


def converted(instruction: str, x: Value, dtype: str) -> Value:
    """A number by an instruction of PTX, its bits where TVM's type would want CUDA's headers."""
    to = registers(1, dtype)
    T.evaluate(T.ptx[instruction](to[0], x))
    return to[0]


def over_lanes(pick: Callable[[Value, Value], Value], x: Value) -> Value:
    """`pick` of all lanes, two at a time."""
    count = lanes(x)
    if count == 1:
        return x
    each = registers(count, kind(x))
    T.buffer_store(each, x, [T.ramp(whole(0), 1, count)])
    with T.serial(1, count) as lane:
        T.buffer_store(each, pick(each[0], each[lane]), [0])
    return each[0]


def widened(x: Value, to: int) -> Value:
    return T.broadcast(x, to) if lanes(x) == 1 and to > 1 else x


def full(x: float, isa: Machine) -> Value:
    """A vector of a number."""
    return widened(real(x), isa.lanes)


def run(start: Value, isa: Machine) -> Value:
    """Where a vector is that begins at an element."""
    return T.ramp(start, whole(1, kind(start)), isa.lanes)


def line(n: Value, v: Value | int, isa: Machine) -> Value:
    """Where vector `v` of rows is in line n of a buffer [lines, rows]."""
    return run(n * isa.rows + v * isa.lanes, isa)


def joined(*xs: Value) -> list[Value]:
    """The values with as many lanes as the widest of them."""
    most = max(map(lanes, xs))
    return [widened(x, most) for x in xs]


def elementwise(f: Callable[..., Value], *xs: Value) -> Value:
    return f(*joined(*xs))


def none(x: Value) -> Value:
    """0 in every lane, of the same dtype as `x`."""
    return widened(real(0.0) if kind(x) == "float32" else whole(0, kind(x)), lanes(x))


def cast(x: Value, dtype: str) -> Value:
    """Each lane in another dtype."""
    if kind(x) == dtype:
        return x
    count = lanes(x)
    return T.Cast(dtype if count == 1 else f"{dtype}x{count}", x)


def select(c: Value, a: Value, b: Value) -> Value:
    return T.Select(*joined(c, a, b))


def equal(a: Value, b: Value) -> Value:
    """a == b, of conditions too: TVM compares those as floats."""
    return tirx.EQ(*(cast(x, "int32") if kind(x) == "bool" else x for x in (a, b)))


def unequal(a: Value, b: Value) -> Value:
    """a != b, as NaN is to anything; TVM's own says of numbers alone that they differ."""
    return tirx.Not(equal(a, b))


def times_power(x: Value, n: Value, isa: Machine) -> Value:
    """x * 2**n for a float n that is whole; 0 where n is far below the exponents, infinite where it is far above."""
    count = lanes(x)
    if isa.has_scalef and count == isa.lanes:
        intrinsic = "llvm.x86.avx512.mask.scalef.ps.512"
        zero, all_lanes, rounding = widened(real(0.0), count), whole(65535, "uint16"), whole(4)
        return T.call_llvm_pure_intrin(str(x.ty), intrinsic, x, n, zero, all_lanes, rounding)
    # two halves, for one exponent holds -126 to 127 and results may be as small as 2**-149
    low, high = joined(real(-252.0), real(254.0), n)[:2]
    n = let(cast(T.min(T.max(n, low), high), "int32"))
    half = let(n >> widened(whole(1), count))
    return x * _power(half) * _power(n - half)


def _power(n: Value) -> Value:
    """2.0**n for an int n from -127 to 127."""
    count = lanes(n)
    bits = (n + widened(whole(127), count)) << widened(whole(23), count)
    return T.reinterpret("float32" if count == 1 else f"float32x{count}", bits)


def _exp2_polynomial(degree: int = 6) -> tuple[float, ...]:
    """Coefficients of 2**f on [-1/2, 1/2], lowest first."""
    at_nodes = np.polynomial.Chebyshev.interpolate(np.exp2, degree, domain=[-0.5, 0.5])
    return tuple(float(c) for c in at_nodes.convert(kind=np.polynomial.Polynomial).coef)


EXP2: Final = _exp2_polynomial()


def exp2(x: Value, isa: Machine, *, falls: bool = False) -> Value:
    """2**x within an ulp or two; NaN stays NaN. `falls`: no x is above 0, so none has to be kept from overflowing."""
    if isa.has_functions:
        return let(T.exp2(x))
    count = lanes(x)
    x = let(largest(widened(real(-300.0), count), x))  # keeps -inf - -inf out
    x = x if falls else let(least(widened(real(200.0), count), x))
    n = let(T.nearbyint(x))
    f = let(x - n)
    return let(times_power(let(_horner(f, EXP2)), n, isa))


def called(name: str) -> Callable[[Value, Machine], Value]:
    """A function that is a call a lane: rare in scores, and then of what no key moves."""

    def calls(x: Value, isa: Machine) -> Value:
        count = lanes(x)
        if count == 1:
            return getattr(T, name)(x)
        each, every = registers(count, "float32"), T.ramp(whole(0), 1, count)
        T.buffer_store(each, x, [every])
        with T.serial(0, count) as lane:
            T.buffer_store(each, getattr(T, name)(each[lane]), [lane])
        return each[every]

    return calls


def largest(bound: Value, x: Value) -> Value:
    """max, where a NaN in `x` stays: LLVM selects the second operand unless the first is greater."""
    return T.max(*joined(bound, x))


def least(bound: Value, x: Value) -> Value:
    """min, where a NaN in `x` stays."""
    return T.min(*joined(bound, x))


def exp(x: Value, isa: Machine) -> Value:
    """e**x, as exp2. What is left of x behind the power of 2 is taken from x itself: x * log2(e) is rounded."""
    if isa.has_functions:
        return let(T.exp(x))
    count = lanes(x)
    x = let(least(widened(real(150.0), count), largest(widened(real(-150.0), count), x)))
    n = let(T.nearbyint(x * widened(real(LOG2E), count)))
    high, low = (widened(real(part), count) for part in LN2_PARTS)
    f = let(((x - n * high) - n * low) * widened(real(LOG2E), count))
    return let(times_power(let(_horner(f, EXP2)), n, isa))


def sigmoid(x: Value, isa: Machine) -> Value:
    one = widened(real(1.0), lanes(x))
    return let(one / (one + exp(-x, isa)))


def tanh(x: Value, isa: Machine) -> Value:
    """By the magnitude, so that neither end overflows; a series near 0, where differences of exponentials cancel."""
    if isa.has_functions:
        return let(T.tanh(x))
    x = let(x)
    count = lanes(x)
    one, two = widened(real(1.0), count), widened(real(2.0), count)
    size = let(T.max(x, -x))
    e = exp(-two * size, isa)
    far = let((one - e) / (one + e))
    square = let(x * x)
    near = let(x * _horner(square, (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835)))
    signed = select(let(x < widened(real(0.0), count)), -far, far)
    return let(select(let(size < widened(real(0.25), count)), near, signed))


def _horner(x: Value, coefficients: tuple[float, ...]) -> Value:
    y = widened(real(coefficients[-1]), lanes(x))
    for c in coefficients[-2::-1]:
        y = y * x + widened(real(c), lanes(x))
    return y


def quotient(a: Value, b: Value) -> Value:
    """Floor division of integers; 0 where b is 0.

    By bits: TVM's own takes LLVM minutes, and conditions on integers take TVM's simplifier minutes.
    """
    if shift := _power_of_two(b):
        return let(a >> widened(whole(shift - 1, kind(a)), lanes(a)))
    a, b = joined(let(a), b if _constant(b) else let(b))
    if _constant(b):
        q = let(T.truncdiv(a, b))
        return let(q + signs(a - q * b))  # the remainder of a negative number is negative
    one = widened(whole(1, kind(a)), lanes(a))
    used = let(signs(b | -b))
    negates = let(~signs((b + one) | -(b + one)))  # by -1, which processors trap on for the least number
    q = let(T.truncdiv(a, b + (used + one) - (negates + negates)))
    q = let((q ^ negates) - negates)
    r = let(a - q * b)
    return let((q + (signs(r ^ b) & signs(r | -r))) & used)


def remainder(a: Value, b: Value) -> Value:
    """What floor division leaves; 0 where b is 0."""
    if shift := _power_of_two(b):
        return let(a & widened(whole((1 << (shift - 1)) - 1, kind(a)), lanes(a)))
    a, b = joined(let(a), b if _constant(b) else let(b))
    left = let(a - quotient(a, b) * b)
    return left if _constant(b) else let(left & signs(b | -b))


def signs(x: Value) -> Value:
    """All bits of a negative integer set, none of another's."""
    bits = 63 if kind(x) == "int64" else 31
    return x >> widened(whole(bits, kind(x)), lanes(x))


def _constant(b: Value) -> int:
    """The positive number that every lane is, else 0."""
    number = b.value if isinstance(b, tirx.Broadcast) else b
    return max(0, int(number.value)) if isinstance(number, tirx.IntImm) else 0


def _power_of_two(b: Value) -> int:
    """1 + n where every lane is 2**n, else 0."""
    number = _constant(b)
    return number.bit_length() if number and number & (number - 1) == 0 else 0
