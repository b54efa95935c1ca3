"""The canonical text of an IR: of a formula, a variant, a kernel or a program; and its digest.

The text is total: whatever changes the meaning shows, and what has its default value does not. A name's or
tensor's dtype stands where it is bound. Formulas read as in a spec, with no more parentheses than needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from hashlib import sha256
from typing import Any, Final, cast

from attncc.ir.attention import Attention, KeyTiles, Part
from attncc.ir.attention import Call as Primitive
from attncc.ir.expr import Expr, Shape, const
from attncc.ir.tile import (
    AtOnce,
    Barrier,
    CallFn,
    Engine,
    For,
    Function,
    If,
    Kernel,
    Knob,
    Launch,
    Let,
    Note,
    Param,
    Program,
    Scratch,
    Statement,
    Store,
    StoreTile,
)

INDENT: Final = "    "

# Python's precedence, loosest first: a comparison binds looser than `|`
COMPARE, OR, AND, SUM, PRODUCT, UNARY, POWER, ATOM = range(8)

INFIX: Final[dict[str, tuple[str, int]]] = {
    "lt": ("<", COMPARE), "le": ("<=", COMPARE), "gt": (">", COMPARE), "ge": (">=", COMPARE), "eq": ("==", COMPARE),
    "ne": ("!=", COMPARE), "or": ("|", OR), "and": ("&", AND), "add": ("+", SUM), "sub": ("-", SUM),
    "mul": ("*", PRODUCT), "div": ("/", PRODUCT), "floordiv": ("//", PRODUCT), "mod": ("%", PRODUCT),
    "pow": ("**", POWER),
}  # fmt: skip
PREFIX: Final = {"neg": "-", "not": "~"}
KINDS: Final[Mapping[tuple[str, object], str]] = {
    ("floordiv", "nonneg"): "quotient",
    ("mod", "nonneg"): "remainder",
    ("div", "rounded"): "ratio",
    ("tanh", "fast"): "fast_tanh",
}
"""Second kinds: divisions of numbers known to be non-negative, one that rounds as IEEE does, and what a GPU hurries."""


def text(x: Attention | Program | Kernel | Expr) -> str:
    """The canonical text; one line for an expression, else lines that each end in a newline."""
    match x:
        case Expr():
            return _expr(x)[0]
        case Attention():
            lines = _attention(x)
        case Program():
            lines = _program(x)
        case Kernel():
            lines = _kernel(x)
    return "".join(f"{line}\n" for line in lines)


def digest(x: Attention | Program | Kernel | Expr) -> str:
    """16 hex digits that name the meaning of `x`."""
    return sha256(text(x).encode()).hexdigest()[:16]


# -- expressions ---------------------------------------------------------------------------------


def _expr(e: Expr) -> tuple[str, int]:
    """The text of an expression and how tightly its outermost operator binds."""
    if e.op in STRUCTURES:
        return STRUCTURES[e.op](e)
    if (e.op, e.attr) in KINDS:
        return f"{KINDS[e.op, e.attr]}({_list(e.args)})", ATOM
    if e.op in PREFIX:
        operand = e.args[0]
        inner = f"({text(operand)})" if operand.op == "const" else _inside(operand, UNARY)
        return PREFIX[e.op] + inner, UNARY
    if e.op not in INFIX:
        return f"{e.op}({_list(e.args)})", ATOM
    sign, level = INFIX[e.op]
    left, right = e.args
    if e.op == "pow":
        return f"{_inside(left, ATOM)} ** {_inside(right, UNARY)}", level
    return f"{_inside(left, level + (level == COMPARE))} {sign} {_inside(right, level + 1)}", level


def _inside(e: Expr, least: int) -> str:
    """The text of an operand, in parentheses if it binds looser than `least`."""
    inner, level = _expr(e)
    return inner if level >= least else f"({inner})"


def _list(es: Iterable[Expr]) -> str:
    return ", ".join(text(e) for e in es)


def _const(e: Expr) -> tuple[str, int]:
    number = e.value
    assert number is not None
    if e.dtype == "bool":
        return ("true" if number else "false"), ATOM
    is_float = e.dtype in ("f16", "bf16", "f32", "f64")
    digits = repr(float(number)) if is_float else str(int(number))
    usual = "f32" if is_float else const(int(number)).dtype
    if e.dtype != usual:
        return f"{e.dtype}({digits})", ATOM
    return digits, UNARY if digits.startswith("-") else ATOM


def _load(e: Expr) -> tuple[str, int]:
    index = [text(a) for a in e.args]
    if e.args and e.args[-1].dtype == "bool":
        index[-1] = f"mask={index[-1]}"
    return f"{e.attr}[{', '.join(index)}]", ATOM


def _bucket(e: Expr) -> tuple[str, int]:
    return f"bucket({e.attr}; {_list(e.args)})", ATOM


def _qdot(e: Expr) -> tuple[str, int]:
    return f"qdot({e.attr}{'; ' if e.args else ''}{_list(e.args)})", ATOM


def _expand(e: Expr) -> tuple[str, int]:
    axes = [":"] * len(e.args[0].shape)
    assert isinstance(e.attr, int)
    axes.insert(e.attr, "None")
    return f"{_inside(e.args[0], ATOM)}[{', '.join(axes)}]", ATOM


def _reduce(e: Expr) -> tuple[str, int]:
    assert isinstance(e.attr, tuple)
    kind, axis = e.attr
    return f"{kind}({text(e.args[0])}, axis={axis})", ATOM


def _unpack(e: Expr) -> tuple[str, int]:
    assert isinstance(e.attr, tuple)
    what, bit = e.attr
    return f"unpack({text(e.args[0])}, {what}, bit={bit}, dtype={e.dtype})", ATOM


def _dot(e: Expr) -> tuple[str, int]:
    dtype = "" if e.dtype == "f32" else f", dtype={e.dtype}"
    dtype += ", few" if e.attr == "few" else ""
    return f"dot({_list(e.args)}{dtype})", ATOM


STRUCTURES: Final[dict[str, Callable[[Expr], tuple[str, int]]]] = {
    "const": _const,
    "name": lambda e: (str(e.attr), ATOM),
    "load": _load,
    "bucket": _bucket,
    "qdot": _qdot,
    "rows_min": lambda e: (f"rows_min({_list(e.args)})", ATOM),
    "rows_max": lambda e: (f"rows_max({_list(e.args)})", ATOM),
    "program": lambda e: (f"program({e.attr})", ATOM),
    "iota": lambda e: (f"iota({e.attr})", ATOM),
    "full": lambda e: (f"full({_list(e.args)}, {_shape(e.shape)})", ATOM),
    "expand": _expand,
    "reshape": lambda e: (f"reshape({_list(e.args)}, {_shape(e.shape)})", ATOM),
    "trans": lambda e: (f"trans({_list(e.args)})", ATOM),
    "half": lambda e: (f"half({_list(e.args)}, {e.attr})", ATOM),
    "joined": lambda e: (f"joined({_list(e.args)}{f', {e.attr}' if e.attr else ''})", ATOM),
    "cast": lambda e: (f"{e.dtype}({_list(e.args)})", ATOM),
    "unpack": _unpack,
    "dot": _dot,
    "reduce": _reduce,
    "cumsum": lambda e: (f"cumsum({_list(e.args)})", ATOM),
    "tile": lambda e: (f"tile({e.attr}; {_list(e.args)}; {_shape(e.shape)})", ATOM),
}


def _shape(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


# -- what: a variant -----------------------------------------------------------------------------


def _value(x: Any) -> str:
    """A field's value; words that could be read as something else are quoted."""
    match x:
        case Expr():
            return text(x)
        case Primitive():
            given = [*map(text, x.args), *map(repr, x.words)]
            given += [f"{key}={text(v) if isinstance(v, Expr) else repr(v)}" for key, v in x.kwargs]
            return f"{x.name}({', '.join(given)})" if given else x.name
        case None | bool():
            return str(x).lower()
        case str():
            plain = re.fullmatch(r"[A-Za-z_]\w*", x) and x not in ("true", "false", "none", "inf", "nan")
            return x if plain else repr(x)
        case tuple():
            return f"[{', '.join(map(_value, cast(tuple[Any, ...], x)))}]"
        case int() | float():
            return repr(x)
        case _:
            return f"{type(x).__name__}({_record(x)})"


