"""Weights of scores that have limits, relative to one base for all rows and tiles: nothing waits for a maximum, and
nothing shrinks.

Of other scores a row's maximum has the weight 1, which bf16 holds exactly. Here it is rounded as all others are, and a
row of one key would bear that. So rows are divided by the sums of what products take, which the tensor cores find:
weights times ones. Then a row of one key has its values, to the last bit. `lse` has the sums of weights as they were,
and only it does: who does not ask for it does not wait for them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._softmax import exp2
from ._weights import lanes, spread

# -- assembly ------------------------------------------------------------------------------------


@gluon.constexpr_function
def _sums_text(count):
    """Of so many pairs in a thread, of two rows in turn; out: as many sums, of which the first two count; in: pairs,
    sums before. The registers of a product of 16 keys are those in which the first product left them."""
    first = 2 * count
    lines = ["{ .reg .f32 a, b, c, d; .reg .b32 ones; mov.b32 ones, 0x3F803F80;"]
    lines.append(f"mov.f32 a, ${first}; mov.f32 b, a; mov.f32 c, ${first + 1}; mov.f32 d, c;")
    for n in range(count, first, 4):
        pairs = ", ".join(f"${n + k}" for k in range(4))
        lines.append(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            f"{{a, b, c, d}}, {{{pairs}}}, {{ones, ones}}, {{a, b, c, d}};"
        )
    return "\n".join([*lines, "mov.f32 $0, a; mov.f32 $1, c; }"])


@gluon.constexpr_function
def _sums_sides(count):
    return ",".join(["=&f"] * count + ["r"] * count + ["f"] * count)


# -- weights and their sums ----------------------------------------------------------------------


@gluon.jit
def weights_within(x, c, base):
    """Of a tile of scores x * c in units of log 2."""
    return exp2(x * c - base)


@gluon.jit
def in_pairs(p):
    """Weights as bf16, in the registers in which the first product left them: two neighbours are one number."""
    a, b = gl.split(gl.reshape(p, [p.shape[0], p.shape[1] // 2, 2]))
    asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def no_sums(p):
    """Those of rows that have seen no key, for such pairs of weights."""
    like = lanes(p)
    LAYOUT: gl.constexpr = like.type.layout
    return gl.zeros([like.shape[0], like.shape[1]], gl.float32, LAYOUT)


@gluon.jit
def add_pairs(p, sums):
    """Sums of rows with these weights as well, the same in each of a row's threads."""
    LAYOUT: gl.constexpr = p.type.layout
    COUNT: gl.constexpr = p.shape[0] * p.shape[1] // 128
    asm: gl.constexpr = _sums_text(COUNT)
    sides: gl.constexpr = _sums_sides(COUNT)
    given = (p, spread(sums, p.shape[1], LAYOUT))
    made = gl.inline_asm_elementwise(asm, sides, given, dtype=gl.float32, is_pure=False, pack=COUNT)
    return lanes(made)
