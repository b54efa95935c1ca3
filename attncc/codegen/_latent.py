"""The latent engine: a warp-specialised kernel for few queries over latents on sm_90; the same in every package.

Values are the first columns of the keys, so that a tile of 64 keys, once in shared memory, serves both products of 64
rows: query heads of a group, side by side. What is a variant's own stands in `latent.py`. Here

* one warp, the producer, copies key tiles by TMA into two buffers, piece by piece;
* two warpgroups, the consumers, own half of the output's columns each. Tiles alternate: each consumer multiplies
  queries by its own tiles alone, and makes weights of the scores, which the other one finds in shared memory, with the
  peak that they are relative to. Each multiplies all weights by its own half of the values. So one has products for
  the tensor cores while the other has a softmax. The second one takes the other's tile under its softmax, before its
  own; the first one behind its own, so that a tile on its way to the place of that has the time of these products;
* a buffer's pieces are given back one by one: there is room for no third tile, and what is left of two must be on its
  way while the rest is still in use;
* blocks live as long as the kernel. Their programs are shares of query tiles, or ranges of the line of all tiles, as
  in the portable kernels: `latent.py` says which query tiles a program has, and which part of their keys.

Columns of queries behind the values' stay in registers, in which products take them.

A fresh barrier's odd phase counts as over, so a producer waits for `phase ^ 1` and finds the first places empty. A
buffer's phase follows from how many tiles it has held.

What does not change in a loop LLVM moves in front of it. Of the addresses that wgmma takes these would be dozens, which
spill; so they depend on a number that is 0 but not known to be (`opaque`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import latent as variant
from ._gluon import ROWS, barriers, begin_early, load_by_tma
from ._latent_consumer import consume, job_of, next_job, part_of
from ._latent_steps import KEYS

# -- the producer --------------------------------------------------------------------------------


@gluon.jit
def copy(K, at, column, bars, piece, place, phase):
    """Copies a piece of a key tile when its place is free; the barrier hears of all its bytes."""
    full, empty = bars
    inside, hk, row = at
    mbarrier.wait(empty.index(piece), phase ^ 1)
    mbarrier.expect(full.index(piece), K.block_type.nbytes)
    load_by_tma(K, [inside, hk, row, column], full.index(piece), place)


@gluon.jit
def find(n, part, wholes, hk, at, s, args):
    """Where a program's n-th key tile of a query tile lies; its last one, for numbers behind that."""
    first, stride, blocks, _ = part
    t = first + gl.minimum(n, blocks - 1) * stride
    if t < wholes:
        key = variant.whole(t, s, args, KEYS)
    else:
        key = variant.cut(t - wholes, s, args, KEYS)
    inside, row = variant.locate(key, at, args)
    return inside, hk, row


@gluon.jit
def copy_tile(K, at, bars, k_s, phase, BUFFER: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr):
    """Copies some pieces of a tile to its buffer."""
    PIECES: gl.constexpr = k_s.shape[0] // 2
    WIDTH: gl.constexpr = k_s.shape[4]
    for n in gl.static_range(FIRST, LAST):
        copy(K, at, n * WIDTH, bars, BUFFER * (PIECES + 1) + n, k_s.index(BUFFER * PIECES + n), phase)


@gluon.jit
def copy_rest(KX, at, bars, k_s, x_s, phase, BUFFER: gl.constexpr):
    """Copies the columns behind the values'."""
    PIECES: gl.constexpr = k_s.shape[0] // 2
    WIDTH: gl.constexpr = k_s.shape[4]
    if KX is not None:
        copy(KX, at, PIECES * WIDTH, bars, BUFFER * (PIECES + 1) + PIECES, x_s.index(BUFFER), phase)


