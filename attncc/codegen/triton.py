"""Tile IR to readable Triton source: tables for operators, one `match` for expressions, one for statements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from attncc.codegen.source import Writer, called, definitions, filled
from attncc.errors import CompilerBug
from attncc.ir.expr import FLOATS, INTS, STORED, TRUE, WORD, Dim, Dtype, Expr, const
from attncc.ir.tile import (
    AtOnce,
    Barrier,
    CallFn,
    For,
    Function,
    If,
    Let,
    Note,
    Param,
    Program,
    Statement,
    Store,
    StoreTile,
)

INFIX: Final[dict[str, tuple[str, int]]] = {
    "mul": ("*", 8), "div": ("/", 8), "add": ("+", 7), "sub": ("-", 7), "and": ("&", 6), "or": ("|", 5),
    "lt": ("<", 4), "le": ("<=", 4), "gt": (">", 4), "ge": (">=", 4), "eq": ("==", 4), "ne": ("!=", 4),
}  # fmt: skip
MACHINE_DIVISION: Final[dict[str, tuple[str, int]]] = {"floordiv": ("//", 8), "mod": ("%", 8)}
PREFIX: Final[dict[str, str]] = {"neg": "-", "not": "~"}
CALL: Final[dict[str, str]] = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "log1p": "log1p", "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt", "sigmoid": "tl.sigmoid", "sin": "tl.sin", "cos": "tl.cos", "erf": "tl.erf",
    "floor": "tl.floor", "abs": "tl.abs", "min": "tl.minimum", "max": "tl.maximum", "where": "tl.where",
    "floordiv": "floor_div", "mod": "floor_mod", "pow": "power", "tanh": "tanh",
}  # fmt: skip
DTYPE: Final[dict[Dtype, str]] = {
    "bool": "tl.int1", "i8": "tl.int8", "u8": "tl.uint8", "i16": "tl.int16", "i32": "tl.int32", "i64": "tl.int64",
    "f8e4m3": "tl.uint8", "f8e5m2": "tl.uint8", "f16": "tl.float16", "bf16": "BF16", "f32": "tl.float32",
    "f64": "tl.float64",
}  # fmt: skip
FP8: Final[dict[Dtype, str]] = {"f8e4m3": "3, 7", "f8e5m2": "2, 15"}
"""Bits of the mantissa, and the exponent's bias. Kernels see the bits, for not every target converts these itself."""
UNPACK: Final[dict[str, str]] = {
    "i8": "from_bytes({}, {}, True", "u8": "from_bytes({}, {}, False", "u4": "from_nibbles({}, {}",
    "f8e4m3": "from_e4m3({}, {}",
}  # fmt: skip
"""Calls that take fields from words, before the dtype that they make."""
HALF: Final = {"0": "first_half", "1": "second_half", "even": "even_columns", "odd": "odd_columns"}
ATOM: Final = 10
UNARY: Final = 9


