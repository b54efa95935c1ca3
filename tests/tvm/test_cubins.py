"""CUDA kernels through TVM, where no GPU is: their source, their machine code, their packages, and what they refuse."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from carried import ROOT, carried

from attncc import driver, passes, spec
from attncc.codegen import assembly
from attncc.codegen.backends import share_out
from attncc.codegen.tvm.cuda import cubin, forward, libraries, warps
from attncc.device import DEVICES, find
from attncc.errors import AttnccError, SpecError, Unsupported
from attncc.ir.attention import Attention, Dims

EXAMPLES = carried("tvm: forward")
HEADS = "heads: {q: 4, kv: 2}\n"
CAUSAL = f"{HEADS}dims: 64\nmask: causal"


def variant(body: str) -> Attention:
    return passes.run(spec.loads(f"attncc: 1\nname: variant\n{body}\n").attention)


def products(attn: Attention) -> int:
    """Tensor core products of 16 x 8 x 16 that a key tile takes a warp."""
    block = warps.choose(attn.dims, find("sm_90").shared_bytes_per_block)
    qk, v = warps.padded(attn.dims.qk), warps.padded(attn.dims.v)
    return block.tiles * (block.keys // 8) * (qk // 16) + block.tiles * (block.keys // 16) * (v // 8)


@cache
def built(body: str, arch: str = "sm_90") -> libraries.Cubin:
    return libraries.cubins(variant(body), [find(arch)])[arch]


@cache
def disassembled(body: str, arch: str) -> assembly.Counts:
    knobs: Any = triton.knobs
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built(body, arch).code)
        file.flush()
        tool = knobs.nvidia.nvdisasm.path
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return assembly.read(text, assembly.SASS)


# -- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_becomes_source(path: Path) -> None:
    """Each kernel multiplies as often as its tiles ask: cut tiles share the products of whole ones."""
    attn = passes.run(spec.load(path).attention)
    block = warps.choose(attn.dims, find("sm_90").shared_bytes_per_block)
    for name in libraries.kernels(attn):
        text = cubin.source({name: forward.forward(attn, block, name)}, "sm_90")
        body = text[text.rindex(f" {name}(") :]
        assert len(re.findall(r"tvm_builtin_ptx_mma_sync", body)) == products(attn)
        assert ("cp_async" in body) == (name == forward.IN_CHUNKS)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(arch: str) -> None:
    """Both kernels' products are all there; keys are copied behind the back of the registers."""
    found = disassembled(CAUSAL, arch)
    assert found.total["mma"] == 2 * products(variant(CAUSAL))
    assert found.total["cp_async"] > 0


@pytest.mark.parametrize("body", [CAUSAL, f"{HEADS}dims: 128", f"{HEADS}dims: {{qk: 192, v: 128}}"])
def test_registers_hold_a_tile(body: str) -> None:
    """What spills is a few words at most, where a tile of the output would be hundreds."""
    found = disassembled(body, "sm_90")
    keys, rows = built(body).keys // 4, warps.choose(variant(body).dims, find("sm_90").shared_bytes_per_block).vectors
    careful = 2 * keys * rows  # weights asked by number lie in memory on purpose, in both kernels
    assert found.total.get("spill_store", 0) <= careful + 2 * 32


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtypes_multiply_as_themselves(dtype: str) -> None:
    attn = variant(f"{CAUSAL}\ndtype: {dtype}")
    block = warps.choose(attn.dims, find("sm_90").shared_bytes_per_block)
    text = cubin.source({"attention": forward.forward(attn, block, "attention")}, "sm_90")
    name = {"bf16": "bf16", "fp16": "f16"}[dtype]
    assert f"m16n8k16_row_col_f32_{name}_{name}_f32" in text


def test_heads_that_no_row_can_align_have_one_kernel() -> None:
    assert libraries.kernels(variant(f"{HEADS}dims: 64")) == ("attention", "attention_any")
    assert libraries.kernels(variant(f"{HEADS}dims: {{qk: 64, v: 20}}")) == ("attention_any",)


@pytest.mark.parametrize("device", [d for d in DEVICES.values() if d.vendor == "nvidia"], ids=lambda d: d.name)
def test_blocks_fit_every_device(device: Any) -> None:
    for d in (1, 16, 64, 72, 128, 192, 256):
        block = warps.choose(Dims(d, d), device.shared_bytes_per_block)
        assert block.shared_bytes(Dims(d, d)) <= device.shared_bytes_per_block
        assert block.rows % warps.ATOM == block.keys % warps.ATOM == 0


