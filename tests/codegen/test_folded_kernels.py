"""Kernels of steps in Gluon: their text, and what the compiler makes of it for a GPU that need not be here."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attncc import driver, spec
from attncc.codegen import gate, source
from attncc.codegen.gluon_kernels import print_kernel
from attncc.codegen.package import emit
from attncc.device import find
from attncc.errors import CompilerBug
from attncc.ir.build import Builder, column, iota, read, row
from attncc.ir.expr import cast_to, const, name
from attncc.ir.tile import Kernel, Param

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_PROGRAM = 233472 - 1024
"""Bytes of shared memory that it may have, but for what the driver takes."""
JUDGE = """
import json, sys
from pathlib import Path
from attncc.codegen import assembly
from attncc.codegen.elsewhere import disassembled, large_call, opened, runner_of
from attncc.device import find
package = opened(Path(sys.argv[1]), find("sm_90"))
config = next(c for m in package.VARIANT.configs.values() for _, c in m.TABLE if c.get("ENGINE"))
call = large_call(runner_of(package))
launches, tensors = call.launches(config, True, True)
for launch in launches:
    if "_prologue_" in launch.function.__name__:
        made = launch.compile(launch.prepared(launch.bound, tensors, 0.1, launch.make_map))
        text = disassembled(made)
        counts = assembly.read(text, assembly.SASS)
        print(json.dumps([made.name, made.metadata.shared, counts.total, counts.loop, counts.reloads]))
"""


def files_of(example: str) -> dict[str, Any]:
    loaded = spec.loads(example) if example == MORE else driver.load(EXAMPLES / f"{example}.yaml")
    attn, program = driver.lower(replace(loaded.attention, modes=("prefill",)))
    configs = [driver.default_config(attn, find("sm_90"))]
    return dict(emit(attn, program, loaded.text, configs, "attncc", "0"))


@pytest.mark.parametrize("example", ["cca", "ccgqa"])
def test_what_a_kernel_calls_is_there(example: str) -> None:
    files = files_of(example)
    module = ast.parse(files["prologue.py"])
    called = {n.func.id for n in ast.walk(module) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    imported = {a.name for n in module.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert called - {"range"} <= imported
    assert imported - {"gluon", "language"} <= source.called("_fragments", [files["prologue.py"]]) & called
    assert "tl." not in files["prologue.py"]
    assert "_fragments.py" in files
    assert "from . import" in files["__init__.py"]
    assert f"prologue.{example}_prologue_folded" in files["__init__.py"]


def test_portable_packages_have_no_kernels_in_gluon() -> None:
    loaded = driver.load(EXAMPLES / "cca.yaml")
    attn, program = driver.lower(replace(loaded.attention, modes=("prefill",)))
    files = emit(attn, program, loaded.text, [driver.default_config(attn, find("sm_80"))], "attncc", "0")
    assert not {"prologue.py", "_fragments.py"} & {*files}
    assert "prologue_folded" not in "".join(t for t in files.values() if isinstance(t, str))


MORE = """
attncc: 1
name: more
heads: {q: 4, kv: 2}
dims: 64
mask: causal
modes: [prefill]
inputs:
  a: {shape: [6, 64, 2]}
  u: {shape: [384]}
  c: {shape: [384, 64, 2]}
  w: {shape: [Dqk]}
  x: {shape: [B, Hq, Sq, Dqk], dtype: fp16}
  t: {shape: [B, Hk]}
prologue:
  - causal_conv(a, bias=u)
  - causal_conv(c, groups=heads)
  - mean_residual(scale=0.25)
  - rms_norm(weight=w)
  - silu(on=k)
  - lerp(x, 0.25, on=q)
  - temperature(exp(t[b, hk]) + 0.5, on=k)
  - rope
