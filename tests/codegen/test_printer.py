"""The Triton printer: precedence, every kind of expression and statement, names; and text for the host."""

from __future__ import annotations

import ast
import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncc.codegen.host import host_expr, host_function
from attncc.codegen.signature import types
from attncc.codegen.source import Writer, called, definitions, filled
from attncc.codegen.triton import CALL, INFIX, PREFIX, Printer, dim, lower_name, print_kernels, strides
from attncc.errors import CompilerBug
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
    read,
    reduce,
    reduce_all,
    remainder,
    reshape,
    row,
    tile,
    trans,
    unpack,
)
from attncc.ir.expr import OPS, Expr, cast_to, const, divide_exactly, eq, ew, maximum, minimum, name, where
from attncc.ir.tile import (
    CallFn,
    For,
    Function,
    If,
    Kernel,
    Launch,
    Let,
    Note,
    Param,
    Program,
    Statement,
    Store,
    StoreTile,
)

Sq = name("Sq")
Q = Param("Q", "operand", "bf16", tiles=(("BM", 64),), extent=(Sq, 64))
V = Param("V", "operand", "bf16", tiles=(("BN", 128), ("BN", 64)), extent=(name("Sk"), 192))
CODES = Param("K", "operand", "i16", tiles=(("BN", 32),), extent=(name("Sk"), 32))
PAGES = Param("K", "operand", "i16")
SKEW = Param("skew_0", "operand", "f32", tiles=(("BM", "BN"),))
BIAS = Param("bias_ptr", "buffer", "f32", rank=2)
P = name("p", "f32", ("BM", 64))
CUTS = Param("cuts_ptr", "buffer", "i32", rank=2)
a, b, c, n = (name(x) for x in "abcn")
x, y, flag = name("x", "f32"), name("y", "f32"), name("flag", "bool")
F = Function("step", (Param("x", "value"), V, BIAS, Param("n", "scalar", "i32"), Param("BM", "constexpr")), (), (x,))


def printer() -> Printer:
    return Printer((Q, V, SKEW, BIAS, CUTS), {"step": F}, {"step": ["TMA"]})


