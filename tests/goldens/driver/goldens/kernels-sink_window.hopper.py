"""What the Hopper engine in `_hopper.py` asks of sink_window.

From spec.yaml by attncc 0.1.0; variant 1f93c8160cc29c5c. To change it, edit the spec and run
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
    B, Sq, Sk, scale = args
    offset = Sk - Sq
    c = scale * 1.4426950408889634  # to units of log 2
    return (c, Sq, Sk, offset)


@gluon.jit
def place(number, args, BM: gl.constexpr, GROUP: gl.constexpr, AGAIN: gl.constexpr):
    """Where a query tile is: in the sequence; batch entry, heads and rows by which TMA finds it; its number."""
    B, Sq, Sk, scale = args
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
    B, Sq, Sk, scale = args
    b, h, number, row0 = at
    last_row = gl.minimum(row0 + BM, Sq) - 1
    offset = Sk - Sq
    i0 = row0 + offset
    i1 = last_row + offset
    c = scale * 1.4426950408889634  # to units of log 2
    key_hi_0 = gl.maximum(gl.minimum(gl.minimum(i1 + 1, 4), Sk), 0)
    full_hi_0 = gl.maximum(gl.minimum(gl.minimum(i0 + 1, 4), Sk), 0)
    key_lo_1 = gl.maximum(gl.minimum(i0 - 1023, Sk), 0)
    key_hi_1 = gl.maximum(gl.minimum(i1 + 1, Sk), 0)
    full_lo_1 = gl.maximum(gl.minimum(i1 - 1023, Sk), 0)
    full_hi_1 = gl.maximum(gl.minimum(i0 + 1, Sk), 0)
    full_end_0 = gl.minimum(full_hi_0, key_hi_0) // BN * BN
    cursor = gl.maximum(0, (key_hi_0 + (BN - 1)) // BN * BN)
    lo_1 = key_lo_1 // BN * BN
    lo_1 = gl.maximum(lo_1, cursor)
    full_start_1 = gl.minimum(
        gl.maximum((full_lo_1 + (BN - 1)) // BN * BN, lo_1), gl.maximum((key_hi_1 + (BN - 1)) // BN * BN, lo_1),
    )
    full_end_1 = gl.maximum(gl.minimum(full_hi_1, key_hi_1) // BN * BN, full_start_1)
    cut_0 = (gl.maximum(key_hi_0 - full_end_0, 0) + (BN - 1)) // BN
    cut_1 = cut_0 + (gl.maximum(full_start_1 - lo_1, 0) + (BN - 1)) // BN
    cut_2 = cut_1 + (gl.maximum(key_hi_1 - full_end_1, 0) + (BN - 1)) // BN
    whole_0 = (gl.maximum(full_end_0, 0) + (BN - 1)) // BN
    whole_1 = whole_0 + (gl.maximum(full_end_1 - full_start_1, 0) + (BN - 1)) // BN
    wholes = whole_1
    cuts = gl.where(gl.maximum(cut_2, wholes) == 0, 1, cut_2)  # one at least, that hides all
    return cuts, wholes, (
        c, Sq, Sk, offset, last_row, cut_0, full_end_0, cut_1, lo_1, full_end_1, whole_0, full_start_1,
    )


@gluon.jit
def cut(t, s, args, BN: gl.constexpr):
    """The first key of cut tile t."""
    c, Sq, Sk, offset, last_row, cut_0, full_end_0, cut_1, lo_1, full_end_1, whole_0, full_start_1 = s
    n = gl.where(
        t < cut_0, full_end_0 + t * BN, gl.where(t < cut_1, lo_1 + (t - cut_0) * BN, full_end_1 + (t - cut_1) * BN),
    )
    return n


@gluon.jit
def whole(t, s, args, BN: gl.constexpr):
    """The first key of whole tile t."""
    c, Sq, Sk, offset, last_row, cut_0, full_end_0, cut_1, lo_1, full_end_1, whole_0, full_start_1 = s
    n = gl.where(t < whole_0, t * BN, full_start_1 + (t - whole_0) * BN)
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
    c, Sq, Sk, offset, last_row, cut_0, full_end_0, cut_1, lo_1, full_end_1, whole_0, full_start_1 = s
    i = gl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
    mask = i - 1023
    return (i, mask)


@gluon.jit
def score(qk, beside, j, r, s, args):
    """Scores of products, but for the factor c."""
    x = qk  # [rows, BN]
    return x


@gluon.jit
def keep(j, r, s, args):
    """Which pairs count."""
    B, Sq, Sk, scale = args
    i, mask = r
    keep = (j[None, :] <= gl.minimum(i[:, None], Sk - 1)) & (
        (j[None, :] <= 3) | (j[None, :] >= mask[:, None]) & (j[None, :] <= i[:, None])
    )
    return keep


@gluon.jit
def finish(m, total, r, s, args):
    """What a row's accumulator is multiplied by, and its lse."""
    empty = total <= 0.0
    divisor = gl.where(empty, 1.0, total)
    factor = 1.0 / divisor
    lse = gl.where(empty, float("-inf"), (m + gl.log2(gl.where(empty, 1.0, total))) * 0.6931471805599453)
    return factor, lse
