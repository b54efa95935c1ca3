"""The functions by which engines know a variant: made of what lowering binds around a query tile.

An engine is a fixed kernel. What differs from variant to variant are small functions: what is known of a tile and of
its rows, where its key tiles begin, what a product becomes, which pairs count, and how a row ends. Statements that
lowering collects in one builder are parted here, into what makes numbers and what makes vectors of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, function, row
from attncc.ir.expr import FLOATS, Expr, cast_to, const, name
from attncc.ir.rewrite import names, transform, walk
from attncc.ir.tile import Function, Let, Note, Statement, binds, block, reads, reads_memory
from attncc.passes.lower import quantize
from attncc.passes.lower.ends import ends, with_end
from attncc.passes.lower.fragments import Formulas, read_early
from attncc.passes.lower.grid import QueryTile
from attncc.passes.lower.normalizers import TOTAL, M, Rule
from attncc.passes.lower.walk import Run, number_tiles, tile_at

ROWS: Final = name("rows", "i32", ("BM",))
RAMP: Final = name("ramp", "f32", ("BN",))
WALK: Final = "Tiles cut by the mask or by the end of the keys, whole tiles, and what is known of the query tile."


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine is told of a variant's query tiles."""

    tile: tuple[Expr, ...]
    """Numbers."""
    rows: tuple[Expr, ...]
    """Vectors of its rows."""
    numbers: tuple[Statement, ...]
    """What binds the numbers."""
    functions: tuple[Function, ...]
    """rows, score, keep and finish."""


def told(
    b: Builder,
    attn: Attention,
    t: QueryTile,
    rule: Rule,
    formulas: Formulas,
    at: Sequence[Expr],
    fixed: Sequence[Expr],
    others: Iterable[Function],
    always: Sequence[Expr] = (),
) -> Told:
    """What the formulas need of a tile that a builder's statements describe.

    Args:
        at: numbers that tell where the tile is.
        fixed: numbers that the engine itself reads.
        others: functions of key tiles, which read numbers and rows, too.
        always: vectors of rows that the engine itself reads, first.
    """
    score, keep, finish = score_of(b, formulas), keep_of(b, formulas), finish_of(b, attn, t, rule)
    if not reads_keys(b, formulas):
        keep = keep_of(b, replace(formulas, mask=with_end(formulas.mask)), "")
    of_tile, of_rows = parted(b.body)
    others = tuple(others)
    wanted = {*parameters_of((score, keep, finish, *others))}
    shaped = [e for e in (ROWS, *bound_by(of_rows)) if str(e.attr) in wanted and e not in always]
    shaped = [*always, *shaped] or [ROWS]
    rows = around("rows", b, of_rows, shaped, "What the formulas know of rows, [rows] or [rows, 1] each.")
    numbers = {str(e.attr): e for e in (*at, *bound_by(of_tile), *fixed)}
    used = dict.fromkeys((*(str(e.attr) for e in fixed), *parameters_of((rows, score, keep, finish, *others))))
    tile = [numbers[text] for text in used if text in numbers]
    assert all(e.dtype in ("i32", "f32") for e in tile), tile
    return Told(tuple(tile), tuple(shaped), tuple(of_tile), (rows, score, keep, finish))


def floats_first(tile: Iterable[Expr]) -> tuple[Expr, ...]:
    return tuple(sorted(tile, key=lambda e: e.dtype not in FLOATS))


# -- functions -----------------------------------------------------------------------------------


def numbered(b: Builder, runs: tuple[Run, ...], text: str) -> tuple[Function, Expr]:
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


def score_of(b: Builder, formulas: Formulas) -> Function:
    inner = Builder(b.params)
    qk = name("qk", "f32", ("BM", "BN"))
    scope = formulas.scope.with_(j=row(name("j", "i32", ("BN",))))
    score = read_early(inner, formulas, scope, lambda d: name("beside", "f32", ("BM", "BN")))
    score = scope.with_(qk=qk).bind(score)
    inner.let("x", score if formulas.sloped is None else score + row(RAMP), "[rows, BN]")
    return function("score", inner, [name("x", "f32", ("BM", "BN"))], (), "Scores of products, but for the factor c.")


