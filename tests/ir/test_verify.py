"""The verifier on programs: legal samples pass, each broken rule is named in its context, and all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tile_samples import ALL, KNOBS, builder, copy, matmul, scalars, single, two_kernels

from attncc.errors import CompilerBug
from attncc.ir.build import Builder, dot, full, function, iota, program, read, reduce, reshape, tile, trans, unpack
from attncc.ir.expr import OPS, STRUCTURAL, Expr, cast_to, const, ew, name
from attncc.ir.rules import RULES
from attncc.ir.tile import (
    AtOnce,
    CallFn,
    For,
    If,
    Knob,
    Launch,
    Let,
    Param,
    Program,
    Scratch,
    Statement,
    Store,
    StoreTile,
)
from attncc.ir.verify import verify_program


def test_rules_know_every_operator() -> None:
    assert set(RULES) == set(STRUCTURAL)
    assert not set(RULES) & set(OPS)


@pytest.mark.parametrize("sample", ALL)
def test_legal_programs_pass(sample: str) -> None:
    verify_program(ALL[sample]())


X = Param("x", "buffer", "f32", rank=1)
E = Param("e", "buffer", "f8e5m2", rank=1)
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
WIDE = full(("BM", 16), 0.0)
STORED = cast_to(SQUARE, "f8e4m3")
WORDS = full(("BM", "BN"), 0, "i16")

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
    "dot of words": (let(dot(WORDS, trans(WORDS))), "'dot' of i16 and i16"),
    "sum of words": (let(Expr("add", (WORDS, WORDS), None, "i16", WORDS.shape)), "cast it first"),
    "fields of no words": (let(unpack(SQUARE, "u8", 0, "bf16")), "'unpack' takes words, got f32"),
    "a field across two": (let(unpack(WORDS, "u8", 4, "bf16")), "words have no u8 at bit 4"),
    "a field of no kind": (let(unpack(WORDS, "u2", 0, "bf16")), "words have no u2 at bit 0"),
    "fields in fp32": (let(unpack(WORDS, "u8", 0, "f32")), "'unpack' makes bf16 or f16, not f32"),
    "another kind of product": (let(Expr("dot", (SQUARE, trans(SQUARE)), "fast", "f32", ("BM", "BM"))), "no attribute"),
    "dot of stored floats": (let(dot(STORED, trans(STORED))), "'dot' of f8e4m3 and f8e4m3"),
    "sum of stored floats": (let(Expr("add", (STORED, STORED), None, "f8e4m3", STORED.shape)), "cast it first"),
    "store of another narrow float": (
        written(Store("e", (iota("BM"),), cast_to(full(("BM",), 1.0), "f8e4m3"))),
        "'e' holds f8e5m2",
    ),
    "a rounded sum": (let(Expr("add", (SQUARE, SQUARE), "rounded", "f32", SQUARE.shape)), "no attribute 'rounded'"),
    "a rounded quotient of integers": (let(Expr("floordiv", (const(3), const(2)), "rounded", "i32")), "no attribute"),
    "dot on a foreign accumulator": (let(dot(SQUARE, trans(SQUARE), SQUARE)), r"'dot' adds to f32\[BM, BM\]"),
    "dot of one": (let(Expr("dot", (SQUARE,))), "'dot' takes"),
    "halves of a vector": (let(Expr("half", (iota("BM"),), 0, "i32", ("BM",))), "'half' takes a matrix"),
    "a third half": (let(Expr("half", (WIDE,), 2, "f32", ("BM", 8))), "the halves 0, 1, even, odd, got 2"),
    "halves of 3 columns": (let(Expr("half", (full(("BM", 3), 0.0),), 0, "f32", ("BM", 1))), "even number"),
    "halves of a knob's columns": (let(Expr("half", (SQUARE,), 0, "f32", ("BM", "BN/2"))), "so many columns"),
    "tiles of two widths": (
        let(Expr("joined", (WIDE, full(("BM", 8), 0.0)), None, "f32", ("BM", 24))),
        "two of one type",
    ),
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
    "columns joined otherwise": (
        let(Expr("joined", (WIDE, WIDE), "at random", "f32", ("BM", 16))),
        "'joined' has no attribute 'at random'",
    ),
    "unknown function": (written(CallFn((), "f", ())), "there is no function 'f'"),
    "unknown function at once": (written(AtOnce((CallFn((), "f", ()),), (), ())), "there is no function 'f'"),
    "warps for nothing": (written(AtOnce((CallFn((), "f", ()),), (4,), (32,))), "1 calls, warps of 1, registers of 1"),
    "results at once": (written(AtOnce((CallFn((name("y"),), "f", ()),), (), ())), "a call gives results"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_broken_programs_are_refused(case: str) -> None:
    write, message = FAULTS[case]
    b = builder(X, E, T, *scalars("N"))
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
    other = replace(kernel, name="other", functions=(replace(f, doc="Another one."),))
    with pytest.raises(CompilerBug, match=f"function f\n.*another one in kernel other than in kernel {kernel.name}"):
        verify_program(replace(whole, kernels=(kernel, other), launches=(*whole.launches, Launch("other"))))
    same = replace(kernel, name="other")
    verify_program(replace(whole, kernels=(kernel, same), launches=(*whole.launches, Launch("other"))))


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
