"""Stream-K as integers: lines of key tiles cut into contiguous ranges, and the fragments that the cuts leave.

A line is the row of key tiles that one output tile needs, such as those of one (head, batch). All lines stand one
behind the other; each program takes a range of them, wherever lines end. LeanAttention (arXiv 2405.10480) is this
cut for decode, split-KV the cut of each line alone.

A range holds at most two fragments of unfinished lines, its first and its last: with two slots of scratch a range,
every program writes where no other does, and a second kernel merges the slots of each line, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Cut:
    """A number of tiles in nearly equal contiguous ranges: the first `high` hold `most` tiles, the others one fewer."""

    total: int
    ranges: int

    def __post_init__(self) -> None:
        if self.total and self.ranges < 1:
            raise ValueError(f"{self.total} tiles need a range at least")

    @property
    def most(self) -> int:
        return -(-self.total // self.ranges) if self.ranges else 0

    @property
    def high(self) -> int:
        return self.total - (self.most - 1) * self.ranges

    def bounds(self) -> tuple[tuple[int, int], ...]:
        """[lo, hi) of each range."""
        starts = [n * self.most - max(0, n - self.high) for n in range(self.ranges + 1)]
        return tuple(pairwise(starts))


@dataclass(frozen=True, slots=True)
class Fragment:
    """The tiles [lo, hi) of a line, counted from the line's first, that one range holds."""

    line: int
    lo: int
    hi: int
    of: int
    """How many tiles the line has."""
    range: int

    @property
    def host(self) -> bool:
        """Whether it holds the line's first tile."""
        return self.lo == 0

    @property
    def finishing(self) -> bool:
        """Whether it holds the line's last tile."""
        return self.hi == self.of

    @property
    def whole(self) -> bool:
        return self.host and self.finishing

    @property
    def slot(self) -> int:
        """Where its partial state goes, two a range: a range's first fragment continues a line, its last begins one."""
        return 2 * self.range + int(self.host)


def lines(keys: Sequence[int], heads: int, tile: int) -> tuple[int, ...]:
    """Tiles of each line, head-major and then by sequence; `keys` has each sequence's length."""
    return tuple(-(-n // tile) for n in keys) * heads


def programs(total: int, most: int, per_line: int) -> int:
    """How many ranges for `total` tiles where `most` programs fit; `per_line` is how many tiles a sequence has.

    Few tiles are not cut to single ones, for a merge costs as much as a tile: at least two a range, at most 32
    ranges a line.
    """
    if total > most:
        return most
    return min((total + 1) // 2, -(-32 * total // per_line)) if total else 0


def stream_k(tiles: Sequence[int], ranges: int) -> tuple[Fragment, ...]:
    """The fragments of lines with so many tiles each, all lines cut as one; in order of range and line."""
    starts = [0, *accumulate(tiles)]
    cuts = Cut(starts[-1], ranges).bounds()
    found: list[Fragment] = []
    line = 0
    for n, (lo, hi) in enumerate(cuts):
        while lo < hi:
            while starts[line + 1] <= lo:
                line += 1
            end = min(hi, starts[line + 1])
            found.append(Fragment(line, lo - starts[line], end - starts[line], tiles[line], n))
            lo = end
    return tuple(found)


def split_kv(tiles: Sequence[int], splits: int) -> tuple[Fragment, ...]:
    """The fragments of lines cut each into `splits` (fewer where it has fewer tiles): its bits know no neighbour."""
    return tuple(
        Fragment(line, lo, hi, of, line * splits + n)
        for line, of in enumerate(tiles)
        for n, (lo, hi) in enumerate(Cut(of, min(splits, of)).bounds())
    )


def fixups(fragments: Sequence[Fragment]) -> dict[int, tuple[int, ...]]:
    """What the second kernel merges: for each line that no range holds alone its slots, first tile first."""
    found: dict[int, tuple[int, ...]] = {}
    for f in fragments:
        if not f.whole:
            found[f.line] = (*found.get(f.line, ()), f.slot)
    return found
