"""The upper IR level: *what* an attention variant computes, frozen, with no idea of tiles or devices.

Letters: B batch, Hq query heads, Hk key heads, Hv value heads, Sq queries, Sk keys, Dqk and Dv head sizes.
Expressions (`ir.expr`) read the names `qk scale b h hk i j row`, the sizes, and `load`s of the inputs.
`i` and `j` are logical positions inside a sequence, `row` is the query's row in this call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from attncc.ir.expr import TRUE, Expr

OperandDtype = Literal["bf16", "fp16", "fp32"]
Layout = Literal["bhsd", "bshd", "varlen"]

SIZE_NAMES: Final = ("B", "Hq", "Hk", "Hv", "Sq", "Sk", "Dqk", "Dv")
POSITION_NAMES: Final = ("b", "h", "hk", "i", "j", "row")
MAX_SIZE: Final = 2**24
"""Bound of a size that the spec does not bound: positions below it are exact in fp32."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts; `map` says which key head serves query head h: h // (q / kv) or h % kv."""

    q: int
    kv: int
    v: int
    map: Literal["interleave", "tile"] = "interleave"


@dataclass(frozen=True, slots=True)
class Dims:
    qk: int
    v: int


@dataclass(frozen=True, slots=True)
class Input:
    """An extra tensor; a shape entry is a number, 1 (broadcast), or a size name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "fp32"
    """One of fp32 fp16 bf16 int32 int64 int8 uint8 bool."""
    grad: bool = False
    sorted: bool = False
    """Non-decreasing along the last axis: masks over it are then solved by binary search."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is known of a size: a fixed value (compile-time), or bounds of a run-time one."""

    name: str
    fixed: int | None = None
    max: int | None = None
    multiple: int = 1

    @property
    def most(self) -> int:
        """The greatest value it may have in a call."""
        return self.fixed if self.fixed is not None else self.max or MAX_SIZE


@dataclass(frozen=True, slots=True)
class Align:
    """Where query row 0 stands: i = row + Sk - Sq, i = row, or i = row + input[b]."""

    kind: Literal["bottom_right", "top_left", "input"] = "bottom_right"
    input: str = ""


@dataclass(frozen=True, slots=True)
class Normalizer:
    kind: Literal["softmax", "sigmoid", "relu", "none", "linear", "column_softmax"] = "softmax"
    sink: Expr | None = None
    """softmax: a logit per head that joins the denominator alone."""
    eps: float = 0.0
    """linear: added to the denominator."""


@dataclass(frozen=True, slots=True)
class Call:
    """A named primitive with its arguments, as selectors, rules, steps and taps are: `mass(0.9)`."""

    name: str
    args: tuple[Expr, ...] = ()
    kwargs: tuple[tuple[str, Expr | str], ...] = ()
    """Sorted by key; a string is a bare word (`crossing=in`, `given(NAME)`)."""
    words: tuple[str, ...] = ()
    """Positional bare words: names of inputs or branches."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How keys and values lie in memory."""

    kind: Literal["dense", "cache", "paged", "latent", "gathered", "given", "pooled"] = "dense"
    """cache: rows as dense ones are, which the call that appends has written."""
    page_size: int | None = None
    """paged: keys of a page; latent: the same, None where latents lie in rows."""
    rope: int | None = None
    index: str = ""
    """gathered: the input that lists keys; given: the input that holds this part's own keys."""
    values: str = ""
    """given: the input that holds this part's own values."""
    block: int | None = None
    """pooled: keys and values are means over so many; None: over the blocks of the part's selection."""
    weighted: bool = False
    """pooled: each mean counts as often as it has members."""


@dataclass(frozen=True, slots=True)
class Select:
    """Block or token selection (design, section 2.2)."""

    block: tuple[int | str, int | str]
    score: Call
    normalize: str
    heads: str
    rule: Call
    force: tuple[Call, ...]
    reuse: Call
    charge: bool = True
    """Whether forced blocks count toward the rule's budget; if not, they take no part in the competition."""
    take: Literal["selected", "marginal", "rest"] = "selected"
    """Which blocks the part attends to: the rule's, the middle class of `ternary`, or all but the rule's."""