# -- packages ------------------------------------------------------------------------------------

ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("attncc", "tvm", "tvm_ffi", "triton", "cuda"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Nothing())
import torch
import deployed
q = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16)
try:
    deployed.attention(q, q[:, :2], q[:, :2])
except RuntimeError as error:
    print(error)
"""


def test_a_package_needs_torch_alone(tmp_path: Path) -> None:
    path = driver.compile(spec.loads(f"attncc: 1\nname: deployed\n{CAUSAL}\n"), tmp_path, ["sm_90"], backend="tvm")
    held = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert held == {
        "__init__.py",
        "_checks.py",
        "_cuda.py",
        "_driver.py",
        "_runtime.py",
        "spec.yaml",
        "cuda/sm_90.cubin",
    }
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "deployed: tensors are on cpu, the kernels need an NVIDIA GPU\n", done.stderr


def test_a_package_can_hold_several_cubins_and_a_library(tmp_path: Path) -> None:
    targets = ["sm_80", "nvidia_h200", "cpu"]
    path = driver.compile(spec.loads(f"attncc: 1\nname: several\n{CAUSAL}\n"), tmp_path, targets, backend="tvm")
    assert {p.name for p in (path / "cuda").iterdir()} == {"sm_80.cubin", "sm_90.cubin"}
    assert list((path / "cpu").glob("*.so"))
    assert "_runtime.Either(_cuda.Runner(VARIANT, 4, BLOCKS), _cpu.Runner(" in (path / "__init__.py").read_text()


def test_the_same_spec_gives_the_same_bytes() -> None:
    attn = variant(f"{HEADS}dims: 16")
    first, second = (libraries.cubins(attn, [find("sm_90")])["sm_90"] for _ in range(2))
    assert first == second


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{HEADS}dims: 64\ndtype: fp32", r"tensor cores, which do not multiply fp32"),
        (f"{HEADS}dims: 320", r"do not carry heads of 320 and 320"),
        (f"{HEADS}dims: {{qk: 64, v: 257}}", r"do not carry heads of 64 and 257"),
    ],
)
def test_variants_that_are_not_carried(body: str, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        libraries.cubins(variant(body), [find("sm_90")])
    assert "--backend triton" in str(caught.value)


def test_the_error_stands_at_the_spec_s_line(tmp_path: Path) -> None:
    loaded = spec.loads(f"attncc: 1\nname: variant\n{HEADS}dims: 64\ndtype: fp32\n")
    with pytest.raises(Unsupported, match=r":5:.*\n.*dtype: fp32"):
        driver.compile(loaded, tmp_path, ["sm_90"], backend="tvm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "backend", "message"),
    [
        ("sm_90", "tmv", r"unknown back-end 'tmv'.*\n.*tvm"),
        ("sm_90", "", r"unknown back-end ''"),
        ("gfx942", "tvm", r"no kernels for target 'gfx942'"),
        ("interpreter", "tvm", r"no kernels for target 'interpreter'"),
        ("cpu", "triton", r"no kernels for target 'cpu'"),
    ],
)
def test_targets_of_a_back_end(target: str, backend: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        share_out([find(target)], backend)


def test_devices_are_shared_out() -> None:
    h100, cpu = find("sm_90"), find("cpu")
    assert share_out([h100, cpu]) == share_out([h100, cpu], None)
    assert share_out([h100, cpu]).kernels == (h100,)
    assert share_out([h100, cpu], "tvm").cubins == (h100,)
    assert share_out([h100, cpu], "tvm").libraries == share_out([h100, cpu]).libraries == (cpu,)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(cubin, "import_module", nothing)
    with pytest.raises(Unsupported, match=r"compiled by NVRTC, which is not installed") as caught:
        libraries.cubins(variant(CAUSAL), [find("sm_90")])
    assert "attncc[cuda]" in str(caught.value)


def test_an_architecture_that_the_compiler_does_not_know() -> None:
    with pytest.raises(Unsupported, match=r"does not compile for sm_77"):
        cubin.cubin('extern "C" __global__ void nothing() {}', "sm_77")


def test_source_that_does_not_compile_is_our_fault() -> None:
    with pytest.raises(Exception, match=r"our own source for sm_90.*undefined"):
        cubin.cubin('extern "C" __global__ void wrong() { undefined(); }', "sm_90")


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(AttnccError):
        driver.check(ROOT / "examples" / "dense.yaml", target="sm_90", backend="tvm")