EXPRESSIONS: dict[str, Expr] = {
    "a + b + c": a + b + c,
    "a + (b + c)": a + (b + c),
    "a - b - c": a - b - c,
    "a - (b - c)": a - (b - c),
    "(a + b) * c": (a + b) * c,
    "a + b * c": a + b * c,
    "a * (b * c)": a * (b * c),
    "x / (y * x)": x / (y * x),
    "-a + b": -a + b,
    "-(a + b)": -(a + b),
    "a - -b": a - -b,
    "a * -b": a * -b,
    "a * (-3)": a * -3,
    "a + (-3)": a + -3,
    "a - (-3)": Expr("sub", (a, const(-3)), None, "i32"),
    "(a < b) & (b <= c)": (a < b) & (b <= c),
    "(a < b) == (b < c)": eq(a < b, b < c),
    "(a < b) & flag | ~flag": ((a < b) & flag) | ~flag,
    "~(a == b)": ~eq(a, b),
    "(a < b) & (flag | (b > c))": (a < b) & (flag | (b > c)),
    "a != b": ew("ne", a, b),
    "(a + b) // 4": quotient(a + b, 4),
    "a % 4 * 2": remainder(a, 4) * 2,
    "a * (b % 4)": a * remainder(b, 4),
    "floor_div(a + b, 4)": (a + b) // 4,
    "floor_mod(a, -b) + 1": a % -b + 1,
    "tl.floor(x / (y + 1.0))": x // (y + 1.0),
    "float_mod(x, y)": x % y,
    "tl.minimum(a, tl.maximum(b, 0))": minimum(a, maximum(b, 0)),
    "tl.where(a < b, x, 0.0)": where(a < b, x, 0.0),
    "tl.where(a < b, 1.0, 0.0).to(BF16)": where(a < b, const(1.0, "bf16"), const(0.0, "bf16")),
    "tl.where(a < b, 1.0, 2.0)": where(a < b, const(1.0), const(2.0)),
    'float("-inf")': const(-math.inf),
    'float("nan")': const(math.nan),
    "1e-30": const(1e-30),
    "True": const(True),
    "tanh(x)": ew("tanh", x),
    "power(x, y)": x**y,
    "tl.exp2(-x)": ew("exp2", -x),
    "log1p(x)": ew("log1p", x),
    "tl.program_id(0)": program(),
    "tl.arange(0, BM)": iota("BM"),
    "tl.arange(0, BN // 8)": iota("BN/8"),
    "tl.full([BM, 8], 0.0, tl.float32)": full(("BM", 8), 0.0),
    "(n + tl.arange(0, BN))[None, :]": row(n + iota("BN")),
    "rows[:, None] < 3": column(name("rows", "i32", ("BM",))) < 3,
    "p[:, None, :]": expand(name("p", "f32", ("BM", "BN")), 1),
    "(p + 1.0).T": trans(name("p", "f32", ("BM", "BN")) + 1.0),
    "p.to(BF16)": cast_to(name("p", "f32", ("BM", "BN")), "bf16"),
    "tl.cast(n, tl.int64) * 3": cast_to(n, "i64") * 3,
    "tl.reshape(p, [BM, BN // 8, 8])": reshape(name("p", "f32", ("BM", "BN")), ("BM", "BN/8", 8)),
    "tl.max(p, 1)": reduce("max", name("p", "f32", ("BM", "BN")), 1),
    "tl.sum(p)": reduce_all("sum", name("p", "f32", ("BM", "BN"))),
    "tl.cumsum(v, 0)": Expr("cumsum", (name("v", "i32", ("BN",)),), None, "i32", ("BN",)),
    "side_by_side(second_half(p), first_half(p))": joined(half(P, 1), half(P, 0)),
    "tl.dot(p, k.T)": dot(name("p", "bf16", ("BM", 64)), trans(name("k", "bf16", ("BN", 64)))),
    'tl.dot(p, v, acc, input_precision="ieee")': dot(
        name("p", "f32", ("BM", "BN")), name("v", "f32", ("BN", 64)), name("acc", "f32", ("BM", 64))
    ),
    "tl.load(bias_ptr + a * bias_s0 + (b + 1) * bias_s1)": read(BIAS, a, b + 1),
    "tl.load(bias_ptr + bias_s1)": read(BIAS, 0, 1),
    "tl.load(bias_ptr + a * bias_s0, mask=a < b, other=0)": read(BIAS, a, 0, mask=a < b),
    "count_up_to(cuts_ptr + b * cuts_s0, cuts_s1, n, a + 1)": Expr("bucket", (b, a + 1, n), "cuts_ptr", "i32"),
    "load_tile(Q, a, b, n, 0, q_b, q_h, q_s, Sq, 64, BM, 64, TMA)": tile(Q, a, b, n, 0, ("BM", 64)),
    "load_tile(V_64, a, b, n, 128, v_b, v_h, v_s, Sk, 192, BN, 64, TMA)": tile(V, a, b, n, 128, ("BN", 64)),
    "load_block(skew_0, 0, b, 0, 0, skew_0_b, skew_0_h, skew_0_s, BM, BN, TMA)": tile(SKEW, 0, b, 0, 0, ("BM", "BN")),
}


NARROW: dict[str, Expr] = {
    "to_fp8(x, 3, 7, FP8)": cast_to(x, "f8e4m3"),
    "to_fp8(x + 1.0, 2, 15, FP8)": cast_to(x + 1.0, "f8e5m2"),
    "from_fp8(to_fp8(x, 3, 7, FP8), 3, 7)": cast_to(cast_to(x, "f8e4m3"), "f16"),
    "from_fp8(to_fp8(x, 2, 15, FP8), 2, 15).to(BF16)": cast_to(cast_to(x, "f8e5m2"), "bf16"),
    "tl.div_rn(x, y + 1.0) * 2.0": divide_exactly(x, y + 1.0) * 2.0,
}


IN_WORDS = name("k", "i16", ("BN", 32))
WORDS: dict[str, Expr] = {
    "from_bytes(k, 8, True, BF16, PTX)": unpack(IN_WORDS, "i8", 8, "bf16"),
    "from_bytes(k, 0, False, tl.float16, PTX)": unpack(IN_WORDS, "u8", 0, "f16"),
    "from_nibbles(k, 12, BF16, PTX)": unpack(IN_WORDS, "u4", 12, "bf16"),
    "from_e4m3(k, 8, tl.float16, PTX)": unpack(IN_WORDS, "f8e4m3", 8, "f16"),
    "load_words(K, a, b, n, 0, k_b, k_h, k_s, Sk, 32, BN, 32, TMA, WORDS)": tile(CODES, a, b, n, 0, ("BN", 32)),
}


