"""Masks of cut tiles, of which a comparison for each pair is what costs most."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._gluon import ROWS


@gluon.jit
def between(first, last, like):
    """Which columns are from the first to the last of a row: a thread has a bit for each of its own, and asks for that.

    Columns are as an accumulator has them, eight by eight; the bits of an eighth's place are one number.
    """
    EIGHTHS: gl.constexpr = like.shape[1] // 8
    PARTS: gl.constexpr = gl.reshape(like, [ROWS, EIGHTHS, 8]).type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, PARTS))
    first = gl.convert_layout(first, ROW, assert_trivial=True)[:, None]
    last = gl.convert_layout(last, ROW, assert_trivial=True)[:, None]
    place = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, PARTS)))[None, :]
    eighth = gl.arange(0, EIGHTHS, gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))[None, :]
    begin = gl.minimum(gl.maximum((first - place + 7) >> 3, 0), EIGHTHS)
    end = gl.minimum(gl.maximum(((last - place) >> 3) + 1, 0), EIGHTHS)
    bits = ((1 << end) - 1) & (-1 << begin)
    kept = gl.expand_dims(bits, 1) >> gl.expand_dims(eighth, 2) & 1
    return gl.convert_layout(gl.reshape(kept, [ROWS, EIGHTHS * 8]), like.type.layout, assert_trivial=True) != 0
