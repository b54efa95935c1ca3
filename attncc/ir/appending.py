"""The call that writes new keys and values into a cache: its tensors, derived from the variant."""

from __future__ import annotations

from typing import Final

from attncc.ir.attention import Attention
from attncc.ir.cache import BY_TOKEN, cached
from attncc.ir.given import Given
from attncc.ir.staircase import staircase

OPERANDS: Final = ("k", "v")
AROUND: Final = ("causal_conv", "value_shift", "mean_residual")
"""Steps that look at tokens before theirs, or at the query or the key beside."""


def appends(attn: Attention) -> bool:
    """Whether a variant has such a call: its keys are a cache, in rows, in pages or as codes."""
    return attn.page_size > 0 or bool(cached(attn)) or any(part.kv.kind == "cache" for part in attn.parts)


def is_packed(attn: Attention) -> bool:
    """Whether new tokens of all sequences lie one behind the other."""
    return attn.layout == "varlen"


def count(attn: Attention) -> str:
    """The size that says how many new tokens a call has, of a sequence or of all where they are packed."""
    return "Tn" if is_packed(attn) else "Sn"


def room(attn: Attention) -> str:
    """The size that says how many tokens there is room for."""
    return "Tk" if is_packed(attn) and not attn.page_size else "Sk"


def finds_sequences(attn: Attention) -> bool:
    """Whether a packed token has to find its sequence: for the pages of that, its scales, or steps on the way there."""
    own = any(c.per not in BY_TOKEN for c in cached(attn))
    return is_packed(attn) and (attn.page_size > 0 or own or attn.kept is not None)


def writes_queries(attn: Attention) -> bool:
    """Whether queries go through their steps where new keys do."""
    return attn.kept is not None and any(step.name in AROUND for step in attn.kept.steps)


def tokens(attn: Attention) -> tuple[Given, ...]:
    """What is written: keys and values of new tokens, in the layout of queries, and these where steps ask for them."""
    heads = {"k": (attn.heads.kv, attn.dims.qk), "v": (attn.heads.v, attn.dims.v), "q": (attn.heads.q, attn.dims.qk)}
    found: list[Given] = []
    for x in (*["q"] * writes_queries(attn), *OPERANDS[: 1 if attn.is_latent else 2]):
        h, dim = heads[x]
        axes: dict[str, tuple[int | str, ...]] = {
            "bhsd": ("B", h, "Sn", dim),
            "bshd": ("B", "Sn", h, dim),
            "varlen": ("Tn", h, dim),
        }
        what = {"q": "queries", "k": "keys", "v": "values"}[x]
        found.append(Given(f"{x}_new", axes[attn.layout], attn.dtype, f"{what} of new tokens"))
    return tuple(found)


def places(attn: Attention) -> tuple[Given, ...]:
    """Where it goes; behind what a sequence has, where the cache is a staircase."""
    packed, paged = is_packed(attn), attn.page_size > 0
    inside = "row of k" if packed and not paged else "position in its sequence"
    doc = f"the {inside} where a token goes; nowhere below 0 or without room"
    out = [Given("positions", ("Tn",) if packed else ("B", "Sn"), "int32", doc)]
    if staircase(attn) is not None:
        doc = "how many keys each sequence has; nothing is written below 0, or without room"
        out = [Given("lengths", ("B",), "int32", doc)]
    if finds_sequences(attn):
        out.append(Given("cu_seqlens_new", ("B + 1",), "int32", "where the new tokens of each sequence begin"))
    if packed and not paged and attn.kept is not None:
        out.append(Given("cu_seqlens_k", ("B + 1",), "int32", "where the rows of each sequence begin"))
    if paged:
        pages: tuple[int | str, ...] = ("B", f"Sk / {attn.page_size}")
        out.append(Given("block_table", pages, "int32", "the page of each run of keys"))
    return tuple(out)
