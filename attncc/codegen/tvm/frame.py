"""The arguments of a kernel, and where a query tile stands in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, Protocol, TypeVar

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.formulas import Array, Formulas, stored
from attncc.codegen.tvm.isa import Isa, Machine
from attncc.codegen.tvm.vector import Value, cast, least, let, over_lanes, quotient, registers, whole, widened
from attncc.ir.attention import SIZE_NAMES, Attention

FLAT: Final = 1 << 62
"""Elements of a flat view: no bound, for addresses are computed here."""
ALIGNMENT: Final = {"uint8": 1, "int8": 1, "uint16": 2, "float16": 2, "int64": 8}
"""Bytes to which elements are aligned, 4 for others. TVM takes 64 for granted, which no view of a tensor keeps."""


@dataclass(frozen=True, slots=True)
class Operand:
    """q, k, v or o of a call: flat elements, and strides of batch (None in packed layouts), head and row."""

    flat: Any
    length: Value
    """Rows; of all sequences together in packed layouts."""
    batch: Value | None
    head: Value
    row: Value

    def start(self, b: Value, h: Value, row: Value) -> Value:
        """The address of a row of a head."""
        at = cast(h, "int64") * self.head + cast(row, "int64") * self.row
        return at if self.batch is None else at + cast(b, "int64") * self.batch


@dataclass(frozen=True, slots=True)
class Task:
    """One query tile."""

    b: Value
    h: Value
    hk: Value
    hv: Value
    row0: Value
    queries: Value
    """Of its sequence, as `keys`."""
    keys: Value
    q0: Value
    """Where the sequence's queries begin in a packed tensor, else 0; `k0`: its keys."""
    k0: Value
    formulas: Formulas
    buffers: dict[str, Any] = field(default_factory=dict[str, Any])
    """Filled once, by `Tiles.allocate`."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor among the arguments: flat elements, extents and strides (int64)."""

    flat: Any
    shape: tuple[Value, ...]
    strides: tuple[Value, ...]


Tensors = Mapping[str, tuple[int, str]]
"""Rank and dtype, as the spec has it, by name."""


M = TypeVar("M", bound=Machine)


class Place(Protocol):
    """What differs between a processor, whose lanes are rows, and a thread of a GPU's block."""

    def declare(self, tensors: Tensors) -> Callable[[], dict[str, View]]:
        """Makes the arguments of tensors, and what makes the views of them once all other arguments are made."""
        ...

    def rows(self, row0: Value) -> list[Value]:
        """The rows that each vector of rows has in the tile that begins at `row0`."""
        ...

    def over_rows(self, pick: Callable[[Value, Value], Value], x: Value) -> Value:
        """`pick`, T.min or T.max, over all rows of the tile, given those of a vector."""
        ...


