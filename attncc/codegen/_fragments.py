"""Tiles in the registers that products take them from: what the kernels in `prologue.py` are made of; sm_90.

A tile has 64 rows, which four warps share. wgmma wants of a factor in registers that a thread has two rows of it and,
of every 8 columns, two beside each other, and leaves sums so. In what order columns are counted does not matter to it,
as long as matrices have them in the same: here a thread's columns are 8 beside each other of every 32, which memory
gives it at once. So tiles go from memory to products, and sums through formulas to memory, and no thread hears of
others.

Numbers of 16 bits stay as they come, two in a word, until a formula reads them: loops would keep each in a register of
its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._gluon import ROWS, barrier, load_by_threads
from ._turns import pass_turn, take_turn

ONES = gl.constexpr(16)
"""Columns of a factor of ones, by which a bias is multiplied: as few as wgmma takes."""


# -- layouts -------------------------------------------------------------------------------------


@gluon.constexpr_function
def tile_of(width):
    """Who has what of a tile of 32, 64 or 128 columns: of every 32, a thread has 8 beside each other, of two rows."""
    further = [[0, n] for n in (32, 64) if n < width]
    registers = [[0, 1], [0, 2], [0, 4], *further, [8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, width])


@gluon.constexpr_function
def words_of(width):
    """The same of numbers of 16 bits, two in a word."""
    further = [[0, n] for n in (16, 32) if n < width // 2]
    registers = [[0, 1], [0, 2], *further, [8, 0]]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, width // 2])


@gluon.constexpr_function
def room_of(width):
    """Where threads find their words in shared memory: those of a warp, 16 bytes each, beside each other."""
    further = [[0, n] for n in (16, 32) if n < width // 2]
    return gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], [2, 0], [4, 0], *further, [8, 0], [16, 0], [32, 0]]
    )


@gluon.constexpr_function
def rows_of(width):
    return gl.SliceLayout(1, tile_of(width))


@gluon.constexpr_function
def columns_of(width):
    return gl.SliceLayout(0, tile_of(width))


@gluon.constexpr_function
def sums_of(width):
    """wgmma's own."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def factor_of(width):
    return gl.DotOperandLayout(0, sums_of(width), 2)


