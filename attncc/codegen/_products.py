"""Products of a key tile by a consumer of the Hopper engine, and what they multiply: operands in shared memory, weights
in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ._gluon import ROWS, named
from ._parts import area, part_scores, part_values

SHORT = gl.constexpr(256)
"""Columns of keys and values, together, up to which a tile's products take less time than its weights."""
FIXED = gl.constexpr({
    "BN": 0, "CONSUMERS": 1, "STAGES": 2, "Q_STAGES": 3, "TURNS": 4, "GROUP": 5, "AGAIN": 6, "MARK_LOST": 7, "KNOWN": 8,
    "FLOATS": 9, "FACTOR": 10, "QUERIES": 11, "KEYS": 12, "KEEP_ROWS": 13, "READS_KEYS": 14, "HEADS": 15,
    "COLUMNS": 16, "POLY": 17, "DRAWN": 18, "OPENS": 19, "DEPTH": 20, "PARTS": 21,
})  # fmt: skip
"""Where what a launch fixes stands in the tuple in which it travels; functions would pass a dozen constants on else."""
fixed = named(FIXED)
"""What a launch fixes under a name; `forward` says what each is."""


@gluon.constexpr_function
def _area(config, what):
    return area(what, *(fixed(config, name) for name in ("DEPTH", "COLUMNS", "BN", "CONSUMERS", "STAGES", "Q_STAGES")))


@gluon.jit
def in_room(CONFIG, WHAT: gl.constexpr, slot):
    """Where a slot of queries, keys or values begins in the room of parts; else they have rooms of their own."""
    if fixed(CONFIG, "PARTS"):
        FIRST: gl.constexpr = _area(CONFIG, WHAT)[0]
        SIZE: gl.constexpr = _area(CONFIG, WHAT)[1]
        at = FIRST + slot * SIZE
    else:
        at = slot
    return at


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
def rounded(p):
    """Weights of few bits as they are kept until the second product takes them, in the registers in which the first one
    left them.

    Those of a register are one number, for ptxas gives each of less than 32 bits a register of its own where loops hand
    them on. The keys of four of fp8 are those of a thread's two neighbours in each half of 16, where a tensor core
    takes four in a row: values are in that order (`key_at` in attncc).
    """
    parts = gl.permute(gl.reshape(p, [ROWS, p.shape[1] // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    even, odd = gl.split(parts)
    a, c = gl.split(even)
    b, d = gl.split(odd)
    asm: gl.constexpr = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(p, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights out of numbers of two or four; by halves, which LLVM sees through, so that no instruction is left."""
    x = gl.join(p.to(gl.int16), (p >> 16).to(gl.int16))
    if few_bits(dtype):
        x = gl.reshape(gl.join(x.to(gl.int8), (x >> 8).to(gl.int8)), [ROWS, p.shape[1] * 16])
    else:
        x = gl.reshape(x, [ROWS, p.shape[1] * 2])
    return gl.convert_layout(x.to(dtype, bitcast=True), LAYOUT, assert_trivial=True)


@gluon.jit
def tile_of(place, slot):
    """A slot of shared memory as rows and columns."""
    LINES: gl.constexpr = place.shape[3]
    WIDTH: gl.constexpr = place.shape[4]
    return place.index(slot).reshape([LINES, WIDTH])


@gluon.jit
def product(q_s, q_at, k_s, slot, first, CONFIG):
    """Issues Q K^T of a slot, added to what scores begin with. Scores are tensors side by side."""
    if fixed(CONFIG, "PARTS"):
        q_block, k_unit = in_room(CONFIG, "q", q_at), in_room(CONFIG, "k", slot)
        made = part_scores(q_block, k_unit, fixed(CONFIG, "DEPTH"), fixed(CONFIG, "BN"), k_s[0].dtype)
    else:
        OPENS: gl.constexpr = fixed(CONFIG, "OPENS")
        sent = first
        for n in gl.static_range(len(q_s)):
            keys = tile_of(k_s[n], slot).permute((1, 0))
            sent = warpgroup_mma(tile_of(q_s[n], q_at), keys, sent, use_acc=n + OPENS > 0, is_async=True)
        made = (sent,)
    return made


@gluon.jit
def value_product(p, place, slot, acc):
    LAYOUT: gl.constexpr = acc.type.layout
    a = unpacked(p, place.dtype, operand(width_of(place), place.dtype))
    if few_bits(place.dtype):
        none = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, LAYOUT)
        sent = warpgroup_mma(a, tile_of(place, slot).permute((1, 0)), none, use_acc=False, is_async=True)
    else:
        sent = warpgroup_mma(a, tile_of(place, slot), acc, is_async=True)
    return sent


@gluon.jit
def add_values(p, v_s, slot, acc, CONFIG):
    """Issues acc + P V of a slot; of few bits P V alone, to be `joined`."""
    sent = ()
    if fixed(CONFIG, "PARTS"):
        sent = part_values(p, in_room(CONFIG, "v", slot), acc, fixed(CONFIG, "BN"), v_s[0].dtype)
    else:
        for n in gl.static_range(len(acc)):
            sent = sent + (value_product(p[0], v_s[n], slot, acc[n]),)
    return sent


@gluon.jit
def arrived(sent, LEFT: gl.constexpr = 0):
    """What is sent, when so many products are left to come."""
    if len(sent) == 1:
        got = (warpgroup_mma_wait(LEFT, deps=sent),)
    else:
        got = warpgroup_mma_wait(LEFT, deps=sent)
    return got


@gluon.constexpr_function
def is_short(config):
    """Whether the products of a tile take less time than its weights do, and threads have registers for a second tile
    of those."""
    return fixed(config, "CONSUMERS") == 2 and fixed(config, "DEPTH") + fixed(config, "COLUMNS") <= SHORT.value


@gluon.jit
def copied(p, nothing):
    """Weights in other registers. `nothing` is 0, of which ptxas must not know: it leaves a plain copy out, and then
    serialises, for what a product reads would be written while another one runs."""
    asm: gl.constexpr = "xor.b32 $0, $1, $2;"
    made = ()
    for n in gl.static_range(len(p)):
        given = (p[n], nothing)
        made = made + (gl.inline_asm_elementwise(asm, "=r,r,r", given, dtype=gl.int32, is_pure=False, pack=1),)
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
