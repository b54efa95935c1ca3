"""What in TVM and LLVM has bitten, or would: each trap by itself, so that an upgrade that moves one is noticed.

Traps are those of TVM 0.27; where a test shows one that is still there, it says why the back-end goes around it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built import built
from codegen.emitted import normal
from codegen.test_packages import FEATURES, HEADS, PLAIN
from jitted import BY_NAME, RUNNABLE, function, jitted
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from attncc import driver, spec
from attncc.codegen.tvm import decode, formulas, forward, vector
from attncc.codegen.tvm.build import PASSES, assembly, compiled
from attncc.codegen.tvm.isa import KEYS, Isa
from attncc.codegen.tvm.libraries import kernels
from attncc.ir.attention import Attention

EACH_ISA = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
BEST = RUNNABLE[0]
REPOSITORY = Path(__file__).parents[2]


@cache
def attention(body: str) -> Attention:
    return driver.lower(spec.loads(f"attncc: 1\nname: trap\n{body}\n").attention)[0]


# -- floats --------------------------------------------------------------------------------------


@EACH_ISA
def test_differences_of_equal_floats_are_computed(isa: Isa) -> None:
    """NaN - NaN and inf - inf are NaN, x + big - big rounds: TVM's simplifier, which is left out, takes them for 0."""
    x = np.array([np.nan, np.inf, -np.inf, 1.25, 0.1], np.float32)
    big = np.float32(1.5 * 2**23)
    lanes = isa.lanes
    with np.errstate(invalid="ignore"):
        want = (x - x, x - ((x + big) - big), x * np.float32(0))
    difference = jitted(isa, ["float32"], "float32", lambda x: x - x)
    np.testing.assert_array_equal(difference(x), want[0])
    large = vector.widened(vector.real(float(big)), lanes)
    rest = jitted(isa, ["float32"], "float32", lambda x: x - ((x + large) - large))
    np.testing.assert_array_equal(rest(x), want[1])
    none = jitted(isa, ["float32"], "float32", lambda x: x * vector.widened(vector.real(0.0), lanes))
    np.testing.assert_array_equal(none(x), want[2])


def test_no_pass_simplifies() -> None:
    assert not [p for p in PASSES if "Simplif" in p.__name__ or "CommonSub" in p.__name__]


def test_unequal_is_not_left_to_tvm() -> None:
    """TVM's != of floats says no of NaN; where that changes `vector.unequal` can be simpler."""
    lanes = BEST.lanes
    theirs = jitted(BEST, ["float32"] * 2, "int32", lambda a, b: vector.cast(tirx.NE(a, b), "int32"), lanes)
    ours = jitted(BEST, ["float32"] * 2, "int32", lambda a, b: vector.cast(vector.unequal(a, b), "int32"), lanes)
    nan = np.full(lanes, np.nan, np.float32)
    assert theirs(nan, nan).sum() == 0
    assert ours(nan, nan).sum() == lanes


@EACH_ISA
def test_names_of_bf16_values(isa: Isa) -> None:
    """A bf16 value under a name is cast as an integer by TVM; ours are bits, widened by a shift."""
    x = normal(200).bfloat16()
    lanes = isa.lanes

    def product(x: Any) -> Any:
        named = vector.let(formulas.widen(vector.let(x), "bf16"))
        return vector.let(named * named)

    got = jitted(isa, ["uint16"], "float32", product, lanes)(x.view(torch.uint16).numpy())
    np.testing.assert_array_equal(got, x.float().square().numpy())
    assert "bfloat16" not in str(kernels(attention(f"{HEADS}dims: 16\nmask: causal"), isa)["attention"])


def test_exp_is_no_call_a_lane() -> None:
    """exp2 of a vector stays in registers; TVM's calls libm for each lane, forty times as slow."""
    text = assembly(kernels(attention(FEATURES["causal"]), BEST), BEST)
    assert not re.findall(r"call\w*\s+\S*exp", text)
    theirs = assembly({"f": function(BEST, ["float32"], "float32", lambda x: T.exp2(x), BEST.lanes)}, BEST)
    assert re.findall(r"exp2", theirs)


# -- integers and time ---------------------------------------------------------------------------


def test_nested_divisions_build_fast() -> None:
    """`//` and `%` of TVM's took LLVM minutes, and named integers TVM's simplifier; now it is a second or so."""
    begun = time.process_time()
    with_many = spec.load(REPOSITORY / "examples" / "natten_2d.yaml")
    kernels(driver.lower(with_many.attention)[0], BEST)
    deep = "i"
    for n in range(2, 9):
        deep = f"({deep} // (j % {n} + 1) + row % (h + {n}))"
    compiled(kernels(attention(f"{PLAIN}mask: {deep} % 3 != 1"), BEST), BEST)
    built(spec_body("natten_2d"))
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    "f",
    ["tanh({})", "sigmoid({})", "abs({} - 0.3)", "max(min({}, 0.9), -0.8)", "exp({} * 0.1)", "where({} > 0, {}, 1)"],
)
def test_nested_functions_build_fast(f: str) -> None:
    """TVM's simplifier looked through the names of floats as well: six tanh took minutes."""
    score = "qk"
    for _ in range(6 if f.count("{}") == 1 else 3):
        score = f.replace("{}", score)
    begun = time.process_time()
    compiled(kernels(attention(f"{PLAIN}score: '{score}'\nmask: causal"), BEST), BEST)
    assert time.process_time() - begun < 10