def ramp_of(b: Builder, formulas: Formulas) -> Function:
    inner = Builder(b.params)
    found: list[Expr] = []
    if formulas.sloped is not None:
        found = [inner.let("ramp", formulas.sloped.slope * cast_to(name("u", "i32", ("BN",)), "f32"), "[BN]")]
    return function("ramp", inner, found, (), "What scores grow by along a key tile, if they do so alike for all.")


def shift_of(b: Builder, formulas: Formulas) -> Function:
    """A line's own height where a tile begins: it moves a row's maximum, and no weight."""

    inner = Builder(b.params)
    found: list[Expr] = []
    if formulas.sloped is not None:
        line = transform(formulas.scope.with_(j=name("n")).bind(formulas.sloped.line), _without_columns)
        found = [inner.let("shift", line)]
    return function("shift", inner, found, (), "What scores of the key tile from n on have beside in a row.")


def ends_of(b: Builder, formulas: Formulas) -> Function:
    """Both ends of what a row sees, where its mask is no more than these: pairs then need no two comparisons."""
    inner = Builder(b.params)
    found: list[Expr] = []
    between = None if reads_keys(b, formulas) else ends(with_end(formulas.mask))
    if between is not None:
        bounds = [transform(formulas.scope.bind(e), _without_columns) for e in between]
        if all(e.shape for e in bounds):
            found = [inner.let(text, e) for text, e in zip(("first", "last"), bounds, strict=True)]
    return function(
        "ends", inner, found, (), "The first and the last key that count of a row, if that is all a mask says."
    )


def _without_columns(e: Expr) -> Expr | None:
    return e.args[0] if e.op == "expand" else None


def reads_keys(b: Builder, formulas: Formulas) -> bool:
    """Whether score or mask read memory at the keys."""
    return reads_memory(score_of(b, formulas)) or reads_memory(keep_of(b, formulas))


def keep_of(b: Builder, formulas: Formulas, but: str = "; keys behind the last aside") -> Function:
    inner = Builder(b.params)
    mask = formulas.scope.with_(j=row(name("j", "i32", ("BN",)))).bind(formulas.mask)
    kept = inner.let("keep", mask)
    return function("keep", inner, [kept], (), f"Which pairs count{but}.")


def finish_of(b: Builder, attn: Attention, t: QueryTile, rule: Rule) -> Function:
    inner = Builder(b.params)
    sink = attn.part.normalizer.sink
    end = rule.finish(inner, M, TOTAL, None if sink is None else t.scope.bind(sink))
    assert end.lse is not None
    factor = 1.0 / end.divisor if end.divisor is not None else end.factor
    assert factor is not None
    factor, lse = quantize.ended(attn, factor, end.lse)
    results = [inner.let("factor", factor), inner.let("lse", lse)]
    return function("finish", inner, results, (), "What a row's accumulator is multiplied by, and its lse.")


def around(
    text: str,
    b: Builder,
    body: Iterable[Statement],
    results: Sequence[Expr],
    doc: str,
    constants: Sequence[str] = ("BM", "BN", "GROUP", "AGAIN"),
) -> Function:
    """A function around some of a builder's statements, less those that no result needs."""
    used = {str(e.attr) for e in results}
    kept: list[Statement] = []
    for s in reversed([*body]):
        bound = {str(e.attr) for e in (*binds(s), *bound_by(block(s)))}
        if bound & used:
            inside = [e for inner in block(s) for e in reads(inner)]
            used = (used - bound if isinstance(s, Let) else used).union(*map(names, (*reads(s), *inside)))
            kept.insert(0, s)
    inner = Builder(b.params, [kept])
    return function(text, inner, results, constants, doc)


# -- statements ----------------------------------------------------------------------------------


def parted(body: Iterable[Statement]) -> tuple[list[Statement], list[Statement]]:
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


def bound_by(body: Iterable[Statement]) -> Iterator[Expr]:
    for s in body:
        if isinstance(s, Let):
            yield s.var


def parameters_of(functions: Iterable[Function]) -> Iterator[str]:
    for f in functions:
        yield from (p.name for p in f.params)


def is_over_rows(e: Expr) -> bool:
    return any(node.op in ("rows_min", "rows_max") for node in walk(e))
