"""Products of any multiple of eight columns, and of sixteen keys, where Gluon's tensors have powers of two.

An accumulator is a tuple of parts: tensors of eight columns, of which a thread has four numbers, as `wgmma` has them.
Its instructions are printed here, for Gluon's own would make a tensor of all columns.

Operands lie in one room of shared memory, in blocks of 64 columns, which is what one swizzle spans; TMA fills the last
block of a row up with zeros. The room consists of units: as many rows of a block as divide a tile of keys.
Instructions take addresses, of which Gluon tells none: the room, which is by far the largest of what a kernel has in
shared memory, is where that begins, and the kernel makes sure of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ._gluon import ROWS, barrier, floats, load_by_tma, reinterpreted

BLOCK = gl.constexpr(64)
"""Columns that stand together, of 128 bytes."""
NARROW = gl.constexpr(8)
"""Columns of a part."""
DEEP = gl.constexpr(16)
"""What an instruction sums over."""
SWIZZLED = gl.constexpr(1 << 62 | (1024 // 16) << 32)
"""What tells wgmma that a matrix is swizzled by 128 bytes, and has 1024 from eight rows to the next."""
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))

# -- the room ------------------------------------------------------------------------------------


@gluon.constexpr_function
def blocks_of(columns):
    """How many blocks hold so many columns."""
    return -(-columns // BLOCK.value)


@gluon.constexpr_function
def steps_of(columns):
    """How many instructions sum over so many columns."""
    return -(-columns // DEEP.value)


@gluon.constexpr_function
def unit_of(keys):
    """Rows of a unit."""
    return min(keys & -keys, ROWS.value)


@gluon.constexpr_function
def area(what, depth, columns, keys, consumers, stages, q_stages):
    """Where queries, keys or values begin in the room, or where it ends, and how much a tile of them has: in units, and
    in blocks of 64 rows of queries, where outputs go afterwards."""
    q, unit = blocks_of(depth), unit_of(keys)
    k_units, v_units = q * keys // unit, blocks_of(columns) * keys // unit
    k = consumers * q_stages * q * (ROWS.value // unit)
    v = k + stages * k_units
    return {"q": (0, q), "k": (k, k_units), "v": (v, v_units), "end": (v + stages * v_units, 0)}[what]


@gluon.jit
def in_blocks(room):
    """The room as blocks of 64 rows."""
    LAYOUT: gl.constexpr = room.layout
    COUNT: gl.constexpr = room.shape[0] * room.shape[3] // ROWS
    return reinterpreted(room, room.dtype, [COUNT, 1, 1, ROWS, BLOCK], LAYOUT)


@gluon.jit
def stop_elsewhere(room):
    """Stops the kernel if the room is not where shared memory begins: products would read something else."""
    UNIT: gl.constexpr = room.shape[3]
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    asm: gl.constexpr = (
        "{ .reg .b32 x; .reg .pred p; mov.u32 x, global_smem; ld.shared.b32 x, [x]; "
        "setp.ne.b32 p, x, 0x3C003C00; @p trap; mov.u32 $0, 0; }"
    )
    mark = gl.full([UNIT, BLOCK], 0x3C00, gl.int16, LINES).to(room.dtype, bitcast=True)
    room.index(0).reshape([UNIT, BLOCK]).store(mark)
    barrier()
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    fence_async_shared()
    barrier()


@gluon.jit
def one_room(
    K, DEPTH: gl.constexpr, COLUMNS: gl.constexpr, BN: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """The room, as queries, keys and values have it."""
    UNITS: gl.constexpr = area("end", DEPTH, COLUMNS, BN, CONSUMERS, STAGES, Q_STAGES)[0]
    room = gl.allocate_shared_memory(K.dtype, [UNITS, 1, 1, unit_of(BN), BLOCK], K.layout)
    stop_elsewhere(room)
    return (in_blocks(room),), (room,), (room,)


@gluon.jit
def load_blocks(X, b, h, row, first, bar, room, LINES: gl.constexpr, BLOCKS: gl.constexpr):
    """Copies so many rows and blocks to a room, from this one of its units on."""
    UNIT: gl.constexpr = room.shape[3]
    mbarrier.expect(bar, LINES * BLOCKS * 128)
    for n in gl.static_range(BLOCKS):
        for m in gl.static_range(LINES // UNIT):
            place = room.index(first + n * (LINES // UNIT) + m)
            load_by_tma(X, [b, h, row + m * UNIT, n * BLOCK], bar, place)


# -- products as text ----------------------------------------------------------------------------


@gluon.constexpr_function
def _numbered(first, count):
    return ", ".join(f"${n}" for n in range(first, first + count))


@gluon.constexpr_function
def _multiply(parts, dtype, a, b, more):
    """`more`: the matrix b's own words, of which the first tells whether there is an accumulator already."""
    kind = "bf16" if dtype == gl.bfloat16 else "f16"
    accumulator = _numbered(0, 4 * parts)
    return f"wgmma.mma_async.sync.aligned.m64n{8 * parts}k16.f32.{kind}.{kind} {{{accumulator}}}, {a}, {b}, {more};"


