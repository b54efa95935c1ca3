"""Score and mask formulas over tiles: what moves with the key stays in the loop, the rest is hoisted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attncc.ir.attention import Attention, Input
from attncc.ir.build import Builder, column, fresh, read, reduce
from attncc.ir.expr import Dtype, Expr, Value, broadcast, cast_to, const, lift, name, where
from attncc.ir.factors import fold_constants
from attncc.ir.rewrite import names, rebuild, transform
from attncc.ir.tile import Param

INPUT_DTYPE: Mapping[str, Dtype] = {
    "fp32": "f32", "fp16": "f16", "bf16": "bf16", "int32": "i32", "int64": "i64", "int8": "i8", "uint8": "u8",
    "bool": "bool",
}  # fmt: skip

KERNEL_SIZES = frozenset({"B", "Sq", "Sk", "Tq", "Tk"})
IN_LOOP = frozenset({"qk", "j"})


def input_param(x: Input) -> Param:
    """The kernel parameter of an extra tensor."""
    return Param(f"{x.name}_ptr", "buffer", INPUT_DTYPE[x.dtype], rank=len(x.shape), doc=f"input {x.name}")


def own_name(text: str, attn: Attention) -> str:
    """A name for a tensor of the program's own; no input has it."""
    return fresh(text, {x.name for x in attn.inputs})


def length(size: str) -> str:
    """The parameter that holds an input's own size; the prefix keeps it apart from the kernel's names."""
    return f"len_{size}"


@dataclass(frozen=True, slots=True)
class Scope:
    """What the names of a formula stand for at one place of a kernel, as values that broadcast together."""

    values: Mapping[str, Expr]
    inputs: Mapping[str, Input]
    shared: dict[Expr, Expr] = field(default_factory=dict[Expr, Expr])
    """Reads bound so far, by `share_reads`."""

    def with_(self, **values: Expr) -> Scope:
        return replace(self, values={**self.values, **values}, shared={})

    def bind(self, e: Expr) -> Expr:
        """The formula over tiles. A read outside its tensor gives 0, as the language has it."""

        def step(node: Expr) -> Expr | None:
            match node.op:
                case "name":
                    return self._name(str(node.attr))
                case "load":
                    return self._read(node)
                case "bucket":
                    return self._bucket(node)
                case "rows_min" | "rows_max":
                    return reduce(node.op[5:], node.args[0], 0)
                case _:
                    return None

        return transform(e, step)

    def _name(self, text: str) -> Expr | None:
        if text in self.values:
            return self.values[text]
        own = {s for x in self.inputs.values() for s in x.shape if isinstance(s, str)} - KERNEL_SIZES
        return name(length(text)) if text in own else None

    def _read(self, node: Expr) -> Expr:
        x = self.inputs[str(node.attr)]
        at = _broadcast_axes(x.shape, node.args)
        guards = self._guards(x.shape, at)
        tiles = [index for index in at if index.shape]
        scalars = [guard for guard in guards if not guard.shape]
        if tiles and scalars:  # Triton's interpreter takes no scalar for a tile's mask: an index of the tile carries it
            inside = _all_of(scalars)
            guards = [guard for guard in guards if guard.shape] + [where(inside, tiles[0], -1) >= 0]
        mask = _all_of(guards) if guards else None
        return cast_to(read(input_param(x), *at, mask=mask), node.dtype)

    def _bucket(self, node: Expr) -> Expr:
        """How many entries of a sorted row are <= the value; a row outside its tensor is one of zeros."""
        x = self.inputs[str(node.attr)]
        *row_, value = node.args
        at = _broadcast_axes(x.shape[:-1], row_)
        guards = self._guards(x.shape[:-1], at)
        entries = lift(self._size(x.shape[-1]))
        inside = _all_of(guards) if guards else None
        at = at if inside is None else tuple(where(inside, index, 0) for index in at)
        shape = broadcast(*(a.shape for a in (*at, value)))
        found = Expr("bucket", (*at, value, entries), input_param(x).name, "i32", shape)
        return found if inside is None else where(inside, found, where(value >= 0, entries, 0))

    def _guards(self, shape: Sequence[int | str], at: Sequence[Expr]) -> list[Expr]:
        """What must hold for an entry to be inside, as far as it is not proven."""
        guards: list[Expr] = []
        for size, index in zip(map(self._size, shape), at, strict=True):
            if not (self._is_position(index, size) or _is_nonnegative(index)):
                guards.append(index >= 0)
            if not (self._is_position(index, size) or _is_below(index, size)):
                guards.append(index < size)
        return guards

    def _size(self, size: int | str) -> Value:
        if isinstance(size, int):
            return size
        return self.values.get(size) or name(size if size in KERNEL_SIZES else length(size))

    def _is_position(self, index: Expr, size: Value) -> bool:
        """Whether an index needs no check: a position on an axis of its own length."""
        owners = {"b": "B", "h": "Hq", "hk": "Hk", "row": "Sq", "j": "Sk"}
        if index.op == "floordiv" and index.attr == "nonneg" and (index.args[1].value or 0) >= 1:
            index = index.args[0]  # of blocks there are no more than positions
        return any(
            index == self.values.get(position) and size == self.values.get(axis, name(axis))
            for position, axis in owners.items()
        )


