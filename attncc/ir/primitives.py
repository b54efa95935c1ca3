"""The named primitives of a variant: which there are by key, what their expressions may read, and which one uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Literal

from attncc.ir.attention import Attention, Call, Part, Quantizer
from attncc.ir.expr import OPS, Expr, name
from attncc.ir.rewrite import names, walk

Scope = Literal["constant", "head", "row", "key", "pair"]

READS: Final[Mapping[Scope, frozenset[str]]] = {
    "constant": frozenset(),
    "head": frozenset({"b", "h", "hk"}),
    "row": frozenset({"b", "h", "hk", "i", "row"}),
    "key": frozenset({"b", "h", "hk", "j"}),
    "pair": frozenset({"b", "h", "hk", "i", "j", "row"}),
}
"""Which positions have a value where an expression is computed."""


def _plain(*words: str) -> dict[str, Scope]:
    return dict.fromkeys(words, "constant")


PRIMITIVES: Final[Mapping[str, Mapping[str, Scope]]] = {
    "combine": {**_plain("lse", "add"), "gate": "row", "lerp": "row"},
    "schedule": _plain("auto", "tile", "split_kv", "stream_k", "persistent"),
    "prologue": {
        **_plain("rope", "rms_norm", "silu", "l2_norm", "causal_conv", "mean_residual", "value_shift", "smooth"),
        **_plain("hadamard", "absorb"),
        "lerp": "head",
        "temperature": "head",
    },
    "epilogue": {**_plain("absorb"), "lerp_v": "row", "gate": "row", "skip": "row"},
    "outputs": {
        **_plain("o", "lse", "max_score", "block_mass", "pair_value", "final_state", "final_mass", "indices"),
        "column_mass": "row",
        "row_mass": "key",
    },
    "select.score": _plain(
        *("pooled_dot", "antidiagonal", "lowbit_qk", "token_dot", "minmax_bound", "centroid_dot", "exact_mass"),
        *("relu_indexer", "random", "given"),
    ),
    "select.rule": {
        **_plain("lines"),
        **dict.fromkeys(("topk", "topk_ratio", "mass", "any_above", "ternary"), "head"),
        "bernoulli": "pair",
    },
    "select.force": {
        **_plain("sink", "local", "diagonal", "first_column", "last_pages"),
        "rows": "row",
        "columns": "key",
    },
    "select.reuse": _plain("every_call", "every", "cosine", "given", "across_layers"),
    "state.decay": {**_plain("none", "scalar", "vector"), "const": "head"},
    "state.update": _plain("add", "delta", "none"),
    "quantize.per": _plain("tensor", "head", "block", "token", "channel", "thread", "group"),
}
"""Every primitive by key, and what its expressions may read besides sizes and inputs."""

TENSORS: Final = frozenset({"cos", "sin", "weight", "bias", "lse", "q", "k", "w"})
"""Options whose word is the name of an input; words by position always are."""

FEATURES: Final = ("identity", "relu", "elu1", "softmax", "exp", "taylor2")
FORMATS: Final = ("int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2", "nvfp4")

SCORE: Final = name("qk", "f32") * name("scale", "f32")


def calls(attn: Attention) -> Iterator[tuple[str, str, Call]]:
    """Every primitive of a variant: where it stands, its key in `PRIMITIVES`, and itself."""
    steps = (("prologue", attn.prologue), ("epilogue", attn.epilogue), ("outputs", attn.outputs))
    yield from (("combine", "combine", attn.combine), ("schedule", "schedule", attn.schedule))
    yield from ((f"{key}[{n}]", key, call) for key, found in steps for n, call in enumerate(found))
    yield from ((f"quantize.{q.operand}.per", "quantize.per", q.per) for q in attn.quantize if q.per)
    for n, part in enumerate(attn.parts):
        yield from ((f"parts[{n}].{key}", key.partition("[")[0], call) for key, call in _calls(part))


def _calls(part: Part) -> Iterator[tuple[str, Call]]:
    select, state = part.select, part.state
    if select is not None:
        yield from (("select.score", select.score), ("select.rule", select.rule), ("select.reuse", select.reuse))
        yield from ((f"select.force[{n}]", call) for n, call in enumerate(select.force))
    if state is not None:
        yield from (("state.decay", state.decay), ("state.update", state.update))


DEFAULT_ON: Final[Mapping[str, str]] = {"absorb": "q", "value_shift": "v"}


def on(step: Call) -> str:
    """The letters of the operands that a step of the prologue maps."""
    return str(dict(step.kwargs).get("on", DEFAULT_ON.get(step.name, "qk")))


def pairs_tokens(attn: Attention) -> bool:
    """Whether each query of a call is that of a key: a step joins the two."""
    return any(step.name == "mean_residual" for step in attn.prologue)


# -- what a variant uses -------------------------------------------------------------------------

KEYS: Final = (
    *("layout", "align", "score", "mask", "normalizer", "dropout", "kv", "select", "state", "columns", "quantize"),
    *("combine", "prologue", "epilogue", "outputs"),
)
DEFAULTS: Final = frozenset(
    {"", "o", "lse", "none", "every_call", "add", "softmax", "identity", "dense", "selected", "bhsd", "bottom_right"}
)
"""Values of keys that nobody needs to write."""


def primitives(attn: Attention) -> dict[str, tuple[str, ...]]:
    """The primitives that a variant uses, by the spec's key; plain dense attention uses none."""
    found: dict[str, dict[str, None]] = {key: {} for key in KEYS}
    for told in (_of_the_whole(attn), *map(_of_part, attn.parts)):
        for key, words in told.items():
            found[key] |= dict.fromkeys(word for word in words if word not in DEFAULTS)
    if len(attn.parts) > 1:
        found["combine"] = {attn.combine.name: None}
    return {key: tuple(words) for key, words in found.items() if words}


