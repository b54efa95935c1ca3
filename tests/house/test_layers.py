"""Imports go one way, knots do not exist, and nothing of ours is imported inside a function."""

from __future__ import annotations

import ast

import pytest
from house.own_code import Module, dotted, imported, modules

BELOW: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "device": {"errors"},
    "ir": {"errors"},
    "spec": {"errors", "ir"},
    "passes": {"errors", "device", "ir"},
    "codegen": {"errors", "device", "ir"},
    "reference": {"errors", "ir"},
    "check": {"errors", "device", "ir", "reference"},
    "driver": {"errors", "version", "device", "ir", "spec", "passes", "codegen", "reference", "check"},
    "autotune": {
        "errors",
        "version",
        "device",
        "ir",
        "spec",
        "passes",
        "codegen",
        "reference",
        "check",
        "driver",
    },
    "cli": {"errors", "device", "codegen", "driver", "autotune"},
    "__main__": {"cli"},
    "attncc": {"errors", "device", "spec", "driver"},
}

ALL = pytest.mark.parametrize("module", modules().values(), ids=lambda m: m.name)


@ALL
def test_a_layer_imports_only_those_below(module: Module) -> None:
    allowed = BELOW[module.layer] | {module.layer}
    wrong = [
        f"{module.where}:{node.lineno}: {name}"
        for name, node in module.imports()
        if modules()[name].layer not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_back_ends_do_not_import_each_other() -> None:
    back_ends = {f"attncc.codegen.{b}" for b in ("triton", "gluon", "tvm")}
    wrong = [
        (m.where, name)
        for m in modules().values()
        if m.name in back_ends
        for name, _ in m.imports()
        if name in back_ends
    ]
    assert not wrong


@ALL
def test_our_imports_are_absolute_and_at_the_top(module: Module) -> None:
    top = set(module.tree.body)
    for node in module.tree.body:
        if isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING":
            top |= set(node.body)
    for name, node in module.imports():
        assert node in top, f"{module.where}:{node.lineno}: {name} is imported inside a block"
    if module.is_fixed_source:
        return
    relative = [n for n in ast.walk(module.tree) if any(name.startswith(".") for name in imported(n))]
    assert not relative, f"{module.where}: relative imports"


def test_no_import_knots() -> None:
    """A package counts as a module, and importing a module imports its packages first."""
    edges = {m.name: {name for name, _ in m.imports() if name != m.name} for m in modules().values()}
    left = dict(edges)
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"knot among {sorted(left)}"


def test_the_table_of_layers_is_complete() -> None:
    assert {m.layer for m in modules().values()} <= BELOW.keys()
