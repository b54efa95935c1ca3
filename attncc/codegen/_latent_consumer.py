"""The consumers of the latent engine: a warpgroup with half of the output's columns. `_latent.py` has the rest."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import latent as variant
from ._latent_steps import KEYS, LINES, ROW, ROWS, SCORES, accumulator, fixed, operand, take, turn
from ._softmax import LOWEST, lane_sum, scaled

# -- which keys ----------------------------------------------------------------------------------


@gluon.jit
def job_of(number, args, CONFIG):
    """The query tiles of a program, and what tells of its keys."""
    first, end, a, b, c, d = variant.job(number, args, ROWS, KEYS, fixed(CONFIG, "SPLIT"), fixed(CONFIG, "FILL"))
    return first, end, (a, b, c, d)


@gluon.jit
def next_job(job, count):
    """What tells of the keys of the next query tile, the one before having so many key tiles."""
    a, b, c, d = job
    return a, b, c + count, d


@gluon.jit
def part_of(number, job, count, wholes, args, CONFIG):
    """The key tiles of a query tile that a program has: the first, the step, how many, and how many of them are whole;
    whether it ends the rows, and where it leaves their state else."""
    first, last, stride, ends, slot = variant.part(
        number, job, count, args, ROWS, KEYS, fixed(CONFIG, "SPLIT"), fixed(CONFIG, "FILL")
    )
    blocks = (gl.maximum(last - first, 0) + stride - 1) // stride
    whole = gl.minimum((gl.maximum(wholes - first, 0) + stride - 1) // stride, blocks)
    return (first, stride, blocks, whole), ends, slot


# -- query tiles ---------------------------------------------------------------------------------


@gluon.jit
def lines(ends, b, row0, s, args, LAYOUT: gl.constexpr):
    """Where a tile's rows of queries begin, [rows, 1]: on 16 bytes, or there were no tensor maps."""
    r = variant.rows(row0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), s, args)
    rows = (r[2].to(gl.int64) * ends[2] + r[1].to(gl.int64) * ends[3])[:, None]
    return gl.multiple_of(ends[0] + b.to(gl.int64) * ends[1] + rows, [16, 16])


@gluon.jit
def load_queries(q_s, ends, b, row0, s, args, NUMBER: gl.constexpr, HAS_REST: gl.constexpr, COLUMNS: gl.constexpr):
    """Brings this consumer's half of the values' columns of queries to shared memory; those behind are returned."""
    HALF: gl.constexpr = q_s.shape[0] // 2
    WIDTH: gl.constexpr = q_s.shape[2]
    begins = lines(ends, b, row0, s, args, LINES)
    for n in gl.static_range(HALF):
        column = (NUMBER * HALF + n) * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, LINES))
        q_s.index(NUMBER * HALF + n).store(gl.load(begins + column[None, :]))
    fence_async_shared()
    rest = 0
    if HAS_REST:
        OPERAND: gl.constexpr = operand(64)
        column = COLUMNS + gl.arange(0, 64, gl.SliceLayout(0, OPERAND))
        rest = gl.load(lines(ends, b, row0, s, args, OPERAND) + column[None, :])
    return rest


@gluon.jit
def leave_state(left, at, state, total, inside, NUMBER: gl.constexpr):
    """Leaves the state of rows where a merge finds it."""
    m, _, acc = state
    M, L, P, m_s, p_s, p_r = left
    one, other = at
    if NUMBER == 0:
        place = one.to(gl.int64) * m_s + other
        gl.store(M + place, m, mask=inside)
        gl.store(L + place, total, mask=inside)
    place = one.to(gl.int64) * p_s + other.to(gl.int64) * p_r
    for n in gl.static_range(len(acc)):
        write(P, place, acc[n], inside, (NUMBER * len(acc) + n) * acc[n].shape[1])


@gluon.jit
def write(to, place, x, inside, first):
    """Writes columns of rows from `first` on; rows begin on 16 bytes."""
    ROWS_OF: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    column = first + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    rows = gl.convert_layout(place, ROWS_OF, assert_trivial=True)
    kept = gl.convert_layout(inside, ROWS_OF, assert_trivial=True)
    begins = gl.multiple_of(to + rows[:, None], [16, 16])
    gl.store(begins + column[None, :], x.to(to.dtype.element_ty), mask=kept[:, None])


