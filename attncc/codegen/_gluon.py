"""What both engines are built of: copies by TMA, barriers in shared memory, and names of what a launch fixes."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(64)
"""Of a consumer's query tile: what one wgmma multiplies."""
FIRST_ANSWER = gl.constexpr(12)
"""Of the named barriers by which a consumer's threads answer a question together; Triton takes those from 0 on."""

# what newer versions of Triton call otherwise
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
reinterpreted = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
load_by_tma = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_by_tma = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def named(places: Any) -> Any:
    """The function that finds what a launch fixes by its name, in the tuple in which it travels."""

    @gluon.constexpr_function
    def fixed(CONFIG, name):
        return CONFIG[places.value[name]]

    return fixed


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        mbarrier.init(bars.index(n), count=ARRIVALS)
    return bars