class Processor:
    """A task of a CPU kernel: tensors come as DLPack has them, and lanes are consecutive rows."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa

    def declare(self, tensors: Tensors) -> Callable[[], dict[str, View]]:
        handles = {n: T.arg(n, T.handle()) for n in tensors}

        def views() -> dict[str, View]:
            bound = {n: _bound(n, handles[n], *what) for n, what in tensors.items()}  # all of them before any view
            return {n: View(_flat(buffer), shape, strides) for n, (buffer, shape, strides) in bound.items()}

        return views

    def rows(self, row0: Value) -> list[Value]:
        isa = self.isa
        return [T.ramp(row0 + v * isa.lanes, 1, isa.lanes) for v in range(isa.vectors)]

    def over_rows(self, pick: Callable[[Value, Value], Value], x: Value) -> Value:
        return over_lanes(pick, x)


class Frame(Generic[M]):
    """A kernel's arguments: q, k, v, (cu_seqlens_q, cu_seqlens_k,) the inputs, o, lse, the scale, and own sizes."""

    def __init__(self, attn: Attention, isa: M, place: Place, *, shared: bool = False) -> None:
        """`shared`: keys are split between tasks, which leave what they have in `work`, behind o and lse."""
        self.attn, self.isa, self.place = attn, isa, place
        self.packed = attn.layout == "varlen"
        cuts = ("cu_seqlens_q", "cu_seqlens_k") if self.packed else ()
        rank = 3 if self.packed else 4
        tensors = dict.fromkeys("qkv", (rank, attn.dtype)) | dict.fromkeys(cuts, (1, "int32"))
        tensors |= {x.name: (max(1, len(x.shape)), x.dtype) for x in attn.inputs}  # a scalar is an entry of its own
        tensors |= {"o": (rank, attn.dtype), "lse": (rank - 1, "fp32")}
        tensors |= {"work": (1, "fp32")} if shared else {}
        made = place.declare(tensors)
        self.scale = T.arg("scale", T.float32())
        self.sizes: dict[str, Value] = {n: T.arg(n, T.int32()) for n in own_sizes(attn)}
        self.shares = T.arg("shares", T.int32()) if shared else whole(1)
        views = made()
        self.q, self.k, self.v, self.o = (self._operand(n, views[n]) for n in "qkvo")
        self.lse, self.lse_strides = views["lse"].flat, views["lse"].strides
        self.work: Any = views["work"].flat if shared else None
        self.starts = {n: views[n].flat for n in cuts}
        broadcasts = {x.name: tuple(size == 1 for size in x.shape) for x in attn.inputs}
        self.arrays: dict[str, Array] = {}
        for x in attn.inputs:
            view, rank = views[x.name], len(x.shape)
            shape, strides = view.shape[:rank], view.strides[:rank]
            self.arrays[x.name] = Array(view.flat, shape, strides, broadcasts[x.name], x.dtype)
        batch = views["cu_seqlens_q"].shape[0] - 1 if self.packed else views["q"].shape[0]
        self.batch = let(cast(batch, "int32"))

    def _operand(self, name: str, view: View) -> Operand:
        flat, shape, strides = view.flat, view.shape, view.strides
        fixed = self.attn.size("Sq" if name in "qo" else "Sk").fixed
        length = shape[2 if self.attn.layout == "bhsd" else 1] if fixed is None else whole(fixed, "int64")
        match self.attn.layout:
            case "bhsd":
                return Operand(flat, length, strides[0], strides[1], strides[2])
            case "bshd":
                return Operand(flat, length, strides[0], strides[2], strides[1])
            case "varlen":
                return Operand(flat, shape[0], None, strides[1], strides[0])

    # -- tasks ---------------------------------------------------------------------------------------

    def tasks(self) -> tuple[Value, Value]:
        """How many tasks there are, one a query tile of a head, and what `on_task` wants to know beside a number."""
        heads, rows = whole(self.attn.heads.q), whole(self.isa.rows)
        total = let(cast(self.q.length, "int32"))
        if self.packed:  # at least as many as there are
            tiles = let(quotient(total, rows) + self.batch)
            return let(tiles * heads), tiles
        tiles = let(quotient(total + (self.isa.rows - 1), rows))
        return let(self.batch * heads * tiles), tiles

    def on_task(self, number: Value, tiles: Value, body: Callable[[Task], None]) -> None:
        """Does `body` with a task, unless there are fewer of them than numbers."""
        task = self._packed_task(number, tiles) if self.packed else self._task(number, tiles)
        with T.If(task.row0 < task.queries), T.Then():
            body(replace(task, formulas=self._formulas(task)))

    def _task(self, number: Value, tiles: Value) -> Task:
        """The tiles with the most keys come first: under a causal mask the last rows have them."""
        heads = whole(self.attn.heads.q)
        b = let(T.truncdiv(number, heads * tiles))
        h = let(T.truncmod(T.truncdiv(number, tiles), heads))
        row0 = let((tiles - 1 - T.truncmod(number, tiles)) * self.isa.rows)
        queries, keys = (let(cast(x.length, "int32")) for x in (self.q, self.k))
        return self._placed(b, h, row0, queries, keys, whole(0), whole(0))

    def _packed_task(self, number: Value, tiles: Value) -> Task:
        h, rest = let(T.truncdiv(number, tiles)), T.truncmod(number, tiles)
        found = self._find_sequence(rest)
        b, row0 = let(found[0]), let(found[1])
        (q0, queries), (k0, keys) = ((let(x[b]), let(x[b + 1] - x[b])) for x in self.starts.values())
        return self._placed(b, h, row0, queries, keys, q0, k0)

    def _placed(self, b: Value, h: Value, row0: Value, queries: Value, keys: Value, q0: Value, k0: Value) -> Task:
        heads = self.attn.heads
        hk, hv = let(self.served_by(h, heads.kv)), let(self.served_by(h, heads.v))
        return Task(b, h, hk, hv, row0, queries, keys, q0, k0, Formulas(self.isa, self.arrays, {}, []))

    def served_by(self, h: Value, count: int) -> Value:
        """The one of `count` key or value heads that query head `h` reads."""
        heads = self.attn.heads
        return T.truncmod(h, whole(count)) if heads.map == "tile" else T.truncdiv(h, whole(heads.q // count))

    def _find_sequence(self, number: Value) -> Any:
        """[sequence, first row] of the packed tile `number`; a row behind all others where there is no such tile."""
        found = registers(3, "int32")
        starts = self.starts["cu_seqlens_q"]
        for at, value in enumerate((whole(0), whole(2**30), number)):
            T.buffer_store(found, value, [at])
        with T.serial(0, self.batch) as s:
            tiles = let(quotient(starts[s + 1] - starts[s] + (self.isa.rows - 1), whole(self.isa.rows)))
            with T.If(tirx.And(found[2] >= 0, found[2] < tiles)), T.Then():
                T.buffer_store(found, s, [0])
                T.buffer_store(found, found[2] * self.isa.rows, [1])
            T.buffer_store(found, found[2] - tiles, [2])
        return found

    def _formulas(self, t: Task) -> Formulas:
        """What names mean in a tile; rows behind the last query stand on it."""
        isa, names = self.isa, self._names(t)
        offset = let(self._offset(t))
        last = widened(t.queries - 1, isa.lanes)
        rows: list[dict[str, Value]] = []
        for at in self.place.rows(t.row0):
            row = let(least(last, at))
            rows.append({"row": row, "i": let(row + widened(offset, isa.lanes))})
        names["i0"] = let(t.row0 + offset)
        names["i1"] = let(T.min(t.row0 + isa.rows, t.queries) - 1 + offset)
        names["row0"], names["row1"] = t.row0, let(names["i1"] - offset)
        return Formulas(isa, self._arrays(t), names, rows, self.place.over_rows)

    def formulas_of_row(self, t: Task) -> Formulas:
        """What names mean in the row `t.row0` alone, whose position is a scalar."""
        names = self._names(t)
        i = let(t.row0 + self._offset(t))
        names |= {"i0": i, "i1": i, "row0": t.row0, "row1": t.row0}
        return Formulas(self.isa, self._arrays(t), names, [{"row": t.row0, "i": i}])

    def _names(self, t: Task) -> dict[str, Value]:
        attn = self.attn
        names: dict[str, Value] = {"b": t.b, "h": t.h, "hk": t.hk, "Sq": t.queries, "Sk": t.keys, "B": self.batch}
        counts = {"Hq": attn.heads.q, "Hk": attn.heads.kv, "Hv": attn.heads.v, "Dqk": attn.dims.qk, "Dv": attn.dims.v}
        names |= {n: whole(count) for n, count in counts.items()} | {"scale": self.scale}
        names |= self.sizes
        return names

    def _arrays(self, t: Task) -> dict[str, Array]:
        """The inputs; one with an axis of queries or keys has, in packed layouts, as many as its sequence."""
        extents = self.sizes | {"Sq": t.queries, "Sk": t.keys}
        found: dict[str, Array] = {}
        for x in self.attn.inputs:
            array = self.arrays[x.name]
            known = [extents.get(str(axis)) for axis in x.shape]
            sizes = (n if e is None else let(cast(e, "int64")) for e, n in zip(known, array.shape, strict=True))
            found[x.name] = replace(array, shape=tuple(sizes))
        return found

    def _offset(self, t: Task) -> Value:
        match self.attn.align.kind:
            case "bottom_right":
                return t.keys - t.queries
            case "top_left":
                return whole(0)
            case "input":
                x = self.arrays[self.attn.align.input]
                return cast(x.flat[cast(t.b, "int64") * x.strides[0]], "int32")


def own_sizes(attn: Attention) -> list[str]:
    """Sizes that a spec has of its own, in the order of its inputs; a tensor's extent is no size where it is 0."""
    named = [s for x in attn.inputs for s in x.shape if isinstance(s, str)]
    return [s for s in dict.fromkeys(named) if s not in SIZE_NAMES]


Bound = tuple[Any, tuple[Value, ...], tuple[Value, ...]]
"""A buffer, its extents and its strides."""


def _bound(name: str, handle: Any, rank: int, dtype: str) -> Bound:
    """An argument with any extents and strides."""
    shape = tuple(tirx.Var(f"{name}_n{axis}", "int64") for axis in range(rank))
    strides = tuple(tirx.Var(f"{name}_s{axis}", "int64") for axis in range(rank))
    element = stored(dtype)
    return (
        T.match_buffer(handle, shape, element, strides=list(strides), align=ALIGNMENT.get(element, 4)),
        shape,
        strides,
    )


def _flat(buffer: Any) -> Any:
    """All that an argument points to, element by element."""
    element = str(buffer.dtype)
    extent = (whole(FLAT, "int64"),)
    return T.decl_buffer(extent, element, data=tirx.buffer_data(buffer), align=ALIGNMENT.get(element, 4))
