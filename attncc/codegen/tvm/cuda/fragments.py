"""A warp's tiles in registers, as `mma.sync` has them, and the products on them.

Of a 16 x 8 result a thread has four entries: two neighbouring columns of row `lane // 4`, and of that plus 8. Row tiles
of a warp are independent products that share what is read of K and V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm.script.ir_builder import tirx as T

from attncc.codegen.tvm.cuda.block import Block, ptx, shuffle_xor
from attncc.codegen.tvm.cuda.shared import Shared, Tile
from attncc.codegen.tvm.cuda.warps import ATOM, ELEMENT, padded
from attncc.codegen.tvm.vector import Value, cast, let, real, registers, whole
from attncc.ir.attention import Attention

NAMES: Final = {"bf16": "bf16", "fp16": "f16"}
"""What PTX calls the operands' dtype."""
LOAD: Final = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LOAD_TRANSPOSED: Final = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


class Fragments:
    """Scores `p` and output `o` of a thread; a `Layout` whose keys and columns are those that the thread has."""

    def __init__(self, attn: Attention, block: Block, shared: Shared) -> None:
        self.attn, self.block, self.shared, self.isa = attn, block, shared, block.warps
        self.keys, self.columns = self.isa.keys // 4, padded(attn.dims.v) // 4
        """That one thread has."""
        self.p: Any = registers(self.keys * self.isa.vectors, "float32")
        self.o: Any = registers(self.columns * self.isa.vectors, "float32")
        self.a: Any = registers(4 * self.isa.tiles, "uint32")
        self.b: Any = registers(4, "uint32")
        name = NAMES[attn.dtype]
        self.mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32"
        self.pack = f"cvt.rn.{name}x2.f32"
        lane, warp = block.lane, block.warp
        half = let(T.truncdiv(lane, whole(16)) * 8)
        eighth = let(T.truncmod(T.truncdiv(lane, whole(8)), whole(2)) * 8)
        rows = let(T.truncmod(lane, whole(16)))
        # where the lane's row of eight elements is, of the four 8 x 8 matrices that are read at once
        self.q_at = let(shared.address(shared.q, warp * (ATOM * self.isa.tiles) + rows, half))
        self.k_at = let(shared.address(shared.k, half + T.truncmod(lane, whole(8)), eighth))
        self.v_at = let(shared.address(shared.v, rows, half))

    scales_queries = False
    """They stay as they are given: in 16 bits a factor would round them."""

    # -- layout --------------------------------------------------------------------------------------

    def at(self, n: int, v: int) -> int:
        return n * self.isa.vectors + v

    def place(self, n: int) -> Value:
        """The key, or column, of the tile that the thread has as its own number n."""
        return (n // 2) * 8 + n % 2 + T.truncmod(self.block.lane, whole(4)) * 2

    def each_key(self, what: Callable[[int], None]) -> None:
        for n in range(self.keys):
            what(n)

    def each_column(self, what: Callable[[int], None]) -> None:
        for d in range(self.columns):
            what(d)

    def across(self, pick: Callable[[Value, Value], Value], rows: Any) -> None:
        """Over the quad that shares rows."""
        for v in range(self.isa.vectors):
            for step in (1, 2):
                T.buffer_store(rows, pick(rows[v], shuffle_xor(rows[v], step)), [v])

    # -- products ------------------------------------------------------------------------------------

    def zero(self, x: Any, count: int) -> None:
        for n in range(count * self.isa.vectors):
            T.buffer_store(x, real(0.0), [n])

    def scores(self, stage: Value) -> None:
        """p = Q K^T."""
        self.zero(self.p, self.keys)
        q, k = self.shared.q, self.shared.k
        at = let(self.k_at + self._stage(k, stage))
        for d in range(0, k.width, ATOM):
            for tile in range(self.isa.tiles):
                self._read(LOAD, self.a, 4 * tile, self.q_at, (ATOM * tile * q.stride + d))
            for n in range(0, self.isa.keys, ATOM):
                self._read(LOAD, self.b, 0, at, n * k.stride + d)
                self._multiply(self.p, n // 8)

    def values(self, stage: Value) -> None:
        """o += P V."""
        v = self.shared.v
        at = let(self.v_at + self._stage(v, stage))
        for n in range(0, self.isa.keys, ATOM):
            for tile in range(self.isa.tiles):
                for part in range(4):  # rows, rows + 8; then the same of the next 8 keys
                    key, row = n // 4 + 2 * (part // 2), 2 * tile + part % 2
                    low, high = (self.p[self.at(key + x, row)] for x in (0, 1))
                    ptx(self.pack, self.a[4 * tile + part], high, low)
            for d in range(0, v.width, ATOM):
                self._read(LOAD_TRANSPOSED, self.b, 0, at, n * v.stride + d)
                self._multiply(self.o, d // 8)

    def _stage(self, tile: Tile, stage: Value) -> Value:
        return cast(stage * (tile.size * ELEMENT), "uint32")

    def _read(self, load: str, to: Any, first: int, at: Value, offset: int) -> None:
        ptx(load, *(to[first + n] for n in range(4)), at + whole(offset * ELEMENT, "uint32"))

    def _multiply(self, c: Any, block: int) -> None:
        """c[:, 16 columns from 8 * block] += a b, for every row tile."""
        for half in range(2):
            for tile in range(self.isa.tiles):
                n = 2 * (block + half)
                entries = [c[self.at(n + e % 2, 2 * tile + e // 2)] for e in range(4)]
                a = [self.a[4 * tile + e] for e in range(4)]
                ptx(self.mma, *entries, *a, self.b[2 * half], self.b[2 * half + 1], *entries)
