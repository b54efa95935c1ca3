"""The small language of named primitives: `mass(0.9, crossing=in)` in, its bound arguments out.

Each key of the schema that takes primitives has a table (`vocabulary`): names, and for each its arguments.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from attncc.errors import SpecError, nearest
from attncc.ir.attention import Call, Input
from attncc.ir.expr import Expr
from attncc.spec.expression import Context, Reader, Scope, Want, syntax
from attncc.spec.source import Snippet

Kind = Literal["count", "number", "expr", "exprs", "word", "input", "flag", "call", "stairs"]


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument of a primitive: its kind, and what of that kind it may be."""

    name: str
    kind: Kind
    required: bool = True
    keyword: bool = False
    """Kept by name in a `Call`; otherwise by position."""
    context: Context = "head"
    """expr: where it is computed."""
    want: Want = "float"
    words: tuple[str, ...] = ()
    """word: the choices."""
    table: Mapping[str, tuple[Arg, ...]] | None = None
    """call: the primitives it may be."""
    low: float = float("-inf")
    """number, and expr where constant: the least value."""
    high: float = float("inf")


Signature = tuple[Arg, ...]
Vocabulary = Mapping[str, Signature]
Stairs = tuple[tuple[int | None, str], ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """A primitive with its arguments by name; those left out are absent."""

    name: str
    signature: Signature
    values: Mapping[str, object]

    def expr(self, arg: str) -> Expr | None:
        e = self.values.get(arg)
        return e if isinstance(e, Expr) else None

    def word(self, arg: str, default: str = "") -> str:
        return str(self.values.get(arg, default))

    def number(self, arg: str) -> int | float | None:
        e = self.expr(arg)
        return e.value if e is not None else None

    def call(self) -> Call:
        """As the IR keeps it: expressions and words by position, the rest by name."""
        args: list[Expr] = []
        words: list[str] = []
        kwargs: dict[str, Expr | str] = {}
        for arg in self.signature:
            value = self.values.get(arg.name)
            match value:
                case None:
                    continue
                case tuple():
                    args.extend(e for e in value if isinstance(e, Expr))
                case Expr() | str() if arg.keyword:
                    kwargs[arg.name] = value
                case Expr():
                    args.append(value)
                case str():
                    words.append(value)
                case bool():
                    kwargs[arg.name] = "true" if value else "false"
        return Call(self.name, tuple(args), tuple(sorted(kwargs.items())), tuple(words))


MAX_ARGS: Final = 32

_KEYWORD_WORD: Final = re.compile(r"(?<==)(\s*)in\b")
"""`crossing=in`: Python reads `in` as an operator, so it is hidden from it for the moment."""


def parse(snippet: Snippet, table: Vocabulary, scope: Scope, what: str) -> Bound:
    """The primitive of `table` that a snippet names."""
    hidden = _KEYWORD_WORD.sub(r"\1In", snippet.text)
    trimmed, tree = syntax(Snippet(hidden, snippet.location, snippet.exact))
    return Binder(trimmed, scope).bind(tree, table, what)


def usage(name: str, signature: Signature) -> str:
    """`mass(tau, crossing=in|out)`, for messages and the JSON schema."""
    shown: list[str] = []
    for arg in signature:
        text = "|".join(arg.words) if arg.words else "…" if arg.keyword else arg.name
        text = f"{arg.name}={text}" if arg.keyword else text
        shown.append(text if arg.required else f"[{text}]")
    return f"{name}({', '.join(shown)})" if shown else name


class Binder:
    """Binds the arguments of primitives; expressions go to the expression reader."""

    def __init__(self, snippet: Snippet, scope: Scope) -> None:
        self.snippet = snippet
        self.scope = scope

    def fault(self, node: ast.expr | ast.keyword, message: str, hint: str = "") -> SpecError:
        end = node.end_col_offset or node.col_offset + 1
        return SpecError(message, self.snippet.part(node.col_offset, end), hint)

    def bind(self, node: ast.expr, table: Vocabulary, what: str) -> Bound:
        head = node.func if isinstance(node, ast.Call) else node
        if not isinstance(head, ast.Name):
            raise self.fault(node, f"{what} must be a name or name(…)", f"valid: {', '.join(sorted(table))}")
        if head.id not in table:
            raise self.fault(head, f"unknown {what} '{head.id}'", nearest(head.id, table))
        signature = table[head.id]
        args = list(node.args) if isinstance(node, ast.Call) else []
        keywords = list(node.keywords) if isinstance(node, ast.Call) else []
        given = self.positional(node, head.id, signature, args)
        for keyword in keywords:
            if keyword.arg in given:
                raise self.fault(keyword, f"'{keyword.arg}' is given twice")
            if keyword.arg not in {a.name for a in signature}:
                raise self.fault(keyword, f"'{head.id}' has no such argument", usage(head.id, signature))
            given[str(keyword.arg)] = [keyword.value]
        values: dict[str, object] = {}
        for arg in signature:
            if arg.name in given:
                values[arg.name] = self.value(arg, given[arg.name], head.id)
            elif arg.required:
                hint = usage(head.id, signature)
                raise self.fault(node, f"'{head.id}' lacks its argument '{arg.name}'", hint)
        return Bound(head.id, signature, values)

    def positional(
        self, node: ast.expr, name: str, signature: Signature, args: list[ast.expr]
    ) -> dict[str, list[ast.expr]]:
        given: dict[str, list[ast.expr]] = {}
        slots = list(signature)
        while args and slots and len(args) <= MAX_ARGS:
            arg = slots.pop(0)
            taken = len(args) if arg.kind == "exprs" else 1
            given[arg.name], args = args[:taken], args[taken:]
        if args:
            takes = usage(name, signature)
            raise self.fault(args[0], f"'{name}' takes no further argument", takes)
        return given

    def value(self, arg: Arg, nodes: list[ast.expr], owner: str) -> object:
        node, what = nodes[0], f"'{arg.name}' of {owner}"
        match arg.kind:
            case "count":
                return self.constant(node, arg, what, "int")
            case "number":
                return self.constant(node, arg, what, "float")
            case "expr":
                return self.expression(node, arg, what)
            case "exprs":
                return tuple(self.expression(n, arg, what) for n in nodes)
            case "word":
                return self.word(node, arg.words, what)
            case "input":
                return self.input(node, what).name
            case "flag":
                return self.word(node, ("true", "false"), what) == "true"
            case "call":
                return self.bind(node, arg.table or {}, what)
            case "stairs":
                return self.stairs(node, arg.words)

    def expression(self, node: ast.expr, arg: Arg, what: str) -> Expr:
        e = Reader(self.snippet, self.scope, arg.context).typed(node, arg.want, what)
        if e.value is not None and not arg.low <= e.value <= arg.high:
            raise self.fault(node, f"{what} must be {_range(arg)}, this is {e.value}")
        return e

    def constant(self, node: ast.expr, arg: Arg, what: str, want: Want) -> Expr:
        e = Reader(self.snippet, self.scope, "scale").typed(node, want, what)
        if e.value is None:
            raise self.fault(node, f"{what} must be a number")
        if not arg.low <= e.value <= arg.high:
            raise self.fault(node, f"{what} must be {_range(arg)}, this is {e.value}")
        return e

    def word(self, node: ast.expr, words: tuple[str, ...], what: str) -> str:
        word = node.id if isinstance(node, ast.Name) else ""
        word = "in" if word == "In" else word
        if word not in words:
            raise self.fault(node, f"{what} must be one of {', '.join(words)}", nearest(word, words))
        return word

    def input(self, node: ast.expr, what: str) -> Input:
        if not isinstance(node, ast.Name):
            raise self.fault(node, f"{what} must be the name of an input")
        if node.id not in self.scope.inputs:
            known = self.scope.inputs
            hint = nearest(node.id, known) if known else f"declare it: inputs: {{{node.id}: {{shape: […]}}}}"
            raise self.fault(node, f"{what} names no input: '{node.id}'", hint)
        return self.scope.inputs[node.id]

    def stairs(self, node: ast.expr, words: tuple[str, ...]) -> Stairs:
        """[(128, bf16), (inf, int4)]: rising ages, the last without end."""
        if not isinstance(node, ast.List) or not node.elts:
            raise self.fault(node, "a staircase is a list of (age, dtype)", "[(128, bf16), (inf, int8)]")
        steps: list[tuple[int | None, str]] = []
        for i, step in enumerate(node.elts):
            if not isinstance(step, ast.Tuple) or len(step.elts) != 2:
                raise self.fault(step, "a step is (age, dtype)")
            last = i == len(node.elts) - 1
            age = self.age(step.elts[0], last, steps[-1][0] or 0 if steps else 0)
            steps.append((age, self.word(step.elts[1], words, "the dtype of a step")))
        return tuple(steps)

    def age(self, node: ast.expr, last: bool, before: int) -> int | None:
        if isinstance(node, ast.Name) and node.id == "inf":
            if not last:
                raise self.fault(node, "only the last step may be without end")
            return None
        if last:
            raise self.fault(node, "the last step must be without end", "(inf, dtype)")
        e = self.constant(node, Arg("age", "count"), "an age", "int")
        if not isinstance(e.value, int) or e.value <= before:
            raise self.fault(node, f"ages rise: {e.value} after {before}")
        return e.value


def _range(arg: Arg) -> str:
    if arg.low == float("-inf"):
        return f"at most {arg.high:g}"
    return f"at least {arg.low:g}" if arg.high == float("inf") else f"in [{arg.low:g}, {arg.high:g}]"
