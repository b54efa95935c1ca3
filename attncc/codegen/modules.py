"""The modules of a package that hold its kernels: what they are about, what they import, and their functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attncc.codegen.gluon_kernels import fragments_in, helpers_of, print_kernel
from attncc.codegen.source import Writer
from attncc.ir.attention import Attention
from attncc.ir.tile import Dialect, Kernel


def engine_module(attn: Attention, engine: str, texts: Sequence[str], header: Iterable[str]) -> str:
    """The functions that an engine calls."""
    about = (f"What the {TITLES[engine]} engine in `_{engine}.py` asks of {attn.name}.", "", *header, "", *SHARED)
    imports = ("from triton.experimental import gluon", "from triton.experimental.gluon import language as gl")
    return _module(about, imports, texts)


MODULES: Final[Mapping[Dialect, str]] = {"triton": "kernels", "gluon": "prologue"}
"""Where a package has its kernels."""
TITLES: Final = {"hopper": "Hopper", "latent": "latent"}
SHARED: Final = (
    "args is what a launch has: tensors, their strides, sizes and the scale; s what is known of a query tile, r of its",
    "rows. BM rows and BN keys make a tile; i and j are positions in the sequence.",
)


def prologue_module(attn: Attention, kernels: Sequence[Kernel], header: Iterable[str]) -> str:
    """The kernels in Gluon that run before an engine."""
    texts = [text for kernel in kernels for text in print_kernel(kernel)]
    texts = [*helpers_of(texts), *texts]
    about = (f"Kernels before the engine of {attn.name}, whose tiles stay in the registers of products.", "", *header)
    imports = ["from triton.experimental import gluon", "from triton.experimental.gluon import language as gl", ""]
    wanted = sorted(fragments_in(texts))
    return _module(about, [*imports, "from ._fragments import (", *(f"    {n}," for n in wanted), ")"], texts)


def kernels_module(attn: Attention, texts: Sequence[str], header: Iterable[str]) -> str:
    about = (f"Triton kernels of {attn.name}.", "", *header, "", *NOTATION)
    bf16 = ("", *BF16) if any("BF16" in text for text in texts) else ()
    return _module(about, ("import triton", "import triton.language as tl", *bf16), texts)


def _module(about: Sequence[str], imports: Iterable[str], texts: Iterable[str]) -> str:
    """A module: what it is about, what it imports, and its functions."""
    w = Writer()
    w.block([f'"""{about[0]}', *about[1:], '"""', "", *imports])
    for text in texts:
        w.block(["", "", *text.splitlines()])
    return w.text()


BF16: Final = (
    "# the interpreter multiplies bf16 bit patterns: it is given fp32, and computes in that",
    "BF16 = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)",
)
NOTATION: Final = (
    "B batch, Hq and Hk query and key heads, Sq queries, Sk keys; Q K V O operands [b, h, row, column], given as",
    "tensor descriptors where TMA is set, else as pointers; x_b x_h x_s their strides. BM rows and BN keys make a",
    "tile; i and j are positions in the sequence. The softmax runs in powers of 2: m is the running maximum, l the",
    "running sum.",
)
