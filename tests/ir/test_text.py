"""The canonical text: exact strings, totality, injectivity, and no dependence on the process."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from ir_samples import FULL, PLAIN, b, formulas, h, i, j, qk, scale
from tile_samples import attention, copy

from attncc.ir.attention import Align, Input
from attncc.ir.build import (
    column,
    dot,
    expand,
    full,
    half,
    iota,
    joined,
    program,
    quotient,
    reduce,
    remainder,
    reshape,
    row,
    trans,
)
from attncc.ir.expr import FALSE, TRUE, Expr, bucket, cast_to, const, divide_exactly, eq, ew, load, maximum, name, where
from attncc.ir.text import digest, text

SQUARE = name("s", "f32", ("BM", "BM"))
WIDE = name("w", "f32", ("BM", 64))

EXPRESSIONS = {
    "qk * scale + 1.0": qk * scale + 1.0,
    "(qk + scale) * qk": (qk + scale) * qk,
    "qk + (scale + qk)": qk + (scale + qk),
    "qk + scale + qk": qk + scale + qk,
    "i - (j - h)": i - (j - h),
    "i - j - h": i - j - h,
    "qk / (scale / qk)": qk / (scale / qk),
    "i // 4 == j // 4": eq(i // 4, j // 4),
    "(i < 4) & (j <= i)": (i < 4) & (j <= i),
    "(i < 4) & (j <= i) | (h > 1)": (i < 4) & (j <= i) | (h > 1),
    "((i < 4) | (j <= i)) & (h > 1)": ((i < 4) | (j <= i)) & (h > 1),
    "~(i < 4)": ~(i < 4),
    "-qk ** 2": -(qk**2),
    "(-qk) ** 2": (-qk) ** 2,
    "qk ** -scale": qk ** (-scale),
    "(qk ** scale) ** qk": (qk**scale) ** qk,
    "qk ** scale ** qk": qk ** (scale**qk),
    "(-2.0) ** qk": ew("pow", -2.0, qk),
    "qk - -2.0": qk - (-2.0),
    "-(2.0)": -const(2.0),
    "max(i, j - 1) % 3": maximum(i, j - 1) % 3,
    "where(j <= i, qk, -inf)": where(j <= i, qk, float("-inf")),
    "bias[h, i - j + 1024]": load("bias", h, i - j + 1024),
    "bucket(cuts; b, i)": bucket("cuts", b, i),
    "tanh(qk / 50.0)": ew("tanh", qk / 50.0),
    "true": TRUE,
    "false": FALSE,
    "i64(5)": const(5, "i64"),
    "8589934592": const(2**33),
    "f16(qk)": cast_to(qk, "f16"),
    "f16(0.5)": const(0.5, "f16"),
    "quotient(i, 4)": quotient(i, 4),
    "ratio(qk, 3.0) / 2.0": divide_exactly(qk, 3.0) / 2.0,
    "remainder(i, 4) + 1": remainder(i, 4) + 1,
    "x[rows, mask=rows < Sq]": Expr(
        "load", (name("rows", shape=("BM",)), name("rows", shape=("BM",)) < name("Sq")), "x", "f32", ("BM",)
    ),
    "m[:, None] - m[None, :]": column(name("m", "f32", ("BM",))) - row(name("m", "f32", ("BM",))),
    "dot(s, trans(s), s)": dot(SQUARE, trans(SQUARE), SQUARE),
    "joined(half(w, 1), half(w, 0))": joined(half(WIDE, 1), half(WIDE, 0)),
    "joined(half(w, odd), half(w, even), in turn)": joined(
        half(WIDE, 1, in_turn=True), half(WIDE, 0, in_turn=True), in_turn=True
    ),
    "sum(reshape(s, [BM, BM/8, 8]), axis=1)": reduce("sum", reshape(SQUARE, ("BM", "BM/8", 8)), 1),
    "max(s + s, axis=0)": reduce("max", SQUARE + SQUARE, 0),
    "(s + s)[None, :, :]": expand(SQUARE + SQUARE, 0),
    "full(0.0, [BM, 64])": full(("BM", 64), 0.0),
    "program(0) * 4 + iota(BM)": program() * 4 + iota("BM"),
    "tile(Q; b, h, i, 64; [BM, 16])": Expr("tile", (b, h, i, const(64)), "Q", "bf16", ("BM", 16)),
    "bf16(s)": cast_to(SQUARE, "bf16"),
}


@pytest.mark.parametrize(("expected", "e"), EXPRESSIONS.items(), ids=str)
def test_expression(expected: str, e: Expr) -> None:
    assert text(e) == expected


@given(formulas(), formulas())
def test_equal_text_means_equal_formula(x: Expr, y: Expr) -> None:
    assert (text(x) == text(y)) == (_plain(x) == _plain(y))


def _plain(e: Expr) -> object:
    """A formula as nested tuples in which 1 and 1.0, 0.0 and -0.0, NaN and NaN are told apart as text does."""
    attr = repr(float(e.attr)) if e.op == "const" and e.dtype == "f32" else repr(e.attr)
    return (e.op, attr, e.dtype, tuple(_plain(a) for a in e.args))


def test_formulas_read_as_python_reads_them() -> None:
    """Same grouping as Python's own grammar: what the spec's parser relies on."""
    x, y, z = 3, 5, 2
    cases = {
        (i - (j - h)): x - (y - z),
        (i - j - h): x - y - z,
        (i * (j + h) // 2): x * (y + z) // 2,
        (-(i % 4)): -(x % 4),
        ((-i) % 4): (-x) % 4,
        (i // (j // h)): x // (y // z),
    }
    for e, value in cases.items():
        names = {"i": x, "j": y, "h": z}
        assert _python(text(e), names) == value, text(e)


def _python(source: str, names: dict[str, int]) -> int:
    def go(node: ast.AST) -> int:
        match node:
            case ast.Expression(body):
                return go(body)
            case ast.Name(id=key):
                return names[key]
            case ast.Constant(value=int(value)):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -go(operand)
            case ast.BinOp(left, op, right):
                table = {
                    ast.Add: int.__add__,
                    ast.Sub: int.__sub__,
                    ast.Mult: int.__mul__,
                    ast.FloorDiv: int.__floordiv__,
                    ast.Mod: int.__mod__,
                }
                return table[type(op)](go(left), go(right))
        raise AssertionError(ast.dump(node))

    return go(ast.parse(source, mode="eval"))


def test_plain_variant_whole() -> None:
    assert text(PLAIN) == (
        "attention plain\n"
        "    heads: q=4, kv=2, v=2\n"
        "    dims: qk=16, v=16\n"
        "    part:\n"
        "        score: qk * scale\n"
        "        mask: j <= i\n"
        "    scale: rsqrt(Dqk)\n"
    )


def test_full_variant_shows_each_thing() -> None:
    shown = text(FULL)
    for line in (
        "    heads: q=8, kv=4, v=2, map=tile\n",
        "    layout: varlen\n",
        "    inputs: name=bias, shape=[Hq, 2048], dtype=bf16, grad=true\n",
        "    sizes: name=Sk, max=4096, multiple=8\n",
        "    align: kind=input, input=starts\n",
        "    part near:\n",
        "        normalizer: kind=linear, sink=sinks[h], eps=1e-06\n",
        "        kv: kind=paged, page_size=16, rope=64, index=picks\n",
        "            keys [0, i1 + 1), full [0, i0)\n",
        "    combine: lerp(mix[h])\n",
    ):
        assert line in shown


# -- totality: every field of every node changes the text ----------------------------------------


def _other(x: Any) -> Any:
    """A value of the same kind that is not `x`."""
    match x:
        case bool():
            return not x
        case int() | float():
            return x + 1
        case str():
            return x + "_"
        case tuple():
            return x[:-1]
        case Expr():
            return x + 1 if x.dtype != "bool" else ~x
        case _:
            return None


PAIR = re.compile(r"(kwargs|tiles|constants)\[\d+\]$|\.extent$")
"""Tuples whose length is fixed."""


def _mutations(x: Any, path: str) -> Iterator[tuple[str, Any]]:
    """`x` with one thing inside it changed, in every way `_other` knows."""
    if isinstance(x, Expr):
        yield path, _other(x)
    elif is_dataclass(x):
        for f in fields(x):
            for at, new in _mutations(getattr(x, f.name), f"{path}.{f.name}"):
                yield at, replace(x, **{f.name: new})
    elif isinstance(x, tuple):
        if x and not PAIR.search(path):
            yield f"{path}[:]", _other(x)
        for n, entry in enumerate(x):
            for at, new in _mutations(entry, f"{path}[{n}]"):
                yield at, (*x[:n], new, *x[n + 1 :])
    elif x is not None:
        yield path, _other(x)


MUTATIONS = dict(_mutations(FULL, "attn"))


def test_all_fields_are_mutated() -> None:
    assert len(MUTATIONS) > 100


@pytest.mark.parametrize("path", MUTATIONS)
def test_a_changed_field_shows(path: str) -> None:
    assert text(MUTATIONS[path]) != text(FULL), path


def test_texts_of_different_variants_differ() -> None:
    texts = {text(m): path for path, m in MUTATIONS.items()}
    assert len(texts) == len({repr(m) for m in MUTATIONS.values()})


PROGRAM_MUTATIONS = dict(_mutations(replace(attention(), why="because", skeleton="by_hand"), "program"))


def test_every_part_of_a_program_shows() -> None:
    whole = text(replace(attention(), why="because", skeleton="by_hand"))
    assert len(PROGRAM_MUTATIONS) > 200
    hidden = [path for path, other in PROGRAM_MUTATIONS.items() if text(other) == whole]
    assert hidden == []


def test_program_text_and_its_parts() -> None:
    shown = text(copy())
    for line in (
        "    knob BM: 16 | 8 | 4\n",
        "    launch copy\n",
        "kernel copy, grid quotient(N + (BM - 1), BM):\n",
        "    buffer x: f32 rank 1\n",
        "    scalar N: i32\n",
        "    at: i32[BM] = program(0) * BM + iota(BM)\n",
        "    store y[at, mask=inside] = x[at, mask=inside]\n",
    ):
        assert line in shown
    assert text(copy().kernels[0]) in shown
    assert digest(copy()) == digest(copy()) != digest(attention())


def test_words_and_formulas_are_told_apart() -> None:
    by_word = replace(FULL, combine=replace(FULL.combine, args=(), words=("mix",)))
    by_name = replace(FULL, combine=replace(FULL.combine, args=(name("mix"),)))
    assert text(by_word) != text(by_name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Align("input", "x, kind=top_left"), Align("top_left", "x")),
        (Align("input", "x\n    layout: varlen"), Align("input", "x")),
    ],
)
def test_odd_words_cannot_forge_text(one: Align, other: Align) -> None:
    assert text(replace(PLAIN, align=one)) != text(replace(PLAIN, align=other))
    assert text(replace(PLAIN, align=one)).count("\n") == text(replace(PLAIN, align=other)).count("\n")


def test_doc_with_newlines_stays_on_one_line() -> None:
    assert text(replace(PLAIN, doc="a\nb")).count("\n") == text(PLAIN).count("\n") + 1


# -- determinism ---------------------------------------------------------------------------------


def test_digest_is_the_text_s() -> None:
    assert digest(PLAIN) == digest(replace(PLAIN)) != digest(FULL)
    assert len(digest(PLAIN)) == 16
    assert int(digest(PLAIN), 16) >= 0


def test_same_text_under_other_hash_seeds() -> None:
    program = "from ir_samples import FULL; from attncc.ir.text import text; print(text(FULL), end='')"
    shown: set[str] = set()
    for seed in ("0", "1", "424242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        shown.add(
            subprocess.run(
                [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert shown == {text(FULL)}


def test_an_input_without_axes_is_shown() -> None:
    assert "inputs: name=t, shape=[]" in text(replace(PLAIN, inputs=(Input("t", ()),)))


def test_columns_of_a_part_are_shown() -> None:
    part = replace(PLAIN.part, columns=(0, 4))
    assert "        columns: [0, 4]\n" in text(replace(PLAIN, parts=(part,)))
