"""Schema 1 of the spec language as pydantic models: every key, its type, its default, and what it means.

The models hold what YAML holds; texts in the sub-languages (expressions, primitives) are read by `build`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from attncc.spec import vocabulary
from attncc.spec.calls import Vocabulary, usage

IDENTIFIER: Final = r"^[A-Za-z][A-Za-z0-9_]*$"
LINE: Final = r"^[^\n\r]*$"
NAME_LENGTH: Final = 64


def _text_of(value: Any) -> Any:
    """YAML reads `1.0` and `true` as a number and a bool; as an expression both are text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, int | float) else value


Expression = Annotated[
    str,
    BeforeValidator(_text_of),
    Field(min_length=1),
    WithJsonSchema({"type": ["string", "number", "boolean"]}),
]
Identifier = Annotated[str, Field(pattern=IDENTIFIER, max_length=NAME_LENGTH)]
HeadCount = Annotated[int, Field(ge=1, le=65536)]
HeadSize = Annotated[int, Field(ge=1, le=1024)]


def _axis(value: Any) -> int | str:
    """A shape entry: a number that is at least 1, or the name of a size."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value < 2**31:
            raise ValueError(f"an axis has at least 1 entry, this says {value}")
        return value
    if not isinstance(value, str):
        raise ValueError("an axis is a number or the name of a size")
    return value


def _block(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= 65536:
            raise ValueError(f"a block has 1 to 65536 tokens, this says {value}")
        return value
    if value not in ("page", "token", "cluster"):
        raise ValueError("a block is a number of tokens, or 'page', 'token' or 'cluster'")
    return value


def _scalar(value: Any) -> int | float | str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected a number or a word")
    return value


Axis = Annotated[
    Any,
    PlainValidator(_axis),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": IDENTIFIER}]}),
]
Block = Annotated[
    Any,
    PlainValidator(_block),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["page", "token", "cluster"]}]}),
]


def _version(value: Any) -> Any:
    if type(value) is not int or value != 1:
        raise ValueError("this attncc reads schema 1")
    return value


Version = Annotated[int, PlainValidator(_version), WithJsonSchema({"const": 1})]
TuneValue = Annotated[Any, PlainValidator(_scalar), WithJsonSchema({"type": ["integer", "number", "string"]})]


class Model(BaseModel):
    """Strict, closed and frozen: an unknown key or a wrong type is a fault."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    shorthand: ClassVar[tuple[str, JsonSchemaValue] | None] = None
    """Where a bare number stands for the mapping: which key it fills, and its JSON schema."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        short = isinstance(value, int | float) and not isinstance(value, bool)
        return {cls.shorthand[0]: value} if cls.shorthand and short else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        full = handler(core)
        return {"anyOf": [cls.shorthand[1], full]} if cls.shorthand else full


class HeadsModel(Model):
    """Head counts; a bare number means as many key heads as query heads."""

    shorthand = ("q", {"type": "integer", "minimum": 1})

    q: HeadCount = Field(description="query heads")
    kv: HeadCount | None = Field(None, description="key heads; q unless given, and a divisor of it")
    v: HeadCount | None = Field(None, description="value heads, where there are not as many as key heads")
    map: Literal["interleave", "tile"] = Field(
        "interleave", description="the key head of query head h: h // (q / kv), or h % kv"
    )


class DimsModel(Model):
    """Head sizes; a bare number is both."""

    shorthand = ("qk", {"type": "integer", "minimum": 1, "maximum": 1024})

    qk: HeadSize = Field(description="size of a query and key head, 1 to 1024")
    v: HeadSize | None = Field(None, description="size of a value head; qk unless given")


class InputModel(Model):
    """An extra tensor that scores, masks and primitives may read."""

    shape: Annotated[list[Axis], Field(max_length=8)] = Field(
        description="one entry an axis: a number (1 broadcasts), a size (B Hq Hk Hv Sq Sk Dqk Dv), or a name of its own"
    )
    dtype: Literal["fp32", "fp16", "bf16", "int32", "int64", "int8", "uint8", "bool"] = Field(
        "fp32", description="how its elements are stored; floats are computed with as fp32"
    )
    grad: bool = Field(False, description="whether the backward computes its gradient")
    sorted: bool = Field(False, description="non-decreasing along the last axis, so that bucket() may search it")


class SizeModel(Model):
    """What is known of a size; a bare number fixes it at compile time."""

    shorthand = ("fixed", {"type": "integer", "minimum": 1})

    fixed: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="its only value")
    max: Annotated[int, Field(ge=1, lt=2**40)] | None = Field(None, description="the greatest value")
    multiple: Annotated[int, Field(ge=1, lt=2**31)] = Field(1, description="a number it is always a multiple of")


class BlockModel(Model):
    """Blocks of the selection; the tile of the computation is independent of them."""

    q: Block = Field(description="queries a block, or token, cluster")
    k: Block = Field(description="keys a block, or page, token, cluster")


def _call(table: Vocabulary, default: str | None, description: str) -> Any:
    extra: dict[str, Any] = {"examples": [usage(n, s) for n, s in table.items()]}
    extra["pattern"] = rf"^\s*({'|'.join(table)})\b"
    rest = {"description": description, "json_schema_extra": extra, "min_length": 1}
    return Field(**rest) if default is None else Field(default, **rest)


class SelectModel(Model):
    """Which blocks or tokens of the keys a query block attends to."""

    block: BlockModel = Field(description="the granularity of the selection")
    score: str = _call(vocabulary.SELECT_SCORE, None, "how a pair of blocks is scored")
    normalize: Literal["softmax", "weighted_softmax", "anchor", "none"] = Field(
        "softmax", description="how the scores of a query block are made comparable"
    )
    heads: Literal["none", "group_sum", "max", "soft_vote"] = Field(
        "none", description="how the heads of a group come to one selection"
    )
    rule: str = _call(vocabulary.SELECT_RULE, None, "which of the scored blocks are taken")
    force: list[str] = Field([], description="blocks that are always taken")
    charge: bool = Field(True, description="whether forced blocks count toward the rule's budget")
    take: Literal["selected", "marginal", "rest"] = Field(
        "selected", description="what the branch attends to: the rule's blocks, ternary's middle class, or all others"
    )
    reuse: str = _call(vocabulary.SELECT_REUSE, "every_call", "when the selection is made anew")


class StateModel(Model):
    """A linear or recurrent branch."""

    feature: Literal["identity", "relu", "elu1", "softmax", "exp", "taylor2"] = Field(
        "identity", description="the feature map on queries and keys"
    )
    decay: str = _call(vocabulary.DECAY, "none", "how the state fades with each token, in log space")
    update: str = _call(vocabulary.UPDATE, "add", "how a token enters the state")
    causal: bool = Field(True, description="false: totals only, per sequence where the layout is varlen")
    chunk: Annotated[int, Field(ge=1, le=65536)] = Field(64, description="tokens a chunk of the scan")
    initial: Identifier | None = Field(None, description="the input that holds the state to start from")
    initial_mass: Identifier | None = Field(None, description="the input that holds the sum of features behind it")
    scale: Expression | None = Field(None, description="factor of every product of features; the run-time scale")
    prescale: Expression | None = Field(None, description="factor of queries and keys before the feature map")


class QuantizeModel(Model):
    """Operands held or computed in few bits."""

    q: str = _call(vocabulary.QUANTIZER, "", "queries")
    k: str = _call(vocabulary.QUANTIZER, "", "keys")
    v: str = _call(vocabulary.QUANTIZER, "", "values")
    p: str = _call(vocabulary.QUANTIZER, "", "probabilities")
    cache: str = _call(vocabulary.CACHE_QUANTIZER, "", "the stored keys and values")


class BranchModel(Model):
    """What one branch computes: these keys stand at the top, or in each of `parts`."""

    score: Expression = Field("qk * scale", description="the logit of query i and key j, over qk, scale and positions")
    mask: Expression = Field("true", description="whether query i sees key j: a boolean expression or macros")
    normalizer: str = _call(vocabulary.NORMALIZER, "softmax", "how a row of scores becomes weights")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="the share of weights dropped")
    kv: str = _call(vocabulary.STORAGE, "dense", "how keys and values lie in memory")
    select: SelectModel | None = Field(None, description="block or token selection")
    state: StateModel | None = Field(None, description="a linear or recurrent state instead of a score")
    columns: Annotated[list[Annotated[int, Field(ge=0, le=1024)]], Field(min_length=2, max_length=2)] | None = Field(
        None, description="the columns [lo, hi) of queries and keys that this branch multiplies"
    )


class PartModel(BranchModel):
    """One of several branches."""

    name: Identifier | None = Field(None, description="what messages and dumps call the branch")


class NumericsModel(Model):
    """What may vary in the last bits."""

    reproducible: Literal["run", "batch", "config"] = Field(
        default="run",
        description="same bits for the same call, whatever the neighbours in the batch, or whatever the config",
    )
    exp: Literal["exact", "fast"] = Field(
        default="fast", description="whether hardware approximations of exp may serve"
    )
    accumulate: Literal["fp32"] = Field(default="fp32", description="the dtype sums are kept in")


class SpecModel(BranchModel):
    """One attention variant."""

    attncc: Version = Field(description="the version of this schema")
    name: Identifier = Field(description="a Python identifier: the name of the emitted package")
    doc: Annotated[str, Field(max_length=200, pattern=LINE)] = Field("", description="one line on what it is")
    family: Annotated[str, Field(max_length=40, pattern=LINE)] = Field("", description="the family it belongs to")
    source: Annotated[str, Field(max_length=200, pattern=LINE)] = Field("", description="where it was published")
    heads: HeadsModel = Field(description="head counts: n or {q, kv, v, map}")
    dims: DimsModel = Field(description="head sizes: d or {qk, v}, 1 to 1024")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="the dtype of q, k, v and o")
    layout: Literal["bhsd", "bshd", "varlen"] = Field(
        "bhsd", description="order of the axes (strides are free), or packed [T, H, D] with cu_seqlens"
    )
    inputs: dict[str, InputModel] = Field({}, description="extra tensors by name")
    sizes: dict[str, SizeModel] = Field({}, description="bounds of sizes; those fixed to a number are compile-time")
    scale: Expression = Field("rsqrt(Dqk)", description="the default of the run-time scale, over the sizes")
    align: Annotated[str, Field(pattern=IDENTIFIER)] = Field(
        "bottom_right", description="where query row 0 stands: bottom_right, top_left, or an input of offsets"
    )
    quantize: QuantizeModel = Field(default_factory=QuantizeModel, description="quantised operands")
    parts: Annotated[list[PartModel], Field(min_length=1, max_length=8)] | None = Field(
        None, description="several branches, each with score, mask, normalizer, dropout, kv, select, state"
    )
    combine: str = _call(vocabulary.COMBINE, "lse", "how the branches become one output")
    prologue: Annotated[list[str], Field(max_length=16)] = Field([], description="steps on q, k and v")
    epilogue: Annotated[list[str], Field(max_length=16)] = Field([], description="steps on the output")
    outputs: Annotated[list[str], Field(min_length=1, max_length=16)] | None = Field(
        None, description="what is returned; [o, lse], without lse where it does not exist"
    )
    modes: Annotated[list[Literal["prefill", "decode", "backward", "jvp"]], Field(min_length=1)] = Field(
        ["prefill", "decode"], description="what is to be emitted"
    )
    numerics: NumericsModel = Field(default_factory=NumericsModel, description="what may vary in the last bits")
    schedule: str = _call(vocabulary.SCHEDULE, "auto", "a wish for the schedule")
    tune: Annotated[list[dict[str, TuneValue]], Field(max_length=64)] = Field(
        [], description="shapes and sparsity to tune on"
    )


def schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **SpecModel.model_json_schema(),
        "title": "attncc spec, schema 1",
    }
