"""Weights of 16 bits: of a tile's keys, relative to a peak of the row's scores, which is a maximum of tiles before.

Whether that peak still does is told by the sums of the weights, which are needed anyway: the tile's own maximum is
looked for only where a thread's weights weigh too much, in a branch that a warp takes as a whole. Then they are made
again, relative to a new peak, and what was summed up before shrinks. A row's numbers do not depend on whether other
rows' peaks moved.

All of it is one piece of assembly, for a branch that a warp takes by itself is nothing that Gluon has. A thread has
numbers of two rows. What it knows of them (peaks, sums, factors) is a tensor of as many columns as there are threads
to a row, or with parts of eight columns, of twice as many: `lanes` below.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._gluon import floats
from ._softmax import per_lane

HEAVY = gl.constexpr("0f44000000")
"""2**9: more than that a thread's weights of a row may not weigh. A key that outweighs all others by as much has the
weight 1 then, to the last bit, and its row its values, as where maxima are looked for: below, bf16 rounds the greatest
weight relative to those as well."""
ONE = gl.constexpr("0f3F800000")
ALL = gl.constexpr("0xffffffff")
"""Threads of a warp."""

# -- assembly ------------------------------------------------------------------------------------


@gluon.constexpr_function
def _made(pairs, factor, kind):
    """Weights of two neighbours at a time, and their sums: of each row's even columns, and of its odd ones."""
    begun, lines = [], []
    for packed, a, b, row in pairs:
        lines.append(f"fma.rn.f32 x, {a}, {factor}, base{row}; fma.rn.f32 y, {b}, {factor}, base{row};")
        lines.append("ex2.approx.ftz.f32 x, x; ex2.approx.ftz.f32 y, y;")
        lines.append(f"cvt.rn.{kind}.f32 {packed}, y, x;")
        if row in begun:
            lines.append(f"add.f32 even{row}, even{row}, x; add.f32 odd{row}, odd{row}, y;")
        else:
            lines.append(f"mov.f32 even{row}, x; mov.f32 odd{row}, y;")
            begun.append(row)
    return lines


@gluon.constexpr_function
def _guess(at, row):
    """Whether a row's weights are too heavy; NaN is."""
    total, peak = at["sum"][row], at["peak"][row]
    return [
        f"add.f32 {total}, even{row}, odd{row}; setp.gtu.f32 heavy{row}, {total}, {HEAVY.value};",
        f"mov.f32 {peak}, {at['base'][row]}; mov.f32 {at['shrink'][row]}, {ONE.value};",
    ]


@gluon.constexpr_function
def _highest(at, row):
    """The greatest score of a row, for all threads that have some of it."""
    scores = [x for _, a, b, of in at["pairs"] if of == row for x in (a, b)]
    lines = [f"max.f32 x, {scores[0]}, {scores[1]};", *(f"max.f32 x, x, {score};" for score in scores[2:])]
    return lines + [f"shfl.sync.bfly.b32 y, x, {n}, 31, {ALL.value}; max.f32 x, x, y;" for n in (1, 2)]


@gluon.constexpr_function
def _moved(at, row, GUESS):
    """A row's new peak, and what was relative to the old one shrinks by; rows whose weights were not heavy keep it."""
    old, peak, shrink = at["base"][row], at["peak"][row], at["shrink"][row]
    lines = [*_highest(at, row), f"mul.f32 x, x, {at['factor']}; max.f32 x, x, {old};"]
    if GUESS:
        lines.append(f"selp.s32 n, 1, 0, heavy{row};")
        lines += [f"shfl.sync.bfly.b32 m, n, {k}, 31, {ALL.value}; or.b32 n, n, m;" for k in (1, 2)]
        lines.append(f"setp.ne.s32 p, n, 0; selp.f32 x, x, {old}, p;")
    lines.append(f"mov.f32 {peak}, x; sub.f32 y, {old}, x; ex2.approx.ftz.f32 {shrink}, y; neg.f32 base{row}, x;")
    return lines


@gluon.constexpr_function
def _text(at, dtype, GUESS):
    """`at`: where what goes in and comes out stands. Without a guess, the tile's maximum is looked for at once."""
    old, peak, answer = at["base"], at["peak"], at["answer"]
    kind = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    lines = ["{ .reg .pred p, heavy0, heavy1; .reg .b32 m, n; .reg .f32 x, y, base0, base1, even0, odd0, even1, odd1;"]
    if GUESS:
        lines += [f"neg.f32 base0, {old[0]}; neg.f32 base1, {old[1]};", *_made(at["pairs"], at["factor"], kind)]
        lines += [*_guess(at, 0), *_guess(at, 1)]
        lines.append(f"or.pred p, heavy0, heavy1; vote.sync.any.pred p, p, {ALL.value};")
        lines.append(f"selp.s32 {answer}, 1, 0, p; @!p bra LIGHT;")
    lines += [*_moved(at, 0, GUESS), *_moved(at, 1, GUESS), *_made(at["pairs"], at["factor"], kind)]
    lines += [f"add.f32 {at['sum'][row]}, even{row}, odd{row};" for row in (0, 1)]
    if not GUESS:
        lines.append(f"setp.neu.f32 p, {peak[0]}, {old[0]}; setp.neu.or.f32 p, {peak[1]}, {old[1]}, p;")
        lines.append(f"vote.sync.any.pred p, p, {ALL.value}; selp.s32 {answer}, 1, 0, p;")
    return "\n".join([*lines, "LIGHT:", *at["copies"], "}"])


