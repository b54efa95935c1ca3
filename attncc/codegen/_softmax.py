"""The softmax of the engines' consumers: exponentials on two units, sums without shuffles, weights of few bits."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOWEST = gl.constexpr(-1.7014118346046923e38)
"""Below every finite score in units of log 2, and finite: a row that sees no key keeps it."""
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


@gluon.jit
def less_log2_most(m):
    """m - log2(MOST), rounded up: weights reach MOST and not further, however large scores are."""
    asm: gl.constexpr = "sub.rp.f32 $0, $1, 0f410CEAED;"
    return gl.inline_asm_elementwise(asm, "=f,f", [m], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softmax(x, shift, m, c, POLY: gl.constexpr):
    """Weights of few bits, of a tile of scores (x + shift) * c in units of log 2; the new maximum, and what older
    weights shrink by.

    `shift`: nothing, or a number a row.
    """
    top = gl.max(x, 1)
    if len(shift) > 0:
        top += shift[0]
    m_new = gl.maximum(m, top * c)
    base = m_new
    if len(shift) > 0:
        base = m_new - shift[0] * c
    base = less_log2_most(base)
    return weights(x * c - base[:, None], POLY), exp2(m - m_new), m_new