def _record(x: Any, skip: tuple[str, ...] = ()) -> str:
    """All fields of a node that are not at their default: `q=32, kv=8`."""
    return ", ".join(f"{f.name}={_value(getattr(x, f.name))}" for f in fields(x) if f.name not in skip and _told(f, x))


def _told(f: Field[Any], x: Any) -> bool:
    return f.default is MISSING or getattr(x, f.name) != f.default


def _attention(attn: Attention) -> Iterator[str]:
    yield f"attention {_value(attn.name)}"
    for f in fields(attn):
        value = getattr(attn, f.name)
        if f.name == "name" or not _told(f, attn):
            continue
        match f.name:
            case "heads" | "dims" | "align" | "numerics":
                yield f"{INDENT}{f.name}: {_record(value)}"
            case "inputs" | "sizes" | "quantize" | "tune":
                yield from (f"{INDENT}{f.name}: {_value(v) if f.name == 'tune' else _record(v)}" for v in value)
            case "parts":
                for part in attn.parts:
                    yield from _part(part)
            case _:
                yield f"{INDENT}{f.name}: {_value(value)}"


def _part(part: Part) -> Iterator[str]:
    yield f"{INDENT}part {_value(part.name)}:" if part.name else f"{INDENT}part:"
    for f in fields(part):
        value = getattr(part, f.name)
        if f.name == "name" or not _told(f, part):
            continue
        if isinstance(value, KeyTiles):
            yield from _key_tiles(value)
        elif isinstance(value, (Expr, float, tuple)):
            yield f"{INDENT * 2}{f.name}: {_value(value)}"
        else:
            yield f"{INDENT * 2}{f.name}: {_record(value)}"


