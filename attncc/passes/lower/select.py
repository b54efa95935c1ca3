"""Which skeleton carries a variant: ordered rules, the first that holds wins; what none carries is `Unsupported`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Final

from attncc.errors import Unsupported
from attncc.ir.attention import Attention, Part
from attncc.ir.expr import INTS
from attncc.ir.keeping import writing
from attncc.ir.rewrite import names, walk
from attncc.ir.tile import Program
from attncc.passes.lower import append, cache, chains, entering, epilogue, short
from attncc.passes.lower.forward import dense_forward
from attncc.passes.lower.hopper import accelerated
from attncc.passes.lower.normalizers import NORMALIZERS
from attncc.passes.lower.pieces import MAX_DIM
from attncc.passes.lower.prologue import with_prologue
from attncc.passes.lower.quantize import LIMITS


@dataclass(frozen=True, slots=True)
class Skeleton:
    name: str
    applies: Callable[[Attention], bool]
    why: str
    build: Callable[[Attention], Program]


SKELETONS: Final = (
    Skeleton(
        "dense_forward",
        lambda a: len(a.parts) == 1,
        "one softmax-like part over a mask: a program per query tile walks the keys it can see",
        dense_forward,
    ),
)


@dataclass(frozen=True, slots=True)
class Gap:
    """A key no skeleton carries yet: where a variant uses it, and what is supported instead."""

    key: str
    used: Callable[[Attention], bool]
    supported: str

    @property
    def message(self) -> str:
        return f"'{self.key}' has no lowering for this value yet"


def _fixes_packed_lengths(a: Attention) -> bool:
    packed = ("Sq",) if a.page_size else ("Sq", "Sk")
    return a.layout == "varlen" and any(a.size(s).fixed is not None for s in packed)


def _is_not_positive(a: Attention) -> bool:
    return a.scale.value is not None and not 0 < a.scale.value < inf


def _scales_by_own_length(a: Attention) -> bool:
    differing = {"Sq", "Sk"} if a.layout == "varlen" else {"Sk"} if a.page_size else set[str]()
    return bool(names(a.scale) & differing)


def _raises_integers(a: Attention) -> bool:
    """To powers that are not small constants; those are products by now."""
    formulas = [e for p in a.parts for e in (p.score, p.mask, p.normalizer.sink) if e is not None]
    formulas += [e for step in (*a.prologue, *a.epilogue, *(a.kept.steps if a.kept else ())) for e in step.args]
    return any(node.op == "pow" and node.dtype in INTS for e in formulas for node in walk(e))


def _any(holds: Callable[[Part], bool]) -> Callable[[Attention], bool]:
    return lambda a: any(map(holds, a.parts))


def _wishes_in_vain(a: Attention) -> bool:
    return a.schedule.name in ("split_kv", "stream_k") and bool(short.gap(a))


def _wishes_against_itself(a: Attention) -> bool:
    return a.schedule.name == "stream_k" and a.is_apart


def _unknown_outputs(a: Attention) -> bool:
    return any(o.name not in ("o", "lse") for o in a.outputs)


def _on_the_way(holds: Callable[[Attention], bool]) -> Callable[[Attention], bool]:
    """The same of the steps that a cache has behind it."""
    return lambda a: a.kept is not None and holds(writing(a))


GAPS: Final = (
    Gap("parts", lambda a: len(a.parts) != 1, "a single part"),
    Gap("state", _any(lambda p: p.state is not None), "softmax, sigmoid, relu, none and linear over a mask"),
    Gap("select", _any(lambda p: p.select is not None), "a mask, which may read inputs (block tables)"),
    Gap("kv", _any(lambda p: p.kv.kind not in ("dense", "cache", "paged", "latent")), "dense, cache, paged, latent"),
    Gap("dropout", _any(lambda p: p.dropout > 0), "0"),
    *(Gap("quantize", holds, supported) for holds, supported in (*cache.LIMITS, *LIMITS)),
    *(Gap("prologue", holds, supported) for holds, supported in (*chains.LIMITS, *entering.LIMITS)),
    *(Gap("prologue", holds, supported) for holds, supported in chains.STEP_LIMITS),
    *(Gap("prologue", _on_the_way(holds), supported) for holds, supported in chains.STEP_LIMITS),
    *(Gap("epilogue", holds, supported) for holds, supported in epilogue.LIMITS),
    Gap("normalizer", _any(lambda p: p.normalizer.kind not in NORMALIZERS), ", ".join(NORMALIZERS)),
    Gap(
        "score",
        _any(lambda p: any(node.op == "qdot" for node in walk(p.score))),
        "scores over qk, positions and inputs",
    ),
    Gap("columns", _any(lambda p: p.columns is not None), "all columns"),
    Gap("score", _raises_integers, "whole numbers to a constant power up to 16; float(…) ** anything"),
    Gap("outputs", _unknown_outputs, "o, lse"),
    Gap("modes", lambda a: bool({"backward", "jvp"} & set(a.modes)), "prefill, decode"),
    Gap("dims", lambda a: max(a.dims.qk, a.dims.v) > MAX_DIM, f"1 to {MAX_DIM}"),
    Gap("sizes", _fixes_packed_lengths, "lengths of packed sequences known when called"),
    Gap("scale", _is_not_positive, "a positive number (a score may be -qk * scale)"),
    Gap("scale", _scales_by_own_length, "sizes that all sequences share; a score may use their lengths"),
    Gap("schedule", lambda a: a.schedule.name == "persistent", "auto, tile, split_kv, stream_k"),
    Gap("schedule", _wishes_in_vain, "auto, where keys cannot be shared out: attncc explain says why"),
    Gap("schedule", _wishes_against_itself, "auto and split_kv, where a sequence's bits must not depend on others"),
    Gap("numerics", lambda a: a.numerics.reproducible == "config", "run, batch"),
)


def gaps(attn: Attention) -> tuple[Gap, ...]:
    """What keeps every skeleton from a variant that passed the pipeline."""
    return tuple(gap for gap in GAPS if gap.used(attn))


def select(attn: Attention) -> Program:
    """The tile program of a variant that passed the pipeline.

    Raises:
        Unsupported: names the spec's key that nothing carries yet, and what is supported.
    """
    for gap in gaps(attn):
        raise Unsupported(gap.message, gap.key, hint=f"supported: {gap.supported}")
    for skeleton in SKELETONS:
        if skeleton.applies(attn):
            made = accelerated(attn, replace(skeleton.build(attn), why=skeleton.why))
            made = epilogue.with_epilogue(attn, with_prologue(attn, short.with_short(attn, made)))
            return replace(made, append=append.program_of(attn))
    raise Unsupported("no skeleton carries this variant", "parts", hint="attncc explain shows its IR")
