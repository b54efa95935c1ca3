"""The function that users of an emitted package call: its signature, its docstring, its body."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Final

from attncc.codegen.host import host_expr
from attncc.codegen.source import Writer
from attncc.ir.attention import Attention
from attncc.ir.cache import beside, cached, find
from attncc.ir.expr import Expr
from attncc.ir.primitives import pairs_tokens
from attncc.ir.rewrite import names
from attncc.ir.staircase import levels
from attncc.ir.widths import entry_width, exit_width

AXES: Final[Mapping[str, tuple[str, ...]]] = {
    "bhsd": ("B", "H", "S", "D"), "bshd": ("B", "S", "H", "D"), "varlen": ("T", "H", "D"),
}  # fmt: skip


INDEX_DOCS: Final[Mapping[str, str]] = {
    "cu_seqlens_q": "[B + 1] int32, where each sequence begins; the last entry is the total",
    "cu_seqlens_k": "[B + 1] int32, where each sequence begins; the last entry is the total",
    "block_table": "[B, pages of a sequence] int32, the page of each run of keys; entries behind the last are not read",
    "seqused_k": "[B] int32, how many keys each sequence has",
}
"""Tensors that say where sequences lie."""


STEPS: Final = (
    "    of k and v, pages hold the last step of the staircase; in a byte the first columns' codes are lowest"
)
PACKED: Final = "    of k and v, byte c holds column c in its low half and that half a row behind it in its high half"


def width_of(attn: Attention, operand: str) -> int:
    """Entries of a row of the tensor of keys or values."""
    c = next(iter(levels(attn, operand)[-1:]), find(attn, operand))
    return entry_width(attn, operand) if c is None else c.width


def cache_rows(attn: Attention) -> tuple[str, ...]:
    """Names of the tensors whose rows are those of keys."""
    return (*operands(attn)[1:], *(x.name for x in beside(attn) if x.name == "k_rope"))


def dtype_of(attn: Attention, operand: str) -> str:
    """What they are, as the spec names dtypes."""
    c = next(iter(levels(attn, operand)[-1:]), find(attn, operand))
    return attn.dtype if c is None else c.codes


def indices(attn: Attention) -> tuple[str, ...]:
    """Names of the tensors that say where a call's sequences lie."""
    packed = ("cu_seqlens_q", "cu_seqlens_k") if attn.layout == "varlen" else ()
    return (*packed[:1], "block_table", "seqused_k") if attn.page_size else packed


def arguments(attn: Attention) -> list[str]:
    """Names of the tensors of a call, in the order of `Variant.tensors`."""
    return [*operands(attn), *(x.name for x in beside(attn)), *indices(attn), *(x.name for x in attn.inputs)]


def operands(attn: Attention) -> tuple[str, ...]:
    """Names of the tensors that come by position: values that are a part of the keys do not."""
    return ("q", "k") if attn.is_latent else ("q", "k", "v")


def write_attention(w: Writer, attn: Attention) -> None:
    positional = operands(attn)
    keywords = arguments(attn)[len(positional) :]
    w.signature("attention", [*positional, "*", *keywords, "scale=None", *["return_lse=False"] * has_lse(attn)])
    with w.indented():
        w.block(opening(sentence(attn.doc or attn.name), 115))
        w.line()
        w.line("Args:")
        with w.indented():
            w.block(_argument_docs(attn))
        w.line()
        w.line("Returns:")
        with w.indented():
            w.line(f"o: {_shown(attn, 'Hq', 'Sq', exit_width(attn))} {attn.dtype}")
            if has_lse(attn):
                w.line(_lse_doc(attn))
        w.line()
        w.line("Raises:")
        with w.indented():
            w.line("TypeError, ValueError: an argument's dtype, device, shape or stride is wrong; says which and how.")
        w.line('"""')
        tensors = ", ".join(arguments(attn))
        w.line(f"o, lse = _runtime.call(_RUNNER, _OP, ({tensors}), scale{', return_lse' if has_lse(attn) else ''})")
        w.line("return (o, lse) if return_lse else o" if has_lse(attn) else "return o")


def _lse_doc(attn: Attention) -> str:
    shape = f"[{attn.heads.q}, Tq]" if attn.layout == "varlen" else f"[B, {attn.heads.q}, Sq]"
    return f"lse: {shape} fp32, natural log, -inf for a row that sees no key; only with return_lse"


def _shown(attn: Attention, heads: str, length: str, dim: int) -> str:
    return bare(axes_text(attn, heads, length, dim))


def bare(axes: str) -> str:
    """Axes as a docstring shows them."""
    return axes.replace('"', "").replace("(", "[").replace(")", "]")


def _argument_docs(attn: Attention) -> list[str]:
    out = [
        f"q: {_shown(attn, 'Hq', 'Sq', entry_width(attn, 'q'))} {attn.dtype}",
        f"k: {bare(key_axes(attn, 'Hk', width_of(attn, 'k')))} {dtype_of(attn, 'k')}",
    ]
    if attn.is_latent:
        out[-1] += f", of which the first {attn.dims.v} columns are the values"
    else:
        out.append(f"v: {bare(key_axes(attn, 'Hv', width_of(attn, 'v')))} {dtype_of(attn, 'v')}")
    if any(c.is_packed for c in cached(attn)):
        out.append(PACKED)
    if levels(attn, "k"):
        out.append(STEPS)
    out += [f"{x.name}: [{', '.join(map(str, x.axes))}] {x.dtype}, {x.doc}" for x in beside(attn)]
    out += [f"{n}: {INDEX_DOCS[n]}" for n in indices(attn)]
    out += [f"{x.name}: [{', '.join(map(str, x.shape))}] {x.dtype}" for x in attn.inputs]
    out.append(f"scale: positive float that qk is multiplied by; default {_scale_doc(attn.scale)}")
    return out


def _scale_doc(scale: Expr) -> str:
    text = host_expr(scale).replace("n.get", "").replace('n["', "").replace('"]', "")
    return text if names(scale) else f"{float(scale.value or 0):g}" if scale.value is not None else text


def has_lse(attn: Attention) -> bool:
    return attn.wants("lse") and attn.parts[0].normalizer.kind == "softmax"


def tuple_text(texts: Iterable[str]) -> str:
    entries = list(texts)
    return f"({', '.join(entries)}{',' * (len(entries) == 1)})"


def opening(text: str, width: int) -> list[str]:
    """The first lines of a docstring."""
    first, *others = textwrap.wrap(text, width)
    return [f'"""{first}', *others]


def sentence(text: str) -> str:
    """A user's words inside a docstring: nothing in them ends it or escapes."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text.replace("\\", "\\\\"))
    shown = shown.replace('"""', r"\"\"\"")
    return shown if shown.endswith((".", "!", "?")) else f"{shown}."


def axes_text(attn: Attention, heads: str, length: str, dim: int) -> str:
    values = {"B": '"B"', "H": str(_count(attn, heads)), "S": f'"{length}"', "T": f'"T{length[1:]}"', "D": str(dim)}
    return f"({', '.join(values[a] for a in AXES[attn.layout])})"


def key_axes(attn: Attention, heads: str, dim: int) -> str:
    """Axes of the keys or values as text of a tuple; pages of all sequences lie in one tensor."""
    if not attn.page_size:
        return axes_text(attn, heads, "Sq" if pairs_tokens(attn) else "Sk", dim)
    return f'("all pages", {attn.page_size}, {_count(attn, heads)}, {dim})'


def _count(attn: Attention, heads: str) -> int:
    return {"Hq": attn.heads.q, "Hk": attn.heads.kv, "Hv": attn.heads.v}[heads]