def _key_tiles(tiles: KeyTiles) -> Iterator[str]:
    rest = _record(tiles, skip=("ranges",))
    yield f"{INDENT * 2}key_tiles: {rest}".rstrip()
    for r in tiles.ranges:
        yield f"{INDENT * 3}keys [{text(r.lo)}, {text(r.hi)}), full [{text(r.full_lo)}, {text(r.full_hi)})"


# -- how: kernels --------------------------------------------------------------------------------


def _program(program: Program) -> Iterator[str]:
    yield f"program {_value(program.name)}"
    for label, words in (("skeleton", program.skeleton), ("why", program.why)):
        if words:
            yield f"{INDENT}{label}: {words!r}"
    scratch = (f"scratch {_scratch(s)}" for s in program.scratch)
    yield from (f"{INDENT}{line}" for line in (*map(_knob, program.knobs), *scratch, *map(_launch, program.launches)))
    for label, why in (("engine: none", program.engine_gap), ("few queries: as others", program.short_gap)):
        if why:
            yield f"{INDENT}{label}, because of {why!r}"
    for kernel in program.kernels:
        yield ""
        yield from _kernel(kernel)
    if program.engine is not None:
        yield ""
        yield from _engine(program.engine)
    if program.append is not None:
        yield ""
        yield from _program(program.append)


def _engine(engine: Engine) -> Iterator[str]:
    yield f"engine {engine.name}:"
    for label, vars_ in (("tile", engine.tile), ("rows", engine.rows)):
        yield f"{INDENT}{label}: {', '.join(map(_typed, vars_))}"
    yield from (f"{INDENT}{line}" for line in (*map(_param, engine.args), *map(_knob, engine.knobs)))
    launches = (*(("before", x) for x in engine.before), *(("after", x) for x in engine.after))
    ends = (*_ends(engine), *((label, _launch(x)) for label, x in launches))
    yield from (f"{INDENT}{label}: {word}" for label, word in ends)
    for function in engine.functions:
        yield ""
        yield from _function(function)


