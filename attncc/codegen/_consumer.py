"""The consumers of the Hopper engine: a warpgroup with its rows of a query tile. `_hopper.py` has the rest."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from . import hopper as variant
from ._gluon import FIRST_ANSWER, ROWS, barrier, store_by_tma
from ._parts import NARROW, PART, as_blocks, zero_parts
from ._products import accumulator, add_values, arrived, few_bits, fixed, in_room, joined, tile_of, width_of
from ._softmax import MOST, lane_sum, scaled
from ._steps import LETTER, fetch, fetch_own, fill, overlap
from ._turns import pass_turn

# -- a query tile's end --------------------------------------------------------------------------


@gluon.jit
def leave(counter, lost, PARTIES: gl.constexpr, MARK_LOST: gl.constexpr):
    """The last of all leaves the counters as they were, and says how many tiles were lost."""
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) * PARTIES - 1:
        if MARK_LOST:
            gl.store(lost, gl.atomic_xchg(counter + 2, 0))
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.constexpr_function
def _any_nan(barrier_):
    """Of four numbers in each of a consumer's threads: their barrier carries the answer to all of them."""
    return (
        "{ .reg .pred p; .reg .f32 x, y; add.f32 x, $4, $5; add.f32 y, $6, $7; add.f32 x, x, y; setp.nan.f32 p, x, x; "
        f"bar.red.or.pred p, {barrier_}, 128, p; "
        "selp.s32 $0, 1, 0, p; mov.b32 $1, $0; mov.b32 $2, $0; mov.b32 $3, $0; }"
    )


@gluon.jit
def mark_lost(acc, lost, counter, again, left, NUMBER: gl.constexpr):
    """Lists a tile with NaN in it, perhaps a hidden one times 0: another kernel does it again, with care.

    Not where no row is left: the number would be that of the tile behind it, if there is one.
    """
    total = lane_sum(acc[0])  # NaN where any is, at one instruction each
    for n in gl.static_range(1, len(acc)):
        total += gl.convert_layout(lane_sum(acc[n]), total.type.layout, assert_trivial=True)
    asm: gl.constexpr = _any_nan(FIRST_ANSWER + NUMBER)
    sides: gl.constexpr = "=r,=r,=r,=r,f,f,f,f"
    bad = gl.inline_asm_elementwise(asm, sides, [total], dtype=gl.int32, is_pure=False, pack=4)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, total.type.layout))[:, None]
    lane = gl.arange(0, 8, gl.SliceLayout(0, total.type.layout))[None, :]
    one = (row + lane == 0) & (gl.minimum(bad, left) > 0)  # all know it, one says it
    at = gl.atomic_add(counter + 2 + (row + lane) * 0, one.to(gl.int32), mask=one)
    gl.store(lost + 1 + at, again + at * 0, mask=one)