@gluon.jit
def produce(K, KX, bars, k_s, x_s, programs, args, CONFIG):
    """Copies the key tiles of all programs of this block, in the order in which their places become free."""
    PIECES: gl.constexpr = k_s.shape[0] // 2
    even = 0  # tiles that were copied to the first buffer, and to the second
    odd = 0
    for number in range(gl.program_id(0), programs, gl.num_programs(0)):
        item, end_item, job = job_of(number, args, CONFIG)
        while item < end_item:
            at, where = variant.place(item, args, ROWS, 0, 0)
            hk = where[0]
            cuts, wholes, s = variant.walk(at, args, ROWS, KEYS)
            part = part_of(number, job, cuts + wholes, wholes, args, CONFIG)[0]
            blocks = part[2]
            if blocks > 0:
                here = find(0, part, wholes, hk, at, s, args)
                beside = find(1, part, wholes, hk, at, s, args)
                for n in range(0, blocks, 2):
                    # pages are looked up while there is time
                    next_here = find(n + 2, part, wholes, hk, at, s, args)
                    next_beside = find(n + 3, part, wholes, hk, at, s, args)
                    more = n + 1 < blocks
                    copy_rest(KX, here, bars, k_s, x_s, even & 1, 0)
                    copy_tile(K, here, bars, k_s, even & 1, 0, 0, PIECES // 2)
                    if more:
                        copy_rest(KX, beside, bars, k_s, x_s, odd & 1, 1)
                    copy_tile(K, here, bars, k_s, even & 1, 0, PIECES // 2, PIECES)
                    even += 1
                    if more:
                        copy_tile(K, beside, bars, k_s, odd & 1, 1, PIECES // 2, PIECES)
                        copy_tile(K, beside, bars, k_s, odd & 1, 1, 0, PIECES // 2)
                        odd += 1
                    here, beside = next_here, next_beside
            job = next_job(job, cuts + wholes)
            item += 1


# -- the kernel ----------------------------------------------------------------------------------


# What numbers are must not make another kernel: this one was looked at.
@gluon.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_s", "o_b", "o_h", "o_s", "lse_b", "lse_h", "m_s", "p_s", "p_r", "write_lse", "opaque",
        "programs", "args",
    ]
)  # fmt: skip
def forward(
    K, KX, Q, O, LSE, M, L, P, q_b, q_h, q_s, o_b, o_h, o_s, lse_b, lse_h, m_s, p_s, p_r, write_lse, opaque,
    programs, args,
    L_WIDTH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, SPLIT: gl.constexpr, FILL: gl.constexpr,
    COLUMNS: gl.constexpr, FACTOR: gl.constexpr, KEYS_AT: gl.constexpr, READS_KEYS: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """The forward pass of few queries.

    Args:
        K, KX: tensor maps of keys as [b or page, h, row, column]: of a piece of the values' columns, and of those
            behind them, None where there are none.
        Q, O: queries and output; LSE: [b, h, row], written if `write_lse`.
        M, L, P: where states of rows are left, at two indices: greatest scores, sums, and outputs as sums.
        opaque: 0.
        programs: all of them, of which a block has many.
        args: what the variant's functions take.
        L_WIDTH: columns of a piece. COLUMNS: of values.
        SPLIT, FILL: how keys are shared out, which the variant's functions know to read.
        FACTOR, KEYS_AT: which of the numbers that are known of a query tile are the factor from scores to units of
            log 2, and the keys.
        READS_KEYS: whether score or mask read memory at the keys; if not, the mask ends where they do.
        EARLY: whether blocks may begin before the launch before has ended.
    """
    begin_early(EARLY)
    gl.static_assert(BM == ROWS)
    gl.static_assert(BN == KEYS)
    DTYPE: gl.constexpr = K.dtype
    PIECES: gl.constexpr = COLUMNS // L_WIDTH
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(DTYPE, [PIECES, ROWS, L_WIDTH], LINES)
    k_s = gl.allocate_shared_memory(DTYPE, [2 * PIECES, 1, 1, KEYS, L_WIDTH], K.layout)
    x_s = k_s
    if KX is not None:
        x_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, KEYS, KX.block_type.shape[3]], KX.layout)
    weights = gl.allocate_shared_memory(DTYPE, [2, ROWS, KEYS], LINES)
    peaks = gl.allocate_shared_memory(gl.float32, [2, ROWS], NUMBERS)
    sums = gl.allocate_shared_memory(gl.float32, [2, ROWS], NUMBERS)
    answers = gl.allocate_shared_memory(gl.int32, [2, ROWS], NUMBERS)
    bars = (barriers(2 * PIECES + 2, 1), barriers(2 * PIECES + 2, 1))
    ready, together = barriers(2, 1), barriers(1, 2)
    rooms = (queries, k_s, x_s, weights, peaks, sums, answers)
    ends = (Q, q_b, q_h, q_s, O, o_b, o_h, o_s, LSE, lse_b, lse_h, write_lse)
    left = (M, L, P, m_s, p_s, p_r)
    # constants stay constants only where they are written inside the call; the first entry runs on the kernel's warps
    gl.warp_specialize([
        (consume, (0, rooms, bars, ready, together, ends, left, programs, opaque, args,
                   (SPLIT, FILL, COLUMNS, FACTOR, KEYS_AT, READS_KEYS, KX is not None))),
        (consume, (1, rooms, bars, ready, together, ends, left, programs, opaque, args,
                   (SPLIT, FILL, COLUMNS, FACTOR, KEYS_AT, READS_KEYS, KX is not None))),
        (produce, (K, KX, bars, k_s, x_s, programs, args, (SPLIT, FILL))),
    ], [4, 1], [240, 24])  # fmt: skip
