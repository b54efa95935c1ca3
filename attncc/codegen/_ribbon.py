"""Ribbons: what stands beside the Hopper engine's products and moves with key - query alone, as relative positions do.

A tile of it has no more numbers than rows and keys together. They come by TMA, two lines of them with each key tile,
and every thread reads those of its pairs in the accumulators' layout.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import core

from ._gluon import ROWS, reinterpreted

LINE = gl.constexpr(256)
"""Numbers of a line that come along with a key tile."""
STAGGER = gl.constexpr(16)
"""So many columns the second line is behind the first: threads read both at once, out of different banks."""


@core.extern
def thread(_semantic: Any = None) -> Any:
    """This thread's number, by LLVM's name: where assembly asks for it, ptxas loses sight of what warps share."""
    number = {(): ("llvm.nvvm.read.ptx.sreg.tid.x", core.dtype("int32"))}
    return core.extern_elementwise("", "", [], number, is_pure=True, _semantic=_semantic)


@gluon.constexpr_function
def _parts(width):
    """An accumulator as [warp, half, row, eighth, pair, one of two]: three parts of its rows, three of its columns."""
    eighths = [[0, 0, 0, 1 << n, 0, 0] for n in range((width // 8).bit_length() - 1)]
    registers = [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0], *eighths]
    lanes = [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], *[[0, 0, 1 << n, 0, 0, 0] for n in range(3)]]
    warps = [[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [4, 2, 8, width // 8, 4, 2])


@gluon.constexpr_function
def _own():
    """Two numbers that are each thread's own, though Triton takes them for the same in all."""
    return gl.DistributedLinearLayout([[1]], [[0]] * 5, [[0]] * 2, [], [2])


@gluon.constexpr_function
def _levels(width):
    """How often halves of so many columns' eighths are joined."""
    return (width // 8).bit_length() - 1


@gluon.jit
def read_ribbon(place, at, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """What stands beside products and moves with key - row alone, in their layout.

    Line u of the place has it of row u, from the key that is 64 + u * STAGGER columns before on. A thread has two
    neighbours in every eighth of its row, and of another one 8 below, where the same numbers are an eighth further on.
    """
    EIGHTHS: gl.constexpr = WIDTH // 8
    PARTS: gl.constexpr = _parts(WIDTH)
    OWN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(4, PARTS)))
    lane, row = thread() % 32, thread() // 32 % 4 * 16 + thread() % 32 // 4
    pair = (LINE + STAGGER) // 2 * (row % 2) + 32 - row // 2 + lane % 4
    lines = reinterpreted(place.index(at), gl.float32, [LINE, 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    read = ()
    for n in gl.static_range(EIGHTHS + 1):
        read = read + (lines.index(pair + 4 * n - 4).load(_own()),)
    some = ()
    for n in gl.static_range(EIGHTHS):
        some = some + (gl.join(read[n + 1], read[n]),)
    for level in gl.static_range(_levels(WIDTH)):
        joined = ()
        for n in gl.static_range(EIGHTHS >> level + 1):
            joined = joined + (gl.join(some[n], some[n + (EIGHTHS >> level + 1)]),)
        some = joined
    x = gl.permute(gl.reshape(some[0], [2, 2 * EIGHTHS]), (1, 0))
    x = gl.convert_layout(gl.reshape(x, [2, EIGHTHS, 2]), OWN, assert_trivial=True)
    x = gl.expand_dims(gl.expand_dims(gl.expand_dims(x, 0), 2), 4)
    x, _ = gl.broadcast(x, gl.zeros([4, 2, 8, EIGHTHS, 4, 2], gl.float32, PARTS))
    return gl.convert_layout(gl.reshape(x, [ROWS, WIDTH]), LAYOUT, assert_trivial=True)
