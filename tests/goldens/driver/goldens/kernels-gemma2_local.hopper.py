"""What the Hopper engine in `_hopper.py` asks of gemma2_local.

From spec.yaml by attncc 0.1.0; variant 03053355757fb424. To change it, edit the spec and run
`attncc compile spec.yaml -o OUT`.

Skeleton: dense_forward, for one softmax-like part over a mask: a program per query tile walks the keys it can see.

args is what a launch has: tensors, their strides, sizes and the scale; s what is known of a query tile, r of its
rows. BM rows and BN keys make a tile; i and j are positions in the sequence.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tanh_approx(x):
    """tanh by the GPU's own instruction, off by 2**-11."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def known(args):
    """What is known before any query tile is."""
    B, Sq, Sk, scale = args
    offset = Sk - Sq
    score = scale * 0.02
    c = 72.13475204444816  # to units of log 2
    return (c, Sq, Sk, offset, score)


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
    hk = h // 2
    hv = h // 2
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
    score = scale * 0.02
    c = 72.13475204444816  # to units of log 2
    key_lo = gl.maximum(gl.minimum(i0 - 4095, Sk), 0)
    key_hi = gl.maximum(gl.minimum(i1 + 1, Sk), 0)
    full_lo = gl.maximum(gl.minimum(i1 - 4095, Sk), 0)
    full_hi = gl.maximum(gl.minimum(i0 + 1, Sk), 0)
    lo = key_lo // BN * BN
    full_start = gl.minimum(
        gl.maximum((full_lo + (BN - 1)) // BN * BN, lo), gl.maximum((key_hi + (BN - 1)) // BN * BN, lo),
    )
    full_end = gl.maximum(gl.minimum(full_hi, key_hi) // BN * BN, full_start)
    cut_0 = (gl.maximum(full_start - lo, 0) + (BN - 1)) // BN
    cut_1 = cut_0 + (gl.maximum(key_hi - full_end, 0) + (BN - 1)) // BN
    whole_0 = (gl.maximum(full_end - full_start, 0) + (BN - 1)) // BN
    wholes = whole_0
    cuts = gl.where(gl.maximum(cut_1, wholes) == 0, 1, cut_1)  # one at least, that hides all
    return cuts, wholes, (c, Sq, Sk, offset, score, last_row, cut_0, lo, full_end, full_start)


@gluon.jit
def cut(t, s, args, BN: gl.constexpr):
    """The first key of cut tile t."""
    c, Sq, Sk, offset, score, last_row, cut_0, lo, full_end, full_start = s
    n = gl.where(t < cut_0, lo + t * BN, full_end + (t - cut_0) * BN)
    return n


@gluon.jit
def whole(t, s, args, BN: gl.constexpr):
    """The first key of whole tile t."""
    c, Sq, Sk, offset, score, last_row, cut_0, lo, full_end, full_start = s
    n = full_start + t * BN
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
    B, Sq, Sk, scale = args
    i, mask = r
    first = mask
    last = gl.minimum(i, Sk - 1)
    return (first, last)


@gluon.jit
def base():
    """What all weights are relative to, in units of log 2."""
    base = 33.13475204444816
    return (base,)


@gluon.jit
def rows(rows, s, args):
    """What the formulas know of rows, [rows] or [rows, 1] each."""
    c, Sq, Sk, offset, score, last_row, cut_0, lo, full_end, full_start = s
    i = gl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
    mask = i - 4095
    return (i, mask)


@gluon.jit
def score(qk, beside, j, r, s, args):
    """Scores of products, but for the factor c."""
    c, Sq, Sk, offset, score, last_row, cut_0, lo, full_end, full_start = s
    x = tanh_approx(qk * score)  # [rows, BN]
    return x


@gluon.jit
def keep(j, r, s, args):
    """Which pairs count."""
    B, Sq, Sk, scale = args
    i, mask = r
    keep = (j[None, :] <= gl.minimum(i[:, None], Sk - 1)) & (j[None, :] >= mask[:, None])
    return keep


@gluon.jit
def finish(m, total, r, s, args):
    """What a row's accumulator is multiplied by, and its lse."""
    empty = total <= 0.0
    divisor = gl.where(empty, 1.0, total)
    factor = 1.0 / divisor
    lse = gl.where(empty, float("-inf"), (m + gl.log2(gl.where(empty, 1.0, total))) * 0.6931471805599453)
    return factor, lse