@gluon.constexpr_function
def _of_tile(count):
    """Of a tile, of which a thread has so many pairs. Out: weights, sums, peaks, what sums shrink by, answers; in: even
    columns, odd ones, the factor, old peaks; as many of each, of which but two count, or one."""
    names = ("sum", "peak", "shrink", "answer", "even", "odd", "factor", "base")
    first = {name: (n + 1) * count for n, name in enumerate(names)}
    at = {name: (f"${n}", f"${n + 1}") for name, n in first.items()}
    pairs = [(f"${n}", f"${first['even'] + n}", f"${first['odd'] + n}", n % 2) for n in range(count)]
    return at | {"answer": at["answer"][0], "factor": at["factor"][0], "pairs": pairs, "copies": []}


@gluon.constexpr_function
def _of_parts(parts):
    """Of so many parts, of which a thread has four numbers each, two of a row. Out: weights, of two parts each; sums,
    peaks, what sums shrink by, answers; in: parts, the factor, old peaks."""
    out = 2 * parts
    first = out + 16
    names = {"sum": out, "peak": out + 4, "shrink": out + 8, "factor": first + 4 * parts, "base": first + 4 * parts + 4}
    at = {name: (f"${n}", f"${n + 2}") for name, n in names.items()}
    pairs = [(f"${n}", f"${first + 2 * n}", f"${first + 2 * n + 1}", n % 2) for n in range(out)]
    copies = [f"mov.f32 ${out + 1}, 0f00000000; mov.f32 ${out + 3}, 0f00000000;"]
    copies += [f"mov.f32 ${n + 1}, ${n}; mov.f32 ${n + 3}, ${n + 2};" for n in (out + 4, out + 8)]
    copies += [f"mov.b32 ${out + 12 + n}, ${out + 12};" for n in (1, 2, 3)]
    return at | {"answer": f"${out + 12}", "factor": at["factor"][0], "pairs": pairs, "copies": copies}


@gluon.constexpr_function
def _tile_text(count, dtype, GUESS):
    return _text(_of_tile(count), dtype, GUESS)


@gluon.constexpr_function
def _part_text(parts, dtype, GUESS):
    return _text(_of_parts(parts), dtype, GUESS)


@gluon.constexpr_function
def _tile_sides(count):
    """Outputs are written while inputs are still read."""
    return ",".join(["=&r"] * count + ["=&f"] * (3 * count) + ["=&r"] * count + ["f"] * (4 * count))


@gluon.constexpr_function
def _part_sides(parts):
    return ",".join(["=&r"] * (2 * parts) + ["=&f"] * 12 + ["=&r"] * 4 + ["f"] * (4 * parts + 8))


@gluon.constexpr_function
def _kinds(weights):
    """Of so many tensors of weights, and what comes along."""
    return (gl.int32,) * weights + (gl.float32,) * 3 + (gl.int32,)


# -- lanes ---------------------------------------------------------------------------------------


@gluon.jit
def lanes(x):
    """Of each thread's numbers the first a row."""
    HALF: gl.constexpr = x.shape[1] // 2
    if HALF >= 4:
        first, _ = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, HALF]), (0, 2, 1)))
        x = lanes(first)
    return x