def _broadcast_axes(shape: Sequence[int | str], at: Sequence[Expr]) -> tuple[Expr, ...]:
    return tuple(const(0) if size == 1 else index for size, index in zip(shape, at, strict=True))


def _all_of(conditions: list[Expr]) -> Expr:
    result = conditions[0]
    for condition in conditions[1:]:
        result = result & condition
    return result


def _is_nonnegative(e: Expr) -> bool:
    """A quick proof; what it misses is checked when the kernel runs."""
    match e.op:
        case "const":
            return e.value is not None and e.value >= 0
        case "max":
            return any(map(_is_nonnegative, e.args))
        case "min" | "add":
            return all(map(_is_nonnegative, e.args))
        case "cast":
            return _is_nonnegative(e.args[0])
        case "floordiv" | "mod":
            return e.attr == "nonneg"
        case _:
            return e.op == "bucket"


def _is_below(e: Expr, size: Value) -> bool:
    """Likewise, for e < size."""
    match e.op:
        case "const":
            return e.value is not None and isinstance(size, int) and e.value < size
        case "min":
            return lift(size) - 1 in e.args or any(_is_below(a, size) for a in e.args)
        case "max":
            return all(_is_below(a, size) for a in e.args)
        case "cast":
            return _is_below(e.args[0], size)
        case _:
            return False


def hoist(b: Builder, e: Expr, scope: Scope, prefix: str) -> Expr:
    """Binds, before the loop, each largest part of `e` that no key moves; returns `e` over the new names.

    Rows are [BM] in `scope`, and what is bound of them too; as columns a thread would find them once for every key that
    it holds. They become columns, which broadcast to [BM, BN], where `e` uses them.
    """
    bound: dict[Expr, Expr] = {}

    def go(node: Expr) -> Expr:
        if node.op in ("const", "name"):
            return node
        if names(node) & IN_LOOP:
            return rebuild(node, tuple(go(a) for a in node.args))
        if node not in bound:
            value = share_reads(b, node, scope)
            if value.op not in ("const", "name"):
                value = b.let(b.fresh(prefix), value)
            bound[node] = column(value) if value.shape else value
        return bound[node]

    return go(e)


def share_reads(b: Builder, e: Expr, scope: Scope) -> Expr:
    """The formula over scalars, each tensor read of it bound to a name once, however often it occurs."""

    def go(node: Expr) -> Expr:
        inner = rebuild(node, tuple(go(a) for a in node.args))
        if node.op in ("load", "bucket") and inner not in shared:
            value = scope.bind(inner)
            shared[inner] = b.let(b.fresh(f"{node.attr}_{'rows' if value.shape else 'at'}"), value)
        return shared.get(inner, inner)

    shared = scope.shared
    return scope.bind(go(e))


def regroup(e: Expr) -> Expr:
    """Products with several scalar factors multiply the tile once: qk * scale / 30 is qk * (scale / 30).

    This rounds differently, by an ulp of fp32; the same licence by which scale and log2(e) are joined.
    """

    def step(node: Expr) -> Expr | None:
        if node.op not in ("mul", "div") or not _moves(node.args[0]):
            return None
        inner, outer = node.args
        if _moves(outer) or outer.value == 0:
            return None
        c = outer if node.op == "mul" else 1.0 / outer
        if inner.op == "mul" and not _moves(inner.args[1]):
            return inner.args[0] * fold_constants(inner.args[1] * c)
        return inner * fold_constants(c)

    return transform(e, step)


def _moves(e: Expr) -> bool:
    """Whether `e` differs from key to key or row to row."""
    return bool(names(e) & {"qk", "j", "i", "row"})
