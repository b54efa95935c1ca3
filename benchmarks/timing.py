"""Device time by events, host time by the clock, ratios by interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median over rounds, and the least and greatest."""

    ms: float
    low: float
    high: float
    rounds: tuple[float, ...]


def device_ms(call: Call, repeat: int) -> float:
    """Mean device time of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat


def interleaved(calls: Mapping[str, Call], rounds: int = 7) -> dict[str, Timing]:
    """Times every call once a round, so that all see the same clocks and temperature."""
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        once = device_ms(call, 2)
        repeats[name] = max(2, min(50, int(20.0 / max(once, 1e-3))))
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seen[name].append(device_ms(call, repeats[name]))
    return {name: Timing(statistics.median(x), min(x), max(x), tuple(x)) for name, x in seen.items()}


def ratio(peer: Timing, ours: Timing) -> tuple[float, float, float]:
    """Peer time over ours, a round at a time: median, least, greatest."""
    rounds = [p / o for p, o in zip(peer.rounds, ours.rounds, strict=True)]
    return statistics.median(rounds), min(rounds), max(rounds)


def host_us(call: Call, calls: int = 2000) -> float:
    """Microseconds of host time a call takes, back to back; the best of five batches."""
    for _ in range(50):
        call()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls // 5):
            call()
        best = min(best, (time.perf_counter() - start) / (calls // 5))
    torch.cuda.synchronize()
    return best * 1e6
