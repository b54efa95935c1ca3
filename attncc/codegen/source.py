"""Text of Python modules: a writer with indents, and definitions copied from tested files by name."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.resources import files

WIDTH = 120


def wrapped(text: str, width: int) -> list[str]:
    """A statement that ends in a call, its arguments on lines of their own; other statements as they are."""
    body, comment = text.split("  # ", 1) if "  # " in text else (text, "")
    start, parts = _last_call(body)
    if start < 0 or text.startswith("#"):
        return [text]
    comma = "," if len(parts) > 1 or body[start - 1 : start].isidentifier() else ""  # ( x, ) would be a tuple
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 6 <= width:
            lines[-1] += f" {part}{comma}"
        else:
            lines.append(f"    {part}{comma}")
    return [body[: start + 1], *lines, ")" + (f"  # {comment}" if comment else "")]


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
        indent = "    " * self._depth
        lines = wrapped(text, WIDTH - len(indent)) if len(indent) + len(text) > WIDTH else [text]
        self.lines += [indent + part if part else "" for part in lines]

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


def definitions(name: str, wanted: frozenset[str]) -> list[str]:
    """Source of the wanted top-level functions of a module, decorators included, in its order."""
    text = module_text(name)
    lines = text.splitlines()
    out: list[str] = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            out.append("\n".join(line.replace("  # fmt: skip", "") for line in lines[start - 1 : node.end_lineno]))
    return out


def function_names(name: str) -> frozenset[str]:
    """The top-level functions of a module of this package."""
    return frozenset(n.name for n in ast.parse(module_text(name)).body if isinstance(n, ast.FunctionDef))
