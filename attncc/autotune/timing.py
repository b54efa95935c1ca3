"""How long a call takes: on a GPU by events around its replays, the cache cold or warm; elsewhere by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from attncc.device import Device

WARM_UP: Final = 3
FEWEST, MOST = 5, 200
"""Samples; FEWEST only where calls leave time for no more."""
OVER_CACHE: Final = 2
"""Times the cache's size that are written to make it cold."""


def samples(call: Callable[[], Any], device: Device, seconds: float, cold: bool) -> list[float]:
    """Milliseconds of single calls, as many as fit into `seconds`."""
    return (_by_events if device.is_gpu else _by_clock)(call, device, seconds, cold)


def summary(found: Sequence[float]) -> dict[str, Any]:
    """The median, and the quartiles."""
    low, ms, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"ms": ms, "spread": (low, high)}


def _by_events(call: Callable[[], Any], device: Device, seconds: float, cold: bool) -> list[float]:
    """Calls are replayed from a graph, and queued behind a write: what the host does for them takes no part.

    Compilers of the next configs keep it busy, and short calls would be timed by that.
    """
    flush = torch.empty(OVER_CACHE * device.l2_bytes, dtype=torch.int8, device="cuda")
    replay = _captured(call).replay
    replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    count = _count(seconds, time.perf_counter() - begin)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        flush.zero_()
        if not cold:
            replay()
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """One call as a graph, after some on the stream that it is captured on."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def _by_clock(call: Callable[[], Any], device: Device, seconds: float, cold: bool) -> list[float]:
    begin = time.perf_counter()
    call()
    found: list[float] = []
    for _ in range(_count(seconds, time.perf_counter() - begin)):
        begin = time.perf_counter()
        call()
        found.append((time.perf_counter() - begin) * 1e3)
    return found


def _count(seconds: float, one: float) -> int:
    return min(MOST, max(FEWEST, int(seconds / max(one, 1e-6))))