@pytest.mark.parametrize("text", WORDS)
def test_words(text: str) -> None:
    p = Printer([CODES], {}, {})
    assert p.expr(WORDS[text]) == text
    assert p.flags == ({"TMA", "WORDS"} if "load" in text else {"PTX"})


def test_words_that_find_their_own_pages() -> None:
    p = Printer([PAGES], {}, {})
    read_ = read(PAGES, a, 0, n, iota(32), mask=iota(32) < 3)
    assert p.expr(read_) == "read_words(K + a * k_b + n * k_s, tl.arange(0, 32), tl.arange(0, 32) < 3, WORDS)"


def test_products_of_few_rows() -> None:
    q, k, acc = name("q", "bf16", ("BM", 64)), name("k", "bf16", ("BN", 64)), name("s", "f32", ("BM", "BN"))
    assert printer().expr(dot(q, trans(k), few=True)) == "dot_few(q, k.T, None)"
    assert printer().expr(dot(q, trans(k), acc, few=True)) == "dot_few(q, k.T, s)"


@pytest.mark.parametrize("text", NARROW)
def test_narrow_floats(text: str) -> None:
    assert printer().expr(NARROW[text]) == text


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions(text: str) -> None:
    assert printer().expr(EXPRESSIONS[text]) == text


STATEMENTS: dict[str, Statement] = {
    "# why": Note("why"),
    "x = y + 1.0": Let(x, y + 1.0),
    "x = y  # [BM]": Let(x, y, "[BM]"),
    "tl.store(bias_ptr + a * bias_s0 + b * bias_s1, x)": Store("bias_ptr", (a, b), x),
    "tl.store(bias_ptr + a * bias_s0, x, mask=flag)": Store("bias_ptr", (a, const(0)), x, flag),
    "tl.store(Q + q_b + b * q_h + n * q_s + a + 1, x)": Store("Q", (const(1), b, n, a + 1), x),
    "store_tile(Q, o, a, b, n, 0, q_b, q_h, q_s, Sq, 64, BM, 64, TMA)": StoreTile(
        "Q", (a, b, n, const(0)), name("o", "bf16", ("BM", 64))
    ),
    "for n in range(0, a):\n    x = y": For(n, const(0), a, const(1), (Let(x, y),)),
    "for n in range(a, b, BN):\n    x = y": For(n, a, b, name("BN"), (Let(x, y),)),
    "if a < b:\n    # why\n    x = y": If(a < b, (Note("why"), Let(x, y))),
    "x = step(x, V_128, V_64, v_b, v_h, v_s, bias_ptr, bias_s0, bias_s1, n * 2, BM, TMA)": CallFn(
        (x,), "step", (x, name("V"), name("bias_ptr"), n * 2, name("BM"))
    ),
}


@pytest.mark.parametrize("text", STATEMENTS)
def test_statements(text: str) -> None:
    w = Writer()
    printer().statement(w, STATEMENTS[text])
    assert w.text() == text + "\n"


def test_every_operator_has_a_text_on_both_sides() -> None:
    assert INFIX.keys() | PREFIX.keys() | CALL.keys() == OPS.keys()
    for op, entry in OPS.items():
        values = [const(0.25)] * entry.arity if op not in ("and", "or", "not") else [const(True)] * entry.arity
        ast.parse(host_expr(Expr(op, tuple(values))), mode="eval")


def test_what_has_no_text_is_a_fault_of_ours() -> None:
    with pytest.raises(CompilerBug, match="no text for 'rows_min'"):
        printer().expr(Expr("rows_min", (a,), None, "i32"))
    with pytest.raises(CompilerBug, match="no text for 'load'"):
        host_expr(Expr("load", (a,), "bias"))


