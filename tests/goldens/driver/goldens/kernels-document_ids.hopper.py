"""What the Hopper engine in `_hopper.py` asks of document_ids.

From spec.yaml by attncc 0.1.0; variant 4cbf5e5b55b5b71f. To change it, edit the spec and run
`attncc compile spec.yaml -o OUT`.

Skeleton: dense_forward, for one softmax-like part over a mask: a program per query tile walks the keys it can see.

args is what a launch has: tensors, their strides, sizes and the scale; s what is known of a query tile, r of its
rows. BM rows and BN keys make a tile; i and j are positions in the sequence.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def known(args):
    """What is known before any query tile is."""
    (
        ids_ptr, ids_s0, ids_s1, tile_list, tile_list_s0, tile_list_s1, tile_counts, tile_counts_s0, tile_counts_s1,
        B, Sq, Sk, scale,
    ) = args
    offset = Sk - Sq
    c = scale * 1.4426950408889634  # to units of log 2
    return (c, Sq, Sk, offset)


@gluon.jit
def place(number, args, BM: gl.constexpr, GROUP: gl.constexpr, AGAIN: gl.constexpr):
    """Where a query tile is: in the sequence; batch entry, heads and rows by which TMA finds it; its number."""
    (
        ids_ptr, ids_s0, ids_s1, tile_list, tile_list_s0, tile_list_s1, tile_counts, tile_counts_s0, tile_counts_s1,
        B, Sq, Sk, scale,
    ) = args
    tiles = (Sq + (BM - 1)) // BM
    group = number // (tiles * GROUP)
    inside = number % (tiles * GROUP)
    width = gl.minimum(B * 32 - group * GROUP, GROUP)
    number = tiles - 1 - inside // width
    head = group * GROUP + inside % width
    b = head // 32
    h = head % 32
    row0 = number * BM
    batch = b
    hk = h // 4
    hv = h // 4
    first_query = row0
    first_key = 0
    again = head * ((Sq + (AGAIN - 1)) // AGAIN) + row0 // AGAIN
    return (b, h, number, row0), (batch, h, hk, hv, first_query, first_key, row0, again)


@gluon.jit
def walk(at, args, BM: gl.constexpr, BN: gl.constexpr):
    """Tiles cut by the mask or by the end of the keys, whole tiles, and what is known of the query tile."""
    (
        ids_ptr, ids_s0, ids_s1, tile_list, tile_list_s0, tile_list_s1, tile_counts, tile_counts_s0, tile_counts_s1,
        B, Sq, Sk, scale,
    ) = args
    b, h, number, row0 = at
    last_row = gl.minimum(row0 + BM, Sq) - 1
    offset = Sk - Sq
    c = scale * 1.4426950408889634  # to units of log 2
    listed = b * ((Sq + (BM - 1)) // BM) + number
    last_tile = gl.maximum((Sk + (BN - 1)) // BN, 1) - 1
    listed_cuts = gl.load(tile_counts + listed * tile_counts_s0)
    wholes = gl.load(tile_counts + listed * tile_counts_s0 + tile_counts_s1)
    cuts = gl.where(gl.maximum(listed_cuts, wholes) == 0, 1, listed_cuts)  # one at least, that hides all
    return cuts, wholes, (c, Sq, Sk, offset, last_row, b, listed, listed_cuts, last_tile)


@gluon.jit
def cut(t, s, args, BN: gl.constexpr):
    """The first key of cut tile t, or 0."""
    (
        ids_ptr, ids_s0, ids_s1, tile_list, tile_list_s0, tile_list_s1, tile_counts, tile_counts_s0, tile_counts_s1,
        B, Sq, Sk, scale,
    ) = args
    c, Sq, Sk, offset, last_row, b, listed, listed_cuts, last_tile = s
    n = gl.load(tile_list + listed * tile_list_s0 + t * tile_list_s1, mask=t < listed_cuts, other=0) * BN
    return n


@gluon.jit
def whole(t, s, args, BN: gl.constexpr):
    """The first key of whole tile t."""
    (
        ids_ptr, ids_s0, ids_s1, tile_list, tile_list_s0, tile_list_s1, tile_counts, tile_counts_s0, tile_counts_s1,
        B, Sq, Sk, scale,
    ) = args
    c, Sq, Sk, offset, last_row, b, listed, listed_cuts, last_tile = s
    n = gl.load(tile_list + listed * tile_list_s0 + (last_tile - t) * tile_list_s1) * BN
    return n


@gluon.jit
def beside(n, row0, at, args):
    """Nothing is read beside the products."""
    table = 0
    column = 0
    return table, column


@gluon.jit
def ramp(u, s, args):
    """What scores grow by along a key tile, if they do so alike for all."""
    return ()


@gluon.jit
def shift(n, r, s, args):
    """What scores of the key tile from n on have beside in a row."""
    return ()


@gluon.jit
def ends(r, s, args):
    """The first and the last key that count of a row, if that is all a mask says."""
    return ()


@gluon.jit
def base():
    """Nothing does for all weights: scores without limits."""
    return ()


@gluon.jit
def rows(rows, s, args):
    """What the formulas know of rows, [rows] or [rows, 1] each."""
    (
        ids_ptr, ids_s0, ids_s1, tile_list, tile_list_s0, tile_list_s1, tile_counts, tile_counts_s0, tile_counts_s1,
        B, Sq, Sk, scale,
    ) = args
    c, Sq, Sk, offset, last_row, b, listed, listed_cuts, last_tile = s
    i = gl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
    ids_rows = gl.load(ids_ptr + b * ids_s0 + i * ids_s1, mask=(i >= 0) & (i < Sk), other=0)
    return (i, ids_rows)


@gluon.jit
def score(qk, beside, j, r, s, args):
    """Scores of products, but for the factor c."""
    x = qk  # [rows, BN]
    return x


@gluon.jit
def keep(j, r, s, args):
    """Which pairs count; keys behind the last aside."""
    (
        ids_ptr, ids_s0, ids_s1, tile_list, tile_list_s0, tile_list_s1, tile_counts, tile_counts_s0, tile_counts_s1,
        B, Sq, Sk, scale,
    ) = args
    c, Sq, Sk, offset, last_row, b, listed, listed_cuts, last_tile = s
    i, ids_rows = r
    keep = (j[None, :] <= i[:, None]) & (ids_rows[:, None] == gl.load(ids_ptr + b * ids_s0 + j[None, :] * ids_s1))
    return keep


@gluon.jit
def finish(m, total, r, s, args):
    """What a row's accumulator is multiplied by, and its lse."""
    empty = total <= 0.0
    divisor = gl.where(empty, 1.0, total)
    factor = 1.0 / divisor
    lse = gl.where(empty, float("-inf"), (m + gl.log2(gl.where(empty, 1.0, total))) * 0.6931471805599453)
    return factor, lse
