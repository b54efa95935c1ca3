"""What a variant says of its integers: sizes that are fixed, ranges of all sizes and positions."""

from __future__ import annotations

from collections.abc import Mapping

from attncc.ir.attention import MAX_SIZE, Attention
from attncc.ir.dims import Range
from attncc.ir.expr import Expr, const, name
from attncc.ir.intervals import Interval


def fixed_sizes(attn: Attention) -> Mapping[str, int]:
    """Sizes known when compiled; those of a packed sequence differ from call to call, and keys in pages do."""
    heads, dims = attn.heads, attn.dims
    known = {"Hq": heads.q, "Hk": heads.kv, "Hv": heads.v, "Dqk": dims.qk, "Dv": dims.v}
    differing = ("B", "Sq", "Sk") if attn.layout == "varlen" else ("Sk",) if attn.page_size else ()
    for size in attn.sizes:
        if size.fixed is not None and size.name not in differing:
            known[size.name] = size.fixed
    return known


def size_ranges(attn: Attention) -> Mapping[str, Range]:
    """Least and greatest value of every size."""
    own = {entry for x in attn.inputs for entry in x.shape if isinstance(entry, str)}
    run_time = {text: (0, _most(attn, text)) for text in sorted({"B", "Sq", "Sk", *own})}
    return run_time | {text: (value, value) for text, value in fixed_sizes(attn).items()}


def _most(attn: Attention, size: str) -> int:
    """No call sees how long packed sequences are: only their total is bounded, and by the default."""
    packed = ("Sq",) if attn.page_size else ("Sq", "Sk")
    return MAX_SIZE if attn.layout == "varlen" and size in packed else attn.size(size).most


def positions(attn: Attention) -> Mapping[str, Interval]:
    """Where the index names lie, as formulas of the sizes; a query stands inside the sequence, however aligned."""
    rows, keys = name("Sq"), name("Sk")
    first = const(0) if attn.align.kind == "top_left" else keys - rows
    last = rows - 1 if attn.align.kind == "top_left" else keys - 1
    return {
        "i": (first, last),
        "j": _below(keys),
        "row": _below(rows),
        "b": _below(name("B")),
        "h": _below(name("Hq")),
        "hk": _below(name("Hk")),
    }


def _below(size: Expr) -> Interval:
    return const(0), size - 1