@dataclass(frozen=True, slots=True)
class State:
    """A linear or recurrent part (section 2.3)."""

    feature: str
    decay: Call
    update: Call
    causal: bool
    chunk: int
    initial: str
    initial_mass: str = ""
    """normalizer linear: the input that holds the sum of features behind `initial`."""
    scale: Expr | None = None
    """Factor of every product of features; None is the run-time scale."""
    prescale: Expr | None = None
    """Factor of queries and keys before the feature map."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How one operand is quantised (section 2.4); `staircase` is (age limit or None, dtype)."""

    operand: Literal["q", "k", "v", "p", "cache"]
    dtype: str
    per: Call | None = None
    symmetric: bool = True
    smooth: str = ""
    staircase: tuple[tuple[int | None, str], ...] = ()
    scales: str = ""
    """Set when lowered: the input that holds the scales of its groups, which the program makes itself."""
    terms: str = ""
    """The same of what its mean, which smoothing takes off, adds to products of queries and keys."""


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys of one query tile: [lo, hi) may be visible to a row of it, [full_lo, full_hi) are to all.

    Expressions over `i0`, `i1` (positions of the tile's first and last row), b, h, hk, sizes and input
    reads. They need not lie inside [0, Sk); the full range may be empty or stick out of [lo, hi).
    """

    lo: Expr
    hi: Expr
    full_lo: Expr
    full_hi: Expr


@dataclass(frozen=True, slots=True)
class KeyTiles:
    """Which key tiles a query tile visits, as `sparsify` solved it from the mask.

    With `listed` the mask depends on data in a way no range can say: a classification kernel writes each
    query tile's key tiles to a list; `ranges` then only bound what it has to look at.
    """

    ranges: tuple[KeyRange, ...]
    """Their union covers every visible key; they may overlap."""
    skip: Expr | None = None
    """Where ranges are loose: a scalar over i0, i1, j0, j1 (the key tile's ends), false where the key
    tile is certainly empty."""
    listed: bool = False
    granularity: tuple[int, int] = (1, 1)
    """listed: the mask is constant on blocks of this many positions, cut at multiples of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One branch: a softmax-like part over a mask or a selection, or a recurrent state."""

    score: Expr
    mask: Expr = TRUE
    normalizer: Normalizer = Normalizer()
    select: Select | None = None
    state: State | None = None
    dropout: float = 0.0
    kv: Storage = Storage()
    name: str = ""
    columns: tuple[int, int] | None = None
    """The columns [lo, hi) of queries and keys that this part multiplies; None is all."""
    key_tiles: KeyTiles | None = None
    """Set by the pass `sparsify`."""


@dataclass(frozen=True, slots=True)
class Numerics:
    reproducible: Literal["run", "batch", "config"] = "run"
    exp: Literal["exact", "fast"] = "fast"
    accumulate: Literal["fp32"] = "fp32"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a cache has behind it: steps that new tokens go through once, on their way into it."""

    steps: tuple[Call, ...]
    """Of keys and values; of queries too where some look at other tokens, or at the other operand."""
    inputs: tuple[Input, ...]
    """Those that the steps read."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention variant, whole. The spec and the tracer make it; passes map it to another."""

    name: str
    heads: Heads
    dims: Dims
    parts: tuple[Part, ...]
    scale: Expr
    """Default of the run-time argument `scale`, over the sizes."""
    doc: str = ""
    family: str = ""
    source: str = ""
    """Where the method was published, such as 'arXiv 2503.16428'."""
    dtype: OperandDtype = "bf16"
    layout: Layout = "bhsd"
    inputs: tuple[Input, ...] = ()
    sizes: tuple[Size, ...] = ()
    align: Align = Align()
    combine: Call = Call("lse")
    quantize: tuple[Quantizer, ...] = ()
    prologue: tuple[Call, ...] = ()
    epilogue: tuple[Call, ...] = ()
    outputs: tuple[Call, ...] = (Call("o"), Call("lse"))
    modes: tuple[str, ...] = ("prefill", "decode")
    numerics: Numerics = Numerics()
    schedule: Call = Call("auto")
    tune: tuple[tuple[tuple[str, int | float | str], ...], ...] = ()
    """Shapes and sparsity to tune on: each a sorted tuple of (key, value)."""
    kept: Kept | None = None
    """Set by the pass `fuse`: the prologue is then what queries go through in every call."""

    @property
    def part(self) -> Part:
        """The only branch; a variant with several has no such thing."""
        (part,) = self.parts
        return part

    @property
    def is_latent(self) -> bool:
        """Whether values are the first columns of the keys, and no tensor of their own."""
        return any(p.kv.kind == "latent" for p in self.parts)

    @property
    def page_size(self) -> int:
        """Keys of a page, 0 where none lie in pages; where they do, `Sk` is how many a sequence has room for."""
        return next((p.kv.page_size for p in self.parts if p.kv.page_size), 0)

    @property
    def is_apart(self) -> bool:
        """Whether a sequence's bits must not depend on those beside it: neither may its shares and tiles then."""
        return self.numerics.reproducible == "batch"

    def input(self, name: str) -> Input:
        return next(i for i in self.inputs if i.name == name)

    def size(self, name: str) -> Size:
        return next((s for s in self.sizes if s.name == name), Size(name))

    def wants(self, output: str) -> bool:
        """Whether the variant emits `output`, such as `lse`."""
        return any(o.name == output for o in self.outputs)
