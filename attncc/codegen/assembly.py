"""Disassembled GPU code in, counts of the instructions that matter out: in all, and in the main loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Final


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an assembly writes labels, instructions and branches, and which opcodes are of what kind."""

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    """Groups: the predicate if any, the opcode, its operands."""
    kinds: Mapping[str, str]
    """Kind by the opcode's beginning."""
    ends: tuple[str, ...]
    """Opcodes behind which the code does not go on, unless a predicate or a condition stands with them."""


@dataclass(frozen=True, slots=True)
class Counts:
    total: Mapping[str, int]
    loop: Mapping[str, int]
    """Inside the innermost loops that multiply matrices."""
    turn: Mapping[str, int]
    """On the shortest way round those loops."""
    reloads: tuple[tuple[int, int], ...]
    """The instructions of each of them, on all ways, and how many reload spilled registers."""


SASS: Final = Dialect(
    label=re.compile(r"^(\.L\w+):"),
    instruction=re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?\w+)?\s*([A-Z0-9.]+)\s*(.*)"),
    kinds={
        "HMMA": "mma",
        "IMMA": "mma",
        "QMMA": "mma",
        "HGMMA": "wgmma",
        "IGMMA": "wgmma",
        "QGMMA": "wgmma",
        "UTCHMMA": "tcgen05",
        "UTCIMMA": "tcgen05",
        "UTCQMMA": "tcgen05",
        "UTCOMMA": "tcgen05",
        "UTMALDG": "tma_load",
        "UTMASTG": "tma_store",
        "LDGSTS": "cp_async",
        "LDG": "global_load",
        "STG": "global_store",
        "LDL": "spill_load",
        "STL": "spill_store",
        "MUFU": "special_function",
        "PRMT": "permute",
        "SHFL": "shuffle",
    },
    ends=("BRA", "EXIT", "RET"),
)

AMDGCN: Final = Dialect(
    label=re.compile(r"^(\.LBB\w+):"),
    instruction=re.compile(r"^\s+()([a-z][a-z0-9_]+)\s*([^;]*)"),
    kinds={
        "v_mfma": "mma",
        "global_load": "global_load",
        "buffer_load": "global_load",
        "global_store": "global_store",
        "buffer_store": "global_store",
        "scratch_load": "spill_load",
        "scratch_store": "spill_store",
        "v_exp": "special_function",
        "v_perm": "permute",
        "ds_bpermute": "shuffle",
    },
    ends=("s_branch", "s_endpgm"),
)

MATRIX: Final = frozenset({"mma", "wgmma", "tcgen05"})


def read(text: str, dialect: Dialect) -> Counts:
    """Counts the kinds of `dialect` in disassembled `text`."""
    kinds: list[str | None] = []
    kind = cache(partial(_kind, dialect=dialect))
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    ends: set[int] = set()
    for line in text.splitlines():
        if label := dialect.label.match(line):
            labels[label[1]] = len(kinds)
        elif found := dialect.instruction.match(line):
            predicate, opcode, operands = found.groups()
            if ".L" in operands:
                jumps += [(len(kinds), name) for name in re.findall(r"\.L\w+", operands)]
            if opcode.startswith(dialect.ends) and not predicate and "," not in operands:
                ends.add(len(kinds))
            kinds.append(kind(opcode))
    edges: Edges = {i: [] if i in ends else [i + 1] for i in range(len(kinds))}
    for source, name in jumps:
        if name in labels:
            edges[source].append(labels[name])
    hot = {i for i, kind in enumerate(kinds) if kind in MATRIX}
    loops = _innermost(set(edges), edges, hot)
    main = set[int]().union(*loops)
    turns = [[kinds[i] for i in _shortest_turn(loop, edges)] for loop in loops]
    reloads = tuple((len(loop), sum(kinds[i] == "spill_load" for i in loop)) for loop in loops)
    return Counts(_count(kinds), _count(kinds[i] for i in main), _count(k for turn in turns for k in turn), reloads)


def _kind(opcode: str, dialect: Dialect) -> str | None:
    """By the longest beginning: LDGSTS is not an LDG."""
    known = [p for p in dialect.kinds if opcode.startswith(p)]
    return dialect.kinds[max(known, key=len)] if known else None


def _count(kinds: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(k for k in kinds if k).items()))


# -- loops of the control flow -------------------------------------------------------------------

Edges = dict[int, list[int]]


def _innermost(nodes: set[int], edges: Edges, hot: set[int]) -> list[set[int]]:
    """The smallest cycles of code that hold one of `hot`; a cycle's first instruction is its head."""
    found: list[set[int]] = []
    for cycle in _cycles(nodes, edges):
        if cycle & hot:
            found += _innermost(cycle - {min(cycle)}, edges, hot) or [cycle]
    return found


def _shortest_turn(loop: set[int], edges: Edges) -> list[int]:
    """The fewest instructions that lead from a loop's head back to it: what is rarely run is not among them."""
    head = min(loop)
    came_from: dict[int, int] = {}
    reached = [head]
    for node in reached:
        for target in edges[node]:
            if target == head:
                turn = [node]
                while turn[-1] != head:
                    turn.append(came_from[turn[-1]])
                return turn
            if target in loop and target not in came_from:
                came_from[target] = node
                reached.append(target)
    return []


def _cycles(nodes: set[int], edges: Edges) -> list[set[int]]:
    """Strongly connected sets of more than one node (Kosaraju's two walks)."""
    backward: Edges = {n: [] for n in nodes}
    for n in nodes:
        for target in edges[n]:
            if target in nodes:
                backward[target].append(n)
    last_to_end = reversed([n for tree in _walks(sorted(nodes), nodes, edges) for n in tree])
    return [set(tree) for tree in _walks(last_to_end, nodes, backward) if len(tree) > 1]


def _walks(starts: Iterable[int], nodes: set[int], edges: Edges) -> Iterator[list[int]]:
    """From each start in turn, what is reached for the first time; children stand before parents."""
    seen: set[int] = set()
    for start in starts:
        tree: list[int] = []
        stack = [(start, False)]
        while stack:
            node, done = stack.pop()
            if done:
                tree.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(t, False) for t in edges[node] if t in nodes and t not in seen]
        if tree:
            yield tree
