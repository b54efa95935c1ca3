"""The softmax of the Hopper engine's consumers: exponentials on two units, sums without shuffles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOWEST = gl.constexpr(-1.7014118346046923e38)
"""Below every finite score in units of log 2, and finite: a row that sees no key keeps it."""
SLACK = gl.constexpr(8.0)
"""By so many units of log 2 scores may exceed the peak that weights are relative to: few peaks move then, and with them
sums and accumulators. Weights reach 2**8, which fp16 and bf16 hold as well, and fp32 their sums."""
MOST = gl.constexpr(448.0)
"""Weights of few bits are multiples of it, the greatest number of fp8: their format's range is all used."""
TOGETHER = gl.constexpr(8)
"""Exponentials that are shared out between two units."""


@gluon.jit
def exp2(x):
    """2**x by one instruction; what is below 2**-126 becomes 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.constexpr_function
def _by_instruction(n):
    return f"ex2.approx.ftz.f32 ${n}, ${n + TOGETHER.value};"


@gluon.constexpr_function
def _by_polynomial(n):
    """2**x as 2**n * 2**f: n is what is left of x beside 1.5 * 2**23, f in [-1/2, 1/2] goes into a polynomial of degree
    3, whose relative error is at most 7.5e-5. What is below 2**-126 becomes 0, NaN stays NaN."""
    return (
        "{ .reg .f32 x, n, p; .reg .b32 e; "
        f"max.NaN.f32 x, ${n + TOGETHER.value}, 0fC2FE0000; "  # -127
        "add.rn.f32 n, x, 0f4B400000; mov.b32 e, n; sub.rn.f32 n, n, 0f4B400000; sub.rn.f32 x, x, n; "
        "fma.rn.f32 p, x, 0f3D61FBB0, 0f3E786F0D; fma.rn.f32 p, p, x, 0f3F31798D; fma.rn.f32 p, p, x, 0f3F7FFB49; "
        f"shl.b32 e, e, 23; add.s32 e, e, 0x3F800000; mov.b32 n, e; mul.rn.f32 ${n}, p, n; }}"
    )


@gluon.constexpr_function
def _powers(POLY):
    """Of eight numbers POLY by polynomial, spread evenly."""
    count = TOGETHER.value
    return " ".join(
        _by_polynomial(n) if (n + 1) * POLY // count > n * POLY // count else _by_instruction(n) for n in range(count)
    )


@gluon.jit
def weights(x, POLY: gl.constexpr):
    """2**x; POLY of eight on the units that multiply and add: where products are of 8 bits, the one of exponentials is
    what all wait for."""
    if POLY > 0:
        asm: gl.constexpr = _powers(POLY)
        sides: gl.constexpr = "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f"
        p = gl.inline_asm_elementwise(asm, sides, [x], dtype=gl.float32, is_pure=True, pack=TOGETHER.value)
    else:
        p = exp2(x)
    return p


@gluon.jit
def lane_sum(p):
    """Row sums in eight parts, each of one thread: no shuffle in the loop."""
    EIGHTHS: gl.constexpr = p.shape[1] // 8
    return gl.sum(gl.reshape(p, [p.shape[0], EIGHTHS, 8]), 1)


@gluon.jit
def lane_sums(p):
    """The same of tensors side by side, all as wide."""
    total = p[0]
    for n in gl.static_range(1, len(p)):
        total += p[n]
    return lane_sum(total)


@gluon.jit
def per_lane(x, l):
    """A value a row as a column beside the parts of its sum."""
    return gl.convert_layout(x, gl.SliceLayout(1, l.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def scaled(acc, factor):
    """The accumulators, each row by its factor."""
    made = ()
    for n in gl.static_range(len(acc)):
        made = made + (acc[n] * gl.convert_layout(factor, gl.SliceLayout(1, acc[n].type.layout))[:, None],)
    return made


@gluon.constexpr_function
def _any_apart():
    """Of two pairs of numbers in each of a warp's threads."""
    return (
        "{ .reg .pred p; setp.neu.f32 p, $2, $4; setp.neu.or.f32 p, $3, $5, p; "
        "vote.sync.any.pred p, p, 0xffffffff; selp.s32 $0, 1, 0, p; mov.b32 $1, $0; }"
    )


