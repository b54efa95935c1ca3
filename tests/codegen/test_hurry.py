"""What makes the interpreter faster for the tests changes no bit of what it computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from codegen.emitted import normal, package

pytestmark = pytest.mark.newest
PLAIN = """
import sys
import torch
folder, name, call, result = sys.argv[1:]
sys.path.insert(0, folder)
torch.save(__import__(name).attention(**torch.load(call), return_lse=True), result)
"""
BODIES = (
    "heads: {q: 4, kv: 2}\ndims: 40\ndtype: fp16\nscore: qk * scale - 0.1 * h * abs(i - j)\nmask: causal | dilated(3)",
    "heads: {q: 4, kv: 2}\ndims: 40\ndtype: fp32\nquantize: {q: fp8_e4m3(per=token), k: int8(per=head)}\nmask: causal",
)


@pytest.mark.parametrize("body", BODIES)
def test_the_interpreter_as_it_is_says_the_same(body: str, tmp_path: Path) -> None:
    p = package(body)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[p.attn.dtype]
    operands = {name: normal(2, heads, 21, 40, seed=heads) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    call = {name: x.to(dtype) for name, x in operands.items()}
    torch.save(call, tmp_path / "call.pt")
    names = [str(p.path.parent), p.path.name, str(tmp_path / "call.pt"), str(tmp_path / "result.pt")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", PLAIN, *names], env=environment, check=True)
    for here, there in zip(p(**call, return_lse=True), torch.load(tmp_path / "result.pt"), strict=True):
        assert torch.equal(here, there)
