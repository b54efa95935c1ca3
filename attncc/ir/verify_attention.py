"""Legality of a variant: what its sizes, inputs, parts and primitives owe each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attncc.errors import nearest
from attncc.ir.attention import POSITION_NAMES, SIZE_NAMES, Attention, Call, KeyTiles, Normalizer, Part, Select, State
from attncc.ir.expr import FLOATS, INTS, Dtype, Expr
from attncc.ir.keeping import writing
from attncc.ir.primitives import FEATURES, FORMATS, PRIMITIVES, READS, TENSORS, calls
from attncc.ir.verify_formula import FLOAT_NAMES, INPUT_DTYPES, Fault, formula_faults, input_faults, size_names

TILE_NAMES: Final = frozenset({"b", "h", "hk", "i0", "i1", "row0", "row1"})
MAX_DIM: Final = 1024
NUMBERS: Final = (*FLOATS, *INTS)
RESULTS: Final[dict[str, tuple[Dtype, ...]]] = {
    "select.force": ("bool", *INTS),
    "outputs": ("bool", *NUMBERS),
}
"""What expressions of a primitive are, where not numbers: conditions and counts, weights of any kind."""


def attention_faults(attn: Attention) -> Iterator[Fault]:
    """Every rule that the variant breaks."""
    yield from _sizes(attn)
    yield from _inputs(attn)
    if not attn.parts:
        yield "parts", "there is none"
    for n, part in enumerate(attn.parts):
        yield from _part(attn, part, f"parts[{n}]")
    yield from formula_faults(attn, "scale", attn.scale, size_names(attn), NUMBERS)
    for where, key, call in calls(attn):
        yield from _call(attn, where, key, call)
    if attn.kept is not None:
        written = writing(attn)
        yield from _inputs(written)
        for n, step in enumerate(attn.kept.steps):
            yield from _call(written, f"kept[{n}]", "prologue", step)
    yield from _quantizers(attn)
    if not attn.wants("o"):
        yield "outputs", "'o' is missing"


def _sizes(attn: Attention) -> Iterator[Fault]:
    heads, dims = attn.heads, attn.dims
    for field, count in (("q", heads.q), ("kv", heads.kv), ("v", heads.v)):
        if count < 1:
            yield f"heads.{field}", f"expected at least 1, got {count}"
        elif heads.q % count:
            yield f"heads.{field}", f"expected a divisor of the {heads.q} query heads, got {count}"
    for field, dim in (("qk", dims.qk), ("v", dims.v)):
        if not 1 <= dim <= MAX_DIM:
            yield f"dims.{field}", f"expected 1 to {MAX_DIM}, got {dim}"
    for size in attn.sizes:
        if size.multiple < 1 or (size.max or 1) < 1 or (size.fixed or 0) < 0:
            yield f"sizes.{size.name}", f"impossible bounds: {size}"


def _inputs(attn: Attention) -> Iterator[Fault]:
    declared = [i.name for i in attn.inputs]
    reserved = {*SIZE_NAMES, *POSITION_NAMES, *FLOAT_NAMES}
    for n, i in enumerate(attn.inputs):
        where = f"inputs.{i.name}"
        if i.name in declared[:n]:
            yield where, "declared twice"
        if i.name in reserved:
            yield where, "the name is taken by a position or size"
        if i.dtype not in INPUT_DTYPES:
            yield where, f"unknown dtype '{i.dtype}'; {nearest(i.dtype, INPUT_DTYPES)}"
        elif i.sorted and INPUT_DTYPES[i.dtype] not in INTS:
            yield where, f"only integers can be sorted, got {i.dtype}"
        if any(isinstance(entry, int) and entry < 1 for entry in i.shape):
            yield where, f"impossible shape {list(i.shape)}"
    if attn.align.kind == "input":
        yield from input_faults(attn, "align", attn.align.input, INTS, 1)


# -- parts ---------------------------------------------------------------------------------------


def _part(attn: Attention, part: Part, at: str) -> Iterator[Fault]:
    positions = size_names(attn) | frozenset(POSITION_NAMES)
    yield from formula_faults(attn, f"{at}.score", part.score, positions | FLOAT_NAMES, FLOATS)
    yield from formula_faults(attn, f"{at}.mask", part.mask, positions, ("bool",))
    yield from _normalizer(attn, part.normalizer, f"{at}.normalizer")
    if not 0 <= part.dropout < 1:
        yield f"{at}.dropout", f"expected a probability in [0, 1), got {part.dropout}"
    yield from _storage(attn, part, f"{at}.kv")
    if part.columns is not None and not 0 <= part.columns[0] < part.columns[1] <= attn.dims.qk:
        yield f"{at}.columns", f"expected some of the {attn.dims.qk} columns, got {list(part.columns)}"
    if part.key_tiles is not None:
        yield from _key_tiles(attn, part.key_tiles, f"{at}.key_tiles")
    if part.select is not None:
        yield from _select(part, part.select, f"{at}.select")
    if part.state is not None:
        yield from _state(attn, part, part.state, f"{at}.state")


def _normalizer(attn: Attention, normalizer: Normalizer, at: str) -> Iterator[Fault]:
    if normalizer.sink is not None:
        yield from formula_faults(attn, f"{at}.sink", normalizer.sink, size_names(attn) | READS["row"], NUMBERS)
        if normalizer.kind != "softmax":
            yield at, f"{normalizer.kind} has no sink"
    if not normalizer.eps >= 0:
        yield at, f"expected eps >= 0, got {normalizer.eps}"


def _storage(attn: Attention, part: Part, at: str) -> Iterator[Fault]:
    kv = part.kv
    if kv.kind not in ("paged", "latent") and kv.page_size is not None:
        yield at, f"{kv.kind} storage has no pages, got a page size of {kv.page_size}"
    elif (kv.kind == "paged" or kv.page_size is not None) and (kv.page_size or 0) < 1:
        yield at, f"{kv.kind} storage needs a page size of at least 1, got {kv.page_size}"
    if kv.kind == "latent" and attn.dims.v > attn.dims.qk:
        yield at, f"latent values are the first columns of the keys, but Dv {attn.dims.v} > Dqk {attn.dims.qk}"
    if kv.kind == "gathered":
        yield from input_faults(attn, at, kv.index, INTS, 4)
    if kv.kind == "given":
        for name in (kv.index, kv.values):
            yield from input_faults(attn, at, name, FLOATS, 4)
    if kv.kind == "pooled" and kv.block is None and part.select is None:
        yield at, "pooled storage needs a size, or the blocks of a selection"
    if kv.kind != "pooled" and (kv.block is not None or kv.weighted):
        yield at, f"{kv.kind} storage has no means of blocks"
    if kv.block is not None and kv.block < 1:
        yield at, f"impossible block of {kv.block} keys"


def _select(part: Part, select: Select, at: str) -> Iterator[Fault]:
    q, k = select.block
    for side, block, words in (("q", q, ("token", "cluster")), ("k", k, ("page", "token", "cluster"))):
        if block not in words if isinstance(block, str) else block < 1:
            yield f"{at}.block.{side}", f"expected a size or {' or '.join(words)}, got {block}"
    if k == "page" and part.kv.page_size is None:
        yield f"{at}.block.k", f"{part.kv.kind} storage has no pages"
    if (k == "cluster") != (select.score.name == "centroid_dot"):
        yield f"{at}.score", f"'{select.score.name}' does not score blocks of {k}"
    if select.normalize == "weighted_softmax" and k != "cluster":
        yield f"{at}.normalize", f"blocks of {k} have no weights"
    if select.take == "marginal" and select.rule.name != "ternary":
        yield f"{at}.take", f"'{select.rule.name}' has no middle class"


def _state(attn: Attention, part: Part, state: State, at: str) -> Iterator[Fault]:
    if state.feature not in FEATURES:
        yield f"{at}.feature", f"unknown feature map '{state.feature}'; {nearest(state.feature, FEATURES)}"
    if part.normalizer.kind not in ("none", "linear"):
        yield f"{at}", f"a state is not normalised by {part.normalizer.kind}"
    if state.chunk < 1:
        yield f"{at}.chunk", f"expected at least 1, got {state.chunk}"
    for field, name in (("initial", state.initial), ("initial_mass", state.initial_mass)):
        if name:
            yield from input_faults(attn, f"{at}.{field}", name)
    for field, factor in (("scale", state.scale), ("prescale", state.prescale)):
        if factor is not None:
            yield from formula_faults(attn, f"{at}.{field}", factor, size_names(attn) | READS["head"], NUMBERS)
    if state.update.name == "none" and not state.initial:
        yield f"{at}.update", "a state that nothing enters needs an initial one"


def _key_tiles(attn: Attention, tiles: KeyTiles, at: str) -> Iterator[Fault]:
    allowed = size_names(attn) | TILE_NAMES
    for n, r in enumerate(tiles.ranges):
        for field in ("lo", "hi", "full_lo", "full_hi"):
            yield from formula_faults(attn, f"{at}.ranges[{n}].{field}", getattr(r, field), allowed, INTS)
    if tiles.skip is not None:
        yield from formula_faults(attn, f"{at}.skip", tiles.skip, allowed | {"j0", "j1"}, ("bool",))
    if min(tiles.granularity) < 1:
        yield at, f"impossible granularity {tiles.granularity}"


# -- primitives ----------------------------------------------------------------------------------


def _call(attn: Attention, at: str, key: str, call: Call) -> Iterator[Fault]:
    """That a primitive exists, its expressions read what has a value there, and its words name inputs."""
    table = PRIMITIVES[key]
    if call.name not in table:
        yield at, f"there is no '{call.name}' here; {nearest(call.name, table)}"
        return
    allowed = size_names(attn) | READS[table[call.name]]
    formulas = [*((f"args[{n}]", e) for n, e in enumerate(call.args)), *call.kwargs]
    for field, e in formulas:
        if isinstance(e, Expr):
            yield from formula_faults(attn, f"{at}.{field}", e, allowed, RESULTS.get(key, NUMBERS))
    for word in (*call.words, *(v for option, v in call.kwargs if option in TENSORS and isinstance(v, str))):
        yield from input_faults(attn, at, word)


def _quantizers(attn: Attention) -> Iterator[Fault]:
    operands = [q.operand for q in attn.quantize]
    for n, q in enumerate(attn.quantize):
        at = f"quantize.{q.operand}"
        if q.operand in operands[:n]:
            yield at, "quantised twice"
        if q.dtype not in FORMATS and (q.dtype, q.operand) != ("staircase", "cache"):
            yield at, f"unknown format '{q.dtype}'; {nearest(q.dtype, FORMATS)}"
        if (q.dtype == "staircase") != bool(q.staircase) or not _rises([age for age, _ in q.staircase]):
            yield at, f"expected ages of a staircase that rise without end, got {q.staircase}"


def _rises(ages: list[int | None]) -> bool:
    """Whether the ages rise, and the last is without end."""
    bounded = [age for age in ages if age is not None]
    return bounded == sorted(set(bounded)) and (not ages or ages == [*bounded, None])