@gluon.jit
def moved(before, peak):
    """Whether any peak among a warp's rows is another one now, as a number a row: the same in all threads."""
    asm: gl.constexpr = _any_apart()
    return gl.inline_asm_elementwise(asm, "=r,=r,f,f,f,f", [before, peak], dtype=gl.int32, is_pure=True, pack=2)


@gluon.constexpr_function
def _scaling(tensors, pack):
    """Of so many numbers of each tensor in a thread; their factors follow, and whether one of them is not 1."""
    count = tensors * pack
    lines = [f"{{ .reg .pred p; setp.eq.s32 p, ${2 * count + pack}, 0; @p bra DONE;"]
    return " ".join([*lines, *(f"mul.f32 ${n}, ${n}, ${2 * count + n % pack};" for n in range(count)), "DONE: }"])


@gluon.constexpr_function
def _scaling_sides(tensors, pack):
    count = tensors * pack
    return ",".join(["=f"] * count + [str(n) for n in range(count)] + ["f"] * pack + ["r"] * pack)


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


@gluon.jit
def scaled_if(answer, acc, factor):
    """The accumulators, each row by its factor, in warps whose answer is not 0. All others' factors are 1, and these
    warps go on without multiplying by it."""
    ROW: gl.constexpr = gl.SliceLayout(1, acc[0].type.layout)
    PACK: gl.constexpr = acc[0].shape[0] * acc[0].shape[1] // 128
    asm: gl.constexpr = _scaling(len(acc), PACK)
    sides: gl.constexpr = _scaling_sides(len(acc), PACK)
    rows = (gl.convert_layout(factor, ROW)[:, None], gl.convert_layout(answer, ROW)[:, None])
    if acc[0].shape[1] != acc[len(acc) - 1].shape[1]:
        made = scaled_if(answer, acc[:1], factor) + scaled_if(answer, acc[1:], factor)
    elif len(acc) == 1:
        made = (gl.inline_asm_elementwise(asm, sides, acc + rows, dtype=gl.float32, is_pure=True, pack=PACK),)
    else:
        kinds: gl.constexpr = _floats(len(acc))
        made = gl.inline_asm_elementwise(asm, sides, acc + rows, dtype=kinds, is_pure=True, pack=PACK)
    return made


@gluon.jit
def less_log2_most(m):
    """m - log2(MOST), rounded up: weights reach MOST and not further, however large scores are."""
    asm: gl.constexpr = "sub.rp.f32 $0, $1, 0f410CEAED;"
    return gl.inline_asm_elementwise(asm, "=f,f", [m], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softmax(x, shift, m, c, FEW_BITS: gl.constexpr, POLY: gl.constexpr):
    """Weights of a tile of scores (x + shift) * c in units of log 2, the peak that they are relative to now, and what
    older weights shrink by.

    `x`: tensors side by side. `shift`: nothing, or a number a row. Weights of few bits need their format's range, and
    are relative to the maximum.
    """
    highest = x[0]
    for n in gl.static_range(1, len(x)):
        highest = gl.maximum(highest, x[n])
    top = gl.max(highest, 1)
    if len(shift) > 0:
        top += shift[0]
    if FEW_BITS:
        peak = gl.maximum(m, top * c)
    else:
        peak = gl.where(top * c > m + SLACK, top * c, m)
    base = peak
    if len(shift) > 0:
        base = peak - shift[0] * c
    if FEW_BITS:
        base = less_log2_most(base)
    p = ()
    for n in gl.static_range(len(x)):
        p = p + (weights(x[n] * c - base[:, None], POLY),)
    return p, exp2(m - peak), peak
