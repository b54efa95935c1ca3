"""The kernel behind attention: its output goes through the steps of the epilogue.

Attention leaves what it finds in scratch memory; a program then has some tokens of one head of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from attncc.ir.attention import Attention, Call
from attncc.ir.build import Builder, column, fresh, lanes, program, quotient, read, remainder, row
from attncc.ir.cache import quantizer
from attncc.ir.expr import Expr, Value, cast_to, const, name
from attncc.ir.tile import Kernel, Launch, Param, Program, Scratch
from attncc.ir.widths import axis_size
from attncc.passes.lower import tokens
from attncc.passes.lower.absorb import absorbed
from attncc.passes.lower.chains import output, source
from attncc.passes.lower.columns import Columns, cut
from attncc.passes.lower.convolution import AT_ONCE
from attncc.passes.lower.flow import Tiles, options, tokens_of
from attncc.passes.lower.grid import CU_K, cdiv, is_varlen, key_head, size_parameters
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.product import of_rows
from attncc.passes.lower.quantize import held
from attncc.passes.lower.scores import Scope, input_param
from attncc.passes.lower.tidy import tidy
from attncc.passes.lower.tokens import Tokens


def with_epilogue(attn: Attention, made: Program) -> Program:
    """The program with the kernel that ends its output, behind an engine's launches as behind the portable ones."""
    if not attn.epilogue:
        return made
    kernel = _kernel(attn)
    launch = Launch(kernel.name, options=options(_absorbs(attn)))
    engine = made.engine
    if engine is not None:
        engine = replace(engine, replaces=(*engine.replaces, kernel.name), after=(*engine.after, launch))
    rows = tokens.rows_of(attn, "q")
    batch = const(1) if is_varlen(attn) else name("B")
    plain = Scratch(output(attn), (batch, const(attn.heads.q), rows, const(attn.dims.v)), VALUE_DTYPE[attn.dtype])
    return replace(
        made,
        kernels=(*made.kernels, kernel),
        launches=(*made.launches, launch),
        scratch=(*made.scratch, plain),
        engine=engine,
    )


def _absorbs(attn: Attention) -> bool:
    return attn.epilogue[-1].name == "absorb"


def _reads_values(attn: Attention) -> bool:
    return any(step.name in ("lerp_v", "skip") for step in attn.epilogue)


def _absorbs_oddly(a: Attention) -> bool:
    """Whether a matrix is one for other heads, or for other columns than the output has."""
    for step in a.epilogue:
        if step.name == "absorb":
            *lead, rows, _ = (axis_size(a, n) for n in a.input(step.words[0]).shape)
            if {*lead} - {1, a.heads.q} or rows != a.dims.v:
                return True
    return False


LIMITS: Final[tuple[tuple[Callable[[Attention], bool], str], ...]] = (
    (lambda a: any(step.name == "absorb" for step in a.epilogue[:-1]), "absorb behind the other steps"),
    (_absorbs_oddly, "absorb by matrices [Dv, n], or [Hq, Dv, n]"),
    (lambda a: _reads_values(a) and a.page_size > 0, "steps that read no values, where these are in pages"),
    (
        lambda a: _reads_values(a) and (held(a, "v") is not None or quantizer(a) is not None),
        "steps that read no values, where these are quantised",
    ),
)
"""What is not carried yet, and what is instead."""


# -- the kernel --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of the output under way."""

    attn: Attention
    b: Builder
    tokens: Tokens
    head: Expr
    scope: Scope
    taken: set[str]

    def let(self, text: str, value: Value, note: str = "") -> Expr:
        word = fresh(text, self.taken)
        self.taken.add(word)
        return self.b.let(word, value, note)

    def factor(self, step: Call) -> Expr:
        """The number of each row, as a column."""
        e = cast_to(self.scope.bind(step.args[0]), "f32")
        value = self.let("factor", e, f"[{self.tokens.rows}]" if e.shape else "")
        return column(value) if value.shape else value

    def at(self, batch: Expr, head: Expr, row_: Expr, columns: Expr) -> tuple[Expr, ...]:
        places = (column(e) if e.shape else e for e in (batch, head, row_))
        return (*places, row(columns))


