"""The Hopper engine: a persistent, warp-specialised forward kernel for sm_90; the same in every package.

What of it is a variant's own stands in `hopper.py`: small functions that say where a tile is, which keys its rows see,
what a product becomes, and how a row ends. Everything here is about keeping the tensor cores busy:

* one warp, the producer, finds out what there is to do, and copies tiles of Q, K and V into rings of shared memory by
  TMA;
* two or three warpgroups, the consumers, own 64 query rows each. Scores and output are accumulators of `wgmma`; the
  weights P stay in registers, where the second product takes them from;
* in its loops a consumer issues Q K(n)^T and P(n-1) V(n-1) together, and then does the softmax of tile n, while
  another consumer has the tensor cores. Key tiles that the mask cuts come first, the first of all fills the pipeline.
  Whole tiles have a loop of their own: their weights are relative to a peak that tiles before had, and no maximum is
  looked for while that does (`_weights.py`), or at all where scores have limits (`_limits.py`). Where products take
  less time than weights, these are made while P(n-1) V(n-1) still runs;
* blocks live as long as the kernel. Each draws its next query tile from a counter, the longest first, so that nobody
  waits for the slowest; or they are dealt out, where all take equally long (`DRAWN`). Consumers hear of a tile by mail:
  the producer puts all that is known of it into shared memory, while they are still busy with the one before.

A head dim is one piece, a power of two wide, or two: 160 is 128 + 32. Operands are tuples of their pieces, and so are
their places in shared memory. Where that costs too much, operands lie in one room, and scores and accumulators are
tuples of narrow parts, as many as heads and key tiles are wide: `_parts.py` has products of them.

Operands of fp8 are multiplied as they are stored. Values come turned, as [column, key], which is how wgmma wants bytes,
and with keys in the order in which a thread has its weights. wgmma keeps some 14 bits of a sum of fp8 products: what
it makes of a tile is added up in fp32.

Barriers: a ring's slot is `full` when TMA has filled it and `empty` when every consumer has read it. A fresh barrier's
odd phase counts as over, so a producer waits for `phase ^ 1` and finds the first slots empty.

ptxas serialises all products of the kernel if, between a product and the wait for it, ordinary code writes registers
that it reads or reads those that it writes. The order of statements below is what keeps that from happening.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import hopper as variant
from ._consumer import consume, leave
from ._gluon import ROWS, barriers, load_by_tma
from ._parts import blocks_of, load_blocks, one_room
from ._products import few_bits, fixed, in_room
from ._steps import LETTER

# -- the producer --------------------------------------------------------------------------------


@gluon.jit
def load(WHAT: gl.constexpr, X, b, h, row, slot, bar, X_s, CONFIG, ALONG: gl.constexpr = 0):
    """Copies a tile of queries, keys or values to its slot; the barrier hears of all its bytes, and of those that come
    along."""
    if fixed(CONFIG, "PARTS"):
        LINES: gl.constexpr = ROWS if WHAT == "q" else fixed(CONFIG, "BN")
        BLOCKS: gl.constexpr = blocks_of(fixed(CONFIG, "COLUMNS") if WHAT == "v" else fixed(CONFIG, "DEPTH"))
        load_blocks(X[0], b, h, row, in_room(CONFIG, WHAT, slot), bar, X_s[0], LINES, BLOCKS)
    else:
        load_pieces(X, b, h, row, slot, bar, X_s, WHAT == "v" and few_bits(X[0].dtype), ALONG)


@gluon.jit
def load_pieces(X, b, h, row, slot, bar, X_s, TURNED: gl.constexpr, ALONG: gl.constexpr):
    """The same piece by piece; values come as [column, key] where they are turned."""
    if len(X) == 1:
        mbarrier.expect(bar, X[0].block_type.nbytes + ALONG)
    else:
        mbarrier.expect(bar, X[0].block_type.nbytes + X[1].block_type.nbytes + ALONG)
    for n in gl.static_range(len(X)):
        if TURNED:
            load_by_tma(X[n], [b, h, n * X[0].block_type.shape[2], row], bar, X_s[n].index(slot))
        else:
            load_by_tma(X[n], [b, h, row, n * X[0].block_type.shape[3]], bar, X_s[n].index(slot))


@gluon.jit
def post(mail, slot, numbers):
    """Puts numbers of 32 bits into a slot of the mail."""
    SIZE: gl.constexpr = mail.shape[0] // 2
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for n in gl.static_range(len(numbers)):
        bits = numbers[n]
        if bits.dtype == gl.float32:
            bits = bits.to(gl.int32, bitcast=True)
        mail.index(slot * SIZE + n).store(gl.full([1], 0, gl.int32, one) + bits)


@gluon.jit
def find(number, tiles, args, CONFIG):
    """Where a query tile is, how many key tiles of it are cut and whole, and what is known of it; the last one's, too,
    for numbers behind that."""
    BM: gl.constexpr = ROWS * fixed(CONFIG, "CONSUMERS")
    at, where = variant.place(gl.minimum(number, tiles - 1), args, BM, fixed(CONFIG, "GROUP"), fixed(CONFIG, "AGAIN"))
    cuts, wholes, s = variant.walk(at, args, BM, fixed(CONFIG, "BN"))
    return at, where, cuts, wholes, s


@gluon.jit
def copy(t, copied, done, at, where, cuts, s, maps, places, bars, args, CONFIG):
    """Copies key tile t of a query tile, and with the first one the queries."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _, _ = bars
    Q, K, V, X = maps
    q_s, k_s, v_s, x_s = places
    b, h, hk, hv, first_query, first_key, row0, _ = where
    BN: gl.constexpr = fixed(CONFIG, "BN")
    CONSUMERS: gl.constexpr = fixed(CONFIG, "CONSUMERS")
    STAGES: gl.constexpr = fixed(CONFIG, "STAGES")
    Q_STAGES: gl.constexpr = fixed(CONFIG, "Q_STAGES")
    if t < cuts:
        n = variant.cut(t, s, args, BN)
    else:
        n = variant.whole(t - cuts, s, args, BN)
    slot = copied % STAGES
    phase = (copied // STAGES) & 1
    mbarrier.wait(k_empty.index(slot), phase ^ 1)
    if len(X) > 0:
        load("k", K, b, hk, first_key + n, slot, k_full.index(slot), k_s, CONFIG, CONSUMERS * X[0].block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            table, column = variant.beside(n, row0 + c * ROWS, at, args)
            load_by_tma(X[0], [0, table, 0, column], k_full.index(slot), x_s[0].index(slot * CONSUMERS + c))
    else:
        load("k", K, b, hk, first_key + n, slot, k_full.index(slot), k_s, CONFIG)
    if t == 0:
        for c in gl.static_range(CONSUMERS):
            place = (done % Q_STAGES) * CONSUMERS + c
            mbarrier.wait(q_empty.index(place), ((done // Q_STAGES) & 1) ^ 1)
            load("q", Q, b, h, first_query + c * ROWS, place, q_full.index(place), q_s, CONFIG)
    mbarrier.wait(v_empty.index(slot), phase ^ 1)
    load("v", V, b, hv, first_key + n, slot, v_full.index(slot), v_s, CONFIG)


@gluon.jit
def produce(maps, counter, lost, places, mail, bars, tiles, args, CONFIG):
    """Draws query tiles, tells the consumers about them, and copies what they will need in the order in which they do.

    What travels by mail of a query tile: how many key tiles (0: there is no more to do), how many of them are cut, the
    first query's place in the sequence, its batch entry, head and row in the operands, how many queries are left from
    there, the program that would do the tile again, and the variant's own numbers.
    """
    mail_full, mail_empty = bars[6], bars[7]
    CONSUMERS: gl.constexpr = fixed(CONFIG, "CONSUMERS")
    STAGES: gl.constexpr = fixed(CONFIG, "STAGES")
    copied = 0  # tiles of K: slot = copied % STAGES, phase = copied // STAGES % 2
    done = 0  # query tiles
    number = gl.program_id(0)
    at, where, cuts, wholes, s = find(number, tiles, args, CONFIG)
    while number < tiles:
        b, h, _, _, first_query, _, row0, again = where
        mbarrier.wait(mail_empty.index(done & 1), ((done >> 1) & 1) ^ 1)
        post(
            mail,
            done & 1,
            (cuts + wholes, cuts, row0, b, h, first_query, s[fixed(CONFIG, "QUERIES")] - row0, again)
            + s[fixed(CONFIG, "KNOWN") :],
        )
        mbarrier.arrive(mail_full.index(done & 1), count=1)
        count = cuts + wholes
        early = gl.minimum(count, STAGES)
        for t in range(0, early):
            copy(t, copied, done, at, where, cuts, s, maps, places, bars, args, CONFIG)
            copied += 1
        # the rings are full: time to look for the next query tile. Its number needs no fences, which would wait for
        # memory, and so would the keys of whatever follows; those of `leave` are behind every draw
        if fixed(CONFIG, "DRAWN"):
            following = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        else:
            following = number + gl.num_programs(0)
        next_at, next_where, next_cuts, next_wholes, next_s = find(following, tiles, args, CONFIG)
        for t in range(early, count):
            copy(t, copied, done, at, where, cuts, s, maps, places, bars, args, CONFIG)
            copied += 1
        number, at, where, cuts, wholes, s = following, next_at, next_where, next_cuts, next_wholes, next_s
        done += 1
    mbarrier.wait(mail_empty.index(done & 1), ((done >> 1) & 1) ^ 1)
    post(mail, done & 1, (done * 0,))
    mbarrier.arrive(mail_full.index(done & 1), count=1)
    leave(counter, lost, CONSUMERS * fixed(CONFIG, "MARK_LOST") + 1, fixed(CONFIG, "MARK_LOST"))


# -- the kernel ----------------------------------------------------------------------------------


@gluon.jit
def pieces(first, second):
    """A tuple of what is there of two."""
    there = ()
    if first is not None:
        there = (first,)
    if second is not None:
        there = (first, second)
    return there


@gluon.jit
def room(X, COUNT: gl.constexpr, LINES: gl.constexpr):
    shape: gl.constexpr = [COUNT, 1, 1, LINES, X.block_type.shape[3]]
    return gl.allocate_shared_memory(X.dtype, shape, X.layout)


@gluon.jit
def rooms(X, COUNT: gl.constexpr):
    """Shared memory for so many tiles of an operand, piece by piece."""
    made = ()
    for n in gl.static_range(len(X)):
        made = made + (room(X[n], COUNT, X[n].block_type.shape[2]),)
    return made


@gluon.jit
def rooms_of_rows(X, COUNT: gl.constexpr):
    """The same for as many rows as a consumer has."""
    made = ()
    for n in gl.static_range(len(X)):
        made = made + (room(X[n], COUNT, ROWS),)
    return made


@gluon.jit
def rooms_of_operands(
    maps, BN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Shared memory for queries, keys, values, and for ribbons, where there are any."""
    Q, K, V, X = maps
    x_s = rooms(X, CONSUMERS * STAGES)
    if PARTS:
        q_s, k_s, v_s = one_room(K[0], DEPTH, COLUMNS, BN, CONSUMERS, STAGES, Q_STAGES)
    else:
        q_s = rooms(Q, CONSUMERS * Q_STAGES)
        k_s, v_s = rooms(K, STAGES), rooms(V, STAGES)
    return q_s, k_s, v_s, x_s


# What numbers are must not make another kernel: this one was looked at.
@gluon.jit(do_not_specialize=["out_h", "out_s", "lse_h", "write_lse", "tiles", "args"])
def forward(
    Q0, Q1, K0, K1, V0, V1, O0, O1, X0, out, LSE, lost, counter,
    out_h, out_s, lse_h, write_lse,
    tiles, args,
    BN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, GROUP: gl.constexpr,
    TURNS: gl.constexpr, REGISTERS: gl.constexpr, POLY: gl.constexpr, DRAWN: gl.constexpr, AGAIN: gl.constexpr,
    MARK_LOST: gl.constexpr, NUMBERS: gl.constexpr, KNOWN: gl.constexpr, FLOATS: gl.constexpr,
    FACTOR: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, KEEP_ROWS: gl.constexpr,
    READS_KEYS: gl.constexpr, OWN_ROOM: gl.constexpr, HEADS: gl.constexpr, COLUMNS: gl.constexpr,
    OPENS: gl.constexpr, DEPTH: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The forward pass.

    Args:
        Q0, Q1, K0, ...: tensor maps of [b, h, row, column], one for each piece of an operand.
        X0: a tensor map of ribbons, two lines of LINE numbers a box, where something moves with key - query alone; else
            None.
        out: the output itself where sequences are packed: TMA would write into the next one. Either it or its maps are
            None.
        lost: int32: how many query tiles hold NaN in the output, and the programs that would do them again, of AGAIN
            rows each; where MARK_LOST.
        write_lse: whether LSE, [b * HEADS + h, row], is to be written.
        DRAWN: whether blocks draw query tiles from a counter, and are not dealt them beforehand.
        counter: three zeros, and zeros again when the kernel ends.
        tiles: query tiles of all heads.
        args: what the variant's functions take.
        NUMBERS, KNOWN, FLOATS: how many numbers the variant knows of a query tile, how many of them it knows before
            there is one, and how many of the others are floats, which stand before integers.
        FACTOR, QUERIES, KEYS: which of them are the factor from scores to units of log 2, and the lengths.
        KEEP_ROWS: whether what the variant knows of rows comes from memory, and so is better kept than found again.
        READS_KEYS: whether score or mask read memory at the keys; if not, the mask ends where they do.
        HEADS: query heads. COLUMNS, DEPTH: of the output, and of keys.
        OPENS: whether scores begin with their ribbon, and their formula has none.
        PARTS: whether products are as wide as heads and key tiles are (`_parts.py`), and not made of pieces.
        OWN_ROOM: whether the output does not leave by way of Q's shared memory, because its pieces or dtype are others.
    """
    maps = (pieces(Q0, Q1), pieces(K0, K1), pieces(V0, V1), pieces(X0, None))
    O = pieces(O0, O1)
    places = rooms_of_operands(maps, BN, CONSUMERS, STAGES, Q_STAGES, DEPTH, COLUMNS, PARTS)
    o_s = places[0]
    if OWN_ROOM:
        if len(O) > 0:
            o_s = rooms(O, CONSUMERS)
        else:  # packed sequences
            o_s = rooms_of_rows(maps[2], CONSUMERS)
    mail = gl.allocate_shared_memory(
        gl.int32, [2 * (LETTER + NUMBERS - KNOWN), 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    q_full, q_empty = barriers(CONSUMERS * Q_STAGES, 1), barriers(CONSUMERS * Q_STAGES, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)  # a consumer arrives once, not once a thread
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    mail_full, mail_empty = barriers(2, 1), barriers(2, CONSUMERS)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty)
    sinks = (out, out_h, out_s, LSE, lse_h, write_lse, lost, counter)
    # constants stay constants only where they are written inside the call; the first entry runs on the kernel's warps
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, O, sinks, places, o_s, mail, bars, args, OWN_ROOM,
                       (BN, CONSUMERS, STAGES, Q_STAGES, TURNS, GROUP, AGAIN, MARK_LOST, KNOWN, FLOATS, FACTOR,
                        QUERIES, KEYS, KEEP_ROWS, READS_KEYS, HEADS, COLUMNS, POLY, DRAWN, OPENS, DEPTH, PARTS))),
            (consume, (1, O, sinks, places, o_s, mail, bars, args, OWN_ROOM,
                       (BN, CONSUMERS, STAGES, Q_STAGES, TURNS, GROUP, AGAIN, MARK_LOST, KNOWN, FLOATS, FACTOR,
                        QUERIES, KEYS, KEEP_ROWS, READS_KEYS, HEADS, COLUMNS, POLY, DRAWN, OPENS, DEPTH, PARTS))),
            (produce, (maps, counter, lost, places, mail, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, TURNS, GROUP, AGAIN, MARK_LOST, KNOWN, FLOATS, FACTOR,
                        QUERIES, KEYS, KEEP_ROWS, READS_KEYS, HEADS, COLUMNS, POLY, DRAWN, OPENS, DEPTH, PARTS))),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize([
            (consume, (0, O, sinks, places, o_s, mail, bars, args, OWN_ROOM,
                       (BN, CONSUMERS, STAGES, Q_STAGES, TURNS, GROUP, AGAIN, MARK_LOST, KNOWN, FLOATS, FACTOR,
                        QUERIES, KEYS, KEEP_ROWS, READS_KEYS, HEADS, COLUMNS, POLY, DRAWN, OPENS, DEPTH, PARTS))),
            (consume, (1, O, sinks, places, o_s, mail, bars, args, OWN_ROOM,
                       (BN, CONSUMERS, STAGES, Q_STAGES, TURNS, GROUP, AGAIN, MARK_LOST, KNOWN, FLOATS, FACTOR,
                        QUERIES, KEYS, KEEP_ROWS, READS_KEYS, HEADS, COLUMNS, POLY, DRAWN, OPENS, DEPTH, PARTS))),
            (consume, (2, O, sinks, places, o_s, mail, bars, args, OWN_ROOM,
                       (BN, CONSUMERS, STAGES, Q_STAGES, TURNS, GROUP, AGAIN, MARK_LOST, KNOWN, FLOATS, FACTOR,
                        QUERIES, KEYS, KEEP_ROWS, READS_KEYS, HEADS, COLUMNS, POLY, DRAWN, OPENS, DEPTH, PARTS))),
            (produce, (maps, counter, lost, places, mail, bars, tiles, args,
                       (BN, CONSUMERS, STAGES, Q_STAGES, TURNS, GROUP, AGAIN, MARK_LOST, KNOWN, FLOATS, FACTOR,
                        QUERIES, KEYS, KEEP_ROWS, READS_KEYS, HEADS, COLUMNS, POLY, DRAWN, OPENS, DEPTH, PARTS))),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