def test_names() -> None:
    assert [lower_name(t) for t in ("Q", "LSE", "bias_ptr", "Bias_ptr", "x_ptr_ptr", "lost")] == [
        "q", "lse", "bias", "Bias", "x_ptr", "lost",
    ]  # fmt: skip
    assert strides(Q) == ["q_b", "q_h", "q_s"]
    assert strides(BIAS) == ["bias_s0", "bias_s1"]
    assert [dim(d) for d in (64, "BM", "BN/8")] == ["64", "BM", "BN // 8"]


# -- random formulas: what is printed is what was meant ------------------------------------------

LEAVES = st.one_of(st.sampled_from([a, b, c]), st.integers(-9, 9).map(const))
INT_OPS = ("add", "sub", "mul", "floordiv", "mod", "neg", "abs", "min", "max")
BOOL_OPS = ("lt", "le", "gt", "ge", "eq", "ne")


def grown(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def node(op: str) -> st.SearchStrategy[Expr]:
        args = st.tuples(*[children] * OPS[op].arity)
        return args.map(lambda e: Expr(op, e, None, "bool" if op in BOOL_OPS else "i32"))

    condition = st.sampled_from(BOOL_OPS).flatmap(node)
    choice = st.tuples(condition, children, children).map(lambda e: Expr("where", e, None, "i32"))
    return st.one_of(*map(node, INT_OPS), choice)


FORMULAS = st.recursive(LEAVES, grown, max_leaves=12)


def meaning(e: Expr, values: dict[str, int]) -> int:
    """By Python's own integers."""
    args = [meaning(x, values) for x in e.args]
    if e.op == "name":
        return values[str(e.attr)]
    if e.op == "const":
        return int(e.value or 0)
    if e.op in ("floordiv", "mod") and args[1] == 0:
        raise ZeroDivisionError
    table = {
        "add": int.__add__, "sub": int.__sub__, "mul": int.__mul__, "floordiv": int.__floordiv__, "mod": int.__mod__,
        "neg": int.__neg__, "abs": int.__abs__, "min": min, "max": max, "lt": int.__lt__, "le": int.__le__,
        "gt": int.__gt__, "ge": int.__ge__, "eq": int.__eq__, "ne": int.__ne__, "where": lambda k, t, f: t if k else f,
    }  # fmt: skip
    return table[e.op](*args)  # type: ignore[operator]


class Shown(ast.NodeTransformer):
    """Printed text, with Triton's functions as Python's."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name(node.attr.replace("imum", ""), ast.Load())


@given(FORMULAS, st.tuples(*[st.integers(-20, 20)] * 3))
def test_printed_formulas_mean_the_same(e: Expr, values: tuple[int, int, int]) -> None:
    scope = dict(zip("abc", values, strict=True))
    try:
        want = meaning(e, scope)
    except ZeroDivisionError:
        return
    functions = {
        "where": lambda k, t, f: t if k else f, "floor_div": lambda p, q: p // q if q else 0, "min": min, "max": max,
        "floor_mod": lambda p, q: p % q if q else 0, "abs": abs,
    }  # fmt: skip
    tree = ast.fix_missing_locations(Shown().visit(ast.parse(printer().expr(e), mode="eval")))
    assert eval(compile(tree, "printed", "eval"), functions | scope) == want


@given(FORMULAS, st.tuples(*[st.integers(-20, 20)] * 3))
def test_host_formulas_mean_the_same(e: Expr, values: tuple[int, int, int]) -> None:
    scope = dict(zip("abc", values, strict=True))
    try:
        want = meaning(e, scope)
        got = eval(host_function(e))(scope)
    except ZeroDivisionError:
        return
    assert got == want


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (ew("rsqrt", name("Dqk")), 'n["Dqk"] ** -0.5'),
        (ew("rsqrt", x) * 2.0, 'n["x"] ** -0.5 * 2.0'),
        (ew("exp2", x) ** y, 'math.exp2(n["x"]) ** n["y"]'),
        ((-x) ** y, '(-n["x"]) ** n["y"]'),
        (-(x**y), '-n["x"] ** n["y"]'),
        (x ** (-y), 'n["x"] ** -n["y"]'),
        ((x**y) ** y, '(n["x"] ** n["y"]) ** n["y"]'),
        (ew("rsqrt", const(-2.0)), "(-2.0) ** -0.5"),
        (1.0 / ew("sigmoid", x - y), '1.0 / (1.0 / (1.0 + math.exp(-(n["x"] - n["y"]))))'),
        (where(~(x < y), x, y) + 1.0, '(n["x"] if not n["x"] < n["y"] else n["y"]) + 1.0'),
        (where((a < b) & (b < c), x, y), 'n["x"] if (n["a"] < n["b"]) & (n["b"] < n["c"]) else n["y"]'),
        (cast_to(a, "f32") / 2.0, 'n["a"] / 2.0'),
    ],
)
def test_host_formulas(formula: Expr, text: str) -> None:
    assert host_expr(formula) == text


# -- signatures, definitions, writing ------------------------------------------------------------


def test_types_of_a_signature() -> None:
    scalars = (Param("Sq", "scalar", "i32"), Param("far", "scalar", "i64"), Param("scale", "scalar", "f32"))
    knobs = (Param("BM", "constexpr"), Param("BN", "constexpr"))
    kernel = Kernel("k", (Q, V, BIAS, *scalars, *knobs), (), (), const(1))
    config = {"BM": 64, "BN": 32, "num_warps": 4}
    signature, constants = types(kernel, ["TMA", "HARDWARE"], config, ["HARDWARE"])
    assert list(signature.values()) == ["*bf16"] * 3 + ["*fp32"] + ["i64"] * 8 + ["i32", "i64", "fp32"]
    assert list(signature)[:8] == ["Q", "V_128", "V_64", "bias_ptr", "q_b", "q_h", "q_s", "v_b"]
    assert constants == {"BM": 64, "BN": 32, "TMA": False, "HARDWARE": True}
    through_maps, _ = types(kernel, ["TMA"], config, ["TMA"])
    assert [through_maps[n] for n in ("Q", "V_128", "V_64", "bias_ptr")] == [
        "tensordesc<bf16[1, 1, 64, 64]>", "tensordesc<bf16[1, 1, 32, 128]>", "tensordesc<bf16[1, 1, 32, 64]>", "*fp32",
    ]  # fmt: skip


def test_definitions_are_copied_whole_and_in_their_order() -> None:
    assert definitions("helpers", frozenset()) == []
    texts = definitions("helpers", frozenset({"floor_mod", "load_tile"}))
    assert [ast.parse(t).body[0].name for t in texts] == ["load_tile", "floor_mod"]  # type: ignore[attr-defined]
    assert all(t.startswith("@triton.jit\ndef ") for t in texts)
    assert "fmt: skip" not in "".join(texts)


def test_helpers_that_helpers_call_come_along() -> None:
    assert called("helpers", ["def load_tile(x):\n    return store_tile(x)"]) == {"store_tile"}
    (text,) = definitions("helpers", frozenset({"floor_mod"}))
    assert called("helpers", ["x = floor_mod(a, b)"]) == {"floor_mod"} | called("helpers", [text])


def test_only_the_helpers_in_use_are_emitted() -> None:
    def texts(value: Expr) -> str:
        body = (Store("bias_ptr", (const(0), const(0)), value),)
        kernel = Kernel("k", (BIAS, Param("a", "scalar", "i32")), body, (), const(1), "Doc.")
        return "\n".join(print_kernels(Program("p", (kernel,), (Launch("k"),), ()))[0])

    assert "def floor_div" in texts(a // 3)
    assert "def " not in texts(quotient(a, 3)).replace("def k(", "")
    assert 'do_not_specialize=["a"]' in texts(a)


def test_filled_lines_are_short_and_whole() -> None:
    words = [f"word_{k}" for k in range(40)]
    lines = filled(words, 60)
    assert all(len(line) <= 60 for line in lines)
    assert [w.strip() for line in lines for w in line.split(",") if w.strip()] == words
    assert all(len(p) + len(q.split(",")[0]) + 2 > 60 for p, q in itertools.pairwise(lines))


def test_entries_stay_inside_their_width() -> None:
    w = Writer()
    with w.indented():
        w.entry("f(" + ", ".join(f'n["Sq"] // n["BM"] * {k}' for k in range(12)) + ")")
    assert all(len(line) <= 120 for line in w.lines)
    assert w.text().endswith("),\n")
    ast.parse("(\n" + w.text() + ")")


def test_strides_of_an_operand_by_several_tile_shapes_are_given_once() -> None:
    assert strides(V) == strides(replace(V, tiles=()))