def _kernel(attn: Attention) -> Kernel:
    parts = cut(0, attn.dims.v, AT_ONCE) if _absorbs(attn) else cut(0, attn.dims.v)
    height = tokens_of(sum(c.width for c in parts), multiplied=_absorbs(attn))
    b = Builder(_parameters(attn))
    head = b.let("h", remainder(program(), attn.heads.q))
    first = b.let("begin", quotient(program(), attn.heads.q) * height)
    count = b.let("count", tokens.bound(attn, "q"))
    with b.when(first < count):
        t = tokens.place(b, attn, "q", first, height)
        hk = key_head(head, attn, attn.heads.kv)
        hk = hk if hk.op in ("name", "const") else b.let("hk", hk)
        rows = _Rows(attn, b, t, head, t.scope.with_(h=head, hk=hk), {*b.bound})
        _take(rows, parts)
    doc = "Takes the output through the steps behind attention: one program per head and tokens."
    grid = cdiv(tokens.count(attn, "q"), height) * attn.heads.q
    return Kernel(f"{attn.name}_epilogue", *tidy(b.params.values(), b.body), (), grid, doc)


def _parameters(attn: Attention) -> Mapping[str, Param]:
    dtype = VALUE_DTYPE[attn.dtype]
    plain = Param(output(attn), "operand", dtype, doc="the output as attention left it")
    values = Param("K" if attn.is_latent else source(attn, "v"), "operand", dtype, doc="values")
    params = [plain, values, Param("O", "operand", dtype, doc="the output"), *tokens.index_params(attn)]
    params += [*map(input_param, attn.inputs), *size_parameters(attn)]
    return {p.name: p for p in params}


def _take(r: _Rows, parts: tuple[Columns, ...]) -> None:
    """Takes a tile through all steps, and writes it."""
    attn, t, into = r.attn, r.tokens, r.b.params["O"]
    x: Tiles = {}
    for c in parts:
        o = read(r.b.params[output(attn)], *r.at(t.batch, r.head, t.row, c.at), mask=lanes(None, c.inside))
        x = {**x, c: r.let("o", cast_to(o, "f32"), f"[{t.rows}, {c.width}]")}
    for step in attn.epilogue:
        if step.name != "absorb":
            r.b.note(step.name)
            x = STEPS[step.name](r, step, x)

    def write(columns: Expr, value: Expr, inside: Expr | None) -> None:
        at = r.at(t.batch, r.head, t.row, columns)
        r.b.store(into, at, cast_to(value, into.dtype), lanes(t.inside, inside))

    if not _absorbs(attn):
        for c, value in x.items():
            write(c.at, value, c.inside)
        return
    factors = of_rows(r.let, [*x.values()], into.dtype, exact=len(attn.epilogue) == 1)
    absorbed(r.b, r.let, attn, attn.epilogue[-1], r.head, dict(zip(x, factors, strict=True)), write)


def _own_value(r: _Rows, c: Columns) -> Expr:
    """[rows, width] the value at each row's position; 0 where there is no such key."""
    attn, t = r.attn, r.tokens
    p = r.b.params["K" if attn.is_latent else source(attn, "v")]
    head = key_head(r.head, attn, attn.heads.v)
    inside = r.let("seen", (t.position >= 0) & (t.position < t.scope.values["Sk"]))
    at = read(CU_K, t.scope.values["b"]) + t.position if is_varlen(attn) else t.position
    value = read(p, *r.at(t.batch, head, at, c.at), mask=lanes(inside, c.inside))
    return r.let("v", cast_to(value, "f32"), f"[{t.rows}, {c.width}]")


Step = Callable[[_Rows, Call, Tiles], Tiles]


def _gate(r: _Rows, step: Call, x: Tiles) -> Tiles:
    factor = r.factor(step)
    return {c: r.let("gated", o * factor) for c, o in x.items()}


def _skip(r: _Rows, step: Call, x: Tiles) -> Tiles:
    factor = r.factor(step)
    return {c: r.let("skipped", o + factor * _own_value(r, c)) for c, o in x.items()}


def _lerp_v(r: _Rows, step: Call, x: Tiles) -> Tiles:
    """Method: SoftPAG, arXiv 2506.10978."""
    w = r.factor(step)
    return {c: r.let("drawn", (1.0 - w) * o + w * _own_value(r, c)) for c, o in x.items()}


STEPS: Final[Mapping[str, Step]] = {"gate": _gate, "skip": _skip, "lerp_v": _lerp_v}