@gluon.jit
def end_rows(ends, b, head, query, state, total, inside, r, s, args, NUMBER: gl.constexpr):
    """Ends rows whose keys were all seen."""
    m, _, acc = state
    _, _, _, _, O, o_b, o_h, o_s, LSE, lse_b, lse_h, write_lse = ends
    factor, lse = variant.finish(m, total, r, s, args)
    acc = scaled(acc, factor)
    if NUMBER == 0:
        if write_lse > 0:
            gl.store(LSE + b.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h + query, lse, mask=inside)
    place = b.to(gl.int64) * o_b + head.to(gl.int64) * o_h + query.to(gl.int64) * o_s
    for n in gl.static_range(len(acc)):
        write(O, place, acc[n], inside, (NUMBER * len(acc) + n) * acc[n].shape[1])


@gluon.jit
def key_of(n, part, wholes, s, args, IS_CUT: gl.constexpr):
    """The first key of a program's n-th tile."""
    first, stride, _, _ = part
    if IS_CUT:
        key = variant.cut(first + n * stride - wholes, s, args, KEYS)
    else:
        key = variant.whole(first + n * stride, s, args, KEYS)
    return key


@gluon.jit
def nothing(k_s):
    """The state of no keys at all."""
    PIECES: gl.constexpr = k_s.shape[0] // 4
    WIDTH: gl.constexpr = k_s.shape[4]
    acc = ()
    for _ in gl.static_range(PIECES):
        acc = acc + (gl.zeros([ROWS, WIDTH], gl.float32, accumulator(WIDTH)),)
    m = gl.full([ROWS], LOWEST, gl.float32, ROW)
    return m, lane_sum(gl.zeros([ROWS, KEYS], gl.float32, SCORES)), acc


@gluon.jit
def walk_tiles(
    part, wholes, q, rooms, bars, ready, uses, opaque, row0, r, s, args, NUMBER: gl.constexpr, CONFIG
):  # fmt: skip
    """The state of a program's key tiles of a query tile: every other one is this consumer's."""
    _, _, blocks, whole = part
    state = nothing(rooms[1])
    own, others = uses
    for n in range(NUMBER, whole, 2):
        state = turn(state, key_of(n, part, wholes, s, args, False), n + 1 < blocks, q, rooms, bars, ready,
                     (own, others), opaque, row0, r, s, args, NUMBER, False, CONFIG)  # fmt: skip
        own += 1
        others += 1
    for n in range(NUMBER + (gl.maximum(whole - NUMBER, 0) + 1) // 2 * 2, blocks, 2):
        state = turn(state, key_of(n, part, wholes, s, args, True), n + 1 < blocks, q, rooms, bars, ready,
                     (own, others), opaque, row0, r, s, args, NUMBER, True, CONFIG)  # fmt: skip
        own += 1
        others += 1
    if NUMBER == 1:
        if blocks % 2 == 1:
            state = take(state, rooms, bars, ready, others, 0, NUMBER)
    return state, (own, uses[1] + (blocks + NUMBER) // 2)


@gluon.jit
def consume(NUMBER: gl.constexpr, rooms, bars, ready, together, ends, left, programs, opaque, args, CONFIG):
    """One consumer's half of all programs of this block."""
    q_s, sums = rooms[0], rooms[5]
    meet = together.index(0)
    met = 0
    uses = (met, met)  # tiles that were in this consumer's buffer, and in the other's
    for number in range(gl.program_id(0), programs, gl.num_programs(0)):
        item, end_item, job = job_of(number, args, CONFIG)
        while item < end_item:
            at, where = variant.place(item, args, ROWS, 0, 0)
            row0, end_row = where[1], where[2]
            cuts, wholes, s = variant.walk(at, args, ROWS, KEYS)
            part, is_end, slot = part_of(number, job, cuts + wholes, wholes, args, CONFIG)
            r = variant.rows(row0 + gl.arange(0, ROWS, ROW), s, args)
            b = at[0]
            q = load_queries(q_s, ends, b, row0, s, args, NUMBER, fixed(CONFIG, "HAS_REST"), fixed(CONFIG, "COLUMNS"))
            mbarrier.arrive(meet, count=1)
            mbarrier.wait(meet, 0)
            state, uses = walk_tiles(
                part, wholes, q, rooms, bars, ready, uses, opaque, row0, r, s, args, NUMBER, CONFIG
            )
            sums.index(NUMBER).store(gl.convert_layout(gl.sum(state[1], 1), ROW))
            mbarrier.arrive(meet, count=1)
            mbarrier.wait(meet, 1)
            total = sums.index(0).load(ROW) + sums.index(1).load(ROW)
            inside = r[0] < end_row
            if is_end:
                end_rows(ends, b, r[2], r[1], state, total, inside, r, s, args, NUMBER)
            else:
                leave_state(left, variant.state(slot, at, r, s, args), state, total, inside, NUMBER)
            job = next_job(job, cuts + wholes)
            item += 1
