"""What Triton's interpreter runs in place of a variant, where it computes that one wrongly or needs minutes for it."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from attncc.check.inputs import expressions
from attncc.device import Device
from attncc.ir.attention import Attention, Heads
from attncc.ir.rewrite import names

HEAD_NAMES = frozenset({"h", "hk", "Hq", "Hk", "Hv"})


def stand_in(attn: Attention, device: Device) -> tuple[Attention, tuple[str, ...]]:
    """A variant that tests the same code, and notes on how it differs; a GPU gets the variant itself."""
    if device.is_gpu:
        return attn, ()
    if device.takes_libraries:
        return attn, ("no GPU here: the library for this CPU was checked, on small shapes",)
    notes = ["no GPU here: kernels ran in Triton's interpreter, on small shapes"]
    if attn.dtype not in device.dtypes:
        notes.append(f"{attn.dtype} was checked as fp16: Triton's interpreter multiplies bf16 wrongly")
        attn = replace(attn, dtype="fp16")
    fewer = fewer_heads(attn)
    if fewer != attn.heads:
        old, new = (f"{x.q} query and {x.kv} key heads" for x in (attn.heads, fewer))
        notes.append(f"{old} were checked as {new}: no formula tells them apart")
        attn = replace(attn, heads=fewer)
    return attn, tuple(notes)


def fewer_heads(attn: Attention) -> Heads:
    """Two key heads' worth in the same ratio, if no expression and no input depends on the head."""
    heads = attn.heads
    common = gcd(heads.q, heads.kv, heads.v)
    shapes = {entry for x in attn.inputs for entry in x.shape}
    tell = any(HEAD_NAMES & names(e) for e in expressions(attn)) or bool(HEAD_NAMES & shapes)
    if tell or common <= 2:
        return heads
    q, kv, v = (n // common * 2 for n in (heads.q, heads.kv, heads.v))
    return replace(heads, q=q, kv=kv, v=v)