@gluon.jit
def spread(x, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """So many columns out of lanes: each thread's number again and again."""
    if x.shape[1] < WIDTH:
        twice = gl.reshape(gl.permute(gl.join(x, x), (0, 2, 1)), [x.shape[0], 2 * x.shape[1]])
        made = spread(twice, WIDTH, LAYOUT)
    else:
        made = gl.convert_layout(x, LAYOUT, assert_trivial=True)
    return made


@gluon.jit
def evens_and_odds(x):
    return gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@gluon.jit
def of_no_keys(x, VALUE: gl.constexpr):
    """What rows have that have seen no key, for such scores: a peak, or a sum."""
    if len(x) == 1:
        even, _ = evens_and_odds(x[0])
        like = lanes(even)
    else:
        like = x[0]
    LAYOUT: gl.constexpr = like.type.layout
    return gl.full([like.shape[0], like.shape[1]], VALUE, gl.float32, LAYOUT)


# -- weights and accumulators --------------------------------------------------------------------


@gluon.jit
def weigh(x, shift, m, c, DTYPE: gl.constexpr, GUESS: gl.constexpr):
    """Weights of scores (x + shift) * c in units of log 2, as the second product takes them, and their sums; the peaks
    that they are relative to now, what older sums shrink by, and whether any of a warp's rows do.

    `x`: tensors side by side. `shift`: nothing, or a number a row. `m`: the peaks before. Without a guess, peaks are
    maxima.
    """
    base = m
    if len(shift) > 0:
        base = m - per_lane(shift[0] * c, m)
    if len(x) == 1:
        p, l, peak, alpha, answer = _weigh_tile(x[0], base, c, DTYPE, GUESS)
    else:
        p, l, peak, alpha, answer = _weigh_parts(x, base, c, DTYPE, GUESS)
    if len(shift) > 0:
        peak = gl.where(peak == base, m, peak + per_lane(shift[0] * c, m))
    return p, l, peak, alpha, answer


@gluon.jit
def _weigh_tile(x, base, c, DTYPE: gl.constexpr, GUESS: gl.constexpr):
    even, odd = evens_and_odds(x)
    LAYOUT: gl.constexpr = even.type.layout
    COUNT: gl.constexpr = even.shape[0] * even.shape[1] // 128
    asm: gl.constexpr = _tile_text(COUNT, DTYPE, GUESS)
    sides: gl.constexpr = _tile_sides(COUNT)
    kinds: gl.constexpr = _kinds(1)
    factor = gl.zeros([even.shape[0], 1], gl.float32, LAYOUT) + c
    given = (even, odd, factor, spread(base, even.shape[1], LAYOUT))
    p, l, peak, alpha, answer = gl.inline_asm_elementwise(asm, sides, given, dtype=kinds, is_pure=False, pack=COUNT)
    return (p,), lanes(l), lanes(peak), lanes(alpha), lanes(answer)


@gluon.jit
def _weigh_parts(x, base, c, DTYPE: gl.constexpr, GUESS: gl.constexpr):
    LAYOUT: gl.constexpr = x[0].type.layout
    WEIGHTS: gl.constexpr = len(x) // 2
    asm: gl.constexpr = _part_text(len(x), DTYPE, GUESS)
    sides: gl.constexpr = _part_sides(len(x))
    kinds: gl.constexpr = _kinds(WEIGHTS)
    beside = (gl.zeros([x[0].shape[0], 1], gl.float32, LAYOUT) + c, base)
    made = gl.inline_asm_elementwise(asm, sides, x + beside, dtype=kinds, is_pure=False, pack=4)
    return made[:WEIGHTS], made[WEIGHTS], made[WEIGHTS + 1], made[WEIGHTS + 2], made[WEIGHTS + 3]


@gluon.constexpr_function
def _scaling(tensors, pack):
    """Of so many numbers of each tensor in a thread; their factors follow, and whether one of them is not 1."""
    count = tensors * pack
    lines = [f"{{ .reg .pred p; setp.eq.s32 p, ${2 * count + pack}, 0; @p bra SAME;"]
    return " ".join([*lines, *(f"mul.f32 ${n}, ${n}, ${2 * count + n % pack};" for n in range(count)), "SAME: }"])


@gluon.constexpr_function
def _scaling_sides(tensors, pack):
    count = tensors * pack
    return ",".join(["=f"] * count + [str(n) for n in range(count)] + ["f"] * pack + ["r"] * pack)


@gluon.jit
def _pairs(x, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Lanes as an accumulator's columns, of which a thread has two side by side; with parts they are that already."""
    made = x
    if x.shape[1] != WIDTH:
        made = spread(gl.reshape(gl.join(x, x), [x.shape[0], 2 * x.shape[1]]), WIDTH, LAYOUT)
    return made


@gluon.jit
def scaled_if(answer, acc, alpha):
    """The accumulators, each row by its factor, in warps whose answer is not 0. All factors of others are 1, and these
    go on without multiplying by it."""
    LAYOUT: gl.constexpr = acc[0].type.layout
    WIDTH: gl.constexpr = acc[0].shape[1]
    if acc[len(acc) - 1].shape[1] != WIDTH:
        made = scaled_if(answer, acc[:1], alpha) + scaled_if(answer, acc[1:], alpha)
    else:
        made = _scaled_alike(acc, (_pairs(alpha, WIDTH, LAYOUT), _pairs(answer, WIDTH, LAYOUT)))
    return made


@gluon.jit
def _scaled_alike(acc, rows):
    """Of accumulators that are all as wide."""
    PACK: gl.constexpr = acc[0].shape[0] * acc[0].shape[1] // 128
    asm: gl.constexpr = _scaling(len(acc), PACK)
    sides: gl.constexpr = _scaling_sides(len(acc), PACK)
    if len(acc) == 1:
        made = (gl.inline_asm_elementwise(asm, sides, acc + rows, dtype=gl.float32, is_pure=True, pack=PACK),)
    else:
        kinds: gl.constexpr = floats(len(acc))
        made = gl.inline_asm_elementwise(asm, sides, acc + rows, dtype=kinds, is_pure=True, pack=PACK)
    return made
