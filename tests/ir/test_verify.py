"""The verifier: legal samples pass, each broken rule is named in its context, and all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ir_samples import PLAIN, h, i, j, qk, scale
from tile_samples import ALL, KNOBS, builder, copy, matmul, scalars, single, two_kernels

from attncc.errors import CompilerBug
from attncc.ir.attention import (
    Align,
    Attention,
    Call,
    Dims,
    Heads,
    Input,
    KeyRange,
    KeyTiles,
    Normalizer,
    Size,
    Storage,
)
from attncc.ir.build import Builder, dot, full, function, iota, program, read, reduce, reshape, tile, trans
from attncc.ir.expr import OPS, STRUCTURAL, TRUE, Expr, bucket, cast_to, const, ew, load, name
from attncc.ir.rules import RULES
from attncc.ir.tile import CallFn, For, If, Knob, Launch, Let, Param, Program, Scratch, Statement, Store, StoreTile
from attncc.ir.verify import verify_attention, verify_program

BIAS = Input("bias", ("Hq", "Sk"))
CUTS = Input("cuts", ("B", "n_cuts"), "int32", sorted=True)


def part(**changes: Any) -> Attention:
    return replace(PLAIN, parts=(replace(PLAIN.part, **changes),), inputs=(BIAS, CUTS))


# -- variants ------------------------------------------------------------------------------------

LEGAL = {
    "plain": PLAIN,
    "inputs": part(score=qk * scale + load("bias", h, j), mask=bucket("cuts", name("b"), i) > 0),
    "own sizes": part(mask=j < name("n_cuts")),
    "sink": part(normalizer=Normalizer(sink=load("bias", h, const(0)))),
    "sizes in the score": part(score=qk * scale * ew("log", name("Sk"))),
    "solved": part(
        key_tiles=KeyTiles(
            (KeyRange(const(0), name("i1") + 1, const(0), Expr("rows_min", (i + 1,), None, "i32")),),
            name("j0") <= name("row1"),
        )
    ),
    "gathered": replace(
        part(kv=Storage("gathered", index="picks")), inputs=(Input("picks", ("B", "Hk", "Sq", 8), "int32"),)
    ),
    "aligned": replace(PLAIN, align=Align("input", "at"), inputs=(Input("at", ("B",), "int64"),)),
}


@pytest.mark.parametrize("case", LEGAL)
def test_legal_variants_pass(case: str) -> None:
    verify_attention(LEGAL[case])


BROKEN = {
    "unknown name": (part(mask=j <= name("k")), "'k' is not known here"),
    "qk in the mask": (part(mask=qk > 0.0), "'qk' is not known here"),
    "tile names in the mask": (part(mask=j <= name("i1")), "'i1' is not known here"),
    "mask of floats": (part(mask=qk * 0.5), "expected bool, got f32"),
    "mask of integers": (part(mask=i + j), "expected bool, got i32"),
    "score of integers": (part(score=i - j), "expected f16 or bf16 or f32 or f64, got i32"),
    "score of booleans": (part(score=j <= i), "got bool"),
    "unknown input": (part(score=qk + load("nope", h)), "tensor 'nope' is not known"),
    "too few indices": (part(score=qk + load("bias", h)), "'bias' has 2 axes, got 1"),
    "too many indices": (part(score=qk + load("bias", h, i, j)), "'bias' has 2 axes, got 3"),
    "float index": (part(score=qk + load("bias", h, qk)), "'bias' is indexed by a f32"),
    "wrong dtype of a load": (part(mask=load("bias", h, j, dtype="bool")), "its arguments make it f32"),
    "bucket of floats": (part(mask=bucket("bias", h, i) > 0), "'bias' is f32"),
    "name with another dtype": (part(score=name("i", "f32")), "'i' is given as f32"),
    "name with a shape": (part(score=name("qk", "f32", ("BM",))), "'qk' is given as f32"),
    "unknown operator": (part(score=Expr("softplus", (qk,))), "'softplus' is no operator"),
    "missing argument": (part(score=Expr("add", (qk,))), "'add' takes 2 arguments, got 1"),
    "wrong dtype of an operator": (part(score=Expr("add", (i, j), None, "f32")), "its arguments make it i32"),
    "logic on integers": (part(mask=Expr("and", (i, j), None, "bool")), "'and' takes booleans"),
    "choice by an integer": (part(score=Expr("where", (i, qk, qk))), "'where' chooses by a boolean"),
    "choice of two kinds": (part(score=Expr("where", (j <= i, qk, TRUE))), "'where' chooses f32 or bool"),
    "odd constant": (part(score=Expr("const", (), "one")), "a constant f32 cannot be 'one'"),
    "float in an integer constant": (part(score=qk + Expr("const", (), 0.5, "i32")), "a constant i32 cannot be 0.5"),
    "tile operator": (part(score=Expr("iota", (), 4, "f32")), "'iota' does not exist at the scalar level"),
    "sink over keys": (part(normalizer=Normalizer(sink=qk)), "'qk' is not known here"),
    "sink of sigmoid": (part(normalizer=Normalizer("sigmoid", sink=const(1.0))), "sigmoid has no sink"),
    "negative eps": (part(normalizer=Normalizer("linear", eps=-1.0)), "eps >= 0"),
    "eps not a number": (part(normalizer=Normalizer("linear", eps=float("nan"))), "eps >= 0"),
    "certain dropout": (part(dropout=1.0), r"\[0, 1\)"),
    "negative dropout": (part(dropout=-0.1), r"\[0, 1\)"),
    "pages without a size": (part(kv=Storage("paged")), "page size"),
    "latent too narrow": (replace(part(kv=Storage("latent")), dims=Dims(16, 32)), "Dv 32 > Dqk 16"),
    "gathered from nothing": (part(kv=Storage("gathered", index="nope")), "'nope' is not declared"),
    "gathered from floats": (part(kv=Storage("gathered", index="bias")), "integer input of 4 axes"),
    "aligned by floats": (replace(part(), align=Align("input", "bias")), "integer input of 1 axes"),
    "aligned by nothing": (replace(PLAIN, align=Align("input", "nope")), "'nope' is not declared"),
    "no query heads": (replace(PLAIN, heads=Heads(0, 1, 1)), "at least 1, got 0"),
    "heads that do not divide": (replace(PLAIN, heads=Heads(6, 4, 4)), "divisor of the 6 query heads, got 4"),
    "more key heads than queries": (replace(PLAIN, heads=Heads(2, 4, 2)), "divisor of the 2 query heads, got 4"),
    "no columns": (replace(PLAIN, dims=Dims(0, 16)), "1 to 1024, got 0"),
    "too many columns": (replace(PLAIN, dims=Dims(16, 2000)), "1 to 1024, got 2000"),
    "no parts": (replace(PLAIN, parts=()), "there is none"),
    "two inputs of a name": (replace(PLAIN, inputs=(BIAS, BIAS)), "declared twice"),
    "input called qk": (replace(PLAIN, inputs=(Input("qk", ()),)), "the name is taken"),
    "input called Sk": (replace(PLAIN, inputs=(Input("Sk", ()),)), "the name is taken"),
    "unknown dtype": (replace(PLAIN, inputs=(Input("x", (), "float"),)), "unknown dtype 'float'"),
    "sorted floats": (replace(PLAIN, inputs=(Input("x", ("Sk",), sorted=True),)), "only integers can be sorted"),
    "empty axis": (replace(PLAIN, inputs=(Input("x", (0,)),)), "impossible shape"),
    "impossible size": (replace(PLAIN, sizes=(Size("Sk", multiple=0),)), "impossible bounds"),
    "scale over rows": (replace(PLAIN, scale=ew("sqrt", i)), "'i' is not known here"),
    "gate over keys": (replace(part(), combine=Call("lerp", (load("bias", h, j),))), "'j' is not known here"),
    "range over keys": (
        part(key_tiles=KeyTiles((KeyRange(const(0), j, const(0), const(0)),))),
        "ranges.0..hi: j\n    'j' is not known here",
    ),
    "float range": (
        part(key_tiles=KeyTiles((KeyRange(const(0.0), const(0), const(0), const(0)),))),
        "expected i8 or u8 or i32 or i64, got f32",
    ),
    "skip of integers": (part(key_tiles=KeyTiles((), skip=name("j0"))), "expected bool, got i32"),
    "no granularity": (part(key_tiles=KeyTiles((), granularity=(0, 1))), "impossible granularity"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_variants_are_refused(case: str) -> None:
    attn, message = BROKEN[case]
    with pytest.raises(CompilerBug, match=message):
        verify_attention(attn)


def test_all_faults_of_a_variant_at_once() -> None:
    attn = replace(part(mask=j <= name("k"), dropout=2.0), heads=Heads(6, 4, 4))
    with pytest.raises(CompilerBug) as bug:
        verify_attention(attn)
    message = str(bug.value)
    assert message.startswith("attention 'plain' breaks 4 rules of the IR:")
    assert "parts[0].mask: j <= k\n    'k' is not known here" in message
    assert "parts[0].dropout" in message
    assert "heads.kv" in message


def test_rules_know_every_operator() -> None:
    assert set(RULES) == set(STRUCTURAL)
    assert not set(RULES) & set(OPS)


# -- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ALL)
def test_legal_programs_pass(sample: str) -> None:
    verify_program(ALL[sample]())


X = Param("x", "buffer", "f32", rank=1)
T = Param("t", "operand", "f32", tiles=(("BM", 16),), extent=(name("N"), 16))
S = name("s", "f32", ("BM", "BN"))
Write = Callable[[Builder], object]


def written(*statements: Statement) -> Write:
    return lambda b: b.stack[-1].extend(statements)


def let(value: Expr) -> Write:
    return lambda b: b.let("y", value)


def loop(*statements: Statement) -> For:
    return For(name("n"), const(0), const(4), const(1), statements)


def runtime(*statements: Statement) -> If:
    return If(name("N") > 0, statements)


def rebound(value: Expr) -> Let:
    return Let(name("a", value.dtype, value.shape), value)


A = rebound(const(0.0))
SQUARE = full(("BM", "BN"), 0.0)

FAULTS: dict[str, tuple[Write, str]] = {
    "unbound": (let(name("z") + 1), "'z' is not bound here"),
    "read with another dtype": (written(A, Let(name("y"), name("a") + 1)), "'a' is f32, read as i32"),
    "read with another shape": (written(A, Let(S, name("a", "f32", ("BM", "BN")))), "read as f32"),
    "value of another type": (written(Let(name("y"), const(1.0))), "'y' is i32, its value f32"),
    "value of another shape": (written(Let(name("y", "f32", ("BM",)), const(1.0))), "its value f32"),
    "loop changes a dtype": (written(A, loop(rebound(const(1)))), "'a' is f32 outside of this block, rebound as i32"),
    "loop changes a shape": (written(A, loop(rebound(full(("BM",), 0.0)))), r"rebound as f32\[BM\]"),
    "branch changes a dtype": (written(A, runtime(rebound(const(1)))), "rebound as i32"),
    "name from inside a loop": (written(loop(A), Let(name("y", "f32"), name("a", "f32"))), "'a' is not bound here"),
    "name from inside a branch": (written(runtime(A), Let(name("y", "f32"), name("a", "f32"))), "'a' is not bound"),
    "loop variable afterwards": (written(loop(), Let(name("y"), name("n"))), "'n' is not bound here"),
    "loop variable rebound": (written(loop(Let(name("n", "f32"), const(0.0)))), "'n' is i32 outside"),
    "loop over floats": (written(For(name("n"), const(0.0), const(1), const(1), ())), "expected a scalar i8"),
    "loop over a vector": (written(For(name("n"), const(0), iota("BM"), const(1), ())), r"got i32\[BM\]"),
    "branch on a vector": (written(If(iota("BM") > 1, ())), r"expected a scalar bool .* got bool\[BM\]"),
    "branch on a float": (written(If(const(1.0), ())), "expected a scalar bool"),
    "knob rebound": (written(Let(name("BM"), const(1))), "'BM' is a parameter that cannot be rebound"),
    "tensor rebound": (written(Let(name("x"), const(1))), "'x' is a parameter that cannot be rebound"),
    "binding no name": (written(Let(const(1), const(1))), "'const' cannot be bound"),
    "unknown tensor": (let(read(Param("w", "buffer", "f32", rank=1), 0)), "tensor 'w' is not known"),
    "wrong rank": (let(Expr("load", (const(0), const(0)), "x")), "'x' has 1 axes, got 2"),
    "wrong dtype of a load": (let(Expr("load", (const(0),), "x", "i32")), "its arguments make it f32"),
    "indexed by a float": (let(Expr("load", (const(0.0),), "x")), "'x' is indexed by a f32"),
    "tile of a buffer": (let(tile(X, 0, 0, 0, 0, ("BM", 16))), "'x' is no operand"),
    "undeclared tile": (let(tile(T, 0, 0, 0, 0, ("BN", 16))), "'t' is declared with tiles"),
    "unknown dim": (let(full(("BK",), 0.0)), "the dim 'BK' is no constexpr here"),
    "scalar operator": (let(Expr("rows_min", (name("N"),), None, "i32")), "does not exist at the tile level"),
    "shapes that do not broadcast": (
        let(Expr("add", (iota("BM"), iota("BN")), None, "i32", ("BM",))),
        "do not broadcast",
    ),
    "wrong shape": (
        let(Expr("add", (iota("BM"), iota("BM")), None, "i32", ("BN",))),
        r"its arguments make it i32\[BM\]",
    ),
    "inner dims differ": (let(dot(SQUARE, SQUARE)), "inner dims differ"),
    "dot of a vector": (let(Expr("dot", (iota("BM"), SQUARE), None, "f32", ("BM", "BN"))), "'dot' takes matrices"),
    "dot of two dtypes": (let(dot(cast_to(SQUARE, "bf16"), trans(SQUARE))), "'dot' of bf16 and f32"),
    "dot on a foreign accumulator": (let(dot(SQUARE, trans(SQUARE), SQUARE)), r"'dot' adds to f32\[BM, BM\]"),
    "dot of one": (let(Expr("dot", (SQUARE,))), "'dot' takes"),
    "reshape to another size": (let(reshape(SQUARE, ("BM", "BN/8", 4))), "differ in size"),
    "axis that is not there": (let(Expr("reduce", (iota("BM"),), ("sum", 1), "i32")), "no axis 1"),
    "unknown reduction": (let(Expr("reduce", (iota("BM"),), ("mean", 0), "i32")), "no reduction 'mean'"),
    "new axis too far": (let(Expr("expand", (iota("BM"),), 3, "i32", ("BM", 1))), "no new axis 3"),
    "transposed vector": (let(Expr("trans", (iota("BM"),), None, "i32", ("BM",))), "'trans' takes a matrix"),
    "full of a vector": (let(Expr("full", (iota("BM"),), None, "i32", ("BM", "BN"))), "'full' repeats a scalar"),
    "sum along a matrix": (let(Expr("cumsum", (SQUARE,), None, "f32", ("BM", "BN"))), "'cumsum' takes one axis"),
    "launch axis": (let(program(1)), "axis 0, got 1"),
    "attribute of another operator": (let(Expr("add", (const(1), const(2)), "nonneg", "i32")), "no attribute 'nonneg'"),
    "store to nowhere": (written(Store("w", (const(0),), const(1.0))), "tensor 'w' is not known"),
    "store with two indices": (written(Store("x", (const(0), const(0)), const(1.0))), "'x' has 1 axes, got 2"),
    "store at a float": (written(Store("x", (const(0.0),), const(1.0))), "'x' is indexed by a f32"),
    "store of an integer": (written(Store("x", (const(0),), const(1))), "'x' holds f32, got i32"),
    "store under a number": (written(Store("x", (const(0),), const(1.0), const(1))), "the mask is i32"),
    "more values than places": (written(Store("x", (const(0),), full(("BM",), 0.0))), "values go to"),
    "mask wider than the index": (written(Store("x", (const(0),), const(0.0), iota("BM") < 2)), "values go to"),
    "store of mixed shapes": (written(Store("x", (iota("BM"),), full(("BN",), 0.0))), "do not broadcast"),
    "tile to a buffer": (written(StoreTile("x", (const(0),) * 4, SQUARE)), "'x' is no operand"),
    "tile of another shape": (written(StoreTile("t", (const(0),) * 4, SQUARE)), "'t' takes f32 tiles"),
    "tile of another dtype": (written(StoreTile("t", (const(0),) * 4, full(("BM", 16), 0.0, "bf16"))), "got bf16"),
    "tile at a vector": (
        written(StoreTile("t", (iota("BM"), *[const(0)] * 3), full(("BM", 16), 0.0))),
        "expected a scalar",
    ),
    "unknown function": (written(CallFn((), "f", ())), "there is no function 'f'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_broken_programs_are_refused(case: str) -> None:
    write, message = FAULTS[case]
    b = builder(X, T, *scalars("N"))
    write(b)
    with pytest.raises(CompilerBug, match=message):
        verify_program(single("fault", b, const(1)))


def test_a_compile_time_branch_keeps_what_it_binds() -> None:
    flag = Param("FLAG", "constexpr", "i32")
    b = Builder({"x": X, "FLAG": flag})
    with b.when(name("FLAG") > 0):
        b.let("a", const(1.0))
    with b.when(name("FLAG") > 0):
        b.store(X, (0,), name("a", "f32"))
    verify_program(replace(single("p", b, const(1)), launches=(Launch("p", (("FLAG", 1),)),)))


def test_straight_lines_may_reuse_a_name() -> None:
    b = builder(X)
    b.let("a", const(1))
    b.store(X, (0,), b.let("a", const(1.0)))
    verify_program(single("p", b, const(1)))


def test_all_faults_of_a_program_at_once_with_their_statements() -> None:
    b = builder(X)
    b.let("y", name("z") + 1)
    with b.loop("n", 0, 4):
        b.store(X, (name("n"),), const(1))
    with pytest.raises(CompilerBug) as bug:
        verify_program(single("p", b, name("nowhere")))
    message = str(bug.value)
    assert message.startswith("program 'p' breaks 3 rules")
    assert "kernel p: y: i32 = z + 1\n    'z' is not bound here" in message
    assert "kernel p: store x[n] = 1\n    'x' holds f32, got i32" in message
    assert "kernel p: grid\n    'nowhere' is not bound here" in message


# -- functions -----------------------------------------------------------------------------------


def calling(*args: Expr, targets: tuple[Expr, ...] = (name("y", "f32"),)) -> Program:
    """A kernel that calls `f(a: f32, w: buffer, v: [BM], BM)`, which gives one f32."""
    inner = Builder({"x": X})
    total = reduce("sum", name("v", "f32", ("BM",)), 0) + name("a", "f32") + read(X, 0)
    inner.let("r", total)
    f = function("f", inner, [name("r", "f32")], ("BM",))
    b = builder(X, *scalars("N"))
    b.let("v", full(("BM",), 0.0))
    b.let("a", const(1.0))
    b.stack[-1].append(CallFn(targets, "f", args))
    return single("p", b, const(1), (f,))


V, SCALAR, XN, BM = name("v", "f32", ("BM",)), name("a", "f32"), name("x"), name("BM")


def _in_order() -> tuple[Expr, ...]:
    f = calling().kernels[0].functions[0]
    known = {"v": V, "a": SCALAR, "x": XN, "BM": BM}
    return tuple(known[p.name] for p in f.params)


def swapped(**changes: Expr) -> tuple[Expr, ...]:
    f = calling().kernels[0].functions[0]
    return tuple(changes.get(p.name, a) for p, a in zip(f.params, _in_order(), strict=True))


def test_a_right_call_passes() -> None:
    verify_program(calling(*_in_order()))


CALLS: dict[str, tuple[Program, str]] = {
    "too few arguments": (calling(*_in_order()[:-1]), "'f' takes 4 arguments, got 3"),
    "too many arguments": (calling(*_in_order(), BM), "'f' takes 4 arguments, got 5"),
    "scalar of another dtype": (calling(*swapped(a=const(1))), "parameter 'a' is f32, got i32"),
    "tile of another shape": (calling(*swapped(v=full(("BN",), 0.0))), r"'v' is f32\[BM\], got f32\[BN\]"),
    "value for a tensor": (calling(*swapped(x=const(1))), "parameter 'x' is a f32 buffer of rank 1, got 1"),
    "unknown tensor": (calling(*swapped(x=name("w"))), "got w"),
    "run-time constant": (calling(*swapped(BM=name("N"))), "parameter 'BM' is constexpr, got N"),
    "no result wanted": (calling(*_in_order(), targets=()), "gives 1 results, got 0 names"),
    "result of another type": (calling(*_in_order(), targets=(name("y"),)), "'y' is i32, the result f32"),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls_are_refused(case: str) -> None:
    bad, message = CALLS[case]
    with pytest.raises(CompilerBug, match=message):
        verify_program(bad)


def test_functions_see_their_parameters_alone() -> None:
    whole = calling(*_in_order())
    kernel = whole.kernels[0]
    f = kernel.functions[0]
    leaky = replace(f, body=(*f.body, Let(name("r", "f32"), name("N") * 1.0)))
    with pytest.raises(CompilerBug, match=r"function f: r: f32 = N .* 1.0\n    'N' is not bound here"):
        verify_program(replace(whole, kernels=(replace(kernel, functions=(leaky,)),)))


# -- launches, knobs, scratch --------------------------------------------------------------------

SUM = two_kernels()
COPY = copy()
KERNEL = COPY.kernels[0]

WHOLE: dict[str, tuple[Program, str]] = {
    "kernel twice": (replace(COPY, kernels=(KERNEL, KERNEL)), "defined twice"),
    "never launched": (replace(COPY, launches=()), "never launched"),
    "no such kernel": (replace(COPY, launches=(*COPY.launches, Launch("gone"))), "there is no such kernel"),
    "undeclared knob": (replace(COPY, knobs=KNOBS[1:]), "constexpr 'BM' is neither a knob nor fixed"),
    "knob without choices": (replace(COPY, knobs=(*KNOBS, Knob("GROUP", ()))), "impossible choices"),
    "negative knob": (replace(COPY, knobs=(*KNOBS, Knob("GROUP", (-1,)))), "impossible choices"),
    "knob twice": (replace(COPY, knobs=(*KNOBS, KNOBS[0])), "knob BM\n    defined twice"),
    "constant of nothing": (replace(COPY, launches=(Launch("copy", (("FLAG", 1),)),)), "'FLAG' is no constexpr"),
    "parameter twice": (
        replace(COPY, kernels=(replace(KERNEL, params=(*KERNEL.params, KERNEL.params[0])),)),
        "parameter 'x' is there twice",
    ),
    "tile as a kernel parameter": (
        replace(COPY, kernels=(replace(KERNEL, params=(*KERNEL.params, Param("v", "value", shape=("BM",)))),)),
        "a tile, which only functions take",
    ),
    "float grid": (replace(COPY, kernels=(replace(KERNEL, grid=const(1.5)),)), "expected a scalar i8"),
    "scratch read first": (replace(SUM, launches=SUM.launches[::-1]), "scratch 'part' is read before"),
    "scratch never written": (
        replace(SUM, launches=SUM.launches[1:], kernels=SUM.kernels[1:]),
        "'part' is read before",
    ),
    "scratch of another dtype": (replace(SUM, scratch=(Scratch("part", (const(9),), "i32"),)), "scratch i32 of rank 1"),
    "scratch of another rank": (
        replace(SUM, scratch=(Scratch("part", (const(9), const(9)), "f32"),)),
        "scratch f32 of rank 2",
    ),
    "scratch of an unknown size": (replace(SUM, scratch=(Scratch("part", (name("Z"),), "f32"),)), "'Z' is not bound"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_wrong_programs_are_refused(case: str) -> None:
    bad, message = WHOLE[case]
    with pytest.raises(CompilerBug, match=message):
        verify_program(bad)


def _twice(order: tuple[int, ...]) -> Program:
    """One kernel launched once for each entry; it fills the scratch where PASS is 0, reads it where PASS is 1."""
    marks, flag = Param("marks", "buffer", "i32", rank=1), Param("PASS", "constexpr", "i32")
    b = Builder({"marks": marks, "x": X, "PASS": flag})
    with b.when(ew("eq", name("PASS"), 0)):
        b.store(marks, (program(),), const(1))
    with b.when(ew("eq", name("PASS"), 1)):
        b.store(X, (program(),), cast_to(read(marks, program()), "f32"))
    launches = tuple(Launch("p", (("PASS", n),)) for n in order)
    whole = single("p", b, const(1), scratch=(Scratch("marks", (const(1),), "i32"),))
    return replace(whole, launches=launches)


def test_dead_branches_of_a_launch_read_nothing() -> None:
    verify_program(_twice((0, 1)))
    with pytest.raises(CompilerBug, match="scratch 'marks' is read before"):
        verify_program(_twice((1, 0)))


def test_an_extent_needs_its_names() -> None:
    b = builder(T)
    b.let("y", tile(T, 0, 0, 0, 0, ("BM", 16)))
    with pytest.raises(CompilerBug, match=r"extent of t.*\n    'N' is not bound here"):
        verify_program(single("p", b, const(1)))


def test_matmul_with_a_swapped_operand_is_refused() -> None:
    whole = matmul()
    kernel = whole.kernels[0]
    wrong = tuple(replace(p, tiles=(("BN", 16),)) if p.name == "X" else p for p in kernel.params)
    with pytest.raises(CompilerBug, match="'X' is declared with tiles"):
        verify_program(replace(whole, kernels=(replace(kernel, params=wrong),)))