def _ends(engine: Engine) -> Iterator[tuple[str, str]]:
    """Where operands come from and the output goes, as far as these are not the call's own."""
    if engine.tensors != ("q", "k", "v"):
        yield "operands", ", ".join(engine.tensors)
    if engine.output != "o":
        yield "output", engine.output
    if engine.states:
        yield "states", ", ".join(engine.states)
    if engine.serves is not None:
        yield "serves", text(engine.serves)


def _knob(knob: Knob) -> str:
    return f"knob {knob.name}: {' | '.join(map(str, knob.choices))}{_comment(knob.doc)}"


def _launch(launch: Launch) -> str:
    given = "".join(f", {constant}={value}" for constant, value in launch.constants)
    return f"launch {launch.kernel}{given}{'' if launch.when is None else f' when {text(launch.when)}'}"


def _scratch(scratch: Scratch) -> str:
    return f"{scratch.name}: {scratch.dtype}[{_list(scratch.shape)}]"


def _kernel(kernel: Kernel) -> Iterator[str]:
    for function in kernel.functions:
        yield from _function(function)
        yield ""
    dialect = ("" if kernel.dialect == "triton" else f" in {kernel.dialect}") + ", early" * kernel.early
    yield f"kernel {kernel.name}{dialect}, grid {text(kernel.grid)}:{_comment(kernel.doc)}"
    yield from (f"{INDENT}{_param(p)}" for p in kernel.params)
    yield from _block(kernel.body, 1)


def _function(function: Function) -> Iterator[str]:
    yield f"function {function.name}:{_comment(function.doc)}"
    yield from (f"{INDENT}{_param(p)}" for p in function.params)
    yield from _block(function.body, 1)
    yield f"{INDENT}return {', '.join(map(_typed, function.results))}"


def _param(param: Param) -> str:
    rank = f" rank {param.rank}" if param.rank else ""
    shape = _shape(param.shape) if param.shape else ""
    tiles = "".join(f", tile {rows} x {columns}" for rows, columns in param.tiles)
    extent = f", extent {text(param.extent[0])} x {param.extent[1]}" if param.extent else ""
    strides = f", strides {', '.join(map(str, param.strides))}" if param.strides else ""
    return f"{param.role} {param.name}: {param.dtype}{shape}{rank}{strides}{tiles}{extent}{_comment(param.doc)}"


def _typed(var: Expr) -> str:
    return f"{var.attr}: {var.dtype}{_shape(var.shape) if var.shape else ''}"


def _comment(words: str) -> str:
    return f"  # {' '.join(words.splitlines())}" if words else ""


def _block(body: tuple[Statement, ...], depth: int) -> Iterator[str]:
    for s in body:
        yield from (f"{INDENT * depth}{line}" for line in statement_lines(s))


def statement_lines(s: Statement) -> Iterator[str]:
    """The lines of a statement, its block's indented."""
    match s:
        case Note(words):
            yield from (f"# {line}" for line in words.splitlines())
        case Barrier():
            yield "barrier"
        case Let(var, value, note, ahead):
            yield f"{'ahead ' * ahead}{_typed(var)} = {text(value)}{_comment(note)}"
        case Store(buffer, index, value, mask):
            masked = f", mask={text(mask)}" if mask is not None else ""
            yield f"store {buffer}[{_list(index)}{masked}] = {text(value)}"
        case StoreTile(operand, index, value):
            yield f"store tile({operand}; {_list(index)}) = {text(value)}"
        case For(var, lo, hi, step, body):
            yield f"for {_typed(var)} in range({_list((lo, hi, step))}):"
            yield from _block(body, 1)
        case If(condition, body):
            yield f"if {text(condition)}:"
            yield from _block(body, 1)
        case CallFn(targets, function, args):
            given = f"{', '.join(map(_typed, targets))} = " if targets else ""
            yield f"{given}{function}({_list(args)})"
        case AtOnce(calls, warps, registers):
            yield f"at once, warps {_list(map(const, warps))}, registers {_list(map(const, registers))}:"
            yield from _block(calls, 1)
