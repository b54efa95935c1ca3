"""Products of any multiple of eight columns, and of sixteen keys, where Gluon's tensors have powers of two.

An accumulator is a tuple of parts: tensors of eight columns, of which a thread has four numbers, as `wgmma` has them.
Instructions are printed here. Operands lie in one room of shared memory, in blocks of 64 columns, which one swizzle
spans; the last one of a row is filled up with zeros by TMA. Blocks begin at units of sixteen rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ._gluon import ROWS, load_by_tma, reinterpreted

BLOCK = gl.constexpr(64)
"""Columns that stand together, of 128 bytes."""
NARROW = gl.constexpr(8)
"""Columns of a part."""
DEEP = gl.constexpr(16)
"""What an instruction sums over."""
HIGH = gl.constexpr(1 << 30 | 1024 // 16)
"""The upper half of what tells wgmma of a matrix: swizzled by 128 bytes, 1024 bytes from eight rows to the next."""
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.constexpr_function
def blocks_of(columns):
    """How many blocks hold so many columns."""
    return -(-columns // BLOCK.value)


@gluon.constexpr_function
def steps_of(columns):
    """How many instructions sum over so many columns."""
    return -(-columns // DEEP.value)


@gluon.constexpr_function
def first_unit(what, shape):
    """Where queries, outputs of another width than theirs, keys or values begin in the room, or where it ends."""
    depth, columns, bn, consumers, stages, q_stages, unit = shape
    q, v = blocks_of(depth), blocks_of(columns)
    rows = (consumers * q_stages * q * ROWS.value, consumers * v * ROWS.value * (v != q), stages * q * bn, stages * v * bn)
    return sum(rows[: "qokve".index(what)]) // unit


# -- text ----------------------------------------------------------------------------------------


@gluon.constexpr_function
def _numbered(first, count):
    return ", ".join(f"${n}" for n in range(first, first + count))


@gluon.constexpr_function
def _kind(dtype):
    return "bf16.bf16" if dtype == gl.bfloat16 else "f16.f16"


@gluon.constexpr_function
def _scores_text(parts, steps, bn, dtype):
    """Queries come as what tells wgmma of each step's, for they stay what they are while keys change."""
    queries, keys = 4 * parts + 4, 4 * parts + 4 + 4 * steps  # behind a number that only says how many there are
    lines = ["{ .reg .b64 b; .reg .pred p; wgmma.fence.sync.aligned;"]
    for step in range(steps):
        lines.append(f"add.s64 b, ${keys}, {step_of(step, bn)}; setp.ne.b32 p, {int(step > 0)}, 0;")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{8 * parts}k16.f32.{_kind(dtype)} "
            f"{{{_numbered(0, 4 * parts)}}}, ${queries + 4 * step}, b, p, 1, 1, 0, 0;"
        )
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@gluon.constexpr_function
def step_of(step, rows):
    """From the first columns of so many rows to those of a step, in units of sixteen bytes."""
    return (step // 4 * rows * 128 + step % 4 * 32) // 16


@gluon.constexpr_function
def _scores_sides(parts, steps):
    return ",".join(["=f"] * (4 * parts) + ["r"] * 4 + ["l"] * (4 * steps + 4))


@gluon.constexpr_function
def _values_text(parts, steps, dtype):
    weights_, tile = 4 * parts, 4 * (parts + steps)
    lines = ["{ .reg .b64 b; wgmma.fence.sync.aligned;"]
    for step in range(steps):
        lines.append(f"add.s64 b, ${tile}, {step * DEEP.value * 128 // 16};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{8 * parts}k16.f32.{_kind(dtype)} "
            f"{{{_numbered(0, 4 * parts)}}}, {{{_numbered(weights_ + 4 * step, 4)}}}, b, 1, 1, 1, 1;"
        )
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@gluon.constexpr_function
def _values_sides(parts, steps):
    accumulators = range(4 * parts)
    return ",".join(["=f" for _ in accumulators] + ["r"] * (4 * steps) + ["l"] * 4 + [str(n) for n in accumulators])


@gluon.constexpr_function
def _rounding_text(dtype):
    """Of two parts side by side: what an instruction takes of sixteen keys, along rows first."""
    kind = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    pairs = ((0, 4), (1, 6), (2, 8), (3, 10))
    return " ".join(f"cvt.rn.{kind}.f32 ${to}, ${at + 1}, ${at};" for to, at in pairs)


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


# -- products ------------------------------------------------------------------------------------


@gluon.jit
def matrix_at(unit, STRIDE: gl.constexpr, UNIT: gl.constexpr):
    """The lower half for one that begins at this unit, and has so many bytes from a block of columns to the next."""
    room = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    at = ((room + unit * (UNIT * 128)) & 0x3FFFF) >> 4
    return (at | ((STRIDE // 16) << 16)).to(gl.int64) | (HIGH << 32)


@gluon.jit
def part_scores(q_unit, k_unit, DEPTH: gl.constexpr, BN: gl.constexpr, UNIT: gl.constexpr, DTYPE: gl.constexpr):
    """Issues Q K^T of a tile."""
    PARTS: gl.constexpr = BN // NARROW
    STEPS: gl.constexpr = steps_of(DEPTH)
    asm: gl.constexpr = _scores_text(PARTS, STEPS, BN, DTYPE)
    sides: gl.constexpr = _scores_sides(PARTS, STEPS)
    kinds: gl.constexpr = _floats(PARTS)
    given = (gl.full([ROWS, NARROW], 0, gl.int32, PART),)
    for step in gl.static_range(STEPS):
        given = given + (matrix_at(q_unit, 16, UNIT) + step_of(step, ROWS),)
    given = given + (matrix_at(k_unit, 16, UNIT),)
    return gl.inline_asm_elementwise(asm, sides, given, dtype=kinds, is_pure=False, pack=4)


@gluon.jit
def part_values(p, v_unit, acc, BN: gl.constexpr, UNIT: gl.constexpr, DTYPE: gl.constexpr):
    """Issues acc + P V of a tile."""
    asm: gl.constexpr = _values_text(len(acc), len(p), DTYPE)
    sides: gl.constexpr = _values_sides(len(acc), len(p))
    kinds: gl.constexpr = _floats(len(acc))
    given = p + (matrix_at(v_unit, BN * 128, UNIT),) + acc
    return gl.inline_asm_elementwise(asm, sides, given, dtype=kinds, is_pure=False, pack=4)


@gluon.jit
def rounded_parts(p, DTYPE: gl.constexpr):
    """Weights, as the second product takes them."""
    asm: gl.constexpr = _rounding_text(DTYPE)
    sides: gl.constexpr = "=r,=r,=r,=r,f,f,f,f,f,f,f,f"
    made = ()
    for n in gl.static_range(len(p) // 2):
        both = [p[2 * n], p[2 * n + 1]]
        made = made + (gl.inline_asm_elementwise(asm, sides, both, dtype=gl.int32, is_pure=True, pack=4),)
    return made


@gluon.jit
def zero_parts(COUNT: gl.constexpr):
    acc = ()
    for _ in gl.static_range(COUNT):
        acc = acc + (gl.zeros([ROWS, NARROW], gl.float32, PART),)
    return acc


# -- copies --------------------------------------------------------------------------------------


@gluon.jit
def in_blocks(room):
    """The room as blocks of 64 rows, as queries and outputs have."""
    LAYOUT: gl.constexpr = room.layout
    COUNT: gl.constexpr = room.shape[0] * room.shape[3] // ROWS
    return reinterpreted(room, room.dtype, [COUNT, 1, 1, ROWS, BLOCK], LAYOUT)


@gluon.jit
def load_blocks(X, b, h, row, first, bar, room, LINES: gl.constexpr, BLOCKS: gl.constexpr):
    """Copies so many rows and blocks to a room, as units from `first` on."""
    UNIT: gl.constexpr = room.shape[3]
    mbarrier.expect(bar, LINES * BLOCKS * 128)
    for m in range(LINES // UNIT):
        for n in gl.static_range(BLOCKS):
            place = room.index(first + n * (LINES // UNIT) + m)
            load_by_tma(X, [b, h, row + m * UNIT, n * BLOCK], bar, place)


@gluon.jit
def beside_each_other(parts):
    """Parts, a power of two of them, as a tensor."""
    made = parts[0]
    if len(parts) > 1:
        HALF: gl.constexpr = len(parts) // 2
        a, b = beside_each_other(parts[:HALF]), beside_each_other(parts[HALF:])
        made = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [ROWS, 2 * a.shape[1]])
    return made


@gluon.jit
def as_blocks(acc):
    """Parts as tensors of a block's columns; the last one is filled up."""
    if len(acc) > 8:
        made = (beside_each_other(acc[:8]),) + as_blocks(acc[8:])
    elif len(acc) == 8:
        made = (beside_each_other(acc),)
    else:
        made = as_blocks(acc + (acc[0],))
    return made
