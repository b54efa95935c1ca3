"""The kernel before attention: q, k and v go through their steps, and into scratch memory that attention then reads.

A program has some tokens of one head of one operand. Those of the same tokens stand side by side in the launch, so
that what several of them read is still in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Final, Literal

from attncc.ir.attention import Attention
from attncc.ir.build import Builder, column, full, iota, lanes, program, quotient, remainder, row
from attncc.ir.expr import Expr, cast_to, const, maximum, minimum, name
from attncc.ir.tile import Engine, Kernel, Launch, Param, Program, Scratch
from attncc.ir.widths import matrix
from attncc.passes.lower import beside, folded, folding, lines, tokens
from attncc.passes.lower.absorb import absorbed
from attncc.passes.lower.chains import Chain, chains, dtype_behind
from attncc.passes.lower.columns import Columns
from attncc.passes.lower.convolution import matrices, matrix_kernel, matrix_params, matrix_scratch, mixes, multiplies
from attncc.passes.lower.flow import Flow, options, tokens_of
from attncc.passes.lower.grid import cdiv, heads_of, is_varlen, size_parameters
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.scores import input_param
from attncc.passes.lower.steps import behind, parts_of
from attncc.passes.lower.tidy import tidy

Walk = Literal["lines", "tokens", "sequences"]
"""How tiles of an operand lie: along lines of tokens, over the tokens of all sequences, or each in one sequence."""
LOOSE: Final = 16
"""Tokens of a tile whose matrices are read for each."""
TURNS: Final = 8
"""Tiles of a program that does so: matrices are read once for all of them."""
PLACED: Final = ("slot", "begin", "count", "h", "hk", "first")
"""Names by which a program knows where it is."""


def with_prologue(attn: Attention, made: Program) -> Program:
    """The program with the kernel that makes what attention reads."""
    if not attn.prologue:
        return made
    kernel = _kernel(attn, chains(attn), "lines" if lines.goes_along(attn) else "tokens")
    own = lines.goes_along(attn) and attn.dtype != "fp32"
    kernels, launches = (kernel,), (Launch(kernel.name, options=lines.OPTIONS if own else options(_mixes(attn))),)
    if matrices(attn):
        first = matrix_kernel(attn)
        kernels, launches = (first, kernel), (Launch(first.name, options=options(False)), *launches)
    scratch = (*matrix_scratch(attn), *(_scratch(attn, c) for c in chains(attn)))
    program = replace(
        made,
        kernels=(*kernels, *made.kernels),
        launches=(*launches, *made.launches),
        scratch=(*scratch, *made.scratch),
    )
    return program if made.engine is None or folded.gap(attn) else _beside_engine(attn, program, made.engine)


def _beside_engine(attn: Attention, program: Program, engine: Engine) -> Program:
    """The program whose engine has kernels before it that fold convolutions, in the place of those that do not."""
    found = chains(attn)
    mixed, rest = [c for c in found if folded.folds(c)], [c for c in found if not folded.folds(c)]
    replaced = [k.name for k in program.kernels[: 2 if matrices(attn) else 1]]
    moved, rest = [c for c in rest if beside.only_moves(c)], [c for c in rest if not beside.only_moves(c)]
    kernels = (
        _ahead(attn, rest, mixed[0]),
        beside.kernel(attn, mixed, moved, _parameters(attn, [*mixed, *moved], mixed), store),
    )
    launches = Launch(kernels[0].name, options=options(False)), Launch(kernels[1].name, options=lines.OPTIONS)
    engine = replace(
        engine,
        replaces=(*replaced, *engine.replaces),
        before=(*launches, *engine.before),
        scratch=(folding.matrix_scratch(attn, mixed[0]), *engine.scratch),
    )
    return replace(program, kernels=(*program.kernels, *kernels), engine=engine)


def _ahead(attn: Attention, rest: Sequence[Chain], mixed: Chain) -> Kernel:
    """Writes the matrices of convolutions that are one, and takes operands without such through their steps."""
    writers = folding.writers(attn, mixed)
    made, whole = folding.matrix_param(attn, mixed), None
    if rest:
        whole = _kernel(attn, rest, "sequences", first=writers)
    b = Builder({p.name: p for p in (*(whole.params if whole else ()), made, *map(input_param, attn.inputs))})
    with b.when(program() < writers) if whole else nullcontext():
        folding.write(b, attn, mixed, program())
    if whole:
        with b.when(program() >= writers):
            b.extend(whole.body)
    also = ", and takes other operands through their steps" if whole else ""
    doc = f"Writes the matrices of convolutions that are one{also}."
    grid = const(writers) if whole is None else whole.grid + writers
    return Kernel(f"{attn.name}_prologue_ahead", *tidy(b.params.values(), b.body), (), grid, doc)


def _scratch(attn: Attention, c: Chain) -> Scratch:
    rows = tokens.rows_of(attn, c.operand)
    batch = const(1) if is_varlen(attn) else name("B")
    return Scratch(c.tensor, (batch, const(c.heads), rows, const(c.stored)), dtype_behind(attn, c.operand))


def _mixes(attn: Attention) -> bool:
    return any(mixes(step) for step in attn.prologue)


def _rows(attn: Attention, c: Chain) -> int:
    """Tokens of a tile."""
    widest = max(sum(part.width for part in parts) for parts in parts_of(attn, c)[:-1])
    loose = attn.dtype == "fp32" and any(map(multiplies, c.steps))
    return LOOSE if loose else tokens_of(widest, multiplied=any(map(mixes, c.steps)))


def _span(attn: Attention, found: Sequence[Chain]) -> int:
    """Tokens of a program."""
    most = max(_rows(attn, c) for c in found)
    return most * TURNS if any(mixes(step) for c in found for step in c.steps) else most


def _tiles(attn: Attention, found: Sequence[Chain], walk: Walk) -> Expr:
    """Programs of a head: of the operand that has most tokens."""
    if walk == "lines":
        return name("B") * _most([lines.tiles_of(attn, c.operand, lines.line_of(attn, c.operand)) for c in found])
    if walk == "sequences":
        return name("B") * _most([cdiv(_length(c), _rows(attn, c)) for c in found])
    return cdiv(_most([tokens.count(attn, c.operand) for c in found]), _span(attn, found))


def _most(counts: Sequence[Expr]) -> Expr:
    longest = counts[0]
    for n in counts[1:]:
        longest = longest if n == longest else maximum(longest, n)
    return longest


def _kernel(attn: Attention, found: Sequence[Chain], walk: Walk, *, first: int = 0) -> Kernel:
    """Takes operands through their steps, from program `first` on."""
    slots = sum(c.heads for c in found)
    b = Builder(_parameters(attn, found, ()))
    number = program() - first if first else program()
    slot, number = b.let("slot", remainder(number, slots)), quotient(number, slots)
    begin = b.let("begin", number * _span(attn, found)) if walk == "tokens" else b.let("part", number)
    before = 0
    for c in found:
        if len(found) > 1:
            b.note(f"{c.operand}: {', '.join(step.name for step in c.steps)}")
        mine = slot < c.heads if before == 0 else (slot >= before) & (slot < before + c.heads)
        with b.when(mine) if len(found) > 1 else nullcontext():
            head = slot - before if before else slot
            match walk:
                case "lines":
                    lines.go(b, attn, c, heads_of(b, attn, c.operand, head), store)
                case "sequences":
                    _in_sequence(b, attn, c, head)
                case "tokens":
                    _over_tokens(b, attn, c, head, begin, _span(attn, found))
        before += c.heads
    through = ", ".join(c.operand for c in found)
    doc = f"Takes {through} through the steps before attention: one program per head and tokens."
    grid = _tiles(attn, found, walk) * slots
    return Kernel(f"{attn.name}_prologue", *tidy(b.params.values(), b.body), (), grid, doc)


def _parameters(attn: Attention, found: Sequence[Chain], mixed: Sequence[Chain]) -> Mapping[str, Param]:
    dtype = VALUE_DTYPE[attn.dtype]
    given = [Param(x.upper(), "operand", dtype, doc="the operand as it came") for x in "qkv"]
    made = [
        Param(c.tensor, "operand", dtype_behind(attn, c.operand), doc="the operand behind its steps") for c in found
    ]
    factors = [folding.matrix_param(attn, mixed[0])] if mixed else matrix_params(attn)
    params = [*given, *made, *factors, *tokens.index_params(attn)]
    params += [*map(input_param, attn.inputs), *size_parameters(attn)]
    return {p.name: p for p in params}


def _length(c: Chain) -> Expr:
    return name("Sq" if c.operand == "q" else "Sk")


def _in_sequence(b: Builder, attn: Attention, c: Chain, head: Expr) -> None:
    """What a program does that has a tile of tokens of one sequence: where they lie takes no division each."""
    rows = _rows(attn, c)
    b.let("tiles", cdiv(_length(c), rows))
    with b.when(name("part") < name("B") * name("tiles")):
        head, served = heads_of(b, attn, c.operand, head)
        b.let("b", quotient(name("part"), name("tiles")))
        ahead, inner = Builder(b.params), Builder(b.params)
        first = remainder(name("part"), name("tiles")) * rows
        at = tokens.along(inner, attn, c.operand, first + iota(rows), rows)
        store(Flow(attn, c, ahead, inner, at, head, served, parts_of(attn, c), {*lines.PLACED, *inner.bound}))
        b.extend(ahead.body)
        b.extend(inner.body)


def _over_tokens(b: Builder, attn: Attention, c: Chain, head: Expr, begin: Expr, span: int) -> None:
    """What a program does that has one of its heads, and so many tokens."""
    count = b.let("count", tokens.bound(attn, c.operand))
    with b.when(begin < count):
        head, served = heads_of(b, attn, c.operand, head)
        rows = _rows(attn, c)
        turns = span > rows
        ahead, inner = Builder(b.params), Builder(b.params)
        at = tokens.place(inner, attn, c.operand, name("first") if turns else begin, rows)
        taken = {*PLACED, *inner.bound}
        store(Flow(attn, c, ahead, inner, at, head, served, parts_of(attn, c), taken))
        b.extend(ahead.body)
        if not turns:
            b.extend(inner.body)
            return
        with b.loop("first", begin, minimum(begin + span, count), rows):
            b.extend(inner.body)


def store(f: Flow) -> None:
    """Writes what becomes of the tile."""
    c, t = f.chain, f.tokens
    into, width = f.b.params[c.tensor], c.widths[-1]
    places = [column(e) if e.shape else e for e in (t.batch, f.head, t.row)]

    def write(columns: Expr, value: Expr, inside: Expr | None) -> None:
        f.b.store(into, (*places, row(columns)), cast_to(value, into.dtype), lanes(t.inside, inside))

    if c.steps[-1].name == "absorb":
        x = behind(f, len(c.steps) - 1)
        n, r = matrix(f.attn, c.steps[-1])
        mixed = [p for p in x if p.first < n]
        factors = f.multiplied([x[p] for p in mixed], exact=len(c.steps) == 1)
        products = dict(zip(mixed, factors, strict=True))
        absorbed(f.b, f.let, f.attn, c.steps[-1], f.head, products, write)
        for p, tile in x.items():
            if p.first >= n:
                write(p.at + (r - n), tile, p.inside)
    else:
        for p, tile in behind(f, len(c.steps)).items():
            write(p.at, tile, p.inside)
    if c.stored > width:
        f.b.note("columns behind the head dim are 0")
        p = Columns(width, c.stored - width)
        write(p.at, full((f.rows, p.width), 0.0), p.inside)
