"""What the Hopper engine in `_hopper.py` asks of relative_bias.

From spec.yaml by attncc 0.1.0; variant 596c57c7b9c86429. To change it, edit the spec and run
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
    bias_ptr, bias_s0, bias_s1, B, Sq, Sk, len_W, scale = args
    c = scale * 1.4426950408889634  # to units of log 2
    return (c, Sq, Sk)


@gluon.jit
def place(number, args, BM: gl.constexpr, GROUP: gl.constexpr, AGAIN: gl.constexpr):
    """Where a query tile is: in the sequence; batch entry, heads and rows by which TMA finds it; its number."""
    bias_ptr, bias_s0, bias_s1, B, Sq, Sk, len_W, scale = args
    tiles = (Sq + (BM - 1)) // BM
    group = number // (tiles * GROUP)
    inside = number % (tiles * GROUP)
    width = gl.minimum(B * 16 - group * GROUP, GROUP)
    number = tiles - 1 - inside // width
    head = group * GROUP + inside % width
    b = head // 16
    h = head % 16
    row0 = number * BM
    batch = b
    hk = h
    hv = h
    first_query = row0
    first_key = 0
    again = head * ((Sq + (AGAIN - 1)) // AGAIN) + row0 // AGAIN
    return (b, h, number, row0), (batch, h, hk, hv, first_query, first_key, row0, again)


@gluon.jit
def walk(at, args, BM: gl.constexpr, BN: gl.constexpr):
    """Tiles cut by the mask or by the end of the keys, whole tiles, and what is known of the query tile."""
    bias_ptr, bias_s0, bias_s1, B, Sq, Sk, len_W, scale = args
    c = scale * 1.4426950408889634  # to units of log 2
    full_end = Sk // BN * BN
    cut_0 = (gl.maximum(Sk - full_end, 0) + (BN - 1)) // BN
    whole_0 = (gl.maximum(full_end, 0) + (BN - 1)) // BN
    wholes = whole_0
    cuts = gl.where(gl.maximum(cut_0, wholes) == 0, 1, cut_0)  # one at least, that hides all
    return cuts, wholes, (c, Sq, Sk, full_end)


@gluon.jit
def cut(t, s, args, BN: gl.constexpr):
    """The first key of cut tile t."""
    c, Sq, Sk, full_end = s
    n = full_end + t * BN
    return n


@gluon.jit
def whole(t, s, args, BN: gl.constexpr):
    """The first key of whole tile t."""
    n = t * BN
    return n


@gluon.jit
def beside(n, row0, at, args):
    """Lines of ribbon that go with 64 rows and the keys from n on."""
    bias_ptr, bias_s0, bias_s1, B, Sq, Sk, len_W, scale = args
    b, h, number, _row0 = at
    table = h
    column = n + ((Sq + 383) // 384 * 384 - 64 - row0)
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
    return (rows,)


@gluon.jit
def score(qk, beside, j, r, s, args):
    """Scores of products, but for the factor c."""
    x = qk  # [rows, BN]
    return x


@gluon.jit
def keep(j, r, s, args):
    """Which pairs count."""
    bias_ptr, bias_s0, bias_s1, B, Sq, Sk, len_W, scale = args
    keep = j[None, :] < Sk
    return keep


@gluon.jit
def finish(m, total, r, s, args):
    """What a row's accumulator is multiplied by, and its lse."""
    empty = total <= 0.0
    divisor = gl.where(empty, 1.0, total)
    factor = 1.0 / divisor
    lse = gl.where(empty, float("-inf"), (m + gl.log2(gl.where(empty, 1.0, total))) * 0.6931471805599453)
    return factor, lse