def _of_the_whole(attn: Attention) -> dict[str, Iterable[str]]:
    return {
        "layout": [attn.layout],
        "align": [attn.align.kind],
        "quantize": (word for q in attn.quantize for word in _quantizer(q)),
        "prologue": (step.name for step in attn.prologue),
        "epilogue": (step.name for step in attn.epilogue),
        "outputs": (output.name for output in attn.outputs),
    }


def _of_part(part: Part) -> dict[str, Iterable[str]]:
    told: dict[str, Iterable[str]] = {
        "score": [] if part.score == SCORE else _formula(part.score),
        "mask": _formula(part.mask),
        "normalizer": [part.normalizer.kind, "" if part.normalizer.sink is None else "sink"],
        "dropout": ["philox" if part.dropout else ""],
        "kv": [part.kv.kind, "paged" if part.kv.page_size else "", "weighted" if part.kv.weighted else ""],
        "columns": ["[{}, {})".format(*part.columns)] if part.columns else [],
    }
    if part.select is not None:
        s = part.select
        words = (
            s.score.name,
            s.normalize,
            s.heads,
            s.rule.name,
            *(call.name for call in s.force),
            s.take,
            s.reuse.name,
        )
        told["select"] = (*words, *(call.name for call in s.force))
    if part.state is not None:
        s = part.state
        order = "causal" if s.causal else "totals"
        told["state"] = (s.feature, s.decay.name, s.update.name, "initial" if s.initial else "", order)
    return told


def _formula(e: Expr) -> Iterable[str]:
    """What a formula is over, positions or data, and the functions in it."""
    nodes = tuple(walk(e))
    read = {"positions"} if names(e) & READS["pair"] else set[str]()
    read |= {"data" for node in nodes if node.op == "load"}
    functions = {node.op for node in nodes if node.op in ("bucket", "qdot") or _is_function(node.op)}
    return sorted(read | functions)


def _is_function(op: str) -> bool:
    """Whether an operator is more than arithmetic."""
    return op in OPS and op not in ARITHMETIC


ARITHMETIC: Final = frozenset(
    {
        *("add", "sub", "mul", "div", "floordiv", "mod", "pow", "neg", "abs", "min", "max", "where", "floor"),
        *("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"),
    }
)


def _quantizer(q: Quantizer) -> tuple[str, ...]:
    """int8 of k per token, smoothed."""
    per = f" per {q.per.name}" if q.per else ""
    return (f"{q.operand} {q.dtype}{per}", *([f"smooth {q.smooth}"] if q.smooth else []))
