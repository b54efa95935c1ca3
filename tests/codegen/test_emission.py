"""Facts of emitted text: what is in it, what is not, that it stands alone, and that user text stays text."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from carried import carried
from codegen.emitted import normal, package

from attncc import driver, spec

EXAMPLES = carried()
BODY = "heads: {q: 4, kv: 2}\ndims: 64\n"
CLOSED = {
    "causal": "mask: causal",
    "window": "mask: causal & window(128)",
    "sink": "mask: causal & (window(128) | sink(4))",
    "prefix": "mask: causal | prefix(100)",
    "chunked": "mask: causal & chunked(256)",
    "documents as offsets": "mask: causal & segments(cuts)\ninputs: {cuts: {shape: [n], dtype: int32, sorted: true}}",
    "lengths": "mask: j < lens[b]\ninputs: {lens: {shape: [B], dtype: int32}}",
}
DATA = {
    "documents": "mask: causal & document(ids)\ninputs: {ids: {shape: [B, Sk], dtype: int32}}",
    "blocks": "mask: on[i // 128, j // 128]\ninputs: {on: {shape: [m, n], dtype: bool}}",
}


def kernels(body: str) -> str:
    return (package(BODY + body, target="sm_90").path / "kernels.py").read_text()


def function(text: str, name: str) -> ast.FunctionDef:
    found = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name.endswith(name))
    return next(found)


def statements_of_full_tiles(step: ast.FunctionDef) -> Iterator[ast.stmt]:
    """Those that run where MASKED is false and CARE is 0."""
    for s in step.body:
        if not (isinstance(s, ast.If) and ast.unparse(s.test) in ("MASKED", "CARE == 1", "CARE == 3")):
            yield s


@pytest.mark.parametrize("body", [*CLOSED.values(), *DATA.values()], ids=[*CLOSED, *DATA])
def test_full_tiles_carry_no_mask(body: str) -> None:
    text = "\n".join(ast.unparse(s) for s in statements_of_full_tiles(function(kernels(body), "key_tile")))
    assert "tl.dot" in text
    assert not re.search(r"\b(where|keep|inside|mask\w*)\b|<=|>=|==", text)


@pytest.mark.parametrize("body", CLOSED.values(), ids=CLOSED)
def test_masks_in_closed_form_have_no_table(body: str) -> None:
    p = package(BODY + body, target="sm_90")
    text = (p.path / "kernels.py").read_text()
    assert "classify" not in text
    assert "tile_list" not in text
    assert {s.name for s in p.module.VARIANT.scratch} <= {"lost", "again", "part_m", "part_l", "part_o", "part_lost"}


@pytest.mark.parametrize("body", DATA.values(), ids=DATA)
def test_tables_of_data_dependent_masks_are_of_tiles(body: str) -> None:
    v = package(BODY + body, target="sm_90").module.VARIANT
    n = {"B": 2, "Sq": 2**16, "Sk": 2**16, "BM": 64, "BN": 128, "n": 512, "m": 512}
    entries = sum(rows * columns for rows, columns in (s.shape(n) for s in v.scratch if s.name.startswith("tile_")))
    assert entries <= 2 * (2**16 // 64) * (2**16 // 128 + 2)


def test_the_causal_loop_ends_at_the_diagonal() -> None:
    text = kernels("mask: causal")
    forward = function(text, "_forward")
    lets = {ast.unparse(s.targets[0]): ast.unparse(s.value) for s in ast.walk(forward) if isinstance(s, ast.Assign)}
    loops = [ast.unparse(s.iter) for s in ast.walk(forward) if isinstance(s, ast.For)]
    assert loops[:2] == ["range(0, full_end, BN)", "range(full_end, key_hi, BN)"]
    assert lets["key_hi"] == "tl.maximum(tl.minimum(i1 + 1, Sk), 0)"
    assert lets["full_hi"] == "tl.maximum(tl.minimum(i0 + 1, Sk), 0)"


def test_one_kernel_serves_all_sizes() -> None:
    def text(sizes: str) -> str:
        found = kernels(f"mask: causal & window(100){sizes}")
        return re.sub(r"emitted_\d+|variant \w+", "", found)

    assert text("") == text("\nsizes: {Sq: {max: 4096}, Sk: {max: 8192}, B: {max: 1}}")
    listed = re.findall(r"do_not_specialize=\[(.*?)\]", kernels("mask: causal"))
    every = '"B", "Sq", "Sk"'
    assert listed == [every, '"Sq", "Sk"', every, every]  # the second does tiles of the first again


def test_nothing_unused_is_passed_or_bound() -> None:
    for body in (*CLOSED.values(), *DATA.values()):
        for f in ast.parse(kernels(body)).body:
            if not isinstance(f, ast.FunctionDef):
                continue
            read = {n.id for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            bound = {n.id for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} - {"_"}
            given = {a.arg for a in f.args.args}
            columns = {a for a in given if re.fullmatch(r".*_s\d|.*_[bhs]", a)}  # strides travel with their tensor
            assert not bound - read, (f.name, bound - read)
            assert not given - columns - read, (f.name, given - read)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_emitted_text_is_tidy(path: Path, tmp_path: Path) -> None:
    """No line is too long, Python 3.11 reads it, ruff has nothing to say of it, every config names every knob."""
    out = driver.compile(path, tmp_path, ["sm_90", "sm_80", "interpreter"])
    for file in sorted(out.rglob("*.py")):
        text = file.read_text()
        ast.parse(text, feature_version=(3, 11))
        compile(text, str(file), "exec")
        assert not [line for line in text.splitlines() if len(line) > 120], file.name
        assert text == text.rstrip() + "\n"
        assert not re.search(r"[ \t]$", text, re.MULTILINE)
    rules = ["--isolated", "--select=F,E7,E9,W,B,PLE", "--ignore=E741", "--no-cache", "-q"]
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *rules, str(out)], capture_output=True, text=True, check=False
    )
    assert ruff.returncode == 0, ruff.stdout
    _, program = driver.lower(driver.load(path).attention)
    wanted = {k.name for k in program.knobs} - {"WRITE_LSE"} | {"num_warps", "num_stages"}
    for file in (out / "configs").glob("[a-z]*.py"):
        scope: dict[str, object] = {}
        exec(file.read_text(), scope)
        table = scope["TABLE"]
        assert isinstance(table, tuple)
        assert table[-1][0] == {}
        assert all(wanted <= config.keys() for _, config in table)


DOCS = [
    'ends """ here',
    'x""" + str(__import__("os").system("true")) + """',
    "back\\slash \\N{nothing} \\x",
    "ends with a \\",
    'ends with "',
    '""" starts with it',
    "ümläut — and 漢字",
    "bidi \u202e override, separator \u2028 and bell \u0007",
    "no dot at the end. Or is there...",
]