def number(value: bool | int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def dim(d: Dim) -> str:
    return str(d).replace("/", " // ")


def lower_name(tensor: str) -> str:
    """The stem of a tensor's stride names: Q -> q; an input keeps its name, bias_ptr -> bias."""
    return tensor.removesuffix("_ptr") if tensor.endswith("_ptr") else tensor.lower()


def strides(p: Param) -> list[str]:
    """Names of the strides that travel with a tensor; an operand's columns are contiguous."""
    if p.strides:
        return []
    if p.role == "operand":
        return [f"{lower_name(p.name)}_{axis}" for axis in "bhs"]
    return [f"{lower_name(p.name)}_s{axis}" for axis in range(p.rank)]


def handles(p: Param) -> list[str]:
    """Names of a tensor itself: an operand read by several tile shapes has a descriptor for each."""
    if len(p.tiles) < 2:
        return [p.name]
    return [f"{p.name}_{columns}" for _, columns in p.tiles]


def _picks_halves(e: Expr) -> bool:
    """Whether an expression picks one of two numbers of 16 bits: Triton takes them for f32, and multiplies as such."""
    return e.op == "where" and e.dtype in ("f16", "bf16") and all(x.op == "const" for x in e.args[1:])


class Printer:
    """Prints one function body: it knows its tensors, and notes which helpers and flags it used."""

    def __init__(
        self,
        params: Iterable[Param],
        functions: Mapping[str, Function],
        flags: Mapping[str, list[str]],
        calls: Mapping[str, str] = CALL,
    ) -> None:
        self.calls = calls
        self.params = {p.name: p for p in params}
        self.functions = functions
        self.function_flags = flags
        self.flags: set[str] = set()

    def expr(self, e: Expr, outer: int = 0) -> str:
        if e.op == "div" and e.attr == "rounded":
            texts = [self.expr(a) for a in e.args]
            shared = e.args[0].shape and (not e.args[1].shape or e.args[1].op == "expand")
            return f"divided({', '.join(texts)}, {self.flag('PTX')})" if shared else f"tl.div_rn({', '.join(texts)})"
        if e.op == "tanh" and e.attr == "fast" and self.calls is CALL:  # an engine has its own word
            return f"fast_tanh({self.expr(e.args[0])}, {self.flag('PTX')})"
        if e.op in INFIX or (e.op in MACHINE_DIVISION and e.attr == "nonneg"):
            sign, strength = INFIX.get(e.op) or MACHINE_DIVISION[e.op]
            left = self.expr(e.args[0], strength + (strength == 4))
            text = f"{left} {sign} {self.expr(e.args[1], strength + 1)}"
            return f"({text})" if strength < outer else text
        if e.op in PREFIX:
            text = PREFIX[e.op] + self.expr(e.args[0], UNARY)
            return f"({text})" if outer > UNARY else text
        if e.op == "floordiv" and e.dtype in FLOATS:
            return f"tl.floor({self.expr(e.args[0], 8)} / {self.expr(e.args[1], 9)})"
        if e.op == "mod" and e.dtype in FLOATS:
            return f"float_mod({', '.join(map(self.expr, e.args))})"
        if e.op in self.calls:
            text = f"{self.calls[e.op]}({', '.join(map(self.expr, e.args))})"
            return f"{text}.to({DTYPE[e.dtype]})" if _picks_halves(e) else text
        return self.structural(e, outer)

    def structural(self, e: Expr, outer: int) -> str:
        a = e.args
        match e.op:
            case "const" if e.value is not None:
                text = number(e.value)
                return f"({text})" if text.startswith("-") and outer > 7 else text
            case "name":
                return str(e.attr)
            case "cast" if e.dtype in STORED:
                return f"to_fp8({self.expr(a[0])}, {FP8[e.dtype]}, {self.flag('FP8')})"
            case "cast" if a[0].dtype in STORED:
                half = f"from_fp8({self.expr(a[0])}, {FP8[a[0].dtype]})"
                return half if e.dtype == "f16" else f"{half}{self.suffix(e)}"
            case "cast" if not e.shape:  # a number may be Python's own in the interpreter
                return f"tl.cast({self.expr(a[0])}, {DTYPE[e.dtype]})"
            case "expand" | "trans" | "cast":
                return f"{self.expr(a[0], ATOM)}{self.suffix(e)}"
            case "dot":
                exact = ', input_precision="ieee"' if a[0].dtype == "f32" else ""
                if e.attr == "few":
                    acc = self.expr(a[2]) if a[2:] else "None"
                    return f"dot_few({self.expr(a[0])}, {self.expr(a[1])}, {acc})"
                return f"tl.dot({', '.join(map(self.expr, a))}{exact})"
            case "unpack" if isinstance(e.attr, tuple):
                call = UNPACK[str(e.attr[0])].format(self.expr(a[0]), e.attr[1])
                return f"{call}, {DTYPE[e.dtype]}, {self.flag('PTX')})"
            case "load" | "bucket" | "tile":
                return self.access(e)
            case _:
                return self.shaped(e)

    def suffix(self, e: Expr) -> str:
        """What is written behind a tile to see it otherwise."""
        if e.op == "expand":
            return f"[{', '.join('None' if axis == e.attr else ':' for axis in range(len(e.shape)))}]"
        return ".T" if e.op == "trans" else f".to({DTYPE[e.dtype]})"

    def shaped(self, e: Expr) -> str:
        """Calls that take a shape, an axis or nothing."""
        shape = f"[{', '.join(map(dim, e.shape))}]"
        match e.op:
            case "program":
                return f"tl.program_id({e.attr})"
            case "iota":
                return f"tl.arange(0, {dim(e.shape[0])})"
            case "full":
                return f"tl.full({shape}, {self.expr(e.args[0])}, {DTYPE[e.dtype]})"
            case "half":
                return f"{HALF[str(e.attr)]}({self.expr(e.args[0])})"
            case "joined":
                return f"{'in_turn' if e.attr else 'side_by_side'}({', '.join(map(self.expr, e.args))})"
            case "reshape":
                return f"tl.reshape({self.expr(e.args[0])}, {shape})"
            case "reduce" if isinstance(e.attr, tuple):
                axis = "" if e.attr[1] == "all" else f", {e.attr[1]}"
                return f"tl.{e.attr[0]}({self.expr(e.args[0])}{axis})"
            case "cumsum":
                return f"tl.cumsum({self.expr(e.args[0])}, 0)"
            case _:
                raise CompilerBug(f"the Triton printer has no text for '{e.op}'")

    def access(self, e: Expr) -> str:
        """Reads of tensors."""
        p = self.params[str(e.attr)]
        if e.op == "load":
            rank = 4 if p.role == "operand" else p.rank
            at, mask = e.args[:rank], e.args[rank:]
            if p.dtype == WORD:
                start = self.pointer(p, (*at[:-1], const(0)))
                given = ", ".join(map(self.expr, (at[-1], *(mask or (TRUE,)))))
                return f"read_words({start}, {given}, {self.flag('WORDS')})"
            guard = f", mask={self.expr(mask[0])}, other=0" if mask else ""
            return f"tl.load({self.pointer(p, at)}{guard})"
        if e.op == "bucket":
            *at, x, entries = e.args
            row = self.pointer(p, at)
            return f"count_up_to({row}, {strides(p)[-1]}, {self.expr(entries)}, {self.expr(x)})"
        at = ", ".join(map(self.expr, e.args))
        if p.extent is None:
            sizes = [*strides(p), *map(dim, e.shape), self.flag("TMA")]
            return f"load_block({self.handle(p, e.shape)}, {at}, {', '.join(sizes)})"
        if p.dtype == WORD:
            return f"load_words({self.handle(p, e.shape)}, {at}, {self.bounds(p, e.shape)}, {self.flag('WORDS')})"
        return f"load_tile({self.handle(p, e.shape)}, {at}, {self.bounds(p, e.shape)})"

    def bounds(self, p: Param, shape: tuple[Dim, ...]) -> str:
        """The arguments of a tile access that say how its operand lies in memory."""
        if p.extent is None:
            raise CompilerBug(f"operand {p.name} has no extent")
        rows, columns = p.extent
        sizes = [self.expr(rows), str(columns), dim(shape[0]), dim(shape[1]), self.flag("TMA")]
        return ", ".join([*strides(p), *sizes])

    def handle(self, p: Param, shape: tuple[Dim, ...]) -> str:
        return p.name if len(p.tiles) < 2 else f"{p.name}_{shape[1]}"

    def pointer(self, p: Param, index: Iterable[Expr]) -> str:
        index, names = tuple(index), strides(p) or [*map(str, p.strides)]
        terms = [
            s if i.value == 1 else self.expr(i, 7) if s == "1" else f"{self.expr(i, 8)} * {s}"
            for i, s in zip(index, names, strict=False)  # an operand's columns, last, have no stride
            if i.value != 0
        ]
        if p.role == "operand" and index[-1].value != 0:
            terms.append(self.expr(index[-1], 7))
        return " + ".join([p.name, *terms])

    def flag(self, text: str) -> str:
        self.flags.add(text)
        return text

    def statement(self, w: Writer, s: Statement) -> None:
        match s:
            case Note(text):
                w.line(f"# {text}")
            case Barrier():
                w.line("tl.debug_barrier()")
            case Let(var, value, note):
                w.line(f"{var.attr} = {self.expr(value)}" + (f"  # {note}" if note else ""))
            case Store(tensor, index, value, mask):
                guard = f", mask={self.expr(mask)}" if mask is not None else ""
                w.line(f"tl.store({self.pointer(self.params[tensor], index)}, {self.expr(value)}{guard})")
            case StoreTile(tensor, index, value):
                p = self.params[tensor]
                b, h, row0, column = map(self.expr, index)
                bounds = self.bounds(p, value.shape)
                handle = self.handle(p, value.shape)
                w.line(f"store_tile({handle}, {self.expr(value)}, {b}, {h}, {row0}, {column}, {bounds})")
            case For(var, lo, hi, step, body):
                by = "" if step.value == 1 else f", {self.expr(step)}"
                w.line(f"for {var.attr} in range({self.expr(lo)}, {self.expr(hi)}{by}):")
                self.block(w, body)
            case If(condition, body):
                w.line(f"if {self.expr(condition)}:")
                self.block(w, body)
            case CallFn(targets, function, args):
                w.line(f"{', '.join(str(t.attr) for t in targets)} = {self.call(function, args)}")
            case AtOnce():
                raise CompilerBug("Triton has no word for calls at once")

    def call(self, function: str, args: tuple[Expr, ...]) -> str:
        flags = [self.flag(f) for f in self.function_flags[function]]
        return f"{function}({', '.join([*self.arguments(function, args), *flags])})"

    def arguments(self, function: str, args: tuple[Expr, ...]) -> list[str]:
        texts: list[str] = []
        for p, a in zip(self.functions[function].params, args, strict=True):
            texts += [*handles(p), *strides(p)] if p.role in ("operand", "buffer") else [self.expr(a)]
        return texts

    def block(self, w: Writer, body: Iterable[Statement]) -> None:
        with w.indented():
            for s in body:
                self.statement(w, s)


def signature(w: Writer, name: str, params: Iterable[Param], flags: Iterable[str], *, entry: bool) -> None:
    """A `def` line, wrapped: tensors, strides, numbers, constants; a kernel's strides are 64 bits wide."""
    tensors = [p for p in params if p.role in ("operand", "buffer")]
    wide = ": tl.int64" if entry else ""
    if entry:
        groups = [
            [h for p in tensors for h in handles(p)],
            [f"{s}{wide}" for p in tensors for s in strides(p)],
            [p.name for p in params if p.role == "scalar"],
        ]
    else:
        groups = [[text for p in params for text in _arguments(p)]]
    constants = [p.name for p in params if p.role == "constexpr"]
    groups.append([f"{c}: tl.constexpr" for c in [*constants, *flags]])
    w.line(f"def {name}(")
    with w.indented():
        for group in filter(None, groups):
            w.block(filled(group))
    w.line("):")


def _arguments(p: Param) -> list[str]:
    if p.role in ("operand", "buffer"):
        return [*handles(p), *strides(p)]
    return [] if p.role == "constexpr" else [p.name]


def functions_of(program: Program) -> dict[str, Function]:
    return {f.name: f for k in program.kernels if k.dialect == "triton" for f in k.functions}


def print_kernels(program: Program) -> tuple[list[str], dict[str, list[str]]]:
    """The text of every device function and kernel of a program, and the flags that each kernel takes."""
    functions = functions_of(program)
    flags: dict[str, list[str]] = {}
    texts: list[str] = []
    for f in functions.values():
        texts.append(_print(f.name, f.params, f.body, f.doc, functions, flags, results=f.results))
    for k in program.kernels:
        if k.dialect == "triton":
            texts.append(_print(k.name, k.params, k.body, k.doc, functions, flags, early=k.early))
    helpers = definitions("helpers", called("helpers", texts))
    return [*helpers, *texts], {k.name: flags.get(k.name, []) for k in program.kernels}


def _print(
    name: str,
    params: tuple[Param, ...],
    body: tuple[Statement, ...],
    doc: str,
    functions: Mapping[str, Function],
    flags: dict[str, list[str]],
    results: tuple[Expr, ...] = (),
    early: bool = False,
) -> str:
    """One function; records the flags it takes in `flags`."""
    printer, inner = Printer(params, functions, flags), Writer()
    with inner.indented():
        inner.line(f'"""{doc}"""')
        if early:
            inner.line(f"begin_early({printer.flag('EARLY')})")
        for s in body:
            printer.statement(inner, s)
        if results:
            inner.line(f"return {', '.join(str(r.attr) for r in results)}")
    flags[name] = sorted(printer.flags)
    head = Writer()
    dynamic = [p.name for p in params if p.role == "scalar" and p.dtype in INTS]
    listed = ", ".join(f'"{d}"' for d in dynamic)
    head.line("@triton.jit" if results or not dynamic else f"@triton.jit(do_not_specialize=[{listed}])")
    signature(head, name, params, flags[name], entry=not results)
    return head.text() + inner.text().rstrip()
