"""What both engines are built of: copies by TMA, barriers in shared memory, and names of what a launch fixes."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(64)
"""Of a consumer's query tile: what one wgmma multiplies."""
FIRST_ANSWER = gl.constexpr(12)
"""Of the named barriers by which a consumer's threads answer a question together; Triton takes those from 0 on."""

# what newer versions of Triton call otherwise
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
reinterpreted = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
load_by_threads = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load_by_tma = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_by_tma = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def named(places: Any) -> Any:
    """The function that finds what a launch fixes by its name, in the tuple in which it travels."""

    @gluon.constexpr_function
    def fixed(CONFIG, name):
        return CONFIG[places.value[name]]

    return fixed


@gluon.constexpr_function
def floats(count):
    """Of so many tensors that assembly gives."""
    return (gl.float32,) * count


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        mbarrier.init(bars.index(n), count=ARRIVALS)
    return bars


@gluon.jit
def begin_early(EARLY: gl.constexpr):
    """Lets the programs of the next launch begin, and waits for all that those of the launch before have written."""
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
