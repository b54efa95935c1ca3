"""Turns at products that consumers of the Hopper engine take, or the two parties of a prologue, by named barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FIRST_TURN = gl.constexpr(9)
"""Named barriers from here on are ours; Triton takes those before."""


@gluon.constexpr_function
def _barrier(what, number):
    return f"bar.{what} {number}, 256; mov.u32 $0, 0;"  # the threads of two


@gluon.jit
def take_turn(NUMBER: gl.constexpr):
    """Waits until the one before has issued its products; or, of consumers, has its scores: as TURNS says."""
    asm: gl.constexpr = _barrier("sync", FIRST_TURN + NUMBER)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(NUMBER: gl.constexpr):
    asm: gl.constexpr = _barrier("arrive", FIRST_TURN + NUMBER)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
