"""The functions by which the Hopper engine knows a variant: where its tiles are, what it scores, what it hides.

The engine itself is fixed (`codegen/_hopper.py`); portable kernels stand beside it, for small calls, for operands that
TMA does not take, and to do rows again into which a hidden NaN may have leaked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, function, quotient, row
from attncc.ir.expr import Expr, const, eq, maximum, name, where
from attncc.ir.rewrite import names, walk
from attncc.ir.tile import Engine, Function, Launch, Let, Note, Param, Program, Statement, reads
from attncc.passes.lower import skew
from attncc.passes.lower.forward import Formulas, formulas_of, may_hide_values, read_early
from attncc.passes.lower.grid import QueryTile, at_row, key_head, order, size_parameters, split_head
from attncc.passes.lower.knobs import ENGINE_KNOBS
from attncc.passes.lower.normalizers import NORMALIZERS, Rule
from attncc.passes.lower.scores import input_param, share_reads
from attncc.passes.lower.walk import Run, key_tiles_of, number_tiles, solve_runs, tile_at

NAME: Final = "hopper"
WIDTHS: Final = (64, 128, 256)
"""Head dims whose tiles TMA and wgmma take whole."""
FIXED: Final = ("Sq", "Sk", "c")
"""What the engine itself reads of a tile: queries, keys, and the factor from scores to units of log 2."""


@dataclass(frozen=True, slots=True)
class Gap:
    """What keeps the engine from a variant."""

    why: str
    holds: Callable[[Attention], bool]


GAPS: Final = (
    Gap("packed sequences", lambda a: a.layout == "varlen"),
    Gap("a normalizer other than softmax", lambda a: a.part.normalizer.kind != "softmax"),
    Gap("products of fp32", lambda a: a.dtype == "fp32"),
    Gap("head dims other than 64, 128 and 256", lambda a: a.dims.qk != a.dims.v or a.dims.qk not in WIDTHS),
    Gap("value heads of their own", lambda a: a.heads.v != a.heads.kv),
    Gap("key tiles listed from data", lambda a: key_tiles_of(a).listed),
    Gap("key tiles skipped by data", lambda a: key_tiles_of(a).skip is not None),
    Gap("a score without qk", lambda a: "qk" not in names(a.part.score)),
    Gap("relative positions read as tiles", lambda a: bool(skew.split_diagonals(a)[1])),
    Gap("wide heads under a mask that begins behind the first key", lambda a: a.dims.qk > 128 and _begins_late(a)),
    Gap("ranges over all rows of a tile", lambda a: any(map(_is_over_rows, _bounds(a)))),
)


def gap(attn: Attention) -> str:
    """Why the engine does not carry a variant that the dense skeleton does; empty if it does."""
    return next((g.why for g in GAPS if g.holds(attn)), "")


def accelerated(attn: Attention, program: Program) -> Program:
    """The program with the engine beside its kernels, where it carries the variant."""
    if why := gap(attn):
        return replace(program, engine_gap=why)
    after = (Launch(program.kernels[-1].name, (("PASS", 1),)),) if may_hide_values(attn) else ()
    return replace(program, engine=replace(engine(attn), knobs=ENGINE_KNOBS, after=after))


def engine(attn: Attention) -> Engine:
    """What the engine asks of a variant."""
    rule = NORMALIZERS[attn.part.normalizer.kind](attn.part.normalizer)
    params = [*map(input_param, attn.inputs), *size_parameters(attn), Param("scale", "scalar", "f32")]
    b = Builder({p.name: p for p in params})
    t = at_row(b, attn, name("b"), name("h"), quotient(name("row0"), name("BM")), name("row0"))
    formulas = formulas_of(b, attn, t, rule)
    b.let("c", formulas.c, "to units of log 2")
    runs = solve_runs(b, key_tiles_of(attn), t.keys, lambda e: share_reads(b, e, t.scope))
    cut, count = _numbered(b, runs.masked, "cut")
    whole, wholes = _numbered(b, runs.full, "whole")
    b.let("wholes", wholes)
    b.let("cuts", where(eq(maximum(count, name("wholes")), const(0)), 1, count), "one at least, that hides all")

    score, keep, finish = _score(b, attn, t, formulas), _keep(b, formulas), _finish(b, attn, t, rule)
    of_tile, of_rows = _parted(b.body)
    wanted = {*_parameters((score, keep, finish))}
    shaped = [e for e in _bound(of_rows) if str(e.attr) in wanted] or [name("rows", "i32", ("BM",))]
    rows = _function("rows", b, of_rows, shaped, "What the formulas know of rows, [rows] or [rows, 1] each.")
    users = (rows, score, keep, finish, cut, whole)
    numbers = {str(e.attr): e for e in (*_bound(of_tile), name("b"), name("h"), name("row0"))}
    own = [numbers[text] for text in dict.fromkeys(_parameters(users)) if text in numbers and text not in FIXED]
    tile = (*(name(text, "f32" if text == "c" else "i32") for text in FIXED), *own)
    place = _function("walk", b, of_tile, [name("cuts"), name("wholes"), *tile], WALK)
    return Engine(
        NAME, (_place(attn), place, cut, whole, rows, score, keep, finish), tuple(params), tile, tuple(shaped)
    )


WALK: Final = "Tiles cut by the mask or by the end of the keys, whole tiles, and what is known of the query tile."


def _bounds(attn: Attention) -> Iterator[Expr]:
    for r in key_tiles_of(attn).ranges:
        yield from (r.lo, r.hi, r.full_lo, r.full_hi)


def _begins_late(attn: Attention) -> bool:
    """Of heads of 256 such tiles spill, and one call of them did not end in its time."""
    return any(r.lo.value != 0 for r in key_tiles_of(attn).ranges)


def _is_over_rows(e: Expr) -> bool:
    return any(node.op in ("rows_min", "rows_max") for node in walk(e))


# -- functions -----------------------------------------------------------------------------------


def _place(attn: Attention) -> Function:
    b = Builder({})
    head, number = order(b, attn, name("number"))
    _, h = split_head(b, attn, head)
    b.let("row0", number * name("BM"))
    b.let("hk", key_head(h, attn, attn.heads.kv))
    results = [name("b"), name("h"), name("hk"), name("row0")]
    return _function("place", b, b.body, results, "Where a query tile is: batch entry, head, key head, first row.")


def _numbered(b: Builder, runs: tuple[Run, ...], text: str) -> tuple[Function, Expr]:
    """The function from a tile's number to its first key, and how many tiles there are."""
    n, t = Builder(b.params), name("t")
    count: Expr = const(0)
    if runs:
        ends = number_tiles(b, runs, text)
        count = ends[-1]
        n.let("n", tile_at(t, runs, ends))
    else:
        n.let("n", const(0))
    return function(text, n, [name("n")], ("BN",), f"The first key of {text} tile t."), count


