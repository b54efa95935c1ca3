"""What a consumer of the latent engine does with a key tile: products, scores, weights and values."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import latent as variant
from ._gluon import FIRST_ANSWER, ROWS, named
from ._softmax import exp2, lane_sum, per_lane, scaled

KEYS = gl.constexpr(64)
"""Of a key tile."""


@gluon.constexpr_function
def accumulator(width):
    """The layout of 64 rows of so many columns that wgmma makes."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def operand(width):
    """Of what such rows are multiplied by."""
    return gl.DotOperandLayout(0, accumulator(width), 2)


SCORES = gl.constexpr(accumulator(64))
ROW = gl.constexpr(gl.SliceLayout(1, accumulator(64)))
SLACK = gl.constexpr(8.0)
"""By so many units of log 2 scores may exceed the peak that weights are relative to: fewer peaks move, and with them
the accumulators. Weights reach 2**8 then, whose sums fp32 holds as well."""
FIXED = gl.constexpr({
    "SPLIT": 0, "FILL": 1, "COLUMNS": 2, "FACTOR": 3, "KEYS_AT": 4, "READS_KEYS": 5, "HAS_REST": 6,
})  # fmt: skip
"""Where what a launch fixes stands in the tuple in which it travels."""
fixed = named(FIXED)
"""What a launch fixes under a name; `forward` says what each is."""
LINES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Eight neighbouring columns a thread."""
LONE = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0]))
"""A row of keys."""

# -- products ------------------------------------------------------------------------------------


@gluon.jit
def flat(place):
    """A slot of shared memory as rows and columns."""
    return place.reshape([place.shape[2], place.shape[3]])


@gluon.jit
def product(q_s, q_rest, k_s, x_s, full, phase, z, NUMBER: gl.constexpr, HAS_REST: gl.constexpr):
    """Issues Q K^T of this consumer's buffer, piece by piece as they arrive."""
    PIECES: gl.constexpr = q_s.shape[0]
    sent = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    if HAS_REST:
        mbarrier.wait(full.index(NUMBER * (PIECES + 1) + PIECES), phase)
        sent = warpgroup_mma(q_rest, flat(x_s.index(NUMBER + z)).permute((1, 0)), sent, use_acc=False, is_async=True)
    for i in gl.static_range(PIECES):
        mbarrier.wait(full.index(NUMBER * (PIECES + 1) + (i + NUMBER * (PIECES // 2)) % PIECES), phase)
        sent = warpgroup_mma(
            q_s.index((i + NUMBER * (PIECES // 2)) % PIECES + z),
            flat(k_s.index(NUMBER * PIECES + (i + NUMBER * (PIECES // 2)) % PIECES + z)).permute((1, 0)),
            sent,
            use_acc=HAS_REST or i > 0,
            is_async=True,
        )
    return sent


@gluon.jit
def add_values(p, k_s, acc, z, BUFFER: gl.constexpr, NUMBER: gl.constexpr):
    """Issues acc + P V of a buffer; P is in shared memory or in registers."""
    FIRST: gl.constexpr = (2 * BUFFER + NUMBER) * (k_s.shape[0] // 4)
    sent = ()
    for n in gl.static_range(len(acc)):
        sent = sent + (warpgroup_mma(p, flat(k_s.index(FIRST + n + z)), acc[n], is_async=True),)
    return sent


@gluon.jit
def arrived(sent, empty, BUFFER: gl.constexpr, NUMBER: gl.constexpr):
    """The accumulators when products are done; the pieces of values that they read are given back."""
    PIECES: gl.constexpr = len(sent)
    if PIECES == 1:
        acc = (warpgroup_mma_wait(0, deps=sent),)
    else:
        acc = warpgroup_mma_wait(0, deps=sent)
    for n in gl.static_range(PIECES):
        mbarrier.arrive(empty.index(BUFFER * (2 * PIECES + 1) + NUMBER * PIECES + n), count=1)
    return acc


@gluon.constexpr_function
def _any_apart(barrier_):
    """Of two pairs of numbers in each of a consumer's threads: their barrier carries the answer to all of them."""
    return (
        "{ .reg .pred p, q; setp.neu.f32 p, $2, $4; setp.neu.f32 q, $3, $5; or.pred p, p, q; "
        f"bar.red.or.pred p, {barrier_}, 128, p; selp.s32 $0, 1, 0, p; mov.b32 $1, $0; }}"
    )


@gluon.jit
def moved(before, peak, NUMBER: gl.constexpr):
    """Whether any row's peak is another one now, as a number a row."""
    asm: gl.constexpr = _any_apart(FIRST_ANSWER + NUMBER)
    return gl.inline_asm_elementwise(asm, "=r,=r,f,f,f,f", [before, peak], dtype=gl.int32, is_pure=False, pack=2)


@gluon.jit
def shrunk(acc, before, peak, answer):
    """The accumulators relative to new peaks; as they are where none has moved, which is known of all rows at once."""
    if gl.max(answer.slice(0, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0) > 0:
        acc = scaled(acc, exp2(before - peak))
    return acc


# -- key tiles -----------------------------------------------------------------------------------


@gluon.jit
def kept(n, r, s, args, LAYOUT: gl.constexpr, CONFIG):
    """Keys from n on where reads of them stay inside, even of no keys at all, and which pairs count."""
    j = n + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    if fixed(CONFIG, "READS_KEYS"):  # `keep` knows of no end then
        inside = j < s[fixed(CONFIG, "KEYS_AT")]
        j = gl.maximum(gl.minimum(j, s[fixed(CONFIG, "KEYS_AT")] - 1), 0)
        keep = inside[None, :] & variant.keep(j, r, s, args)
    else:
        keep = variant.keep(j, r, s, args)
    return j, keep


@gluon.jit
def masked_scores(qk, n, k_s, row0, r, s, args, NUMBER: gl.constexpr, CONFIG):
    """Scores of the tile of keys from n on, -inf for pairs that the mask hides."""
    blank(n, k_s, row0, s, args, NUMBER, CONFIG)
    j, keep = kept(n, r, s, args, SCORES, CONFIG)
    return gl.where(keep, variant.score(qk, 0, j, r, s, args), float("-inf"))


@gluon.jit
def blank(n, k_s, row0, s, args, NUMBER: gl.constexpr, CONFIG):
    """Makes values of keys 0 that the first row, and so no row, sees: what lies there may be NaN."""
    PIECES: gl.constexpr = k_s.shape[0] // 2
    r = variant.rows(row0 + gl.arange(0, 1, gl.SliceLayout(1, LONE)), s, args)
    _, keep = kept(n, r, s, args, LONE, CONFIG)
    sees = gl.convert_layout(gl.max(keep.to(gl.int32), 0), gl.SliceLayout(1, LINES)) > 0
    for n in gl.static_range(PIECES):
        piece = flat(k_s.index(NUMBER * PIECES + n))
        piece.store(gl.where(sees[:, None], piece.load(LINES), 0.0))
    fence_async_shared()


@gluon.jit
def turn(
    state, n, more, q, rooms, bars, ready, uses, opaque, row0, r, s, args,
    NUMBER: gl.constexpr, IS_CUT: gl.constexpr, CONFIG,
):  # fmt: skip
    """One tile of this consumer, whose first key is n: its scores; its weights, which the other one will take; and its
    values. Between them the second consumer has the values of the first one's tile; the first one has those of the
    second one's behind its own, if there are `more`."""
    m, l, acc = state
    q_s, k_s, x_s, p_s, peaks, _, answers = rooms
    full, empty = bars
    own, others = uses
    PIECES: gl.constexpr = len(acc)
    DTYPE: gl.constexpr = k_s.dtype
    z = own & opaque
    sent = product(q_s, q, k_s, x_s, full, own & 1, z, NUMBER, fixed(CONFIG, "HAS_REST"))
    qk = warpgroup_mma_wait(0, deps=(sent,))
    if fixed(CONFIG, "HAS_REST"):
        mbarrier.arrive(empty.index(NUMBER * (2 * PIECES + 1) + 2 * PIECES), count=1)
    if IS_CUT:
        x = masked_scores(qk, n, k_s, row0, r, s, args, NUMBER, CONFIG)
    else:
        x = variant.score(qk, 0, n + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES)), r, s, args)
    c = s[fixed(CONFIG, "FACTOR")]
    top = gl.max(x, 1) * c
    before = m
    if NUMBER == 1:
        mbarrier.wait(ready.index(0), others & 1)
        before = peaks.index(0).load(ROW)
        acc = shrunk(acc, m, before, answers.index(0))
        taken = add_values(p_s.index(0 + z), k_s, acc, z, 0, NUMBER)
    peak = gl.where(top > before + SLACK, top, before)
    p = exp2(x * c - peak[:, None])
    l = l * per_lane(exp2(m - peak), l) + lane_sum(p)
    weights = p.to(DTYPE)
    # free: its tile came after the other consumer was done with the values of the one before
    p_s.index(NUMBER).store(weights)
    peaks.index(NUMBER).store(peak)
    answers.index(NUMBER).store(moved(before, peak, NUMBER))
    fence_async_shared()
    mbarrier.arrive(ready.index(NUMBER), count=1)
    if NUMBER == 1:
        acc = arrived(taken, empty, 0, NUMBER)
    acc = shrunk(acc, before, peak, answers.index(NUMBER))
    added = add_values(gl.convert_layout(weights, operand(acc[0].shape[1])), k_s, acc, z, NUMBER, NUMBER)
    state = peak, l, arrived(added, empty, NUMBER, NUMBER)
    if NUMBER == 0:
        if more:
            state = take(state, rooms, bars, ready, others, z, NUMBER)
    return state


@gluon.jit
def take(state, rooms, bars, ready, others, z, NUMBER: gl.constexpr):
    """The values of the other consumer's tile."""
    m, l, acc = state
    _, k_s, _, p_s, peaks, _, answers = rooms
    OTHER: gl.constexpr = 1 - NUMBER
    mbarrier.wait(ready.index(OTHER), others & 1)
    peak = peaks.index(OTHER).load(ROW)
    acc = shrunk(acc, m, peak, answers.index(OTHER))
    added = add_values(p_s.index(OTHER + z), k_s, acc, z, OTHER, NUMBER)
    return peak, l * per_lane(exp2(m - peak), l), arrived(added, bars[1], OTHER, NUMBER)
