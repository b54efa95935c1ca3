"""Expression text in, `ir.expr` out: a whitelisted subset of Python's syntax, never evaluated.

Text length, nesting and the size of the expanded formula are bounded, so that hostile text is refused before
it costs anything.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Final, Literal

from attncc.errors import Location, SpecError, nearest
from attncc.ir.attention import Align, Input
from attncc.ir.expr import FALSE, TRUE, Expr, const, name
from attncc.ir.rewrite import substitute
from attncc.spec.budget import MAX_DEPTH, Budget
from attncc.spec.macros import MACROS, Param, check_count, count_up_to, read, rows_of, signature
from attncc.spec.operators import FUNCTIONS, Fault, apply, as_bool, as_float, as_int, integer
from attncc.spec.source import Snippet

MAX_TEXT: Final = 8192

Context = Literal["score", "mask", "scale", "head", "row", "key", "pair"]
Want = Literal["float", "bool", "int", "number", "any"]

CONTEXTS: Final[dict[Context, tuple[str, ...]]] = {
    "score": ("qk", "scale", "b", "h", "hk", "i", "j", "row"),
    "mask": ("b", "h", "hk", "i", "j", "row"),
    "pair": ("b", "h", "hk", "i", "j", "row"),
    "row": ("b", "h", "hk", "i", "row"),
    "key": ("b", "h", "hk", "j"),
    "head": ("b", "h", "hk"),
    "scale": (),
}
"""Which names besides sizes and inputs have a value where an expression of this kind is computed."""

CONSTANTS: Final[dict[str, Expr]] = {"true": TRUE, "false": FALSE, "inf": const(inf)}
NAMES: Final[dict[str, Expr]] = {
    **{n: name(n, "f32") for n in ("qk", "scale")},
    **{n: name(n) for n in ("b", "h", "hk", "i", "j", "row")},
}

UNARY: Final[dict[type[ast.unaryop], str]] = {ast.USub: "neg", ast.Invert: "not"}
BINARY: Final[dict[type[ast.operator], str]] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "and",
    ast.BitOr: "or",
}
COMPARE: Final[dict[type[ast.cmpop], str]] = {
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}
REFUSED: Final[dict[type[ast.expr], tuple[str, str]]] = {
    ast.Attribute: ("attributes are not part of the language", ""),
    ast.BoolOp: ("'and' and 'or' are not part of the language", "write & and |, each side in parentheses"),
    ast.IfExp: ("'if … else' is not part of the language", "write where(condition, a, b)"),
    ast.Lambda: ("a lambda is not part of the language", ""),
    ast.NamedExpr: ("':=' is not part of the language", ""),
    ast.Tuple: ("a tuple has no meaning here", ""),
    ast.List: ("a list has no meaning here", ""),
    ast.Slice: ("a slice has no meaning here", "give one index per axis"),
    ast.Starred: ("'*' before a value is not part of the language", ""),
    ast.GeneratorExp: ("a comprehension is not part of the language", ""),
    ast.ListComp: ("a comprehension is not part of the language", ""),
}
SPELLED: Final[dict[str, str]] = {
    **{"BitXor": "^", "MatMult": "@", "LShift": "<<", "RShift": ">>"},
    **{"Not": "not", "Is": "is", "IsNot": "is not", "In": "in", "NotIn": "not in"},
}
MISMATCHED: Final[dict[str, frozenset[str]]] = {
    "b": frozenset({"Sq", "Sk"}),
    "h": frozenset({"B", "Sq", "Sk"}),
    "hk": frozenset({"B", "Sq", "Sk"}),
    "i": frozenset({"B", "Sq"}),
    "j": frozenset({"B", "Sq"}),
    "row": frozenset({"B"}),
}
"""Axes that a bare index runs out of."""

_FOREIGN = re.compile(r"[^A-Za-z0-9_ +\-*/%<>=!&|~()\[\],.:^@]")


@dataclass(frozen=True, slots=True)
class Scope:
    """What expressions of one spec may name: its inputs, and its sizes, the fixed ones as numbers."""

    inputs: Mapping[str, Input]
    sizes: Mapping[str, Expr]
    align: Align = field(default_factory=Align)

    def visible(self, context: Context) -> dict[str, Expr]:
        return {**CONSTANTS, **self.sizes, **{n: NAMES[n] for n in CONTEXTS[context]}}


def parse(snippet: Snippet, scope: Scope, context: Context, want: Want = "any", what: str = "this") -> Expr:
    """The expression a snippet holds, of the wanted type."""
    snippet, tree = syntax(snippet)
    return Reader(snippet, scope, context).typed(tree, want, what)


def syntax(snippet: Snippet) -> tuple[Snippet, ast.expr]:
    """The trimmed snippet and its syntax tree; text that is long, deep or foreign is refused unread."""
    text = re.sub(r"\s", " ", snippet.text)
    margin = len(text) - len(text.lstrip())
    text = text.strip()
    if not text:
        raise SpecError("an expression is missing", snippet.location)
    if len(text) > MAX_TEXT:
        raise SpecError(f"an expression of {len(text)} characters; at most {MAX_TEXT}", snippet.location)
    trimmed = Snippet(text, snippet.part(margin, margin + len(text)), snippet.exact)
    if foreign := _FOREIGN.search(text):
        place = trimmed.part(foreign.start(), foreign.end())
        raise SpecError(f"{foreign[0]!r} is not part of the language", place)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trimmed, ast.parse(text, mode="eval").body
    except SyntaxError as e:
        start = min((e.offset or len(text)) - 1, len(text) - 1)
        end = max(start + 1, min((e.end_offset or 0) - 1, len(text)))
        message = (e.msg or "it cannot be read").split(" (<")[0]
        raise SpecError(f"not an expression: {message}", trimmed.part(start, end)) from None
    except (RecursionError, MemoryError, ValueError):
        raise SpecError("the expression is nested too deeply", trimmed.location) from None


class Reader:
    """Turns syntax into checked expressions; every fault is raised at the syntax it stands in."""

    def __init__(self, snippet: Snippet, scope: Scope, context: Context) -> None:
        self.snippet = snippet
        self.scope = scope
        self.context: Context = context
        self.visible = scope.visible(context)
        self.depth = 0
        self.budget = Budget()

    def place(self, node: ast.expr | ast.keyword) -> Location | None:
        return self.snippet.part(node.col_offset, node.end_col_offset or node.col_offset + 1)

    def fault(self, node: ast.expr | ast.keyword, message: str, hint: str = "") -> SpecError:
        return SpecError(message, self.place(node), hint)

    def typed(self, node: ast.expr, want: Want, what: str) -> Expr:
        """The expression at `node`, refused where its type is not the wanted one."""
        e = self.read(node)
        try:
            match want:
                case "float":
                    return as_float(e, what)
                case "bool":
                    return as_bool(e, what)
                case "int":
                    return as_int(e, what)
                case "number":
                    if e.dtype == "bool":
                        raise Fault(f"{what} must be a number, this is a bool")
            return e
        except Fault as fault:
            raise self.fault(node, str(fault), fault.hint) from None

    def read(self, node: ast.expr) -> Expr:
        """The expression at `node`, its size bounded."""
        if self.depth >= MAX_DEPTH:
            raise SpecError("the expression is nested too deeply", self.snippet.location)
        self.depth += 1
        try:
            e = self.budget.check(self.dispatch(node))
        except Fault as fault:
            raise self.fault(node, str(fault), fault.hint) from None
        self.depth -= 1
        return e

    def dispatch(self, node: ast.expr) -> Expr:
        match node:
            case ast.Constant(value):
                return self.number(node, value)
            case ast.Name(word):
                return self.name(node, word)
            case ast.UnaryOp(op, operand):
                return self.unary(node, op, operand)
            case ast.BinOp(left, op, right):
                return apply(self.operator(node, BINARY, op), self.read(left), self.read(right))
            case ast.Compare(left, ops, rights):
                return self.compare(node, left, ops, rights)
            case ast.Subscript(value, index):
                return self.subscript(node, value, index)
            case ast.Call(function, args, keywords):
                return self.call(node, function, args, keywords)
        message, hint = REFUSED.get(type(node), ("this is not part of the language", ""))
        raise self.fault(node, message, hint)

    def operator(self, node: ast.expr, table: Mapping[Any, str], op: ast.AST) -> str:
        if type(op) not in table:
            word = SPELLED.get(type(op).__name__, type(op).__name__)
            raise self.fault(node, f"'{word}' is not an operator of the language", "write ~" if word == "not" else "")
        return table[type(op)]

    def number(self, node: ast.expr, value: object) -> Expr:
        match value:
            case bool():
                raise self.fault(node, f"'{value}' is not part of the language", nearest(str(value).lower(), CONSTANTS))
            case int():
                return integer(value)
            case float() if isfinite(value):
                return const(value)
        raise self.fault(node, "not a finite number of the language")

    def name(self, node: ast.expr, word: str) -> Expr:
        if word in self.visible:
            return self.visible[word]
        if word in self.scope.inputs:
            x = self.scope.inputs[word]
            if x.shape:
                hint = f"index it: {word}[{', '.join(map(str, x.shape))}]"
                raise self.fault(node, f"input '{word}' is a tensor", hint)
            return read(x)
        if word in MACROS and not MACROS[word].params:
            return MACROS[word].build()
        if word in MACROS:
            raise self.fault(node, f"'{word}' needs arguments", signature(word))
        if word in self.functions():
            raise self.fault(node, f"'{word}' is a function", f"write {word}(…)")
        if word in NAMES:
            hint = f"known here: {', '.join(CONTEXTS[self.context]) or 'sizes'}"
            raise self.fault(node, f"'{word}' has no value here", hint)
        raise self.fault(node, f"unknown name '{word}'", nearest(word, self.words()))

    def functions(self) -> list[str]:
        return [*FUNCTIONS, *MACROS, "bucket", "qdot"]

    def words(self) -> list[str]:
        return [*self.visible, *self.scope.inputs, *self.functions()]

    def unary(self, node: ast.expr, op: ast.unaryop, operand: ast.expr) -> Expr:
        if isinstance(op, ast.UAdd):
            return self.read(operand)
        return apply(self.operator(node, UNARY, op), self.read(operand))

    def compare(self, node: ast.expr, left: ast.expr, ops: list[ast.cmpop], rights: list[ast.expr]) -> Expr:
        """A chain such as 0 <= i - j < 4: the conjunction of its links."""
        values = [self.read(left), *(self.read(r) for r in rights)]
        links = [
            apply(self.operator(node, COMPARE, op), a, b) for op, (a, b) in zip(ops, pairwise(values), strict=True)
        ]
        return self.conjunction(links)

    def conjunction(self, links: list[Expr]) -> Expr:
        result = links[0]
        for link in links[1:]:
            result = apply("and", result, link)
        return result

    def subscript(self, node: ast.expr, value: ast.expr, index: ast.expr) -> Expr:
        x = self.input(value, "only an input can be indexed")
        return read(x, *self.indices(index, x))

    def indices(self, index: ast.expr, x: Input) -> list[Expr]:
        """What stands between the brackets behind `x`, each index inside of its axis where that is known."""
        at = [self.typed(axis, "int", "an index") for axis in self.axes(index)]
        for axis, (size, e) in enumerate(zip(x.shape, at, strict=False)):
            self.check_extent(index, x, axis, size, e)
        return at

    def axes(self, index: ast.expr) -> list[ast.expr]:
        return list(index.elts) if isinstance(index, ast.Tuple) else [index]

    def input(self, node: ast.expr, otherwise: str) -> Input:
        if not isinstance(node, ast.Name):
            hint = "write all indices in one pair of brackets" if isinstance(node, ast.Subscript) else ""
            raise self.fault(node, otherwise, hint)
        if node.id not in self.scope.inputs:
            known = node.id in self.visible or node.id in MACROS or node.id in FUNCTIONS
            hint = nearest(node.id, self.scope.inputs) if self.scope.inputs else "the spec declares no inputs"
            raise self.fault(node, otherwise if known else f"unknown input '{node.id}'", hint)
        return self.scope.inputs[node.id]

    def check_extent(self, node: ast.expr, x: Input, axis: int, size: int | str, e: Expr) -> None:
        """Refuses an index that certainly leaves the axis, such as h where there is one entry per kv head."""
        if size == 1:
            return
        extent = size if isinstance(size, int) else self.scope.sizes[size].value
        where = f"axis {axis} of '{x.name}' ({size})"
        if e.value is not None and (e.value < 0 or (extent is not None and e.value >= extent)):
            raise self.fault(node, f"index {e.value} is outside {where}")
        if e.op != "name":
            return
        runs_to = {"h": "Hq", "hk": "Hk", "b": "B", "i": "Sk", "j": "Sk", "row": "Sq"}.get(str(e.attr))
        foreign = MISMATCHED.get(str(e.attr), frozenset())
        heads = self.scope.sizes[runs_to].value if runs_to in ("Hq", "Hk") else None
        outside = heads is not None and extent is not None and heads > extent
        top_left = e.attr == "i" and self.scope.align.kind == "top_left"
        if outside or (size in foreign and not top_left):
            hint = {"h": "use hk", "i": "use row, or an axis of Sk"}.get(str(e.attr), "")
            raise self.fault(node, f"'{e.attr}' runs to {runs_to}, outside {where}", hint)

    def call(self, node: ast.expr, function: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> Expr:
        if not isinstance(function, ast.Name):
            raise self.fault(function, "only functions of the language can be called")
        word = function.id
        if word in MACROS:
            return self.macro(node, word, args, keywords)
        if keywords:
            raise self.fault(keywords[0], f"'{word}' takes no arguments by name")
        if word == "bucket":
            return self.bucket(node, args)
        if word == "qdot":
            return self.qdot(node, args)
        if word not in FUNCTIONS:
            raise self.fault(function, f"unknown function '{word}'", nearest(word, self.functions()))
        row = FUNCTIONS[word]
        if not row.least <= len(args) <= row.most:
            count = str(row.least) if row.least == row.most else f"{row.least} to {row.most}"
            raise self.fault(node, f"'{word}' takes {count} arguments, got {len(args)}")
        return row.build(*(self.read(a) for a in args))

    def bucket(self, node: ast.expr, args: list[ast.expr]) -> Expr:
        if len(args) != 2:
            raise self.fault(node, f"'bucket' takes 2 arguments, got {len(args)}", "bucket(x, e) or bucket(x[b], e)")
        table, value = args
        index: list[ast.expr] = []
        if isinstance(table, ast.Subscript):
            table, index = table.value, self.axes(table.slice)
        x = self.input(table, "bucket needs an input")
        at = [self.typed(axis, "int", "an index") for axis in index]
        return count_up_to(x, *at, self.typed(value, "int", "the value of bucket"))

    def qdot(self, node: ast.expr, args: list[ast.expr]) -> Expr:
        """The query times a row of an input: `qdot(table[h, i - j + n])`, the last axis left out."""
        if self.context != "score":
            raise self.fault(node, "'qdot' multiplies the query: it stands in a score only")
        if len(args) != 1:
            raise self.fault(node, f"'qdot' takes 1 argument, got {len(args)}", "qdot(x[e, …])")
        table, index = (args[0].value, args[0].slice) if isinstance(args[0], ast.Subscript) else (args[0], None)
        x = self.input(table, "qdot needs an input")
        width = x.shape[-1] if x.shape else 0
        if (self.scope.sizes[width].value if isinstance(width, str) else width) != self.scope.sizes["Dqk"].value:
            hint = f"{x.name}: {{shape: […, Dqk]}}"
            raise self.fault(node, "qdot needs an input whose last axis has the head's Dqk entries", hint)
        return rows_of(x, *([] if index is None else self.indices(index, x)))

    def macro(self, node: ast.expr, word: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Expr:
        params = MACROS[word].params
        if not params:
            raise self.fault(node, f"'{word}' takes no arguments", f"write {word}")
        given = dict(zip((p.name for p in params), args, strict=False))
        for keyword in keywords:
            if keyword.arg not in {p.name for p in params} or keyword.arg in given:
                raise self.fault(keyword, f"'{word}' has no such argument", signature(word))
            given[str(keyword.arg)] = keyword.value
        missing = [p for p in params if p.name not in given and p.default is None]
        if missing or len(args) > len(params):
            raise self.fault(node, f"'{word}' takes other arguments", signature(word))
        e = MACROS[word].build(*(self.argument(word, p, given.get(p.name)) for p in params))
        return substitute(e, {n: size for n, size in self.scope.sizes.items() if size.value is not None})

    def argument(self, macro: str, param: Param, node: ast.expr | None) -> Expr | Input | tuple[int, ...]:
        if node is None:
            return const(param.default or 0)
        if param.kind == "input":
            return self.input(node, f"{macro} needs an input")
        if param.kind == "shape":
            return tuple(self.side(axis) for axis in self.axes(node))
        e = self.typed(node, "int", f"'{param.name}' of {macro}")
        return check_count(e, f"'{param.name}' of {macro}") if param.kind == "count" else e

    def side(self, node: ast.expr) -> int:
        e = self.typed(node, "int", "a side")
        if not isinstance(e.value, int) or e.value < 1:
            raise self.fault(node, "a shape is made of numbers that are at least 1")
        return e.value