@pytest.mark.parametrize("doc", DOCS)
def test_a_doc_is_only_ever_text(doc: str, tmp_path: Path) -> None:
    text = f"attncc: 1\nname: told\ndoc: {json.dumps(doc)}\nheads: 2\ndims: 16\n"
    tree = ast.parse((driver.compile(spec.loads(text), tmp_path, ["interpreter"]) / "__init__.py").read_text())
    shown = ast.get_docstring(tree, clean=False) or ""
    assert shown.startswith(f"told: {doc}"[: 6 + len(doc)])
    attention = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "attention")
    assert (ast.get_docstring(attention, clean=False) or "").startswith(doc)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "__import__"]


NAMES = [
    "lost",
    "lost_",
    "tile_list",
    "tile_counts",
    "skew_0",
    "LSE",
    "Q",
    "acc",
    "m",
    "l",
    "s",
    "x",
    "n",
    "keep",
    "inside",
]
NAMES += ["BM", "TMA", "tl", "triton", "key_tile", "work", "c", "rows", "torch", "kernels", "math", "Tensor", "VARIANT"]
NAMES += ["FORWARD", "self", "int", "load_tile", "bias_ptr", "len_n", "mask_0", "offset", "choose", "attention", "grid"]


@pytest.mark.parametrize("word", NAMES)
def test_an_input_may_have_any_name(word: str) -> None:
    inputs = f"{word}: {{shape: [Sk], dtype: int32}}, Bias: {{shape: [size]}}, bias: {{shape: [size]}}"
    body = f"heads: 2\ndims: 16\ndtype: fp32\ninputs: {{{inputs}}}\nscore: qk * scale + Bias[i - j] - bias[j]"
    p = package(f"{body}\nmask: {word}[i] == {word}[j]").tiles(16, 16)
    q, ids, bias = normal(1, 2, 20, 16), torch.arange(20).int() // 7, normal(20)
    o = p.module.attention(q, q, q, **{word: ids}, Bias=bias, bias=bias * 2)
    d = torch.arange(20)[:, None] - torch.arange(20)
    score = q @ q.mT * 0.25 + torch.where(d >= 0, bias[d], 0.0) - bias * 2
    want = score.masked_fill(ids[:, None] != ids, -torch.inf).softmax(-1) @ q
    torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-6)


def test_a_package_needs_triton_to_know_that_it_interprets(tmp_path: Path) -> None:
    """Where something imported triton for a GPU that is not here, the message says what to do."""
    path = driver.compile(
        spec.loads("attncc: 1\nname: late\nheads: 2\ndims: 16\ndtype: fp32\n"), tmp_path, ["interpreter"]
    )
    call = "q = torch.zeros(1, 2, 3, 16); print(late.attention(q, q, q).shape)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}

    def run(first: str) -> subprocess.CompletedProcess[str]:
        code = f"import torch; {first}import late; {call}"
        return subprocess.run(
            [sys.executable, "-c", code], cwd=path.parent, env=environment, capture_output=True, text=True, check=False
        )

    assert run("").stdout == "torch.Size([1, 2, 3, 16])\n"
    late = run("import triton; ")
    assert late.returncode == 1
    assert "set TRITON_INTERPRET=1 before anything imports triton" in late.stderr
