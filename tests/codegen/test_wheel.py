"""A wheel holds its package byte for byte, says what it needs, and runs where attncc is not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from codegen.emitted import package

from attncc.codegen.wheel import wheel
from attncc.errors import SpecError

CALL = """
import sys
sys.modules["attncc"] = None
sys.path.insert(0, sys.argv[1])
import torch, wheeled
q = torch.randn(1, 2, 5, 16)
o = wheeled.attention(q, q, q)
print((o - torch.nn.functional.scaled_dot_product_attention(q, q, q)).abs().max().item())
"""


def test_a_wheel_is_the_package_and_runs_alone(tmp_path: Path) -> None:
    folder = package("heads: 2\ndims: 16\ndtype: fp32", name="wheeled").path
    made = wheel(folder, tmp_path / "dist", "2.1")
    assert made.name == "wheeled-2.1-py3-none-any.whl"
    with zipfile.ZipFile(made) as archive:
        held = {n: archive.read(n) for n in archive.namelist()}
        archive.extractall(tmp_path / "site")
    files = {f"wheeled/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files = {name: text for name, text in files.items() if "__pycache__" not in name}
    assert {n: t for n, t in held.items() if n.startswith("wheeled/")} == files
    needs = [line for line in held["wheeled-2.1.dist-info/METADATA"].decode().splitlines() if "Requires-Dist" in line]
    assert needs == ["Requires-Dist: torch", "Requires-Dist: triton"]
    command = [sys.executable, "-c", CALL, str(tmp_path / "site")]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert float(said.stdout) < 1e-5


@pytest.mark.parametrize("version", ["", "x", "1.0 beta", '1"\ndependencies = ["evil"]', "1.0; import os", "../1"])
def test_what_is_no_version_is_refused(tmp_path: Path, version: str) -> None:
    folder = package("heads: 2\ndims: 16\ndtype: fp32", name="wheeled").path
    with pytest.raises(SpecError, match="is no version"):
        wheel(folder, tmp_path, version)
    assert not [*tmp_path.iterdir()]


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is no emitted package"):
        wheel(tmp_path, tmp_path / "dist", "1.0")
