"""Which primitives each key takes, and their arguments: one table a key."""

from __future__ import annotations

from typing import Final

from attncc.spec.calls import Arg, Signature, Vocabulary
from attncc.spec.expression import Context, Want

DTYPES: Final = ("int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2", "nvfp4")


def _count(name: str, keyword: bool = False, required: bool = True, low: float = 1) -> Arg:
    return Arg(name, "count", required, keyword, low=low)


def _option(name: str, *words: str) -> Arg:
    return Arg(name, "word", required=False, keyword=True, words=words)


def _flag(name: str) -> Arg:
    return Arg(name, "flag", required=False, keyword=True)


def _tensor(name: str, keyword: bool = False, required: bool = True) -> Arg:
    return Arg(name, "input", required, keyword)


def _number(name: str, low: float = float("-inf"), high: float = float("inf"), keyword: bool = True) -> Arg:
    return Arg(name, "number", not keyword, keyword, low=low, high=high)


def _expr(name: str, context: Context, want: Want = "float", required: bool = True) -> Arg:
    return Arg(name, "expr", required, context=context, want=want)


def _share(name: str) -> Arg:
    """A fraction, one number or one per head."""
    return Arg(name, "expr", low=0.0, high=1.0)


ON: Final = _option("on", "q", "k", "v", "qk")

PER: Final[Vocabulary] = {
    "tensor": (),
    "head": (),
    "block": (_count("n", required=False),),
    "token": (),
    "channel": (),
    "thread": (),
    "group": (_count("n"),),
}
NORMALIZER: Final[Vocabulary] = {
    "softmax": (Arg("sink", "expr", required=False, keyword=True),),
    "sigmoid": (),
    "relu": (),
    "none": (),
    "linear": (_number("eps", 0.0, 1.0, keyword=False),),
    "column_softmax": (),
}
STORAGE: Final[Vocabulary] = {
    "dense": (),
    "cache": (),
    "paged": (_count("page_size"),),
    "latent": (_count("rope", keyword=True, low=0), _count("page_size", keyword=True, required=False)),
    "gathered": (_tensor("name"),),
    "given": (_tensor("k"), _tensor("v")),
    "pooled": (_count("block", required=False), _flag("weighted")),
}
COMBINE: Final[Vocabulary] = {
    "lse": (),
    "add": (_tensor("proj", required=False),),
    "gate": (Arg("gates", "exprs", context="row"),),
    "lerp": (_expr("weight", "row"),),
}
SCHEDULE: Final[Vocabulary] = {
    "auto": (),
    "tile": (),
    "split_kv": (_count("n"),),
    "stream_k": (),
    "persistent": (),
}
PROLOGUE: Final[Vocabulary] = {
    "rope": (
        _tensor("cos", keyword=True, required=False),
        _tensor("sin", keyword=True, required=False),
        _number("base", 1.0),
        _count("dims", keyword=True, required=False),
        _option("pairs", "half", "interleaved"),
        _option("positions", "logical", "packed"),
        ON,
    ),
    "rms_norm": (_tensor("weight", keyword=True, required=False), _number("eps", 0.0), ON),
    "silu": (ON,),
    "lerp": (_tensor("other"), _expr("weight", "head"), ON),
    "l2_norm": (_number("eps", 0.0), _number("to", 0.0), ON),
    "temperature": (_expr("factor", "head"), ON),
    "causal_conv": (
        _tensor("weight"),
        _count("kernel", keyword=True, required=False),
        _option("groups", "depthwise", "heads"),
        _tensor("bias", keyword=True, required=False),
        ON,
    ),
    "mean_residual": (_number("scale"), ON),
    "value_shift": (_number("fraction", 0.0, 1.0),),
    "smooth": (ON,),
    "hadamard": (ON,),
    "absorb": (_tensor("name"), ON),
}
EPILOGUE: Final[Vocabulary] = {
    "lerp_v": (_expr("weight", "row"),),
    "gate": (_expr("gate", "row"),),
    "absorb": (_tensor("name"),),
    "skip": (_expr("factor", "row"),),
}
OUTPUTS: Final[Vocabulary] = {
    "o": (),
    "lse": (),
    "max_score": (),
    "column_mass": (_expr("rows", "row", "any", required=False),),
    "row_mass": (_expr("cols", "key", "any", required=False),),
    "block_mass": (_count("q", required=False), _count("k", required=False)),
    "pair_value": (_tensor("z"),),
    "final_state": (),
    "final_mass": (),
    "indices": (),
}
SELECT_SCORE: Final[Vocabulary] = {
    "pooled_dot": (_option("pool", "mean", "max"), _number("gate", -1.0, 1.0)),
    "antidiagonal": (_count("stride", keyword=True),),
    "lowbit_qk": (
        _count("bits", keyword=True, required=False),
        _option("per", "tensor", "block", "token", "thread"),
        _option("smooth", "mean"),
    ),
    "token_dot": (),
    "minmax_bound": (_count("sub", keyword=True, required=False),),
    "centroid_dot": (
        _tensor("k"),
        _tensor("q", keyword=True, required=False),
        _count("iters", keyword=True, required=False, low=0),
        _option("metric", "euclidean", "dot"),
    ),
    "exact_mass": (_tensor("lse", keyword=True, required=False), _count("last", keyword=True, required=False)),
    "relu_indexer": (
        _tensor("q", keyword=True, required=False),
        _tensor("k", keyword=True, required=False),
        _tensor("w", keyword=True, required=False),
    ),
    "random": (_count("seed", keyword=True, required=False, low=0),),
    "given": (_tensor("name"),),
}
SELECT_RULE: Final[Vocabulary] = {
    "topk": (Arg("k", "expr", want="int", low=1),),
    "topk_ratio": (
        _share("r"),
        _option("round", "down", "nearest"),
        _count("least", keyword=True, required=False, low=0),
    ),
    "mass": (_share("tau"), _option("crossing", "in", "out"), _number("least", 0.0, 1.0)),
    "any_above": (_expr("tau", "head"),),
    "bernoulli": (_expr("p", "pair"),),
    "ternary": (_share("hi"), _share("lo")),
    "lines": (_count("columns"), _count("diagonals")),
}
SELECT_FORCE: Final[Vocabulary] = {
    "sink": (_count("n"),),
    "local": (_count("n"), _count("segment", keyword=True, required=False)),
    "diagonal": (),
    "first_column": (),
    "last_pages": (_count("n"),),
    "rows": (_expr("which", "row", "bool"),),
    "columns": (_expr("which", "key", "bool"),),
}
SELECT_REUSE: Final[Vocabulary] = {
    "every_call": (),
    "every": (_count("n"),),
    "cosine": (_number("theta", -1.0, 1.0, keyword=False),),
    "given": (),
    "across_layers": (),
}
DECAY: Final[Vocabulary] = {
    "none": (),
    "const": (_expr("log_decay", "head"),),
    "scalar": (_tensor("name"),),
    "vector": (_tensor("name"),),
}
UPDATE: Final[Vocabulary] = {"add": (), "delta": (_tensor("beta"),), "none": ()}
_QUANTIZER: Final[Signature] = (
    Arg("per", "call", required=False, keyword=True, table=PER),
    Arg("symmetric", "flag", required=False, keyword=True),
    _option("smooth", "mean"),
)
QUANTIZER: Final[Vocabulary] = dict.fromkeys(DTYPES, _QUANTIZER)
CACHE_QUANTIZER: Final[Vocabulary] = {
    **QUANTIZER,
    "staircase": (Arg("steps", "stairs", words=("bf16", "fp16", "fp32", *DTYPES)), *_QUANTIZER),
}
