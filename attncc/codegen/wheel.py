"""An emitted package as a wheel: what `pip install` takes, and a package index keeps."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from sysconfig import get_platform
from typing import Final

from attncc.codegen.source import Writer
from attncc.errors import CompilerBug, SpecError

SIDES: Final = (("kernels.py", "triton"), ("cpu", "apache-tvm-ffi"))
"""What a package needs beside torch, by the file or folder that it has."""
BUILD: Final = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def wheel(package: Path, out: Path, version: str) -> Path:
    """Builds the wheel of an emitted package into the directory `out`; its path.

    Raises:
        SpecError: if `package` is none, or the version is not one by PEP 440.
    """
    if not (package / "spec.yaml").is_file() or not (package / "_runtime.py").is_file():
        raise SpecError(f"'{package}' is no emitted package", hint="name DIR/<name>, as `attncc compile` prints it")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="attncc-wheel-") as folder:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, Path(folder, package.name), ignore=ignored)
        Path(folder, "pyproject.toml").write_text(_project(package, version))
        command = [sys.executable, "-c", BUILD, str(out.resolve())]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if made.returncode == 0:
        return out / made.stdout.splitlines()[-1]
    said = made.stderr.strip().splitlines()[-1:] or ["nothing"]
    if "version" in said[0]:
        raise SpecError(f"'{version}' is no version: {said[0]}", hint="write 1.0 or 1.0.post1, as PEP 440 has it")
    raise CompilerBug(f"the wheel of '{package.name}' cannot be built:\n{made.stderr[-2000:]}")


def _project(package: Path, version: str) -> str:
    """What setuptools is told; whatever is in the package is part of it."""
    needs = ["torch", *(need for part, need in SIDES if (package / part).exists() and not _is_prebuilt(package, part))]
    folders = sorted(str(p.relative_to(package.parent)) for p in (package, *package.rglob("*")) if p.is_dir())
    names = [f.replace("/", ".") for f in folders if "__pycache__" not in f]
    w = Writer()
    w.block(["[build-system]", 'requires = ["setuptools>=70.1"]', 'build-backend = "setuptools.build_meta"', ""])
    w.block(["[project]", f'name = "{package.name}"', f"version = {_quoted(version)}", f"dependencies = {needs!r}", ""])
    w.block(["[tool.setuptools]", f"packages = {names!r}", "", "[tool.setuptools.package-data]", '"*" = ["*"]'])
    if (package / "cpu").is_dir():
        w.block(
            ["", "[tool.distutils.bdist_wheel]", f'plat_name = "{get_platform()}"']
        )  # libraries of this machine's kind
    return w.text()


def _is_prebuilt(package: Path, part: str) -> bool:
    """Whether cubins stand in for what this part needs."""
    return part == "kernels.py" and (package / "aot").is_dir()


def _quoted(text: str) -> str:
    """As a string of TOML, whatever is in it."""
    plain = "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text)
    return f'"{plain}"'
