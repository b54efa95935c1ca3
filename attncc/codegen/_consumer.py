"""The consumers of the Hopper engine: a warpgroup with its rows of a query tile. `_hopper.py` has the rest."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import hopper as variant

# what newer versions of Triton call otherwise
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_by_tma = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_by_tma = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)
"""Of a consumer: what one wgmma multiplies."""
QUERIES, KEYS, FACTOR = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Of a tile's tuple, what is read here: lengths, and the factor from scores to units of log 2."""
LOWEST = gl.constexpr(-1.7014118346046923e38)
"""Below every finite score in units of log 2, and finite: a row that sees no key keeps it."""
FIRST_TURN = gl.constexpr(9)
"""Named barriers from here on are ours; Triton takes those before."""
PAIR = gl.constexpr(256)
"""Threads that meet at a turn: of one consumer and of the next."""


@gluon.constexpr_function
def _barrier(what, number):
    return f"bar.{what} {number}, 256; mov.u32 $0, 0;"


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


@gluon.jit
def lane_sum(p):
    """Row sums in eight parts, each of one thread: no shuffle in the loop."""
    EIGHTHS: gl.constexpr = p.shape[1] // 8
    return gl.sum(gl.reshape(p, [p.shape[0], EIGHTHS, 8]), 1)


@gluon.jit
def per_lane(x, l):
    """A value a row as a column beside the parts of its sum."""
    return gl.convert_layout(x, gl.SliceLayout(1, l.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def softmax(x, m, c):
    """Weights of a tile of scores x * c in units of log 2, the new maximum, and what older weights shrink by."""
    m_new = gl.maximum(m, gl.max(x, 1) * c)
    return exp2(x * c - m_new[:, None]), exp2(m - m_new), m_new


@gluon.jit
def cut_scores(qk, n, r, s, args, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of a tile of which some pairs do not count: those become -inf."""
    keys = s[KEYS]
    j = n + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    inside = j < keys
    j = gl.minimum(j, keys - 1)
    x = variant.score(qk, j, r, s, args)
    return gl.where(inside[None, :] & variant.keep(j, r, s, args), x, float("-inf"))


@gluon.jit
def whole_scores(qk, n, r, s, args, BN: gl.constexpr, LAYOUT: gl.constexpr):
    j = n + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    return variant.score(qk, j, r, s, args)


@gluon.jit
def product(q, K, slot, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Issues Q K^T of a slot."""
    k = K.index(slot).reshape([BN, q.shape[1]]).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([ROWS, BN], gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def join(p, alpha, l, acc, O_ROW: gl.constexpr):
    """The row sums and the accumulator with a tile's weights about to come in."""
    return l * per_lane(alpha, l) + lane_sum(p), acc * gl.convert_layout(alpha, O_ROW)[:, None]


@gluon.jit
def alone(
    q, m, l, acc, t, read, k_s, v_s, bars, c, r, s, args,
    BN: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Cut tile t by itself: no product of it is left when it returns."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    slot = read % STAGES
    phase = (read // STAGES) & 1
    mbarrier.wait(k_full.index(slot), phase)
    qk = product(q, k_s, slot, BN, S_LAYOUT)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    x = cut_scores(qk, variant.cut(t, s, args, BN), r, s, args, BN, S_LAYOUT)
    p, alpha, m = softmax(x, m, c)
    l, acc = join(p, alpha, l, acc, gl.SliceLayout(1, O_LAYOUT))
    mbarrier.wait(v_full.index(slot), phase)
    v = v_s.index(slot).reshape([BN, acc.shape[1]])
    acc = warpgroup_mma(gl.convert_layout(p.to(k_s.dtype), P_LAYOUT), v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(slot), count=1)
    return m, l, acc


@gluon.jit
def fill(
    q, m, l, acc, cuts, read, k_s, bars, c, r, s, args,
    NUMBER: gl.constexpr, BN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores and weights of the tile that opens the pipeline, under the mask; its values are still to come."""
    _, _, k_full, k_empty, _, _, _, _ = bars
    if cuts > 0:
        n = variant.cut(cuts - 1, s, args, BN)
    else:
        n = variant.whole(0, s, args, BN)
    slot = read % STAGES
    mbarrier.wait(k_full.index(slot), (read // STAGES) & 1)
    if TURNS:
        take_turn(NUMBER)
    qk = product(q, k_s, slot, BN, S_LAYOUT)
    if TURNS:
        pass_turn((NUMBER + 1) % CONSUMERS)
    qk = warpgroup_mma_wait(0, deps=(qk,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, alpha, m = softmax(cut_scores(qk, n, r, s, args, BN, S_LAYOUT), m, c)
    l, acc = join(p, alpha, l, acc, gl.SliceLayout(1, O_LAYOUT))
    return gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2)), m, l, acc


@gluon.jit
def overlap(
    q, p16, m, l, acc, t, read, k_s, v_s, bars, c, r, s, args,
    NUMBER: gl.constexpr, BN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """A turn of the main loop: Q K(n) and P V(n - 1) are issued together, the softmax of n follows."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    slot = read % STAGES
    before = (read - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (read // STAGES) & 1)
    if TURNS:
        take_turn(NUMBER)
    qk_sent = product(q, k_s, slot, BN, S_LAYOUT)
    mbarrier.wait(v_full.index(before), ((read - 1) // STAGES) & 1)
    acc_sent = warpgroup_mma(p16, v_s.index(before).reshape([BN, acc.shape[1]]), acc, is_async=True)
    if TURNS:
        pass_turn((NUMBER + 1) % CONSUMERS)
    qk = warpgroup_mma_wait(1, deps=(qk_sent,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    x = whole_scores(qk, variant.whole(t, s, args, BN), r, s, args, BN, S_LAYOUT)
    p, alpha, m = softmax(x, m, c)
    l = l * per_lane(alpha, l) + lane_sum(p)
    p16_new = gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    acc = warpgroup_mma_wait(0, deps=(acc_sent,))
    mbarrier.arrive(v_empty.index(before), count=1)
    return p16_new, m, l, acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]


@gluon.jit
def store(
    q, acc, factor, lse, b, h, rows, row0, queries, at, O, LSE, lost, lse_strides, q_s,
    NUMBER: gl.constexpr, HEADS: gl.constexpr, WRITE_LSE: gl.constexpr, MARK_LOST: gl.constexpr,
):  # fmt: skip
    """The output through Q's place, which TMA empties while the next tile begins."""
    if MARK_LOST:  # a hidden NaN, times 0, may be in it: another kernel does such rows again, with care
        bad = gl.max(gl.max((acc != acc).to(gl.int32), 1), 0)
        blocks = (queries + (ROWS - 1)) // ROWS
        behind = blocks - 1 - (row0 // ROWS + NUMBER)  # that kernel's programs begin with the last rows
        gl.store(lost + (b * HEADS + h) * blocks + behind, bad, mask=behind >= 0)
    O_ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    q.store((acc * gl.convert_layout(factor, O_ROW)[:, None]).to(q.dtype))
    fence_async_shared()
    barrier()
    store_by_tma(O, [b, h, row0 + NUMBER * ROWS, 0], q_s.index(at))
    if WRITE_LSE:
        to = LSE + b * lse_strides[0] + h * lse_strides[1] + rows * lse_strides[2]
        gl.store(to, lse, mask=rows < queries)


@gluon.jit
def consume(NUMBER: gl.constexpr, O, LSE, lost, lse_strides, q_s, k_s, v_s, next_s, bars, tiles, args, CONFIG):
    """One warpgroup's rows of each query tile of this block."""
    q_full, q_empty, _, _, v_full, v_empty, next_full, next_empty = bars
    BN: gl.constexpr = CONFIG[0]
    CONSUMERS: gl.constexpr = CONFIG[1]
    STAGES: gl.constexpr = CONFIG[2]
    Q_STAGES: gl.constexpr = CONFIG[3]
    GROUP: gl.constexpr = CONFIG[4]
    TURNS: gl.constexpr = CONFIG[5]
    BM: gl.constexpr = ROWS * CONSUMERS
    D: gl.constexpr = q_s.shape[4]
    DV: gl.constexpr = v_s.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    read = 0  # tiles of K
    done = 0  # query tiles
    if TURNS and NUMBER == CONSUMERS - 1:
        pass_turn(0)
    number = gl.program_id(0)
    while number < tiles:
        b, h, _hk, row0 = variant.place(number, args, BM, GROUP)
        cuts, wholes, s = variant.walk(b, h, row0, args, BM, BN)
        queries, c = s[QUERIES], s[FACTOR]
        rows = row0 + NUMBER * ROWS + gl.arange(0, ROWS, ROW)
        r = variant.rows(rows, s, args)
        q_at = (done % Q_STAGES) * CONSUMERS + NUMBER
        q = q_s.index(q_at).reshape([ROWS, D])
        mbarrier.wait(q_full.index(q_at), (done // Q_STAGES) & 1)
        if Q_STAGES == 2:  # the output of the tile before has left its place by now, which is the next Q's
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(q_empty.index(((done + 1) % 2) * CONSUMERS + NUMBER), count=1, pred=done > 0)
        m = gl.full([ROWS], LOWEST, gl.float32, ROW)
        l = lane_sum(gl.zeros([ROWS, BN], gl.float32, S_LAYOUT))
        acc = gl.zeros([ROWS, DV], gl.float32, O_LAYOUT)

        # tiles that the mask cuts, but for the last. No P crosses from one loop into another, where it would travel in
        # halves of registers, to be put together again in every turn of the main loop. And Q must look like another
        # one: ptxas moves what the loop and the code behind it compute alike to the loop's entry, past which a tile
        # with no turn of it goes. (No number is negative.)
        q_alone = q_s.index(q_at + (number >> 31)).reshape([ROWS, D])
        for t in range(0, cuts - 1):
            m, l, acc = alone(
                q_alone, m, l, acc, t, read, k_s, v_s, bars, c, r, s, args, BN, STAGES, S_LAYOUT, O_LAYOUT
            )  # fmt: skip
            read += 1

        # the pipeline fills with the last tile that is cut, else the first whole one, whose mask holds everywhere
        p16, m, l, acc = fill(
            q, m, l, acc, cuts, read, k_s, bars, c, r, s, args,
            NUMBER, BN, CONSUMERS, STAGES, TURNS, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
        read += 1
        for t in range(gl.where(cuts > 0, 0, 1), wholes):
            p16, m, l, acc = overlap(
                q, p16, m, l, acc, t, read, k_s, v_s, bars, c, r, s, args,
                NUMBER, BN, CONSUMERS, STAGES, TURNS, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
            read += 1

        # the pipeline drains; while it does, the row's end and the next tile's number
        before = (read - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((read - 1) // STAGES) & 1)
        acc_sent = warpgroup_mma(p16, v_s.index(before).reshape([BN, DV]), acc, is_async=True)
        total = gl.convert_layout(gl.sum(l, 1), ROW)
        factor, lse = variant.finish(m, total, r, s, args)
        mbarrier.wait(next_full.index(done & 1), (done >> 1) & 1)
        following = gl.max(next_s.index(done & 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        mbarrier.arrive(next_empty.index(done & 1), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc_sent,))
        mbarrier.arrive(v_empty.index(before), count=1)
        store(
            q, acc, factor, lse, b, h, rows, row0, queries, q_at, O, LSE, lost, lse_strides, q_s,
            NUMBER, CONFIG[7], CONFIG[6], CONFIG[8],
        )  # fmt: skip
        if Q_STAGES == 1:
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(q_empty.index(NUMBER), count=1)
        number = following
        done += 1
    tma.store_wait(0)
