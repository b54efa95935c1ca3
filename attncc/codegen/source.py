"""Text of Python modules: a writer with indents, and definitions copied from tested files by name."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Final

WIDTH = 120


BINARY: Final = (
    (" < ", " <= ", " > ", " >= ", " == ", " != "),
    (" | ",),
    (" & ",),
    (" + ", " - "),
    (" * ", " / ", " // ", " % "),
)
"""Python's operators, those that bind the least first."""


def wrapped(text: str, width: int) -> list[str]:
    """A statement over several lines, where it ends in a call or is an assignment."""
    body, _, comment = text.partition("  # ")
    note = f"  # {comment}" if comment else ""
    if text.startswith("#"):
        return [text]
    lines = _wrapped_call(body, width)
    target, assigned, value = body.partition(" = ")
    if assigned and len(lines[0]) > width and target.replace(", ", "").isidentifier() and not value.startswith('"'):
        lines = [f"{target} = (", *[f"    {line}" for line in laid_out(value, width - 4)], ")"]
    return [*lines[:-1], lines[-1] + note]


def laid_out(text: str, width: int) -> list[str]:
    """An expression inside brackets over as many lines as it needs: cut at its weakest operator, else in its calls."""
    if len(text) <= width:
        return [text]
    first, *others = _operands(text)
    if not others:
        return _wrapped_call(text, width)
    lines = laid_out(first, width)
    for sign, operand in zip(others[::2], others[1::2], strict=True):
        inner = laid_out(operand, width - len(sign) + 1)
        lines += [f"{sign[1:]}{inner[0]}", *inner[1:]]
    return lines


def _wrapped_call(text: str, width: int) -> list[str]:
    """An expression that ends in a call, its arguments on lines of their own; others as they are."""
    body, cast = _split_cast(text)
    start, parts = _last_call(body)
    if start < 0 or parts == [""]:
        return [text]
    comma = "," if len(parts) > 1 or body[start - 1 : start].isidentifier() else ""  # ( x, ) would be a tuple
    lines: list[str] = []
    fresh = True
    for part in filter(None, parts):  # a tuple of one has nothing behind its comma
        if not fresh and len(lines[-1]) + len(part) + 2 <= width:
            lines[-1] += f" {part}{comma}"
            continue
        inner = laid_out(part, width - 5)
        lines += [f"    {line}" for line in inner]
        lines[-1] += comma
        fresh = len(inner) > 1
    return [body[: start + 1], *lines, f"){cast}"]


def _split_cast(body: str) -> tuple[str, str]:
    """Conversions and new axes at the end stay behind the call whose value they take."""
    found = re.search(r"(?<=\))(?:\.to\([\w.]+\)|\[(?:None|:)(?:, (?:None|:))*\])+$", body)
    return (body[: found.start()], found[0]) if found else (body, "")


def _operands(text: str) -> list[str]:
    """Operands and operators of an expression, in turn, of its weakest operator outside all brackets."""
    places: dict[int, str] = {}
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        found = re.match(r" (?:[<>=!]=|//|[<>|&+\-*/%]) ", text[at:]) if depth == 0 and letter == " " else None
        if found:
            places[at] = found[0]
    signs = next((signs for signs in BINARY if set(signs) & set(places.values())), ())
    out: list[str] = []
    begin = 0
    for at, sign in places.items():
        if sign in signs:
            out += [text[begin:at], sign]
            begin = at + len(sign)
    return [*out, text[begin:]]


def filled(words: Iterable[str], width: int = WIDTH - 12) -> list[str]:
    """Words with a comma behind each, as many on a line as fit."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 2 <= width:
            lines[-1] += f" {word},"
        else:
            lines.append(f"{word},")
    return lines


def _last_call(body: str) -> tuple[int, list[str]]:
    """Where the parenthesis opens that the text ends with, and the arguments inside; -1 where there is none."""
    if not body.endswith(")"):
        return -1, []
    depth, cuts = 0, [len(body) - 1]
    for at in range(len(body) - 1, -1, -1):
        if body[at] in ")]":
            depth += 1
        elif body[at] in "([":
            depth -= 1
        if depth == 0:
            edges = [at, *reversed(cuts)]
            return at, [body[a + 1 : b].strip() for a, b in itertools.pairwise(edges)]
        if depth == 1 and body[at] == ",":
            cuts.append(at)
    return -1, []


class Writer:
    """Collects lines; `indented` nests them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "") -> None:
        """One line; a call that is too long for it takes several."""
        self._add(wrapped(text, WIDTH - 4 * self._depth) if 4 * self._depth + len(text) > WIDTH else [text])

    def entry(self, text: str) -> None:
        """One line inside brackets and the comma behind it."""
        *lines, last = laid_out(text, WIDTH - 4 * self._depth - 1)
        self._add([*lines, f"{last},"])

    def _add(self, lines: Iterable[str]) -> None:
        self.lines += ["    " * self._depth + line if line else "" for line in lines]

    def signature(self, name: str, parameters: Sequence[str]) -> None:
        """The line that begins a function, over several where it is too long."""
        whole = f"def {name}({', '.join(parameters)}):"
        if 4 * self._depth + len(whole) <= WIDTH:
            self.line(whole)
            return
        self.line(f"def {name}(")
        with self.indented():
            self.block(filled(parameters))
        self.line("):")

    def block(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.line(text)

    @contextmanager
    def indented(self) -> Generator[None]:
        self._depth += 1
        yield
        self._depth -= 1

    def text(self) -> str:
        return "\n".join(self.lines).rstrip() + "\n"


def module_text(name: str) -> str:
    """The source of a module of this package, read without importing it."""
    return files("attncc.codegen").joinpath(f"{name}.py").read_text(encoding="utf-8")


@cache
def _functions(name: str) -> Mapping[str, str]:
    """Source of the top-level functions of a module by name, decorators included, in its order."""
    text = module_text(name)
    lines = text.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            own = lines[start - 1 : node.end_lineno]
            found[node.name] = "\n".join(line.replace("  # fmt: skip", "") for line in own)
    return found


def definitions(name: str, wanted: frozenset[str]) -> list[str]:
    """Source of the wanted top-level functions of a module, decorators included, in its order."""
    return [text for function, text in _functions(name).items() if function in wanted]


def called(name: str, texts: Iterable[str]) -> frozenset[str]:
    """The top-level functions of a module that texts call, and those that these call."""
    functions = _functions(name)
    found: set[str] = set()
    unread = list(texts)
    while unread:
        more = {word for word in CALL.findall(unread.pop()) if word in functions} - found
        found |= more
        unread += (functions[word] for word in more)
    return frozenset(found)


CALL: Final = re.compile(r"(?<!def )\b(\w+)\(")
