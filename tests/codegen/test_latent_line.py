"""What stands around the latent engine where key tiles are one line: ranges found beforehand, states collected.

The kernels are run by Triton's interpreter; the engine, which it cannot run, is left out.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from codegen.emitted import OUT

from attncc import driver, spec
from attncc.codegen.modules import kernels_module
from attncc.codegen.triton import print_kernels
from attncc.passes.lower.stream import COLLECTORS

ROWS, KEYS, SPLIT = 64, 64, 2
SPEC = """
attncc: 1
name: line
heads: {q: 128, kv: 1}
dims: {qk: 192, v: 128}
dtype: fp16
mask: causal
kv: latent(rope=64, page_size=64)
"""
LENGTHS = ([8192] * 4, [300, 0, 64, 1, 900], [0, 0, 0], [5000, 7], [640, 640, 640])


@cache
def kernels() -> ModuleType:
    attn, program = driver.lower(spec.loads(SPEC).attention)
    path = Path(OUT, "kernels_of_a_line.py")
    path.write_text(kernels_module(attn, print_kernels(program)[0], []))
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def of(t: torch.Tensor, text: str) -> dict[str, int]:
    """The strides of a buffer as kernels take them."""
    return {f"{text}_s{n}": s for n, s in enumerate(t.stride())}


def ints(*shape: int) -> torch.Tensor:
    return torch.full(shape, -7, dtype=torch.int32)


def found(lengths: list[int], fill: int, queries: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tiles of items, the ranges, and who holds each item."""
    b, items = len(lengths), len(lengths) * 2 * queries
    used, counts, ranges, held = torch.tensor(lengths, dtype=torch.int32), ints(items), ints(fill, 6), ints(items, 2)
    sizes = {"Sq": queries, "BM": ROWS, "BN": KEYS, "EARLY": False}
    strides = of(used, "seqused_k") | of(counts, "tiles_of")
    kernels().line_plan[(items,)](used, counts, **strides, B=b, Sk=8192, **sizes)
    strides = of(counts, "tiles_of") | of(ranges, "line_ranges") | of(held, "held_by")
    kernels().line_ranges[(fill,)](counts, ranges, held, **strides, B=b, SPLIT=SPLIT, FILL=fill, **sizes)
    return counts, ranges, held


@pytest.mark.parametrize("fill", [1, 4, 7, 132])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_who_holds_an_item_is_who_walks_it(lengths: list[int], fill: int) -> None:
    counts, ranges, held = found(lengths, fill)
    b = len(lengths)
    tiles = [-(-n // KEYS) for n in lengths]
    assert counts.tolist() == tiles * 2  # the second half of the heads behind the first one's sequences
    walkers: list[list[int]] = [[] for _ in range(2 * b)]
    seen = 0
    in_line = sorted(ranges.tolist(), key=lambda x: x[-1])
    for number, (first, behind, begin, end, at, own) in enumerate(in_line):
        assert (begin, own) == (seen, number)
        seen = end
        for item in range(first, behind):
            count = int(counts[item])
            if min(end - at, count) > max(begin - at, 0):
                walkers[item].append(number)
            at += count
    assert seen == sum(tiles) * 2
    for item, numbers in enumerate(walkers):
        assert numbers == list(range(*held[item].tolist()))


@pytest.mark.parametrize(("fill", "ranges"), [(34, 34), (132, 130), (21, 20)])
def test_neighbours_walk_the_same_keys(fill: int, ranges: int) -> None:
    """Of heads in two tiles; also where ranges are as many to each item."""
    lengths = [640] * 5 if ranges == 20 else [900, 5000, 64, 777, 3000]
    counts, rows, _ = found(lengths, fill)
    half = int(counts.sum()) // 2
    begins = rows[:ranges, 2].view(-1, 2)
    assert (begins[:, 1] - begins[:, 0] == half).all()
    assert (rows[ranges:, 2] == 2 * half).all()


@pytest.mark.parametrize(
    ("lengths", "fill", "queries"), [([900, 0], 132, 1), ([900, 5000], 5, 1), ([300], 3, 2), ([64] * 2, 132, 1)]
)
def test_states_are_collected_as_they_are_merged(lengths: list[int], fill: int, queries: int) -> None:
    """What no range has whole is ended; nothing else is touched."""
    counts, _, held = found(lengths, fill, queries)
    random = torch.Generator().manual_seed(0)
    m, l = torch.randn(2, 2 * fill, ROWS, generator=random).unbind()
    acc = torch.randn(1, 2 * fill, ROWS, 128, generator=random)
    results, many = [], COLLECTORS * fill
    for kernel, known, rows in (("merge", {"tiles_of": counts}, None), ("collect", {"held_by": held}, many)):
        o = torch.full((len(lengths), 128, queries, 128), 77.0, dtype=torch.float16)
        lse = torch.full(o.shape[:3], 77.0)
        total = o.shape[0] * 128 * queries
        arguments: dict[str, Any] = {"O": o, "LSE": lse, "part_m": m, "part_l": l.abs() + 1, "part_o": acc, **known}
        arguments |= of(m, "part_m") | of(l, "part_l") | of(lse, "lse") | {"B": len(lengths), "Sq": queries}
        for text, x in known.items():
            arguments |= of(x, text)
        for text, x in (("o", o), ("part_o", acc)):
            arguments |= dict(zip((f"{text}_b", f"{text}_h", f"{text}_s"), x.stride(), strict=False))
        arguments |= {"BM": ROWS, "WRITE_LSE": 1, "FILL": fill, "EARLY": False}
        if rows is None:
            arguments |= {"BN": KEYS, "SPLIT": SPLIT}
        getattr(kernels(), f"line_{kernel}")[(min(total, rows or total),)](**arguments)
        results.append((o, lse))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    whole = (held[:, 1] - held[:, 0] == 1).repeat_interleave(ROWS)
    assert (results[0][1] == 77.0).sum() == whole.sum()
