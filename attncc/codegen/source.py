"""Text of Python modules: a writer with indents, and definitions copied from tested files by name."""

from __future__ import annotations

import ast
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.resources import files


class Writer:
    """Collects lines; `indented` nests them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "") -> None:
        self.lines.append("    " * self._depth + text if text else "")

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
