"""CUDA's driver by ctypes: what loads cubins and starts their kernels, with neither Triton nor a compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

MOST_SHARED, PREFER_SHARED = 8, 1
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_CACHE_PREFER_SHARED"""
NO_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT"""
BUFFER, BUFFER_SIZE, END = 1, 2, 0
"""CU_LAUNCH_PARAM_*: parameters come as one buffer."""
NOT_INTERLEAVED, LINES_OF_128, FILL_WITH_ZEROS = 0, 2, 0
"""Of tensor maps: CU_TENSOR_MAP_INTERLEAVE_NONE, _L2_PROMOTION_L2_128B, _FLOAT_OOB_FILL_NONE."""
MAP_BYTES, MAP_ALIGNMENT = 128, 64
BEGINS_EARLY = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"""


class Attribute(ctypes.Structure):
    """What else is asked of a launch: CUlaunchAttribute, whose value is a union of 64 bytes."""

    _fields_ = (("which", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A kernel that is loaded, and how its blocks are launched."""

    handle: Any
    device: torch.device
    threads: int
    shared_bytes: int


class Parameters:
    """A kernel's parameters in memory that is theirs: the bytes, and where each of them begins.

    Maps are put where the kernel wants them, which only the driver knows: so it is told of each parameter.
    """

    def __init__(self, content: bytes, offsets: Sequence[int]) -> None:
        self.content = ctypes.create_string_buffer(content, len(content))
        first = ctypes.addressof(self.content)
        self.each = (ctypes.c_void_p * len(offsets))(*[first + at for at in offsets])


def start(function: Function, blocks: int, stream: int, parameters: Parameters, early: bool = False) -> None:
    """Launches a kernel on a stream of its device, which is the current one.

    `early`: its blocks may begin before the launch before it has ended, for which they wait themselves.
    """
    if not early:
        launch(function, blocks, stream, parameters.each, None)
        return
    asked = Attribute(BEGINS_EARLY, 0, 1)
    how = Launch((blocks, 1, 1), (function.threads, 1, 1), function.shared_bytes, stream, ctypes.pointer(asked), 1)
    in_context(function, lambda: driver().cuLaunchKernelEx(ctypes.byref(how), function.handle, parameters.each, None))


def start_packed(function: Function, blocks: int, stream: int, content: bytearray) -> None:
    """The same with parameters in one piece, as they lie in the kernel's memory."""
    parameters, size = (ctypes.c_char * len(content)).from_buffer(content), ctypes.c_size_t(len(content))
    extra = (ctypes.c_void_p * 5)(BUFFER, ctypes.addressof(parameters), BUFFER_SIZE, ctypes.addressof(size), END)
    launch(function, blocks, stream, None, extra)


def launch(function: Function, blocks: int, stream: int, parameters: Any, extra: Any) -> None:
    block = (function.threads, 1, 1, function.shared_bytes, ctypes.c_void_p(stream), parameters, extra)
    in_context(function, lambda: driver().cuLaunchKernel(function.handle, blocks, 1, 1, *block))


def in_context(function: Function, launched: Callable[[], int]) -> None:
    status = launched()
    if status == NO_CONTEXT:  # the first call of a thread
        enter_context(function.device)
        status = launched()
    check(status)


def enter_context(device: torch.device) -> None:
    """Makes the context that torch has on a device this thread's."""
    context = ctypes.c_void_p()
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device.index))
    check(driver().cuCtxSetCurrent(context))


def load(code: bytes, kernel: str, shared_bytes: int) -> Any:
    """The handle of a cubin's kernel in the current context."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), code))
    check(driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()))
    check(driver().cuFuncSetAttribute(function, MOST_SHARED, shared_bytes))
    return function


def prefer_shared(handle: Any) -> None:
    """Gives a kernel as much shared memory as there is, at the expense of the cache beside it."""
    check(driver().cuFuncSetCacheConfig(handle, PREFER_SHARED))


def encode(
    address: int, kind: int, swizzle: int, shape: Sequence[int], steps: Sequence[int], box: Sequence[int]
) -> bytes:
    """A tensor map. `kind`, `swizzle`: the driver's numbers; `steps`: in bytes, of all axes but the last."""
    rank = len(shape)
    memory = (ctypes.c_char * (MAP_BYTES + MAP_ALIGNMENT))()
    at = -ctypes.addressof(memory) % MAP_ALIGNMENT
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + at),
        kind,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * (rank - 1))(*reversed(steps)),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        NOT_INTERLEAVED,
        swizzle,
        LINES_OF_128,
        FILL_WITH_ZEROS,
    )
    check(status)
    return memory.raw[at : at + MAP_BYTES]


@cache
def driver() -> Any:
    """CUDA's driver, which torch has loaded."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")
