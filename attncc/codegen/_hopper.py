"""The Hopper engine: a persistent, warp-specialised forward kernel for sm_90; the same in every package.

What of it is a variant's own stands in `hopper.py`: small functions that say where a tile is, which keys its rows see,
what a product becomes, and how a row ends. Everything here is about keeping the tensor cores busy:

* one warp, the producer, copies tiles of Q, K and V into rings of shared memory by TMA; it does nothing else;
* two or three warpgroups, the consumers, own 64 query rows each. Scores and output are accumulators of `wgmma`; the
  weights P stay in registers, where the second product takes them from;
* in the main loop a consumer issues Q K(n)^T and P(n-1) V(n-1) together, and then does the softmax of tile n, while
  another consumer has the tensor cores. Key tiles that the mask cuts come first, each by itself, but for the last of
  them, which fills the pipeline;
* blocks live as long as the kernel. Each draws its next query tile from a counter, the longest first, and hands the
  number to its consumers through shared memory, so that nobody waits for the slowest.

Barriers: a ring's slot is `full` when TMA has filled it and `empty` when every consumer has read it. A fresh barrier's
odd phase counts as over, so a producer waits for `phase ^ 1` and finds the first slots empty.

ptxas serialises all products of the kernel if, between a product and the wait for it, ordinary code writes registers
that it reads or reads those that it writes. The order of statements below is what keeps that from happening.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import hopper as variant
from ._consumer import ROWS, consume, load_by_tma

# -- the producer --------------------------------------------------------------------------------


@gluon.jit
def produce(Q, K, V, counter, q_s, k_s, v_s, next_s, bars, tiles, args, CONFIG):
    """Copies what the consumers of this block will need, in the order in which they will."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty = bars
    BN: gl.constexpr = CONFIG[0]
    CONSUMERS: gl.constexpr = CONFIG[1]
    STAGES: gl.constexpr = CONFIG[2]
    Q_STAGES: gl.constexpr = CONFIG[3]
    GROUP: gl.constexpr = CONFIG[4]
    BM: gl.constexpr = ROWS * CONSUMERS
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    copied = 0  # tiles of K: slot = copied % STAGES, phase = copied // STAGES % 2
    done = 0  # query tiles
    number = gl.program_id(0)
    while number < tiles:
        following = gl.atomic_add(counter, 1) + gl.num_programs(0)
        mbarrier.wait(next_empty.index(done & 1), ((done >> 1) & 1) ^ 1)
        next_s.index(done & 1).store(gl.full([1], 0, gl.int32, one) + following)
        mbarrier.arrive(next_full.index(done & 1), count=1)
        b, h, hk, row0 = variant.place(number, args, BM, GROUP)
        cuts, wholes, s = variant.walk(b, h, row0, args, BM, BN)
        for t in range(0, cuts + wholes):
            if t < cuts:
                n = variant.cut(t, s, args, BN)
            else:
                n = variant.whole(t - cuts, s, args, BN)
            slot = copied % STAGES
            phase = (copied // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), K.block_type.nbytes)
            load_by_tma(K, [b, hk, n, 0], k_full.index(slot), k_s.index(slot))
            if t == 0:
                for c in gl.static_range(CONSUMERS):
                    at = (done % Q_STAGES) * CONSUMERS + c
                    mbarrier.wait(q_empty.index(at), ((done // Q_STAGES) & 1) ^ 1)
                    mbarrier.expect(q_full.index(at), Q.block_type.nbytes)
                    load_by_tma(Q, [b, h, row0 + c * ROWS, 0], q_full.index(at), q_s.index(at))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), V.block_type.nbytes)
            load_by_tma(V, [b, hk, n, 0], v_full.index(slot), v_s.index(slot))
            copied += 1
        number = following
        done += 1
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:  # the last one out leaves the counter as it was
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


# -- the kernel ----------------------------------------------------------------------------------


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        mbarrier.init(bars.index(n), count=ARRIVALS)
    return bars


@gluon.jit
def forward(
    Q, K, V, O, LSE, lost, counter,
    lse_s0, lse_s1, lse_s2,
    tiles, args,
    BN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, GROUP: gl.constexpr,
    TURNS: gl.constexpr, REGISTERS: gl.constexpr, WRITE_LSE: gl.constexpr, HEADS: gl.constexpr,
    MARK_LOST: gl.constexpr,
):  # fmt: skip
    """The forward pass; Q K V O are tensor maps of [b, h, row, column], O's block that of Q.

    Args:
        lost: [B, HEADS, blocks of 64 rows, from the last] int32, 1 where NaN is in the output; where MARK_LOST.
        counter: two zeros, and zeros again when the kernel ends.
        tiles: query tiles of all heads.
        args: what the variant's functions take.
    """
    q_s = gl.allocate_shared_memory(Q.dtype, [CONSUMERS * Q_STAGES] + Q.block_type.shape, Q.layout)
    k_s = gl.allocate_shared_memory(K.dtype, [STAGES] + K.block_type.shape, K.layout)
    v_s = gl.allocate_shared_memory(V.dtype, [STAGES] + V.block_type.shape, V.layout)
    next_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full, q_empty = barriers(CONSUMERS * Q_STAGES, 1), barriers(CONSUMERS * Q_STAGES, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)  # a consumer arrives once, not once a thread
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    next_full, next_empty = barriers(2, 1), barriers(2, CONSUMERS)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty)
    lse_strides = (lse_s0, lse_s1, lse_s2)
    # constants stay constants only where they are written inside the call; the first entry runs on the kernel's warps
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, O, LSE, lost, lse_strides, q_s, k_s, v_s, next_s, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, GROUP, TURNS, WRITE_LSE, HEADS, MARK_LOST))),
            (consume, (1, O, LSE, lost, lse_strides, q_s, k_s, v_s, next_s, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, GROUP, TURNS, WRITE_LSE, HEADS, MARK_LOST))),
            (produce, (Q, K, V, counter, q_s, k_s, v_s, next_s, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, GROUP))),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize([
            (consume, (0, O, LSE, lost, lse_strides, q_s, k_s, v_s, next_s, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, GROUP, TURNS, WRITE_LSE, HEADS, MARK_LOST))),
            (consume, (1, O, LSE, lost, lse_strides, q_s, k_s, v_s, next_s, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, GROUP, TURNS, WRITE_LSE, HEADS, MARK_LOST))),
            (consume, (2, O, LSE, lost, lse_strides, q_s, k_s, v_s, next_s, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, GROUP, TURNS, WRITE_LSE, HEADS, MARK_LOST))),
            (produce, (Q, K, V, counter, q_s, k_s, v_s, next_s, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, GROUP))),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
