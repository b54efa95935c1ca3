"""House rules on the code: sizes, annotations, nothing that evaluates text, no target names above codegen."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter

import pytest
from house.own_code import ROOT, Function, Module, dotted, imported, modules

FILE_LINES = 400
FUNCTION_LINES = 60
BUILDER_LINES = 90
TOTAL_LINES = 44_000
"""Raised on purpose only."""

EVALUATING = {"eval", "exec", "__import__", "sympify", "parse_expr", "lambdify", "torch.load", "np.load"}
EVALUATING_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "jinja2"}
TARGET_WORDS = {"backend", "arch", "vendor", "target", "architecture"}
MUTABLE = {"Builder"}
"""The one writer of lists; what it makes is frozen."""

ALL = pytest.mark.parametrize("module", modules().values(), ids=lambda m: m.name)


@ALL
def test_files_are_short(module: Module) -> None:
    assert module.text.count("\n") < FILE_LINES


def test_the_whole_is_short() -> None:
    assert sum(m.text.count("\n") for m in modules().values()) < TOTAL_LINES


@ALL
def test_functions_are_short(module: Module) -> None:
    builders = module.name.startswith("attncc.passes.lower") or module.layer == "codegen"
    limit = BUILDER_LINES if builders else FUNCTION_LINES
    long = [(f.name, n) for f in module.functions() if (n := (f.end_lineno or 0) - f.lineno + 1) >= limit]
    assert not long


@ALL
def test_functions_are_annotated(module: Module) -> None:
    bare = [f"{module.where}:{f.lineno}: {f.name}" for f in module.functions() if not _annotated(f)]
    assert not bare, "\n".join(bare)


def _annotated(f: Function) -> bool:
    decorators = (d.func if isinstance(d, ast.Call) else d for d in f.decorator_list)
    if any(dotted(d) in ("triton.jit", "gluon.jit", "gluon.constexpr_function") for d in decorators):
        return True
    args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
    args += [a for a in (f.args.vararg, f.args.kwarg) if a]
    return f.returns is not None and all(a.annotation or a.arg in ("self", "cls") for a in args)


@ALL
def test_modules_say_what_they_are(module: Module) -> None:
    assert ast.get_docstring(module.tree), module.where


@ALL
def test_nothing_evaluates_text(module: Module) -> None:
    calls = {dotted(n.func): n.lineno for n in ast.walk(module.tree) if isinstance(n, ast.Call)}
    wrong = {name for name in calls if name in EVALUATING or name.split(".")[-1] in EVALUATING - {"torch.load"}}
    roots = {name.split(".")[0] for n in ast.walk(module.tree) for name in imported(n)}
    assert not wrong
    assert not roots & EVALUATING_MODULES


@ALL
def test_only_codegen_and_the_device_table_tell_targets_apart(module: Module) -> None:
    if module.layer in ("codegen", "device"):
        return
    wrong = [
        f"{module.where}:{n.lineno}: {ast.unparse(n)}"
        for n in ast.walk(module.tree)
        if isinstance(n, ast.Compare) and _compares_a_target(n)
    ]
    assert not wrong, "\n".join(wrong)


def _compares_a_target(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    literal = any(isinstance(s, ast.Constant) and isinstance(s.value, str) for s in sides)
    return literal and any(dotted(s).split(".")[-1] in TARGET_WORDS for s in sides)


@ALL
def test_dataclasses_are_frozen_and_slotted(module: Module) -> None:
    if module.is_fixed_source:
        return
    for node in ast.walk(module.tree):
        for decorator in getattr(node, "decorator_list", []):
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            if dotted(call) == "dataclass" and node.name not in MUTABLE:  # type: ignore[attr-defined]
                keywords = {k.arg for k in getattr(decorator, "keywords", [])}
                assert {"frozen", "slots"} <= keywords, f"{module.where}:{node.lineno}"  # type: ignore[attr-defined]


@ALL
def test_ignores_name_their_rule(module: Module) -> None:
    assert not re.search(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!:)|#\s*pyright:\s*ignore(?!\[)", module.text)


@ALL
def test_no_promises_in_comments(module: Module) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", module.text)


# -- the whole tree ------------------------------------------------------------------------------


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_machine_paths() -> None:
    roots = "|".join(("work", "opt", "root", "home", "mnt", "Users", "scratch"))
    path = re.compile(rf"(?<![\w.\-/<])/(?:{roots})/\w")
    wrong = []
    for name in tracked():
        if name.endswith((".png", ".cubin", ".hsaco")):
            continue
        lines = (ROOT / name).read_text().splitlines()
        wrong += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if path.search(line)]
    assert not wrong, "\n".join(wrong)


def test_no_test_is_skipped() -> None:
    skipping = re.compile(r"pytest\.(skip|importorskip|xfail)\(|mark\.(skip|skipif|xfail)\b")
    tests = [name for name in tracked() if name.startswith("tests/") and name.endswith(".py")]
    assert not [name for name in tests if skipping.search((ROOT / name).read_text()) and "house" not in name]


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by that name alone."""
    count = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, times in count.items() if times > 1]
