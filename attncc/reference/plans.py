"""Which rank of several computes which pairs of a batch of sequences: chunks owned, and pairs in steps.

Queries, keys and outputs of a chunk lie on the rank that owns it; keys travel, and come to a rank a step at a time.
All integers; `ranks` runs a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attncc.ir.stream import Cut


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, stop) of a sequence."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A chunk of queries with a chunk of keys of the same sequence, computed by a rank in a step."""

    step: int
    rank: int
    q: Chunk
    k: Chunk

    @property
    def offset(self) -> int:
        """The position of the first query, counted from the first key."""
        return self.q.start - self.k.start

    def seen(self, causal: bool) -> int:
        """How many (query, key) it holds; under causal keys behind their query are none."""
        keys = self.k.stop - self.k.start
        rows = range(self.q.start, self.q.stop)
        return sum(min(max(i + 1 - self.k.start, 0), keys) for i in rows) if causal else keys * len(rows)


Owned = tuple[tuple[Chunk, ...], ...]
"""The chunks of each rank."""


# -- who owns what -----------------------------------------------------------------------------------


def contiguous(lengths: Sequence[int], ranks: int) -> Owned:
    """Every sequence in as many chunks as ranks, in their order."""
    return _owned({n: list(range(ranks)) for n in range(len(lengths))}, lengths, ranks, folded=False)


def zigzag(lengths: Sequence[int], ranks: int) -> Owned:
    """Every sequence in 2W chunks, r and 2W - 1 - r for rank r: under causal all have equal work."""
    return _owned({n: list(range(ranks)) for n in range(len(lengths))}, lengths, ranks, folded=True)


def packed(lengths: Sequence[int], nodes: int, per_node: int, local: int, inside: int) -> Owned:
    """Sequences of up to `local` tokens whole on one rank, up to `inside` over one node's ranks, others over all.

    The longest go first, each to the node, and there to the rank, with the least work, which grows as the square
    of the length; what several ranks share is cut in zigzag. The partition of Zeppelin (arXiv 2509.21841), as far
    as its abstract tells.
    """
    work = [[0.0] * per_node for _ in range(nodes)]
    ring: dict[int, list[int]] = {}
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        node = min(range(nodes), key=lambda x: sum(work[x]))
        place = min(range(per_node), key=lambda x: work[node][x])
        if lengths[n] > inside:
            at = [(x, y) for x in range(nodes) for y in range(per_node)]
        elif lengths[n] > local:
            at = [(node, y) for y in range(per_node)]
        else:
            at = [(node, place)]
        for x, y in at:
            work[x][y] += lengths[n] ** 2 / len(at)
        ring[n] = [x * per_node + y for x, y in at]
    return _owned(ring, lengths, nodes * per_node, folded=True)


def _owned(ring: dict[int, list[int]], lengths: Sequence[int], ranks: int, folded: bool) -> Owned:
    """Each sequence cut among the ranks of its ring; folded: in twice as many chunks, dealt there and back."""
    found: list[list[Chunk]] = [[] for _ in range(ranks)]
    for n, members in ring.items():
        dealt = members + members[::-1] if folded and len(members) > 1 else members
        for rank, (start, stop) in zip(dealt, Cut(lengths[n], len(dealt)).bounds(), strict=True):
            if start < stop:
                found[rank].append(Chunk(n, start, stop))
    return tuple(map(tuple, found))


# -- how keys come to queries ------------------------------------------------------------------------


def ring(owned: Owned, causal: bool) -> tuple[Pair, ...]:
    """Keys go round among the ranks that share a sequence: in step s a rank has those of the s-th before it."""
    found: list[Pair] = []
    for n in _sequences(owned):
        mine = [(rank, [c for c in chunks if c.sequence == n]) for rank, chunks in enumerate(owned)]
        members = [(rank, chunks) for rank, chunks in mine if chunks]
        for place, (rank, queries) in enumerate(members):
            for step in range(len(members)):
                keys = members[place - step][1]
                found += [Pair(step, rank, q, k) for q in queries for k in keys if not causal or k.start < q.stop]
    return tuple(sorted(found, key=lambda p: (p.step, p.rank)))


def gathered(owned: Owned, causal: bool) -> tuple[Pair, ...]:
    """Keys are gathered once, and each chunk of queries meets all it may see (LASP-2H, arXiv 2502.07563)."""
    chunks = [c for some in owned for c in some]
    length = {n: max(c.stop for c in chunks if c.sequence == n) for n in _sequences(owned)}
    return tuple(
        Pair(0, rank, q, Chunk(q.sequence, 0, q.stop if causal else length[q.sequence]))
        for rank, some in enumerate(owned)
        for q in some
    )


def work(pairs: Sequence[Pair], ranks: int, causal: bool) -> list[int]:
    """How many (query, key) each rank computes."""
    done = [0] * ranks
    for pair in pairs:
        done[pair.rank] += pair.seen(causal)
    return done


def _sequences(owned: Owned) -> list[int]:
    return sorted({c.sequence for some in owned for c in some})
