"""What makes the interpreter faster for the tests changes no bit of what it computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from codegen.emitted import OUT, Package, normal, package

pytestmark = pytest.mark.newest
PLAIN = """
import sys
import torch
folder, calls, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    call = torch.load(f"{calls}/{name}.pt")
    torch.save(__import__(name).attention(**call, return_lse=True), f"{calls}/{name}-result.pt")
"""
BODIES = (
    "dtype: fp16\nscore: qk * scale - 0.1 * h * abs(i - j)\nmask: causal | dilated(3)",
    "dtype: fp32\nquantize: {q: fp8_e4m3(per=token), k: int8(per=head)}\nmask: causal",
    "dtype: fp32\nscore: softcap(qk * scale, 20) + where(i // 4 == j % 7, 0.5, -h / Sk)\nmask: (i < j) | (j % 3 != 1)",
    "dtype: fp16\nprologue: [rms_norm(on=q), rope(base=10000)]\nmask: causal",
)


def test_the_interpreter_as_it_is_says_the_same(tmp_path: Path) -> None:
    calls: list[tuple[Package, dict[str, torch.Tensor]]] = []
    for body in BODIES:
        p = package(f"heads: {{q: 4, kv: 2}}\ndims: 40\n{body}")
        dtype = {"fp16": torch.float16, "fp32": torch.float32}[p.attn.dtype]
        operands = {name: normal(2, heads, 21, 40, seed=heads) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
        calls.append((p, {name: x.to(dtype) for name, x in operands.items()}))
        torch.save(calls[-1][1], tmp_path / f"{p.path.name}.pt")
    names = [str(OUT), str(tmp_path), *(p.path.name for p, _ in calls)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", PLAIN, *names], env=environment, check=True)
    for p, call in calls:
        told = torch.load(tmp_path / f"{p.path.name}-result.pt")
        for here, there in zip(p(**call, return_lse=True), told, strict=True):
            assert torch.equal(here, there), p.attn.name
