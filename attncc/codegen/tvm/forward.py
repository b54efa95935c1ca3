"""The forward kernel for CPUs: a task a query tile, whose rows are the lanes of vector registers.

Scores and weights are kept transposed, [keys, rows]: then K and V are read in place, an element at a time, as
broadcasts; no sum goes across lanes; and what a row needs is elementwise. Each product fills a register tile of
`isa.keys` keys (or columns) times `isa.vectors` vectors of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.frame import Frame, Processor, Task
from attncc.codegen.tvm.isa import KEYS, Isa
from attncc.codegen.tvm.layout import Transposed
from attncc.codegen.tvm.normalizers import lines
from attncc.codegen.tvm.tiles import Tiles
from attncc.codegen.tvm.vector import Value, cast, let, over_lanes, registers, whole, widened
from attncc.codegen.tvm.walk import Counts, Walk
from attncc.ir.attention import Attention
from attncc.ir.expr import TRUE

FUNCTION: Final = "attention"


def forward(attn: Attention, isa: Isa) -> Any:
    """The kernel of a variant that left the passes, as a TVM function; its arguments are those of `Frame`."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(FUNCTION)
        T.func_attr({"tirx.noalias": True})
        frame = Frame(attn, isa, Processor(isa))
        count, tiles = frame.tasks()
        with T.parallel(0, count) as number:
            frame.on_task(number, tiles, lambda task: _query_tile(frame, isa, task))
    return builder.get()


def _query_tile(frame: Frame[Isa], isa: Isa, task: Task) -> None:
    """Walks the keys that the tile's rows may see, and stores its rows."""
    attn, part, f = frame.attn, frame.attn.part, task.formulas
    Tiles.allocate(frame, task)
    layout = Transposed(isa, attn.dims.v, task.buffers["p"], task.buffers["o"])
    normalizer = lines(part.normalizer, attn, task, layout)
    tiles = Tiles(frame, task, normalizer)
    walk = Walk(part, task, KEYS)
    f.prepare([*normalizer.formulas(), part.mask])
    tiles.load_queries(normalizer.query_factor())
    tiles.zero_output()
    normalizer.start()
    first, end = walk.bounds()
    f.seal()
    with T.serial(0, let(end - first)) as number:
        n0 = let((first + number) * KEYS)
        _visit(walk, isa, n0, lambda: _key_tile(tiles, n0, None), lambda counts: _key_tile(tiles, n0, counts))
    kept = normalizer.finish()
    tiles.store_output()
    if kept is not None:
        tiles.store_lse(kept)


def _key_tile(tiles: Tiles, n0: Value, counts: Counts | None) -> None:
    """One step over KEYS keys. `counts`: some pairs do not, or the tile's end is behind the last key."""
    if tiles.widens:
        tiles.widen_keys(n0)
    tiles.lines.begin_tile()
    tiles.scores(n0, counts)
    tiles.lines.weigh()
    if counts is None:
        tiles.values(n0, clamped=False)
        return
    with T.If(tiles.holds_nonfinite(n0)):  # 0 times NaN is NaN, and rows that do not see it must not become it
        with T.Then():
            tiles.values(n0, True, counts)
        with T.Else():
            tiles.values(n0, clamped=True)


def _visit(walk: Walk, isa: Isa, n0: Value, full: Callable[[], None], cut: Callable[[Counts], None]) -> None:
    """Does `full` or `cut` with a tile, or neither where no row sees any of it."""
    if walk.mask == TRUE:
        _either(let(walk.is_whole(n0)), full, lambda: cut(walk.counts(n0)))
        return
    seen, every = walk.verdict(n0)
    with T.If(seen), T.Then():
        _either(let(tirx.And(every, walk.is_whole(n0))), full, lambda: _cut(walk, isa, n0, full, cut))


def _cut(walk: Walk, isa: Isa, n0: Value, full: Callable[[], None], cut: Callable[[Counts], None]) -> None:
    """A tile that the mask cuts; where only data tells, it may hide or show it whole."""
    counts = walk.counts(n0)
    if not walk.tiles.listed:
        cut(counts)
        return
    lanes = T.ramp(whole(0), 1, isa.lanes)
    some, every = registers(isa.lanes, "int32"), registers(isa.lanes, "int32")
    T.buffer_store(some, widened(whole(0), isa.lanes), [lanes])
    T.buffer_store(every, widened(whole(1), isa.lanes), [lanes])
    with T.serial(0, KEYS // walk.stride()) as n:
        for v in range(isa.vectors):
            seen = let(cast(counts(n * walk.stride(), v), "int32"))
            T.buffer_store(some, some[lanes] | seen, [lanes])
            T.buffer_store(every, every[lanes] & seen, [lanes])
    any_row = over_lanes(lambda a, b: a | b, some[lanes])
    with T.If(tirx.NE(any_row, whole(0))), T.Then():
        all_rows = over_lanes(lambda a, b: a & b, every[lanes])
        _either(let(tirx.And(tirx.NE(all_rows, whole(0)), walk.is_whole(n0))), full, lambda: cut(counts))


def _either(condition: Value, yes: Callable[[], None], no: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            yes()
        with T.Else():
            no()
