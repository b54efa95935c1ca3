"""Weights of scores that have limits, relative to one base for all rows and tiles: nothing waits for a maximum, and
nothing shrinks.

Of other scores a row's maximum has the weight 1, which bf16 holds exactly. Here it is rounded as all others are, and a
row of one key would bear that. So rows are divided by the sums of what products take, which the tensor cores find:
weights times ones. Then a row of one key has its values, to the last bit. `lse` has the sums of weights as they were,
and only it does: who does not ask for it does not wait for them.

Scores and weights are tuples of tensors side by side: of one, or with `_parts.py` of many.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._softmax import exp2, lane_sum
from ._weights import evens_and_odds, lanes, spread

# -- assembly ------------------------------------------------------------------------------------


@gluon.constexpr_function
def _sums_text(pairs, before, after):
    """Of a thread's pairs of weights, in the registers in which the first product left them: four for 16 keys, of two
    rows in turn. A product has two sums a row, which are alike; every other one adds to sums of its own, and does not
    wait for the one before."""
    lines = ["{ .reg .f32 a, b, c, d, e, f, g, h; .reg .b32 ones; mov.b32 ones, 0x3F803F80;"]
    lines += [f"mov.f32 {to}, {x};" for to, x in zip("abcdefgh", [*before, *["0f00000000"] * 4], strict=True)]
    for n in range(0, len(pairs), 4):
        sums = "{e, f, g, h}" if n // 4 % 2 else "{a, b, c, d}"
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {sums}, {{{', '.join(pairs[n : n + 4])}}}, "
            f"{{ones, ones}}, {sums};"
        )
    return "\n".join([*lines, *(f"add.f32 {to}, {x};" for to, x in after), "}"])


@gluon.constexpr_function
def _tile_text(count):
    """Of so many pairs. Out: sums; in: pairs, sums before; as many of each, of which but two sums count."""
    pairs = [f"${n}" for n in range(count, 2 * count)]
    first, second = f"${2 * count}", f"${2 * count + 1}"
    return _sums_text(pairs, (first, first, second, second), (("$0", "a, e"), ("$1", "c, g")))


@gluon.constexpr_function
def _part_text(count):
    """The same of so many tensors of two parts' pairs, four in a thread; sums are four, too."""
    pairs = [f"${n}" for n in range(4, 4 * count + 4)]
    before = [f"${n}" for n in range(4 * count + 4, 4 * count + 8)]
    return _sums_text(pairs, before, (("$0", "a, e"), ("$1", "b, f"), ("$2", "c, g"), ("$3", "d, h")))


@gluon.constexpr_function
def _sides(out, pairs, sums):
    return ",".join(["=&f"] * out + ["r"] * pairs + ["f"] * sums)


PAIR = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
PAIRS = gl.constexpr(
    "cvt.rn.bf16x2.f32 $0, $5, $4; cvt.rn.bf16x2.f32 $1, $7, $6; "
    "cvt.rn.bf16x2.f32 $2, $9, $8; cvt.rn.bf16x2.f32 $3, $11, $10;"
)
"""Of two parts."""

# -- weights and their sums ----------------------------------------------------------------------


@gluon.jit
def weights_within(x, c, base):
    """Of scores x * c in units of log 2."""
    made = ()
    for n in gl.static_range(len(x)):
        made = made + (exp2(x[n] * c - base),)
    return made


@gluon.jit
def lane_sums(p):
    """Row sums of weights as they are, in parts, each of one thread."""
    if len(p) == 1:
        total = lane_sum(p[0])
    else:
        total = p[0]
        for n in gl.static_range(1, len(p)):
            total += p[n]
    return total


@gluon.jit
def in_pairs(p):
    """Weights as bf16, in the registers in which the first product left them: two neighbours are one number."""
    if len(p) == 1:
        made = (gl.inline_asm_elementwise(PAIR, "=r,f,f", evens_and_odds(p[0]), dtype=gl.int32, is_pure=True, pack=1),)
    else:
        made = ()
        sides: gl.constexpr = "=&r,=&r,=&r,=&r,f,f,f,f,f,f,f,f"
        for n in gl.static_range(0, len(p), 2):
            x = p[n : n + 2]
            made = made + (gl.inline_asm_elementwise(PAIRS, sides, x, dtype=gl.int32, is_pure=True, pack=4),)
    return made


@gluon.jit
def add_pairs(p, sums):
    """Sums of rows with these pairs of weights as well, the same in each of a row's threads."""
    if len(p) == 1:
        made = _add_tile(p[0], sums)
    else:
        asm: gl.constexpr = _part_text(len(p))
        sides: gl.constexpr = _sides(4, 4 * len(p), 4)
        made = gl.inline_asm_elementwise(asm, sides, p + (sums,), dtype=gl.float32, is_pure=False, pack=4)
    return made


@gluon.jit
def _add_tile(p, sums):
    LAYOUT: gl.constexpr = p.type.layout
    COUNT: gl.constexpr = p.shape[0] * p.shape[1] // 128
    asm: gl.constexpr = _tile_text(COUNT)
    sides: gl.constexpr = _sides(COUNT, COUNT, COUNT)
    given = (p, spread(sums, p.shape[1], LAYOUT))
    return lanes(gl.inline_asm_elementwise(asm, sides, given, dtype=gl.float32, is_pure=False, pack=COUNT))
