"""What a consumer of the Hopper engine does with a key tile: products, scores, softmax. `_hopper.py` has the rest."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import hopper as variant

ROWS = gl.constexpr(64)
"""Of a consumer: what one wgmma multiplies."""
LETTER = gl.constexpr(8)
"""Numbers that travel by mail before the variant's own."""
LOWEST = gl.constexpr(-1.7014118346046923e38)
"""Below every finite score in units of log 2, and finite: a row that sees no key keeps it."""
MOST = gl.constexpr(448.0)
"""Weights of few bits are multiples of it, the greatest number of fp8: their format's range is all used."""
TOGETHER = gl.constexpr(8)
"""Exponentials that are shared out between two units."""
FIRST_TURN = gl.constexpr(9)
"""Named barriers from here on are ours; Triton takes those before."""


@gluon.constexpr_function
def _barrier(what, number):
    return f"bar.{what} {number}, 256; mov.u32 $0, 0;"  # the threads of two consumers


@gluon.jit
def take_turn(NUMBER: gl.constexpr):
    """Waits until the consumer before this one has issued its products."""
    asm: gl.constexpr = _barrier("sync", FIRST_TURN + NUMBER)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(NUMBER: gl.constexpr):
    asm: gl.constexpr = _barrier("arrive", FIRST_TURN + NUMBER)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


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


@gluon.constexpr_function
def few_bits(dtype):
    """Whether products are of fp8: values then come turned, and are summed in full by us, for wgmma does not."""
    return dtype == gl.float8e4nv