"""


@pytest.mark.newest
@pytest.mark.parametrize(("example", "products"), [("cca", 1 + 3 * 8), ("ccgqa", 1 + 3 * 8), (MORE, 1 + 3 * 4)])
def test_machine_code(example: str, products: int, tmp_path: Path) -> None:
    """A program fits a multiprocessor, and few registers are reloaded."""
    files = files_of(example)
    example = "more" if example == MORE else example
    package = tmp_path / example
    (package / "configs").mkdir(parents=True)
    for path, content in files.items():
        (package / path).write_text(content)
    environment = gate.environment(str(tmp_path / "cache"))
    command = [sys.executable, "-c", JUDGE, str(package)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = {line[0]: line[1:] for line in map(json.loads, said.splitlines())}
    assert {*found} == {f"{example}_prologue_ahead", f"{example}_prologue_folded"}
    shared, total, loop, reloads = found[f"{example}_prologue_folded"]
    assert shared <= ONE_PROGRAM
    assert total["wgmma"] == loop["wgmma"] == 4 * products, "a bias and three tokens, of two tiles of q or of k"
    assert all(words <= count // 40 for count, words in reloads), reloads


@pytest.mark.parametrize(("example", "parts"), [("cca", 3), ("ccgqa", 3), (MORE, 2)])
def test_two_tiles_take_turns_and_what_only_moves_is_moved_meanwhile(example: str, parts: int) -> None:
    files = files_of(example)
    name = "more" if example == MORE else example
    text = files["prologue.py"]
    module = ast.parse(text)
    at_once = [n for n in ast.walk(module) if isinstance(n, ast.Call) and ast.unparse(n.func) == "gl.warp_specialize"]
    assert len(at_once) == 2
    for call, operand in zip(at_once, "qk", strict=True):
        tuples, warps, registers = (ast.unparse(a) for a in call.args)
        calls = [ast.unparse(t).strip("()") for t in call.args[0].elts if isinstance(call.args[0], ast.List)]
        assert len(calls) == parts, tuples
        assert [c.endswith(f", {turn}") for turn, c in enumerate(calls[:2])] == [True, True], "whose turn is first"
        assert all(c.startswith(f"{name}_{operand}_lines, ") for c in calls[:2])
        assert [c.split(",")[0] for c in calls[2:]] == [f"{name}_v_moved"] * (parts - 2)
        assert (warps, registers) == (("[4, 4]", "[232, 40]") if parts == 3 else ("[4]", "[240]"))
    assert text.count("begin_turns(TURN)") == text.count("end_turns(TURN)") == 2
    assert text.count("arrived(") == text.count(" = room(")


HERE = {
    "X": Param("X", "operand", "bf16"),
    "Y": Param("Y", "operand", "bf16"),
    "S": Param("S", "scalar", "i32"),
}


def printed(b: Builder) -> list[str]:
    kernel = Kernel("k", tuple(HERE.values()), b.body, (), const(1), "A kernel.", "gluon")
    (text,) = print_kernel(kernel)
    return [line.strip() for line in text.splitlines()]


def stored(b: Builder, value: Any, at: Any) -> None:
    b.store(HERE["Y"], (const(0), const(0), column(at), row(iota(64))), cast_to(value, "bf16"), column(at < name("S")))


def test_vectors_have_the_layout_of_the_axis_that_they_stand_beside() -> None:
    b = Builder(HERE)
    at = b.let("at", iota(64) + 1)
    weight = b.let("weight", cast_to(iota(64), "f32") * 2.0)
    stored(b, cast_to(column(at), "f32") * row(weight), at)
    text = printed(b)
    assert "at = gl.arange(0, 64, rows_of(64)) + 1" in text
    assert "weight = gl.arange(0, 64, columns_of(64)).to(gl.float32) * 2.0" in text
    assert "write_rows(Y, at, y_s, at[:, None].to(gl.float32) * weight[None, :], at < S)" in text


def test_what_loops_read_waits_in_shared_memory() -> None:
    b = Builder(HERE)
    at = b.let("at", iota(64))
    tile = b.let("tile", cast_to(column(at), "f32") * row(cast_to(iota(64), "f32")))
    with b.loop("n", 0, 3):
        stored(b, tile + 1.0, at)
    text = printed(b)
    assert any(line.startswith("tile = kept(") for line in text)
    assert any("tile.load(tile_of(64)) + 1.0" in line for line in text)


def test_accesses_that_are_no_rows_are_no_text() -> None:
    b = Builder(HERE)
    at = b.let("at", iota(64))
    value = cast_to(column(at), "f32") * row(cast_to(iota(64), "f32"))
    b.store(HERE["Y"], (const(0), const(0), column(at), row(iota(64) * 2)), cast_to(value, "bf16"))
    with pytest.raises(CompilerBug, match="no text for an access to Y"):
        printed(b)


def test_rows_come_to_shared_memory_while_threads_go_on() -> None:
    b = Builder(HERE)
    at = b.let("at", iota(64))
    place = const(0), const(0), column(at), row(iota(64))
    coming = b.let("coming", read(HERE["X"], *place), ahead=True)
    stored(b, cast_to(b.let("there", coming), "f32") * 2.0, at)
    text = printed(b)
    order = ["coming = room(64)", "bring(coming, X, at, x_s)", "there = arrived(coming, 64)"]
    assert [line for line in text if line in order] == order
    b.let("coming", read(HERE["X"], *place, mask=column(at < name("S"))), ahead=True)
    with pytest.raises(CompilerBug, match="no text for what comes ahead"):
        printed(b)
