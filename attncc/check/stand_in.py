"""What Triton's interpreter runs in place of a variant, where it computes that one wrongly or needs minutes for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import gcd
from typing import Literal

from attncc.check.inputs import expressions
from attncc.device import Device
from attncc.ir.attention import Attention, Heads
from attncc.ir.expr import Expr, const
from attncc.ir.rewrite import names, transform

HEADS = frozenset({"Hq", "Hk", "Hv"})
HEAD_NAMES = HEADS | {"h", "hk"}
LEAST = 2
"""Key heads that are left."""


def stand_in(attn: Attention, device: Device, captured: Collection[str] = ()) -> tuple[Attention, tuple[str, ...]]:
    """A variant that tests the same code, and notes on how it differs; a GPU gets the variant itself.

    `captured`: names of inputs whose tensors are given, and have as many heads as they have.
    """
    if device.is_gpu:
        return attn, ()
    if device.takes_libraries:
        return attn, ("no GPU here: the library for this CPU was checked, on small shapes",)
    notes = ["no GPU here: kernels ran in Triton's interpreter, on small shapes"]
    if attn.dtype not in device.dtypes:
        notes.append(f"{attn.dtype} was checked as fp16: Triton's interpreter multiplies bf16 wrongly")
        attn = _in(attn, "fp16")
    fewer = fewer_heads(attn, captured)
    if fewer != attn.heads:
        old, new = (f"{x.q} query and {x.kv} key heads" for x in (attn.heads, fewer))
        notes.append(f"{old} were checked as {new}: no formula tells them apart")
        attn = replace(attn, heads=fewer)
    return attn, tuple(notes)


def _in(attn: Attention, dtype: Literal["fp16"]) -> Attention:
    """The variant over operands of another dtype; a staircase begins with it."""
    stairs = {
        z: tuple((age, dtype if step == attn.dtype else step) for age, step in z.staircase) for z in attn.quantize
    }
    return replace(attn, dtype=dtype, quantize=tuple(replace(z, staircase=steps) for z, steps in stairs.items()))


def fewer_heads(attn: Attention, captured: Collection[str] = ()) -> Heads:
    """Two key heads' worth in the same ratio, if heads differ in nothing but what inputs hold for each."""
    heads = attn.heads
    common = gcd(heads.q, heads.kv, heads.v)
    given = any(HEADS & set(x.shape) for x in attn.inputs if x.name in captured)
    if given or common <= LEAST or _steps_count(attn) or any(_tells_apart(attn, e) for e in expressions(attn)):
        return heads
    q, kv, v = (n // common * LEAST for n in (heads.q, heads.kv, heads.v))
    return replace(heads, q=q, kv=kv, v=v)


def _steps_count(attn: Attention) -> bool:
    """Whether steps read inputs that have numbers of heads, in numbers."""
    words = (str(w) for step in (*attn.prologue, *attn.epilogue) for w in (*step.words, *dict(step.kwargs).values()))
    read = [x for x in attn.inputs if x.name in {*words}]
    heads = {attn.heads.q, attn.heads.kv, attn.heads.v}
    convolved = any(step.name == "causal_conv" for step in attn.prologue)
    return convolved or any(heads & {*x.shape[:-1]} for x in read)


def _tells_apart(attn: Attention, e: Expr) -> bool:
    """Whether a formula asks which head it is for, or how many there are, beyond reading what is the head's own."""

    def read(node: Expr) -> Expr | None:
        if node.op != "load":
            return None
        axes = attn.input(str(node.attr)).shape
        own = [at.op == "name" and axis in HEADS for at, axis in zip(node.args, axes, strict=True)]
        return replace(node, args=tuple(const(0) if o else at for o, at in zip(own, node.args, strict=True)))

    return bool(HEAD_NAMES & names(transform(e, read)))
