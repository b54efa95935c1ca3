"""Device time by events, host time by the clock, ratios by interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

Call = Callable[[], Any]
ROUND_MS: Final = 25.0
"""Device time that each implementation gets in a round, about."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call, a number a round."""

    rounds: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> list[float]:
        """The least and the greatest."""
        return [round(min(self.rounds), 5), round(max(self.rounds), 5)]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Peer time over ours, a round at a time: the median, and the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, peer: Timing, ours: Timing) -> Ratio:
        rounds = [p / o for p, o in zip(peer.rounds, ours.rounds, strict=True)]
        return cls(statistics.median(rounds), min(rounds), max(rounds))


def device_ms(call: Call, repeat: int) -> float:
    """Mean device time of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat


def wall_ms(call: Call, repeat: int) -> float:
    """Mean time by the clock of one call among many back to back, with one synchronization, at the end."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / repeat


def interleaved(calls: Mapping[str, Call], rounds: int) -> dict[str, Timing]:
    """Device time of every call once a round, so that all see the same clocks and temperature."""
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(2, min(100, int(ROUND_MS / max(device_ms(call, 2), 1e-3))))
    return _rounds({n: lambda c=c, n=n: device_ms(c, repeats[n]) for n, c in calls.items()}, rounds)


def interleaved_host(calls: Mapping[str, Call], rounds: int, repeat: int = 2000) -> dict[str, Timing]:
    """Time by the clock of every call, once a round."""
    for call in calls.values():
        wall_ms(call, 50)
    return _rounds({n: lambda c=c: wall_ms(c, repeat) for n, c in calls.items()}, rounds)


def _rounds(measurements: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    seen: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            seen[name].append(measure())
    return {name: Timing(tuple(times)) for name, times in seen.items()}


def graphed_ms(call: Call, repeat: int = 20, rounds: int = 7) -> Timing:
    """Device time alone of a call too short to hide what the host does: from the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    graph.replay()
    return Timing(tuple(device_ms(graph.replay, 3) / repeat for _ in range(rounds)))