def _score(b: Builder, attn: Attention, t: QueryTile, formulas: Formulas) -> Function:
    inner = Builder(b.params)
    qk = name("qk", "f32", ("BM", "BN"))
    scope = formulas.scope.with_(j=row(name("j", "i32", ("BN",))))
    score = read_early(inner, attn, t, formulas, scope)
    inner.let("x", scope.with_(qk=qk).bind(score), "[rows, BN]")
    return function("score", inner, [name("x", "f32", ("BM", "BN"))], (), "Scores of products, but for the factor c.")


def _keep(b: Builder, formulas: Formulas) -> Function:
    inner = Builder(b.params)
    mask = formulas.scope.with_(j=row(name("j", "i32", ("BN",)))).bind(formulas.mask)
    kept = inner.let("keep", mask)
    return function("keep", inner, [kept], (), "Which pairs count; keys behind the last aside.")


def _finish(b: Builder, attn: Attention, t: QueryTile, rule: Rule) -> Function:
    inner = Builder(b.params)
    sink = attn.part.normalizer.sink
    end = rule.finish(inner, None if sink is None else t.scope.bind(sink))
    assert end.lse is not None
    factor = 1.0 / end.divisor if end.divisor is not None else end.factor
    assert factor is not None
    results = [inner.let("factor", factor), inner.let("lse", end.lse)]
    return function("finish", inner, results, (), "What a row's accumulator is multiplied by, and its lse.")


def _function(text: str, b: Builder, body: Iterable[Statement], results: Sequence[Expr], doc: str) -> Function:
    """A function around some of a builder's statements, less those that no result needs."""
    inner = Builder(b.params)
    used = {str(e.attr) for e in results}
    for s in reversed([*body]):
        if isinstance(s, Let) and str(s.var.attr) in used:
            used = (used - {str(s.var.attr)}) | names(s.value)
            inner.stack[-1].insert(0, s)
    return function(text, inner, results, ("BM", "BN", "GROUP"), doc)


# -- statements ----------------------------------------------------------------------------------


def _parted(body: Iterable[Statement]) -> tuple[list[Statement], list[Statement]]:
    """Statements that make numbers, and those that make vectors of rows; the rows themselves are given."""
    numbers: list[Statement] = []
    vectors: list[Statement] = []
    shaped = {"rows"}
    for s in body:
        match s:
            case Note():
                continue
            case Let(var) if str(var.attr) == "rows":
                continue
            case Let(var) if var.shape or any(shaped & names(e) for e in reads(s)):
                assert var.shape, f"{var.attr} is a number made of rows"
                shaped.add(str(var.attr))
                vectors.append(s)
            case Let():
                numbers.append(s)
            case _:
                raise AssertionError(f"{type(s).__name__} among what no key moves")
    return numbers, vectors


def _bound(body: Iterable[Statement]) -> Iterator[Expr]:
    for s in body:
        if isinstance(s, Let):
            yield s.var


def _parameters(functions: Iterable[Function]) -> Iterator[str]:
    for f in functions:
        yield from (p.name for p in f.params)
