"""LeanAttention's claim, on its own kind of shapes: few heads, long contexts, one query, keys shared out or not.

`python -m benchmarks.lean emit -o DIR` writes the packages (any machine); `run DIR --json FILE` measures them on the
GPU here, from CUDA graphs; `page FILE` prints the section of docs/systems.md.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.command import Table, main
from benchmarks.decode_cases import LEAN, Decode
from benchmarks.pool import Job

Times = Mapping[str, float]
"""Milliseconds by implementation."""
HEAD: Final = ("heads", "batch", "keys", "D", "stream-K", "split-KV")
AGAINST: Final = (
    ("attncc, tile", "ours, no split"),
    ("FlashAttention-2", "FlashAttention-2, no split"),
    ("FlashAttention-2, split", "FlashAttention-2 in SDPA"),
    ("cuDNN", "cuDNN"),
)
PREFACE: Final = """\
Published are 2.6 × over FlashAttention-2 on average and 8.33 × at 512k tokens (arXiv 2405.10480v1), then 1.73 × over
FlashDecoding, which splits keys, and 2.18 × at 256k (v2). Here is one query a sequence, in bf16, over heads that have
keys of their own: stream-K, whose programs leave what they found to a merge where LeanAttention's wait, beside
split-KV, which `schedule: auto` takes for keys in rows. Times are device times from CUDA graphs, interleaved, of
results that were checked against float64; behind them stands how many times as long as stream-K the others take.
FlashAttention-2 is torch's: for packed sequences, which it never splits, and as SDPA has it, which splits where it
thinks that worth it."""


def page(file: Path) -> str:
    """The section of docs/systems.md: a row a case, times of ours and how many times as long the others take."""
    data = json.loads(file.read_text())
    cases = [case for series in LEAN for case in series.cases]
    times = {case: found for case in sorted(cases, key=_order) if (found := _times(data["rows"], case))}
    return "\n".join(_lines(data["meta"], times, file.name))


def _order(case: Decode) -> tuple[int, int, int, int]:
    return case.d, case.hq, case.b, case.lengths[0]


def _times(rows: Sequence[Mapping[str, Any]], case: Decode) -> dict[str, float]:
    return {row["impl"]: row["ms"] for row in rows if row["case"] == case.name}


def _lines(meta: Mapping[str, Any], times: Mapping[Decode, Times], file: str) -> Iterator[str]:
    yield ""
    yield "## The claim of LeanAttention, measured again"
    yield ""
    yield PREFACE
    yield ""
    yield f"Written by `python -m benchmarks.lean page benchmarks/results/{file}`, a file of"
    yield f"{meta['date']}, {meta['device']}, driver {meta['driver']}, torch {meta['torch']}, Triton {meta['triton']}."
    yield ""
    yield _line((*HEAD, *(title for _, title in AGAINST)))
    yield _line(["---"] * (len(HEAD) + len(AGAINST)))
    for case, t in times.items():
        ours = t["attncc, stream_k"]
        ratios = [f"{t[name] / ours:.2f} ×" if name in t else "–" for name, _ in AGAINST]
        sizes = (case.hq, case.b, case.lengths[0], case.d)
        yield _line((*map(str, sizes), f"{ours:.4f} ms", f"{t['attncc']:.4f} ms", *ratios))
    yield ""
    for name, title in (*AGAINST, ("attncc", "split-KV")):
        found = {case: t[name] / t["attncc, stream_k"] for case, t in times.items() if name in t}
        if found:
            yield f"- against {title}: {_summary(found)}"


def _summary(ratios: Mapping[Decode, float]) -> str:
    """The mean that a claim is compared with, and what the longest contexts give."""
    longest = max(case.lengths[0] for case in ratios)
    last = [r for case, r in ratios.items() if case.lengths[0] == longest]
    mean = sum(ratios.values()) / len(ratios)
    geometric = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return (
        f"{mean:.2f} × on average (geometric mean {geometric:.2f}), {min(ratios.values()):.2f} to "
        f"{max(ratios.values()):.2f}; at {longest} keys {min(last):.2f} to {max(last):.2f}"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


TABLE: Final = Table(
    "lean",
    __doc__,
    tuple(x for series in LEAN for x in series.cases[0].specs),
    tuple(Job("series", c) for c in LEAN),
    page,
)

if __name__ == "__main__":
    sys.exit(main(TABLE))
