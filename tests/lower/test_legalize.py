"""Legalized formulas have the values of Python's integers on a machine whose integers wrap and divide towards 0."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attncc.ir.attention import Align, Attention, Dims, Heads, Input, KeyRange, KeyTiles, Part, Size
from attncc.ir.expr import Dtype, Expr, cast_to, const, eq, ew, load, maximum, minimum, name, where
from attncc.ir.rewrite import walk
from attncc.passes.legalize import legalize, name_ranges

i, j, row, b, h, n, Sk = (name(x) for x in ("i", "j", "row", "b", "h", "n", "Sk"))
small, wide = load("small", b, dtype="i32"), load("wide", b, dtype="i64")
INPUTS = (Input("small", ("B",), "int32"), Input("wide", ("B",), "int64"), Input("table", ("n",), "fp32"))
BITS: dict[Dtype, int] = {"i32": 32, "i64": 64}


def variant(mask: Expr = j <= i, **more: Any) -> Attention:
    score = name("qk", "f32") * name("scale", "f32")
    part = Part(score, mask, key_tiles=more.pop("key_tiles", None))
    return Attention("t", Heads(4, 2, 2), Dims(16, 16), (part,), const(1.0), inputs=INPUTS, **more)


def wrapped(value: int, dtype: Dtype) -> int:
    bits = BITS[dtype]
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def exact(e: Expr, values: dict[str, int]) -> int:
    """By integers without end."""
    return _value(e, values, lambda v, _: v, lambda a, b, _: a // b)


def machine(e: Expr, values: dict[str, int]) -> int:
    """As a GPU computes it: what leaves its width wraps, and a division marked nonneg rounds towards 0."""
    return _value(e, values, lambda v, node: wrapped(v, node.dtype) if node.dtype in BITS else v, _machine_division)


def _machine_division(a: int, b: int, node: Expr) -> int:
    return int(math.copysign(1, a * b)) * (abs(a) // abs(b)) if node.attr == "nonneg" else a // b


def _value(e: Expr, values: dict[str, int], store: Any, divide: Any) -> int:
    args = [_value(a, values, store, divide) for a in e.args] if e.op not in ("load", "bucket") else []
    match e.op:
        case "const":
            return int(e.value or 0)
        case "name" | "load":
            return values[str(e.attr)]
        case "floordiv":
            return store(divide(*args, e), e)
        case "mod":
            return store(args[0] - args[1] * divide(*args, e), e)
        case "where":
            return args[1] if args[0] else args[2]
        case "cast" | "rows_min" | "rows_max":
            return store(args[0], e)
        case _:
            return store(TABLE[e.op](*args), e)


TABLE: dict[str, Any] = {
    "add": int.__add__, "sub": int.__sub__, "mul": int.__mul__, "neg": int.__neg__, "abs": int.__abs__, "min": min,
    "max": max, "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__, "eq": int.__eq__,
    "ne": int.__ne__, "and": lambda x, y: x & y, "or": lambda x, y: x | y, "not": lambda x: not x,
}  # fmt: skip

LEAVES = st.one_of(
    st.sampled_from([i, j, row, b, h, n, Sk, small, wide]),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 1000, -4096, 2**20, 2**31 - 1, -(2**31)]).map(const),
)


def grown(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def binary(op: str) -> st.SearchStrategy[Expr]:
        return st.tuples(children, children).map(lambda p: ew(op, *p))

    condition = st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]).flatmap(binary)
    return st.one_of(
        *map(binary, ("add", "sub", "mul", "floordiv", "mod", "min", "max")),
        children.map(lambda e: -e),
        children.map(lambda e: ew("abs", e)),
        st.tuples(condition, children, children).map(lambda t: where(*t)),
    )


NUMBERS = st.recursive(LEAVES, grown, max_leaves=8)
MASKS = st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), NUMBERS, NUMBERS).map(lambda t: ew(*t))
ALIGNS = st.sampled_from([Align(), Align("top_left"), Align("input", "small")])


def extreme(low: float, high: float) -> st.SearchStrategy[int]:
    lo, hi = int(max(low, -(2**62))), int(min(high, 2**62))
    return st.one_of(st.sampled_from([lo, hi, min(max(lo, 0), hi)]), st.integers(lo, hi))


@given(st.data(), MASKS, ALIGNS)
@settings(max_examples=600, deadline=None)
def test_values_stay(data: st.DataObject, mask: Expr, align: Align) -> None:
    attn = variant(mask, align=align)
    ranges = name_ranges(attn) | {"small": (-(2.0**31), 2.0**31 - 1), "wide": (-(2.0**62), 2.0**62)}
    values = {
        x: data.draw(extreme(*ranges[x]), label=x) for x in ("i", "j", "row", "b", "h", "n", "Sk", "small", "wide")
    }
    try:
        want = exact(mask, values)
    except ZeroDivisionError:
        return
    assume(all(abs(v) < 2**63 for v in _partial_values(mask, values)))  # nothing is proven of 64 bits
    assert bool(machine(legalize(attn).part.mask, values)) == bool(want)


def _partial_values(e: Expr, values: dict[str, int]) -> list[int]:
    return [exact(node, values) for node in walk(e)]


# -- what it makes of single formulas ------------------------------------------------------------


def legalized(mask: Expr, **more: Any) -> Expr:
    return legalize(variant(mask, **more)).part.mask


@pytest.mark.parametrize(
    "mask",
    [j <= i, i - j < 4096, (j - i) * 3 < i, eq((i + j * 2) // 8, j), where(j < 3, i, j) < Sk, j < small, b * 4 + h < n],
)
def test_what_is_proven_stays_in_32_bits(mask: Expr) -> None:
    assert all(node.dtype != "i64" for node in walk(legalized(mask)))


@pytest.mark.parametrize("mask", [j * j < i, (i - j) * 1000 < 5, small + 1 > j, -small < j, ew("abs", small) < j])
def test_what_is_not_proven_is_computed_in_64(mask: Expr) -> None:
    found = legalized(mask)
    assert any(node.dtype == "i64" for node in walk(found))
    assert {a.dtype for a in found.args} == {"i32"}, "compared in 32 bits all the same"


def test_bounds_of_the_spec_are_used() -> None:
    sizes = (Size("Sq", max=4096), Size("Sk", max=4096))
    assert all(node.dtype != "i64" for node in walk(legalized(j * j < i, sizes=sizes)))
    packed = legalized(j * j < i, sizes=sizes, layout="varlen")
    assert any(node.dtype == "i64" for node in walk(packed)), "no call sees the lengths of packed sequences"


@pytest.mark.parametrize(
    ("mask", "align", "marked"),
    [
        (eq(j // 8, 0), Align(), True),
        (eq(i // 8, 0), Align(), False),
        (eq(i // 8, 0), Align("top_left"), True),
        (eq(i // 8, 0), Align("input", "small"), False),
        (eq(j % n, 0), Align(), True),
        (eq(j // -8, 0), Align(), False),
        (eq(j // small, 0), Align(), False),
        (eq(j // small // 8, 0), Align(), False),
        (eq(maximum(small, 0) // 8, 0), Align(), True),
        (eq(ew("abs", i - j) // 8, 0), Align(), True),
        (eq((j - 1) // 8, 0), Align(), False),
    ],
)
def test_divisions_are_marked_where_neither_side_is_negative(mask: Expr, align: Align, marked: bool) -> None:
    outer = legalized(mask, align=align).args[0]
    assert (outer.attr == "nonneg") == marked


def test_a_row_reduction_is_as_wide_as_what_it_reduces() -> None:
    """Ends of key ranges are 32 bits wide again, inside the sequence."""
    lim = load("small", row, dtype="i32") * 3
    end = Expr("rows_max", (lim,), None, "i32")
    tiles = KeyTiles((KeyRange(const(0), end, const(0), const(0)),))
    (found,) = legalize(variant(key_tiles=tiles)).part.key_tiles.ranges  # type: ignore[union-attr]
    reduction = next(node for node in walk(found.hi) if node.op == "rows_max")
    assert reduction.dtype == reduction.args[0].dtype == "i64"
    assert found.hi == cast_to(maximum(minimum(reduction, Sk), 0), "i32")
    assert found.lo == const(0)


def test_formulas_that_need_nothing_are_the_same() -> None:
    attn = variant((j <= i) & (i - j < 9))
    assert legalize(attn) == attn
    assert legalize(legalize(replace(attn, align=Align("top_left")))) == legalize(
        replace(attn, align=Align("top_left"))
    )