@gluon.constexpr_function
def _lines(width):
    """Eight neighbouring columns a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def write_lines(o, sinks, h, first, left, column0, COLUMNS: gl.constexpr):
    """Writes the rows that are left of the sequence from shared memory by plain stores."""
    out, out_h, out_s, _, _, _, _, _ = sinks
    WIDTH: gl.constexpr = o.shape[1]
    LINES: gl.constexpr = _lines(WIDTH)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    column = column0 + gl.arange(0, WIDTH, gl.SliceLayout(0, LINES))
    to = out + h * out_h + (first + row).to(gl.int64)[:, None] * out_s + column[None, :]
    gl.store(to, o.load(LINES), mask=(row < left)[:, None] & (column < COLUMNS)[None, :])


@gluon.jit
def nth(x, N: gl.constexpr):
    """Of several; or the one that does for all."""
    AT: gl.constexpr = N if len(x) > 1 else 0
    return x[AT]


@gluon.jit
def store(o, O, o_s, sinks, at, b, h, first, left, COLUMNS: gl.constexpr):
    """Writes an output by way of its places in shared memory, but for what is behind the `left` rows of the sequence.
    Pieces have a place each, or one behind the other."""
    for n in gl.static_range(len(o)):
        tile_of(nth(o_s, n), at + n * (len(o_s) == 1)).store(o[n].to(o_s[0].dtype))
    fence_async_shared()
    barrier()
    for n in gl.static_range(len(o)):
        place = nth(o_s, n).index(at + n * (len(o_s) == 1))
        if len(O) > 0:  # TMA ends where the tensor does
            store_by_tma(nth(O, n), [b, h, first, n * o[0].shape[1]], place)
        else:
            write_lines(place.reshape([ROWS, o[n].shape[1]]), sinks, h, first, left, n * o[0].shape[1], COLUMNS)


@gluon.jit
def write_rows(to, x, first, left, ROW: gl.constexpr):
    """Writes a number a row, as far as rows are left of the sequence."""
    row = gl.arange(0, ROWS, ROW)
    gl.store(to + (first + row), x, mask=row < left)


# -- the loop over query tiles -------------------------------------------------------------------


@gluon.jit
def zeros(place):
    WIDTH: gl.constexpr = width_of(place)
    return gl.zeros([ROWS, WIDTH], gl.float32, accumulator(WIDTH, place.dtype))


@gluon.jit
def nothing(v_s, CONFIG):
    """Accumulators of no keys at all."""
    acc = ()
    if fixed(CONFIG, "PARTS"):
        acc = zero_parts(fixed(CONFIG, "COLUMNS"))
    else:
        for n in gl.static_range(len(v_s)):
            acc = acc + (zeros(v_s[n]),)
    return acc


@gluon.jit
def ramps(s, args, LAYOUT: gl.constexpr, CONFIG):
    """What the variant knows of a tile's columns, for each of the tensors that scores are."""
    WIDTH: gl.constexpr = NARROW if fixed(CONFIG, "PARTS") else fixed(CONFIG, "BN")
    made = ()
    for part in gl.static_range(fixed(CONFIG, "BN") // WIDTH):
        made = made + (variant.ramp(part * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT)), s, args),)
    return made


@gluon.jit
def finish(m, l, r, s, known, mail, letter, args, DTYPE: gl.constexpr, ROW: gl.constexpr, CONFIG):
    """What rows' accumulators are multiplied by, and their lse."""
    total = gl.convert_layout(gl.sum(l, 1), ROW)
    if few_bits(DTYPE):  # what only the end needs is heard of again, and takes no registers from the loop
        s_end = known + fetch_own(mail, letter + LETTER, fixed(CONFIG, "FLOATS"))
        factor, lse = variant.finish(m, total * (1.0 / MOST), r[0], s_end, args)
    elif len(variant.base()) > 0:
        base = gl.full([ROWS], variant.base()[0], gl.float32, ROW)
        factor, _ = variant.finish(base, gl.convert_layout(gl.max(m, 1), ROW), r[0], s, args)
        _, lse = variant.finish(base, total, r[0], s, args)
    else:
        factor, lse = variant.finish(gl.convert_layout(gl.max(m, 1), ROW), total, r[0], s, args)
    return factor, lse


