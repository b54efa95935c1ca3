"""The package's own modules, parsed, for the tests of the house rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "attncc"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    """attncc.ir.expr"""
    path: Path
    text: str
    tree: ast.Module

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def layer(self) -> str:
        """Its directory or file right under the package: ir, spec, driver."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else "attncc"

    @property
    def is_fixed_source(self) -> bool:
        """Copied into emitted packages as it is, beside its like: they import each other relatively."""
        return self.name.startswith("attncc.codegen._")

    def functions(self) -> Iterator[Function]:
        return (n for n in ast.walk(self.tree) if isinstance(n, Function))

    def imports(self) -> Iterator[tuple[str, ast.stmt]]:
        """Every module of ours it imports, wherever the import stands."""
        for node in ast.walk(self.tree):
            for name in imported(node):
                if name.split(".")[0] == "attncc":
                    yield owner(name), node  # type: ignore[misc]


def imported(node: ast.AST) -> list[str]:
    """Full names that an import statement brings in; `from . import x` is written with its dots."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            return [f"{'.' * level}{module or ''}.{alias.name}" for alias in names]
        case _:
            return []


@cache
def modules() -> dict[str, Module]:
    found: dict[str, Module] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        found[name] = Module(name, path, text, ast.parse(text))
    return found


def owner(name: str) -> str:
    """The module that `attncc.ir.expr.Expr` stands in."""
    while name not in modules() and "." in name:
        name = name.rpartition(".")[0]
    return name


def dotted(node: ast.expr) -> str:
    """`a.b.c` of nested attributes; empty for anything else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            head = dotted(value)
            return f"{head}.{attr}" if head else attr
        case _:
            return ""