def spec_body(example: str) -> str:
    lines = (REPOSITORY / "examples" / f"{example}.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(("attncc:", "name:", "doc:")))


@pytest.mark.parametrize("feature", ["integers", "divisors from data", "listed by blocks", "offsets of documents"])
def test_floor_division_is_emitted_by_hand(feature: str) -> None:
    text = "".join(kernel.script() for kernel in kernels(attention(FEATURES[feature]), BEST).values())
    floored = re.compile(r" // | % ")
    x, y = tirx.Var("x", "int32"), tirx.Var("y", "int32")
    assert all(floored.search(str(e)) for e in (tirx.FloorDiv(x, y), tirx.FloorMod(x, y)))  # that is how they print
    assert not floored.search(text)
    assert " / " in text


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rows", [2, 70])
def test_tensors_are_aligned_to_elements_alone(dtype: str, rows: int) -> None:
    """TVM takes 64 bytes for granted, and faults on views that are not."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    p = built(
        f"{HEADS}dims: 16\ndtype: {dtype}\ninputs: {{x: {{shape: [Hq, Sk], dtype: int8}}}}\nscore: qk * scale + x[h, j]"
    )
    q, k = normal(1, 4, rows, 16, dtype=kind), normal(1, 2, 130, 16, dtype=kind)
    x = torch.arange(4 * 130).view(4, 130).remainder(5).to(torch.int8)
    want = p(q, k, k, x=x)
    for offset in (1, 2, 3, 7):
        moved = [torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t) for t in (q, k, x)]
        assert torch.equal(p(moved[0], moved[1], moved[1], x=moved[2]), want)


@pytest.mark.parametrize("feature", ["causal", "every operator", "offsets of documents", "listed by batch"])
def test_registers_stay_on_the_stack(feature: str) -> None:
    """TVM calls for memory for whatever is larger than a few bytes; only a task's tiles may be asked for, once."""
    found = kernels(attention(FEATURES[feature]), BEST)
    for name, kernel in found.items():
        text = compiled({name: kernel}, BEST).inspect_source("ll")
        sizes = [int(size) for size in re.findall(r"call ptr %\S+\(i32 1, i32 \S+, i64 (\d+), i32", text)]
        rows, columns = BEST.rows, 16
        tiles = {forward.FUNCTION: [4 * columns * rows, 4 * KEYS * rows, 4 * columns * rows]}
        assert sizes == tiles.get(name, [4 * decode.ROWS * columns])


@pytest.mark.parametrize("dtype", ["fp32", "bool"])
def test_squares_move_in_registers(dtype: str) -> None:
    """TVM reads vectors of unaligned tensors by their elements, and LLVM may leave it at that; of squares it made 256
    scalar moves, or longer chains of integers."""
    use = "mask: x[row, j]" if dtype == "bool" else "score: qk * scale + x[row, j]"
    body = f"{PLAIN}inputs: {{x: {{shape: [Sq, Sk], dtype: {dtype}}}}}\n{use}"
    text = assembly({"f": forward.forward(attention(body), BEST)}, BEST)
    lanes = BEST.lanes
    assert len(re.findall(r"\bvp?unpck[lh]\w+", text)) >= 2 * 2 * lanes  # two squares, two steps each inside of groups


# -- errors --------------------------------------------------------------------------------------


def test_uncaught_errors_are_shown() -> None:
    """TVM puts a hook in place of Python's that hides them."""
    imports = "import sys; h = sys.excepthook; import attncc.codegen.tvm.libraries; assert sys.excepthook is h"
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}; raise KeyError('shown')"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "KeyError: 'shown'" in done.stderr


# -- other processors ----------------------------------------------------------------------------


def test_aarch64_is_compiled() -> None:
    """Nothing here can run it; its machine code at least multiplies and adds in vector registers, and calls no exp."""
    neon = BY_NAME["neon"]
    for body in (FEATURES["causal"], f"{HEADS}dims: 24\nmask: causal & window(40)"):
        text = assembly(kernels(attention(body), neon), neon)
        assert len(re.findall(r"\bfmla\s+v\d+\.4s", text)) > 100
        assert not re.findall(r"\bbl\s+\S*exp", text)
        assert "zmm" not in text


def test_vector_registers_of_each_kind() -> None:
    attn = attention(FEATURES["causal"])
    for isa, wide, multiply in (("avx512", "zmm", "vfmadd"), ("avx2", "ymm", "vfmadd")):
        text = assembly(kernels(attn, BY_NAME[isa]), BY_NAME[isa])
        assert len(re.findall(rf"{multiply}\w+\s.*{wide}", text)) > 100
        assert ("zmm" in text) == (isa == "avx512")