@gluon.jit
def consume(NUMBER: gl.constexpr, O, sinks, places, o_s, mail, bars, args, OWN_ROOM: gl.constexpr, CONFIG):
    """One warpgroup's rows of each query tile of this block."""
    q_full, q_empty, _, _, v_full, v_empty, mail_full, mail_empty = bars
    _, _, v_s, _ = places
    _, _, _, LSE, lse_h, write_lse, lost, counter = sinks
    BN: gl.constexpr = fixed(CONFIG, "BN")
    CONSUMERS: gl.constexpr = fixed(CONFIG, "CONSUMERS")
    STAGES: gl.constexpr = fixed(CONFIG, "STAGES")
    Q_STAGES: gl.constexpr = fixed(CONFIG, "Q_STAGES")
    SIZE: gl.constexpr = mail.shape[0] // 2
    S_LAYOUT: gl.constexpr = PART if fixed(CONFIG, "PARTS") else accumulator(BN, v_s[0].dtype)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    read = 0  # tiles of K
    done = 0  # query tiles
    if fixed(CONFIG, "TURNS") > 0 and NUMBER == CONSUMERS - 1:
        pass_turn(0)
    known = variant.known(args)
    mbarrier.wait(mail_full.index(0), 0)
    count = fetch(mail, 0)
    while count > 0:
        letter = (done & 1) * SIZE
        cuts = fetch(mail, letter + 1)
        row0 = fetch(mail, letter + 2)
        s = known + fetch_own(mail, letter + LETTER, fixed(CONFIG, "FLOATS"))
        c = s[fixed(CONFIG, "FACTOR")]
        r = variant.rows(row0 + NUMBER * ROWS + gl.arange(0, ROWS, ROW), s, args)
        r = (r, ramps(s, args, S_LAYOUT, CONFIG))
        q_at = (done % Q_STAGES) * CONSUMERS + NUMBER
        mbarrier.wait(q_full.index(q_at), (done // Q_STAGES) & 1)
        acc = nothing(v_s, CONFIG)
        p, m, l, late = fill(q_at, cuts, read, places, bars, c, r, s, args, NUMBER, S_LAYOUT, CONFIG)
        if Q_STAGES == 2:  # the output of the tile before has left its place by now, which is the next Q's
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(q_empty.index(((done + 1) % 2) * CONSUMERS + NUMBER), count=1, pred=done > 0)
        read += 1
        for t in range(1, cuts):
            p, m, l, acc, late = overlap(
                q_at, p, m, l, acc, late, t, read, places, bars, mail, letter, known, c, r, s, args, write_lse,
                NUMBER, S_LAYOUT, True, CONFIG,
            )  # fmt: skip
            read += 1
        for t in range(gl.maximum(1 - cuts, 0), count - cuts):
            p, m, l, acc, late = overlap(
                q_at, p, m, l, acc, late, t, read, places, bars, mail, letter, known, c, r, s, args, write_lse,
                NUMBER, S_LAYOUT, False, CONFIG,
            )  # fmt: skip
            read += 1

        # the pipeline drains; while it does, the row's end and the next letter's first number
        before = (read - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((read - 1) // STAGES) & 1)
        acc_sent = add_values(p, v_s, before, acc, CONFIG)
        factor, lse = finish(m, l, r, s, known, mail, letter, args, v_s[0].dtype, ROW, CONFIG)
        b, h, first = fetch(mail, letter + 3), fetch(mail, letter + 4), fetch(mail, letter + 5) + NUMBER * ROWS
        left = fetch(mail, letter + 6) - NUMBER * ROWS
        again = fetch(mail, letter + 7) + NUMBER * ROWS // fixed(CONFIG, "AGAIN")
        mbarrier.arrive(mail_empty.index(done & 1), count=1)
        done += 1
        mbarrier.wait(mail_full.index(done & 1), (done >> 1) & 1)
        count = fetch(mail, (done & 1) * SIZE)
        acc = joined(arrived(acc_sent), acc, late)
        if fixed(CONFIG, "PARTS"):
            acc = as_blocks(acc)
        mbarrier.arrive(v_empty.index(before), count=1)
        if fixed(CONFIG, "MARK_LOST"):
            mark_lost(acc, lost, counter, again, left, NUMBER)
        if OWN_ROOM:
            tma.store_wait(0)
            barrier()
            store(scaled(acc, factor), O, o_s, sinks, NUMBER, b, h, first, left, fixed(CONFIG, "COLUMNS"))
        else:
            o_at = in_room(CONFIG, "q", q_at)
            store(scaled(acc, factor), O, o_s, sinks, o_at, b, h, first, left, fixed(CONFIG, "COLUMNS"))
        if write_lse > 0:
            write_rows(LSE + (b * fixed(CONFIG, "HEADS") + h).to(gl.int64) * lse_h, lse, first, left, ROW)
        if Q_STAGES == 1:
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(q_empty.index(NUMBER), count=1)
    tma.store_wait(0)
    if fixed(CONFIG, "MARK_LOST"):
        leave(counter, lost, CONSUMERS + 1, True)
