"""A TVM function in, a shared library out: the few passes that a kernel in registers needs, LLVM, and a linker."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import tvm
from tvm import tirx

from attncc.codegen.tvm.isa import Isa
from attncc.errors import Unsupported

LINKERS: Final = (("ld", "-shared"), *((cc, "-shared", "-nostdlib") for cc in ("cc", "gcc", "clang")))
"""The first that is here serves; kernels need nothing but libm and libc, which every process has."""


def library(functions: Mapping[str, Any], isa: Isa) -> bytes:
    """The shared library of some kernels by name, and of their threads.

    Raises:
        Unsupported: no linker is here.
    """
    linker = next((command for command in LINKERS if shutil.which(command[0])), None)
    if linker is None:
        raise Unsupported("a CPU library needs a linker", hint=f"install one of {', '.join(c[0] for c in LINKERS)}")
    with tempfile.TemporaryDirectory(prefix="attncc-tvm-") as folder:
        at = Path(folder)
        compiled(functions, isa).write_to_file(str(at / "kernel.o"), "o")
        threads(isa, at).write_to_file(str(at / "threads.o"), "o")
        command = [*linker, "-o", str(at / "kernel.so"), str(at / "kernel.o"), str(at / "threads.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unsupported(f"{linker[0]} cannot link for {isa.name}: {done.stderr.strip()}", hint="a cross linker")
        return (at / "kernel.so").read_bytes()


def target(isa: Isa) -> Any:
    here = {"kind": "llvm", "mcpu": isa.cpu, "mtriple": isa.triple}
    made = tvm.target.Target(here)
    return made.with_host(made)


def compiled(functions: Mapping[str, Any], isa: Isa) -> Any:
    """TVM's module of machine code.

    TVM's default passes are left out: registers are tiled by hand, and its simplifier takes x - x for 0.
    """
    where = target(isa)
    module = tirx.transform.BindTarget(where)(tvm.IRModule(dict(functions)))
    for step in PASSES:
        module = step()(module)
    return tvm.get_global_func("target.build.llvm")(module, where)


PASSES: Final = (
    tirx.transform.FlattenBuffer,
    tirx.transform.AnnotateEntryFunc,
    tirx.transform.SplitHostDevice,
    tirx.transform.MakePackedAPI,
    tirx.transform.LowerTVMBuiltin,
    tirx.transform.LowerIntrin,
)


def assembly(functions: Mapping[str, Any], isa: Isa) -> str:
    """The kernels' machine code as text, to be looked at."""
    return compiled(functions, isa).inspect_source("asm")


def threads(isa: Isa, folder: Path) -> Any:
    """The module that runs parallel loops on torch's threads."""
    body = files("attncc.codegen.tvm").joinpath("threads.ll").read_text()
    told = f'{{"kind":"llvm","mtriple":"{isa.triple}"}}'.replace('"', r"\22")  # LLVM's way to write quotes
    flags = f'!llvm.module.flags = !{{!0}}\n!0 = !{{i32 4, !"tvm_target", !"{told}"}}\n'
    source = folder / "threads.ll"
    source.write_text(f'target triple = "{isa.triple}"\n{body}\n{flags}')
    return tvm.get_global_func("ffi.Module.load_from_file.ll")(str(source), "ll")
