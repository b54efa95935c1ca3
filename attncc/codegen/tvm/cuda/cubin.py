"""TVM functions in, CUDA source and its cubin out: neither needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import tvm
from tvm import tirx

from attncc.errors import CompilerBug, Unsupported

PASSES: Final = (tirx.transform.FlattenBuffer, tirx.transform.LowerIntrin)
"""TVM's default ones are left out, as for CPUs."""
INTEGERS: Final = {
    "int8_t": "signed char", "int16_t": "short", "int32_t": "int", "int64_t": "long long", "uint8_t": "unsigned char",
    "uint16_t": "unsigned short", "uint32_t": "unsigned int", "uint64_t": "unsigned long long",
}  # fmt: skip
TRAITS: Final = (
    *("is_same", "is_same_v", "is_integral", "is_signed", "is_unsigned", "is_floating_point", "enable_if"),
    "conditional",
)
HEADERS: Final = {
    "cuda/std/cstdint": "\n".join(f"typedef {c} {name};" for name, c in INTEGERS.items()),
    "cuda/std/type_traits": "\n".join(f"template <typename...> struct {name};" for name in TRAITS),
    "math_constants.h": "\n".join(
        f"#define CUDART_{name}_F __int_as_float({bits})"
        for name, bits in (("INF", "0x7f800000"), ("NAN", "0x7fc00000"))
    ),
}
"""What TVM's source includes, as far as kernels use it: the real ones would need a CUDA toolkit."""


def source(functions: Mapping[str, Any], arch: str) -> str:
    """CUDA C++ of kernels by name, for an architecture such as sm_90."""
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    module = tirx.transform.BindTarget(target)(tvm.IRModule(dict(functions)))
    for step in PASSES:
        module = step()(module)
    return str(tvm.get_global_func("target.build.cuda")(module, target).inspect_source())


def cubin(text: str, arch: str) -> bytes:
    """The machine code of CUDA C++, by NVRTC.

    Raises:
        Unsupported: NVRTC is not installed, or does not know the architecture.
    """
    try:
        nvrtc: Any = import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        hint = "pip install 'attncc[cuda]', or --backend triton"
        raise Unsupported(
            f"CUDA kernels of TVM are compiled by NVRTC, which is not installed: {error}", hint=hint
        ) from None
    named = [name.encode() for name in HEADERS]
    texts = [_in_namespace(name, header).encode() for name, header in HEADERS.items()]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"attention.cu", len(named), texts, named)
    options = [f"--gpu-architecture={arch}".encode(), b"-ftz=true"]  # without it exp2 takes three instructions
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status == nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION:
        raise Unsupported(f"this NVRTC does not compile for {arch}", hint="a newer nvidia-cuda-nvrtc")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompilerBug(f"NVRTC refuses our own source for {arch}: {_read(nvrtc, program, 'ProgramLog').decode()}")
    return _read(nvrtc, program, "CUBIN")


def _in_namespace(name: str, header: str) -> str:
    return f"namespace cuda {{ namespace std {{\n{header}\n}} }}" if name.startswith("cuda/") else header


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    _, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    content = b" " * size
    getattr(nvrtc, f"nvrtcGet{what}")(program, content)
    return content