@gluon.constexpr_function
def accumulator(width, dtype):
    """The layout of 64 rows of so many columns that wgmma makes of operands of a dtype."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 256 // dtype.primitive_bitwidth])


@gluon.constexpr_function
def operand(width, dtype):
    """Of the weights that are multiplied by values."""
    return gl.DotOperandLayout(0, accumulator(width, dtype), 32 // dtype.primitive_bitwidth)


@gluon.constexpr_function
def width_of(place):
    """Columns of the output that a tile of values has, which come as [column, key] where they are turned."""
    return place.shape[3] if few_bits(place.dtype) else place.shape[4]


@gluon.jit
def less_log2_most(m):
    """m - log2(MOST), rounded up: weights reach MOST and not further, however large scores are."""
    asm: gl.constexpr = "sub.rp.f32 $0, $1, 0f410CEAED;"
    return gl.inline_asm_elementwise(asm, "=f,f", [m], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softmax(x, m, c, FEW_BITS: gl.constexpr, POLY: gl.constexpr):
    """Weights of a tile of scores x * c in units of log 2, the new maximum, and what older weights shrink by."""
    m_new = gl.maximum(m, gl.max(x, 1) * c)
    if FEW_BITS:
        p = weights(x * c - less_log2_most(m_new)[:, None], POLY)
    else:
        p = weights(x * c - m_new[:, None], POLY)
    return p, exp2(m - m_new), m_new


@gluon.jit
def rounded(p, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights as they are kept until the second product takes them, in the registers in which the first one left them.

    Four of fp8 are one number, for ptxas gives each byte a register. Their keys are those of a thread's two neighbours
    in each half of 16, where a tensor core takes four in a row: values are in that order (`key_at` in attncc).
    """
    if few_bits(dtype):
        BN: gl.constexpr = p.shape[1]
        parts = gl.permute(gl.reshape(p, [ROWS, BN // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
        even, odd = gl.split(parts)
        a, c = gl.split(even)
        b, d = gl.split(odd)
        asm: gl.constexpr = (
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
        )
        made = gl.inline_asm_elementwise(asm, "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)
    else:
        made = gl.convert_layout(p.to(dtype), LAYOUT)
    return made


@gluon.jit
def unpacked(p, LAYOUT: gl.constexpr):
    """Weights of fp8 out of numbers of four; by halves, which LLVM sees through, so that no instruction is left."""
    pairs = gl.join(p.to(gl.int16), (p >> 16).to(gl.int16))
    ones = gl.join(pairs.to(gl.int8), (pairs >> 8).to(gl.int8))
    x = gl.reshape(ones, [ROWS, p.shape[1] * 16]).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def tile_of(place, slot):
    """A slot of shared memory as rows and columns."""
    LINES: gl.constexpr = place.shape[3]
    WIDTH: gl.constexpr = place.shape[4]
    return place.index(slot).reshape([LINES, WIDTH])


@gluon.jit
def fetch(mail, at):
    """A number of the mail, the same in every thread."""
    return gl.max(mail.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def fetch_own(mail, at, FLOATS: gl.constexpr):
    """What the variant knows of a query tile."""
    s = ()
    for n in gl.static_range(mail.shape[0] // 2 - LETTER):
        number = fetch(mail, at + n)
        if n < FLOATS:
            number = number.to(gl.float32, bitcast=True)
        s = s + (number,)
    return s


@gluon.jit
def read_beside(places, bars, read, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """What is read beside a tile's products, in their layout; 0 where nothing is."""
    _, _, _, _, _, _, x_full, x_empty, _, _ = bars
    _, _, _, x_s = places
    x = 0
    if len(x_s) > 0:
        mbarrier.wait(x_full.index(NUMBER), read & 1)
        x = tile_of(x_s[0], NUMBER).load(LAYOUT)
        fence_async_shared()  # loads are on their way, and TMA would not wait for them
        mbarrier.arrive(x_empty.index(NUMBER), count=1)
    return x


@gluon.jit
def product(q, k_s, slot, LAYOUT: gl.constexpr):
    """Issues Q K^T of a slot."""
    BN: gl.constexpr = k_s[0].shape[3]
    sent = gl.zeros([ROWS, BN], gl.float32, LAYOUT)
    for n in gl.static_range(len(q)):
        sent = warpgroup_mma(q[n], tile_of(k_s[n], slot).permute((1, 0)), sent, use_acc=n > 0, is_async=True)
    return sent


@gluon.jit
def value_product(p, place, slot, acc):
    if few_bits(place.dtype):
        LAYOUT: gl.constexpr = acc.type.layout
        a = unpacked(p, gl.DotOperandLayout(0, LAYOUT, 4))
        none = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, LAYOUT)
        sent = warpgroup_mma(a, tile_of(place, slot).permute((1, 0)), none, use_acc=False, is_async=True)
    else:
        a = gl.convert_layout(p, gl.DotOperandLayout(0, acc.type.layout, 2))
        sent = warpgroup_mma(a, tile_of(place, slot), acc, is_async=True)
    return sent


@gluon.jit
def add_values(p, v_s, slot, acc):
    """Issues acc + P V of a slot; of few bits P V alone, to be `joined`."""
    sent = ()
    for n in gl.static_range(len(acc)):
        sent = sent + (value_product(p, v_s[n], slot, acc[n]),)
    return sent


@gluon.jit
def arrived(sent):
    """The accumulators, when nothing is left to come."""
    if len(sent) == 1:
        acc = (warpgroup_mma_wait(0, deps=sent),)
    else:
        acc = warpgroup_mma_wait(0, deps=sent)
    return acc


@gluon.jit
def scaled(acc, factor):
    """The accumulators, each row by its factor."""
    made = ()
    for n in gl.static_range(len(acc)):
        made = made + (acc[n] * gl.convert_layout(factor, gl.SliceLayout(1, acc[n].type.layout))[:, None],)
    return made


@gluon.jit
def joined(arrived_, acc, late):
    """The accumulators with a product that is their own already, or else is added in fp32 to what they shrink to."""
    made = arrived_
    if len(late) > 0:
        made = ()
        for n in gl.static_range(len(acc)):
            alpha = gl.convert_layout(late[0], gl.SliceLayout(1, acc[n].type.layout))
            made = made + (acc[n] * alpha[:, None] + arrived_[n],)
    return made


@gluon.jit
def shrunk(acc, alpha, FEW_BITS: gl.constexpr):
    """The accumulators times alpha; of few bits that is left for when the next product joins them."""
    if FEW_BITS:
        made, late = acc, (alpha,)
    else:
        made, late = scaled(acc, alpha), ()
    return made, late


@gluon.jit
def scores(
    qk, t, cuts, read, places, bars, mail, letter, known, r, s, args,
    NUMBER: gl.constexpr, LAYOUT: gl.constexpr, CONFIG,
):  # fmt: skip
    """Scores of tile t, -inf for pairs that the mask hides, or the sequence's end; whole tiles are not asked."""
    BN: gl.constexpr = CONFIG[0]
    KEYS: gl.constexpr = CONFIG[12]
    columns = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    beside = read_beside(places, bars, read, NUMBER, LAYOUT)
    if t < cuts:  # rare: what it needs is heard of again, and takes no registers from the other branch
        s_cut = known + fetch_own(mail, letter + LETTER, CONFIG[9])
        r_cut = r
        if not CONFIG[13]:
            rows = fetch(mail, letter + 2) + NUMBER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            r_cut = variant.rows(rows, s_cut, args)
        j = variant.cut(t, s_cut, args, BN) + columns
        inside = j < s_cut[KEYS]
        j = gl.maximum(gl.minimum(j, s_cut[KEYS] - 1), 0)  # reads stay inside, even of no keys at all
        x = variant.score(qk, beside, j, r_cut, s_cut, args)
        x = gl.where(inside[None, :] & variant.keep(j, r_cut, s_cut, args), x, float("-inf"))
    else:
        x = variant.score(qk, beside, variant.whole(t - cuts, s, args, BN) + columns, r, s, args)
    return x


@gluon.jit
def fill(
    q, m, l, acc, cuts, read, places, bars, mail, letter, known, c, r, s, args,
    NUMBER: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, CONFIG,
):  # fmt: skip
    """Scores and weights of the tile that opens the pipeline; its values are still to come."""
    _, _, k_full, k_empty, _, _, _, _, _, _ = bars
    _, k_s, _, _ = places
    CONSUMERS: gl.constexpr = CONFIG[1]
    STAGES: gl.constexpr = CONFIG[2]
    TURNS: gl.constexpr = CONFIG[4]
    slot = read % STAGES
    mbarrier.wait(k_full.index(slot), (read // STAGES) & 1)
    if TURNS:
        take_turn(NUMBER)
    qk = product(q, k_s, slot, S_LAYOUT)
    if TURNS:
        pass_turn((NUMBER + 1) % CONSUMERS)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    x = scores(qk, 0, cuts, read, places, bars, mail, letter, known, r, s, args, NUMBER, S_LAYOUT, CONFIG)
    FEW_BITS: gl.constexpr = few_bits(k_s[0].dtype)
    p, alpha, m = softmax(x, m, c, FEW_BITS, CONFIG[16])
    l = l * per_lane(alpha, l) + lane_sum(p)
    p_new = rounded(p, k_s[0].dtype, P_LAYOUT)
    acc, late = shrunk(acc, alpha, FEW_BITS)
    return p_new, m, l, acc, late


@gluon.jit
def overlap(
    q, p, m, l, acc, late, t, cuts, read, places, bars, mail, letter, known, c, r, s, args,
    NUMBER: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, CONFIG,
):  # fmt: skip
    """A turn of the main loop: Q K(n) and P V(n - 1) are issued together, the softmax of n follows."""
    _, _, k_full, k_empty, v_full, v_empty, _, _, _, _ = bars
    _, k_s, v_s, _ = places
    CONSUMERS: gl.constexpr = CONFIG[1]
    STAGES: gl.constexpr = CONFIG[2]
    TURNS: gl.constexpr = CONFIG[4]
    FEW_BITS: gl.constexpr = few_bits(k_s[0].dtype)
    slot = read % STAGES
    before = (read - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (read // STAGES) & 1)
    if TURNS:
        take_turn(NUMBER)
    qk_sent = product(q, k_s, slot, S_LAYOUT)
    mbarrier.wait(v_full.index(before), ((read - 1) // STAGES) & 1)
    acc_sent = add_values(p, v_s, before, acc)
    if TURNS:
        pass_turn((NUMBER + 1) % CONSUMERS)
    qk = warpgroup_mma_wait(len(acc), deps=(qk_sent,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    x = scores(qk, t, cuts, read, places, bars, mail, letter, known, r, s, args, NUMBER, S_LAYOUT, CONFIG)
    new, alpha, m = softmax(x, m, c, FEW_BITS, CONFIG[16])
    l = l * per_lane(alpha, l) + lane_sum(new)
    if FEW_BITS:  # what the next product reads must not be written while this one runs
        got = arrived(acc_sent)
        p_new = rounded(new, k_s[0].dtype, P_LAYOUT)
    else:
        p_new = rounded(new, k_s[0].dtype, P_LAYOUT)
        got = arrived(acc_sent)
    mbarrier.arrive(v_empty.index(before), count=1)
    acc, late = shrunk(joined(got, acc, late), alpha, FEW_BITS)
    return p_new, m, l, acc, late
