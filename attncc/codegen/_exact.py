"""Products with values as wide as a head is: a `wgmma` of any multiple of 8 columns, where Gluon's tensors have powers of two.

An accumulator is a tuple of tensors of eight columns, four numbers a thread each. Values lie in shared memory as blocks
of 64 columns, the last one filled up by TMA with zeros that no product reads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._gluon import ROWS

BLOCK = gl.constexpr(64)
"""Columns of values that stand together: as much as one swizzle has."""
NARROW = gl.constexpr(8)
"""Columns of an accumulator's part."""
DEPTH = gl.constexpr(16)
"""Keys that an instruction multiplies."""
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.constexpr_function
def blocks_of(columns):
    """How many blocks hold so many columns."""
    return -(-columns // BLOCK.value)


@gluon.constexpr_function
def parts_of(columns):
    """How many parts hold so many columns, which are taken by sixteens."""
    return -(-columns // 16) * 2


@gluon.constexpr_function
def _numbered(first, count):
    return ", ".join(f"${n}" for n in range(first, first + count))


@gluon.constexpr_function
def _text(parts, steps, dtype):
    """All products of a key tile. Of the four registers of weights that a step has, the middle two come the other way
    round: wgmma goes along rows first."""
    weights_, tile = 4 * parts, 4 * (parts + steps)
    kind = "bf16" if dtype == gl.bfloat16 else "f16"
    to = _numbered(0, 4 * parts)
    lines = ["{ .reg .b64 at; wgmma.fence.sync.aligned;"]
    for step in range(steps):
        first = weights_ + 4 * step
        lines.append(f"add.s64 at, ${tile}, {step * DEPTH.value * 2 * BLOCK.value // 16};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{8 * parts}k16.f32.{kind}.{kind} "
            f"{{{to}}}, {{${first}, ${first + 2}, ${first + 1}, ${first + 3}}}, at, 1, 1, 1, 1;"
        )
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@gluon.constexpr_function
def _sides(parts, steps):
    accumulators = range(4 * parts)
    return ",".join(["=f" for _ in accumulators] + ["r"] * (4 * steps) + ["l"] * 4 + [str(n) for n in accumulators])


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


@gluon.jit
def split_columns(x, COUNT: gl.constexpr):
    """A power of two of tensors side by side."""
    made = (x,)
    if COUNT > 1:
        HALF: gl.constexpr = x.shape[1] // 2
        a, b = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, HALF]), (0, 2, 1)))
        made = split_columns(a, COUNT // 2) + split_columns(b, COUNT // 2)
    return made


@gluon.jit
def beside_each_other(parts):
    """The same backwards."""
    made = parts[0]
    if len(parts) > 1:
        HALF: gl.constexpr = len(parts) // 2
        a, b = beside_each_other(parts[:HALF]), beside_each_other(parts[HALF:])
        made = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [ROWS, 2 * a.shape[1]])
    return made


@gluon.jit
def weight_parts(p, STEPS: gl.constexpr):
    """Weights, two a number, as what each step takes: keys 2 n and 2 n + 8 beside each other."""
    x = gl.permute(gl.reshape(p, [ROWS, STEPS, 2, 4]), (0, 1, 3, 2))
    parts = split_columns(gl.reshape(x, [ROWS, 8 * STEPS]), STEPS)
    made = ()
    for n in gl.static_range(STEPS):
        made = made + (gl.convert_layout(parts[n], PART, assert_trivial=True),)
    return made


@gluon.jit
def exact_zeros(COUNT: gl.constexpr):
    acc = ()
    for _ in gl.static_range(COUNT):
        acc = acc + (gl.zeros([ROWS, NARROW], gl.float32, PART),)
    return acc


@gluon.jit
def exact_product(p, place, slot, acc, COLUMNS: gl.constexpr):
    """Issues acc + P V of a slot."""
    KEYS: gl.constexpr = place.shape[3]
    STEPS: gl.constexpr = KEYS // DEPTH
    BYTES: gl.constexpr = KEYS * BLOCK * 2
    base = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    tile = base + slot * (BYTES * blocks_of(COLUMNS))
    # swizzled by 128 bytes; from eight keys to the next, and from a block of columns to the next
    matrix = ((tile & 0x3FFFF) >> 4).to(gl.int64) | (1 << 62) | (64 << 32) | ((BYTES // 16) << 16)
    asm: gl.constexpr = _text(len(acc), STEPS, place.dtype)
    sides: gl.constexpr = _sides(len(acc), STEPS)
    kinds: gl.constexpr = _floats(len(acc))
    given = weight_parts(p, STEPS) + (matrix,) + acc
    return gl.inline_asm_elementwise(asm, sides, given, dtype=kinds, is_pure=False, pack=4)


@gluon.jit
def as_pieces(acc, places):
    """The accumulator as tensors as wide as their places."""
    COUNT: gl.constexpr = places[0].shape[4] // NARROW
    made = (beside_each_other(acc[:COUNT]),)
    if len(places) > 1:
        made = made + as_pieces(acc[COUNT:], places[1:])
    return made