@gluon.constexpr_function
def copied_by(columns):
    """A matrix on its way to shared memory."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def as_column(x, width: gl.constexpr):
    """Numbers of rows beside a tile of so many columns."""
    return gl.convert_layout(x, rows_of(width), assert_trivial=True)[:, None]


@gluon.jit
def counted(x):
    """The columns of a tile in wgmma's order, and those of a sum in memory's."""
    R: gl.constexpr = x.shape[0]
    W: gl.constexpr = x.shape[1]
    return gl.reshape(gl.permute(gl.reshape(x, [R, W // 32, 4, 4, 2]), (0, 1, 3, 2, 4)), [R, W])


@gluon.jit
def first_half(x):
    a, _ = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
    return gl.convert_layout(a, tile_of(x.shape[1] // 2), assert_trivial=True)


@gluon.jit
def second_half(x):
    _, b = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
    return gl.convert_layout(b, tile_of(x.shape[1] // 2), assert_trivial=True)


@gluon.jit
def side_by_side(a, b):
    """The columns of a, then those of b."""
    W: gl.constexpr = 2 * a.shape[1]
    both = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [a.shape[0], W])
    return gl.convert_layout(both, tile_of(W), assert_trivial=True)


# -- memory --------------------------------------------------------------------------------------


@gluon.jit
def read_rows(X, rows, stride, width: gl.constexpr, keep=None):
    """Rows of numbers of 16 bits as words, 0 where they are not kept."""
    place = places(X, rows, stride, width)
    if keep is None:
        found = gl.load(place)
    else:
        keep = gl.convert_layout(keep, gl.SliceLayout(1, words_of(width)), assert_trivial=True)[:, None]
        found = gl.load(place, mask=keep, other=0)
    return found


@gluon.jit
def places(X, rows, stride, width: gl.constexpr):
    """Where rows of numbers of 16 bits lie, as words."""
    at = gl.convert_layout(rows, gl.SliceLayout(1, words_of(width)), assert_trivial=True)[:, None] * (stride // 2)
    words = gl.arange(0, width // 2, gl.SliceLayout(0, words_of(width)))[None, :]
    return X.to(gl.pointer_type(gl.int32)) + at + words


@gluon.jit
def write_rows(X, rows, stride, value, keep):
    if value.dtype == gl.int32:  # as they came
        W: gl.constexpr = 2 * value.shape[1]
        keep = gl.convert_layout(keep, gl.SliceLayout(1, words_of(W)), assert_trivial=True)[:, None]
        gl.store(places(X, rows, stride, W), value, mask=keep)
    else:
        W: gl.constexpr = value.shape[1]
        place = X + rows[:, None] * stride + gl.arange(0, W, columns_of(W))[None, :]
        gl.store(place, value.to(X.dtype.element_ty), mask=keep[:, None])


@gluon.jit
def room(width: gl.constexpr):
    """Shared memory for rows of words that are on their way."""
    return gl.allocate_shared_memory(gl.int32, [ROWS, width // 2], room_of(width))


@gluon.jit
def bring(room, X, rows, stride):
    """Has rows of numbers of 16 bits brought to shared memory, while threads go on."""
    load_by_threads(room, places(X, rows, stride, 2 * room.shape[1]))
    async_copy.commit_group()


@gluon.jit
def arrived(room, width: gl.constexpr):
    """The rows, when all that was on its way is there."""
    async_copy.wait_group(0)
    return room.load(words_of(width))


@gluon.jit
def unpacked(words):
    """bf16 numbers that lie two in a word, in fp32."""
    low = (words << 16).to(gl.float32, bitcast=True)
    high = (words & -65536).to(gl.float32, bitcast=True)
    W: gl.constexpr = 2 * words.shape[1]
    return gl.convert_layout(gl.reshape(gl.join(low, high), [ROWS, W]), tile_of(W), assert_trivial=True)


@gluon.jit
def held(X, stride, rows: gl.constexpr, columns: gl.constexpr):
    """A matrix in shared memory, rows and columns in wgmma's order; the rows of a bias are not columns of a tile."""
    L: gl.constexpr = copied_by(columns)
    at = gl.arange(0, rows, gl.SliceLayout(1, L))[:, None] * stride
    x = counted(gl.load(X + at + gl.arange(0, columns, gl.SliceLayout(0, L))[None, :]))
    if rows > ONES:
        x = gl.permute(gl.reshape(x, [rows // 32, 4, 4, 2, columns]), (0, 2, 1, 3, 4))
        x = gl.reshape(x, [rows, columns])
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, columns], X.dtype.element_ty)
    return gl.allocate_shared_memory(X.dtype.element_ty, [rows, columns], layout, x)


@gluon.jit
def kept(x):
    """A tile of fp32, or a vector of columns, in shared memory: its threads read it again, turn by turn."""
    if len(x.shape) == 2:
        layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    else:
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.float32, x.shape, layout, x)


@gluon.jit
def settle():
    """All threads have written what products read from shared memory."""
    fence_async_shared()
    barrier()


# -- products ------------------------------------------------------------------------------------


@gluon.jit
def ones(width: gl.constexpr):
    """The factor of a bias, beside sums of so many columns."""
    return gl.full([ROWS, ONES], 1.0, gl.bfloat16, factor_of(width))


@gluon.jit
def factor(words):
    """A tile of words as wgmma takes it."""
    W: gl.constexpr = 2 * words.shape[1]
    low = (words & 65535).to(gl.int16).to(gl.bfloat16, bitcast=True)
    high = (words >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    x = counted(gl.reshape(gl.join(low, high), [ROWS, W]))
    return gl.convert_layout(x, factor_of(W), assert_trivial=True)


@gluon.jit
def begin_turns(TURN: gl.constexpr):
    if TURN == 1:
        pass_turn(1 - TURN)


@gluon.jit
def end_turns(TURN: gl.constexpr):
    """Takes what the last turn has passed on."""
    if TURN == 0:
        take_turn(TURN)


@gluon.jit
def products(tiles, matrices, start, TURN: gl.constexpr = None):
    """What tiles, a tuple, are multiplied by matrices, and the start of their sum; TURN: two parties take turns, so
    that what one makes of its products goes on under those of the other."""
    W: gl.constexpr = start.shape[1]
    total = gl.convert_layout(counted(start), sums_of(W), assert_trivial=True)
    if TURN is not None:
        take_turn(TURN)
    for n in gl.static_range(len(tiles)):
        x = factor(tiles[n]) if tiles[n].dtype == gl.int32 else tiles[n]
        total = warpgroup_mma(x, matrices[n], total, is_async=True)
    if TURN is not None:
        pass_turn(1 - TURN)
    total = warpgroup_mma_wait(0, deps=(total,))
    return gl.convert_layout(counted(total), tile_of(W), assert_trivial=True)


# -- formulas ------------------------------------------------------------------------------------


@gluon.jit
def sine(x):
    """Off by 5e-7 and by what fp32 leaves of an angle."""
    return gl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def cosine(x):
    return gl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))
