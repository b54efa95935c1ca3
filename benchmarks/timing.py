"""Device time by events, time of the host and of CPUs by the clock, ratios by interleaved rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name")
ROUND_MS: Final = 25.0
"""Device time that each implementation gets in a round, about."""
GRAPH_MS: Final = 4.0
"""Device time of a graph, about."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call, a number a round."""

    rounds: tuple[float, ...]
    inner: bool = False
    """Whether spreads are of the middle half: where others use the machine too, the ends tell of them alone."""

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> list[float]:
        return [round(x, 5) for x in _ends(self.rounds, self.inner)]

    def times(self, factor: float) -> Timing:
        """As if every round did so many times the work."""
        return Timing(tuple(t * factor for t in self.rounds), self.inner)

    def against(self, peer: Timing) -> Ratio:
        """Of the peer's time to this."""
        rounds = [p / o for p, o in zip(peer.rounds, self.rounds, strict=True)]
        low, high = _ends(rounds, self.inner)
        return Ratio(statistics.median(rounds), low, high, min(peer.rounds) / min(self.rounds))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Peer time over ours, a round at a time: the median and the spread; and that of the best rounds of each."""

    median: float
    low: float
    high: float
    best: float


def _ends(rounds: Sequence[float], inner: bool) -> tuple[float, float]:
    """The least and the greatest, or the quartiles."""
    if not inner or len(rounds) < 2:
        return min(rounds), max(rounds)
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return low, high


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


def alternating(
    calls: Mapping[str, Call], rounds: int, seconds: float, between: Call | None = None
) -> dict[str, Timing]:
    """Time by the clock of single calls on the CPU, in turn; at least 5 rounds, and no more than fit into `seconds`.

    `between` runs before each, untimed.
    """
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for call in [*calls.values()] * 2:
        call()
    until = time.perf_counter() + seconds
    for number in range(max(5, rounds)):
        if number >= 5 and time.perf_counter() > until:
            break
        for name, call in calls.items():
            if between is not None:
                between()
            start = time.perf_counter()
            call()
            seen[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing(tuple(times), inner=True) for name, times in seen.items()}


def _rounds(measurements: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, Timing]:
    """In another order every round: a GPU at its power limit is slower behind one that heats it more."""
    seen: dict[Name, list[float]] = {name: [] for name in measurements}
    order, chance = [*measurements], random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            seen[name].append(measurements[name]())
    return {name: Timing(tuple(times)) for name, times in seen.items()}


def interleaved_graphs(calls: Mapping[Name, Call], rounds: int) -> dict[Name, Timing]:
    """Device time of every call once a round, from the replay of a CUDA graph: without what the host does."""
    graphs: dict[Name, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in calls.items():
        call()
        repeat = max(2, min(200, int(GRAPH_MS / max(device_ms(call, 5), 1e-3))))
        graphs[name] = graph_of(call, repeat), repeat
    return _rounds({n: lambda g=g, r=r: device_ms(g.replay, 3) / r for n, (g, r) in graphs.items()}, rounds)


def graphed_ms(call: Call, repeat: int = 20, rounds: int = 7) -> Timing:
    """Device time alone of a call too short to hide what the host does: from the replay of a CUDA graph."""
    graph = graph_of(call, repeat)
    return Timing(tuple(device_ms(graph.replay, 3) / repeat for _ in range(rounds)))


def graph_of(call: Call, repeat: int) -> torch.cuda.CUDAGraph:
    """So many calls in a graph, which was replayed once."""
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
    return graph