@gluon.constexpr_function
def _step(number, rows):
    """From the first of so many rows' columns to those of a step, in units of sixteen bytes."""
    return (number // 4 * rows * 128 + number % 4 * 32) // 16


@gluon.constexpr_function
def _scores_text(parts, steps, keys, dtype):
    """Where each step finds its queries stands behind the keys: that stays as it is while keys change."""
    first = 4 * parts
    lines = ["{ .reg .b64 b; .reg .pred p; wgmma.fence.sync.aligned;"]
    for step in range(steps):
        lines.append(f"add.s64 b, ${first}, {_step(step, keys)}; setp.ne.b32 p, {int(step > 0)}, 0;")
        lines.append(_multiply(parts, dtype, f"${first + 4 * (step + 1)}", "b", "p, 1, 1, 0, 0"))
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@gluon.constexpr_function
def _scores_sides(parts, steps):
    return ",".join(["=f"] * (4 * parts) + ["l"] * (4 * (steps + 1)))


@gluon.constexpr_function
def _values_text(parts, steps, dtype):
    weights_, tile = 4 * parts, 4 * (parts + steps)
    lines = ["{ .reg .b64 b; wgmma.fence.sync.aligned;"]
    for step in range(steps):
        lines.append(f"add.s64 b, ${tile}, {step * DEEP.value * 128 // 16};")
        lines.append(_multiply(parts, dtype, f"{{{_numbered(weights_ + 4 * step, 4)}}}", "b", "1, 1, 1, 1"))
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@gluon.constexpr_function
def _values_sides(parts, steps):
    accumulators = [str(n) for n in range(4 * parts)]
    return ",".join(["=f"] * len(accumulators) + ["r"] * (4 * steps) + ["l"] * 4 + accumulators)


# -- products ------------------------------------------------------------------------------------


@gluon.jit
def matrix_at(unit, LINES: gl.constexpr, STRIDE: gl.constexpr):
    """What tells wgmma of a matrix that begins at this unit of so many rows; its columns go on so many rows behind."""
    room = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    at = ((room + unit * (LINES * 128)) & 0x3FFFF) >> 4
    return at.to(gl.int64) | (SWIZZLED | (STRIDE * 128 // 16) << 16)


@gluon.jit
def part_scores(q_at, k_at, DEPTH: gl.constexpr, BN: gl.constexpr, DTYPE: gl.constexpr):
    """Issues Q K^T of a tile."""
    PARTS: gl.constexpr = BN // NARROW
    STEPS: gl.constexpr = steps_of(DEPTH)
    asm: gl.constexpr = _scores_text(PARTS, STEPS, BN, DTYPE)
    sides: gl.constexpr = _scores_sides(PARTS, STEPS)
    kinds: gl.constexpr = floats(PARTS)
    given = (gl.full([ROWS, NARROW], 0, gl.int64, PART) + matrix_at(k_at, unit_of(BN), BN),)
    queries = matrix_at(q_at, ROWS, ROWS)
    for step in gl.static_range(STEPS):
        given = given + (queries + _step(step, ROWS),)
    return gl.inline_asm_elementwise(asm, sides, given, dtype=kinds, is_pure=False, pack=4)


@gluon.jit
def part_values(p, v_at, acc, BN: gl.constexpr, DTYPE: gl.constexpr):
    """Issues acc + P V of a tile."""
    asm: gl.constexpr = _values_text(len(acc), len(p), DTYPE)
    sides: gl.constexpr = _values_sides(len(acc), len(p))
    kinds: gl.constexpr = floats(len(acc))
    given = p + (matrix_at(v_at, unit_of(BN), BN),) + acc
    return gl.inline_asm_elementwise(asm, sides, given, dtype=kinds, is_pure=False, pack=4)


@gluon.jit
def zero_parts(COLUMNS: gl.constexpr):
    """An accumulator of no keys at all."""
    acc = ()
    for _ in gl.static_range(steps_of(COLUMNS) * (DEEP // NARROW)):
        acc = acc + (gl.zeros([ROWS, NARROW], gl.float32, PART),)
    return acc


@gluon.jit
def side_by_side(parts):
    """A power of two of parts as a tensor."""
    made = parts[0]
    if len(parts) > 1:
        HALF: gl.constexpr = len(parts) // 2
        a, b = side_by_side(parts[:HALF]), side_by_side(parts[HALF:])
        made = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [ROWS, 2 * a.shape[1]])
    return made


@gluon.jit
def as_blocks(acc):
    """Parts as tensors of a block's columns; the last one is filled up with what lies outside of the output."""
    if len(acc) > BLOCK // NARROW:
        made = (side_by_side(acc[: BLOCK // NARROW]),) + as_blocks(acc[BLOCK // NARROW :])
    elif len(acc) == BLOCK // NARROW:
        made = (side_by_side(acc),)
    else:
        made = as_blocks(acc + (acc[0],))
    return made
