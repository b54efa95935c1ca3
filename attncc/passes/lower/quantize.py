"""Quantised operands as the forward kernel sees them: stored tensors in place of the call's, and scales of groups.

Scales are inputs that the program makes itself. Those that differ from row to row or key to key are read by the score
formula, `qk` becoming `qk * k_scales[b, hk, j]`; those of a whole head are one number, hoisted out of the loop; those
of values join at the end. Products are of the operands' own dtype, which holds every stored number exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce as fold
from typing import Final

from attncc.ir.attention import Attention, Input, Quantizer
from attncc.ir.build import Builder, iota, quotient, read, row, tile
from attncc.ir.expr import Dim, Dtype, Expr, cast_to, const, eq, load, minimum, name, where
from attncc.ir.rewrite import substitute
from attncc.ir.tile import Param
from attncc.passes.lower.chains import prepared, source
from attncc.passes.lower.normalizers import TOTAL, VALUE_DTYPE
from attncc.passes.lower.pieces import MIN_WIDTH, Piece
from attncc.passes.lower.scores import input_param, own_name, regroup

QK: Final = name("qk", "f32")
UNIT: Final = name("unit", "f32")
"""What qk is to be multiplied by where one number does for all of a head."""
SCALE_QK: Final = name("scale_qk", "f32")
"""The same, NaN where the head holds what is no number."""


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are held: the dtype of their bits, and the greatest of them."""

    dtype: Dtype
    most: float


FORMATS: Final[Mapping[str, Format]] = {
    "fp8_e4m3": Format("f8e4m3", 448.0),
    "fp8_e5m2": Format("f8e5m2", 57344.0),
    "int8": Format("i8", 127.0),
}
DEFAULT_BLOCK: Final[Mapping[str, int]] = {"q": 128, "k": 64}
"""Tokens of a group where `per=block` does not say."""
WHOLE: Final = ("tensor", "head")
"""Groups that hold all tokens, so that one number is a head's scale."""
GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "q": ("tensor", "head", "block", "token"),
    "k": ("tensor", "head", "block", "token"),
    "v": ("tensor", "head", "channel"),
    "p": ("token",),
}
"""What may share a scale: values are summed over tokens, so theirs cannot differ from one to the next."""


def _each(holds: Callable[[Quantizer], bool], operands: str = "qkvp") -> Callable[[Attention], bool]:
    return lambda a: any(z.operand in operands and holds(z) for z in a.quantize)


def _per(z: Quantizer) -> str:
    return z.per.name if z.per else "token" if z.operand == "p" else "tensor"


_any_operand: Final = _each(lambda z: True)


def _has_group_gap(z: Quantizer) -> bool:
    return _per(z) not in GROUPS[z.operand]


LIMITS: Final[tuple[tuple[Callable[[Attention], bool], str], ...]] = (
    (_each(lambda z: z.dtype not in FORMATS), ", ".join(FORMATS)),
    (_each(lambda z: not z.symmetric), "symmetric formats"),
    (_each(_has_group_gap, "qk"), f"q and k per {', '.join(GROUPS['q'])}"),
    (_each(_has_group_gap, "v"), f"v per {', '.join(GROUPS['v'])}"),
    (_each(_has_group_gap, "p"), "p per token, relative to the greatest weight of its row"),
    (lambda a: _any_operand(a) and a.layout == "varlen", "the layouts bhsd and bshd"),
    (lambda a: _any_operand(a) and (a.page_size > 0 or a.is_latent), "dense storage"),
    (
        lambda a: any(z.operand in "vp" for z in a.quantize) and a.parts[0].normalizer.kind != "softmax",
        "q and k where the normalizer is no softmax",
    ),
)
"""What is not carried yet, and what is instead."""


@dataclass(frozen=True, slots=True)
class Held:
    """One of q, k, v as its quantizer holds it, in scratch memory."""

    operand: str
    format: Format
    per: str
    block: int
    """Tokens that share a scale, where blocks or single tokens do."""
    tensor: str
    """Name of the stored tensor."""
    scales: Input
    heads: int
    dim: int
    tokens: Expr
    terms: str = ""
    """Name of what the mean that is taken off adds to products; empty where none is."""

    @property
    def width(self) -> int:
        """Columns of the stored tensor, those past the head dim being 0: tensor maps want rows of whole 16 bytes."""
        return -(-self.dim // MIN_WIDTH) * MIN_WIDTH

    @property
    def scale_shape(self) -> tuple[Expr, ...]:
        known = {"Hq": self.heads, "Hk": self.heads, "Hv": self.heads, "Dv": self.dim, 1: 1}
        return tuple(const(known[s]) if s in known else name(str(s)) for s in self.scales.shape)


def with_scales(attn: Attention) -> Attention:
    """The variant over the operands as they are stored: scales are inputs, and the score has those that rows and keys
    do not share, and what means that were taken off add to qk."""
    quantizers = tuple(
        replace(
            z,
            scales=own_name(f"{z.operand}_scales", attn),
            terms=own_name(f"{z.operand}_terms", attn) if z.smooth else "",
        )
        if z.operand in "qkv"
        else z
        for z in attn.quantize
    )
    attn = replace(attn, quantize=quantizers)
    terms = (Input(h.terms, terms_of(h.operand)) for h in all_held(attn) if h.terms)
    attn = replace(attn, inputs=(*attn.inputs, *(h.scales for h in all_held(attn)), *terms))
    qk = QK
    for h, head, at in ((held(attn, "q"), "h", "row"), (held(attn, "k"), "hk", "j")):
        if h is not None and h.per not in WHOLE:
            qk = qk * load(h.scales.name, name("b"), name(head), quotient(name(at), h.block))
    for h, at in ((held(attn, "k"), "row"), (held(attn, "q"), "j")):
        if h is not None and h.terms:
            qk = qk + load(h.terms, name("b"), name("h"), name(at))
    score = substitute(attn.part.score, {"qk": qk})
    return replace(attn, parts=(replace(attn.part, score=score),))


def terms_of(operand: str) -> tuple[str, ...]:
    """Axes of what the mean of an operand adds to products: one for each row of the other's."""
    return ("B", "Hq", "Sq" if operand == "k" else "Sk")


def held(attn: Attention, operand: str) -> Held | None:
    """How an operand is stored; None where it is read as it came."""
    z = _quantizer(attn, operand)
    if z is None:
        return None
    per, heads, tokens = _per(z), f"H{operand}", "Sq" if operand == "q" else "Sk"
    shapes: dict[str, tuple[int | str, ...]] = {
        "tensor": ("B", 1, 1),
        "head": ("B", heads, 1),
        "channel": ("B", heads, "Dv"),
        "block": ("B", heads, tokens),
        "token": ("B", heads, tokens),
    }
    given = z.per.args[0].value if z.per and z.per.args else None
    return Held(
        operand,
        FORMATS[z.dtype],
        per,
        int(given or DEFAULT_BLOCK.get(operand, 1)) if per == "block" else 1,
        own_name(f"{operand}_stored", attn),
        Input(z.scales, shapes[per]),
        {"q": attn.heads.q, "k": attn.heads.kv, "v": attn.heads.v}[operand],
        attn.dims.v if operand == "v" else attn.dims.qk,
        name(tokens),
        z.terms,
    )


def _quantizer(attn: Attention, operand: str) -> Quantizer | None:
    return next((z for z in attn.quantize if z.operand == operand), None)


def all_held(attn: Attention) -> tuple[Held, ...]:
    return tuple(h for h in (held(attn, operand) for operand in "qkv") if h is not None)


# -- what the forward kernel reads ---------------------------------------------------------------


def operand(attn: Attention, which: str, given: Param) -> Param:
    """The parameter by which q, k or v comes: `given`, the call's own, or a prepared or stored one in its place."""
    h = held(attn, which)
    if h is None:
        return prepared(attn, given)
    extent = (h.tokens, h.width)
    return replace(given, name=h.tensor, dtype=h.format.dtype, extent=extent, doc=f"{given.doc}, {h.format.dtype}")


def read_tile(b: Builder, attn: Attention, which: str, at: tuple[Expr, Expr, Expr], rows: Dim, piece: Piece) -> Expr:
    """Rows of q, k or v from (batch, head, row) on, in the dtype that is multiplied."""
    h = held(attn, which)
    p = b.params[source(attn, which) if h is None else h.tensor]
    return cast_to(tile(p, *at, piece.column, (rows, piece.width)), VALUE_DTYPE[attn.dtype])


def bind_unit(b: Builder, attn: Attention, batch: Expr, heads: Mapping[str, Expr]) -> None:
    """Binds the scale of qk as far as one number is that of a head.

    A scale of NaN, of a head that holds what is no number, must not join -inf, the score of keys that a row does not
    see: it reaches the others through `poison`.
    """
    if not _of_heads(attn):
        return
    factors = [
        read(input_param(h.scales), batch, heads[h.operand] if h.per == "head" else 0, 0) for h in _of_heads(attn)
    ]
    b.let("scale_qk", fold(lambda x, y: x * y, factors))
    b.let("unit", where(_is_number(SCALE_QK), SCALE_QK, 1.0))


def with_unit(attn: Attention, score: Expr, multiplier: Expr) -> tuple[Expr, Expr]:
    """A score of products of stored numbers, and what multiplies it."""
    if not _of_heads(attn):
        return score, multiplier
    if score == QK:
        return score, multiplier * UNIT
    return regroup(substitute(score, {"qk": QK * UNIT})), multiplier


def poison(attn: Attention, q: Expr) -> Expr:
    """A tile of queries, NaN where the head's scale is."""
    return where(_is_number(SCALE_QK), q, const(math.nan, q.dtype)) if _of_heads(attn) else q


def bind_ends(b: Builder, attn: Attention, batch: Expr, head: Expr) -> None:
    """Binds, for kernels that multiply stored numbers alone, what `ended` adds to a row's end."""
    h = held(attn, "v")
    if h is None:
        return
    spoilt: Expr = const(0.0)
    if _of_heads(attn):
        spoilt = where(_is_number(SCALE_QK), 0.0, math.nan)
    b.let("spoilt", spoilt, "NaN where the scale of qk is")
    b.let("unit_v", read(input_param(h.scales), batch, 0 if h.per == "tensor" else head, 0))


def ended(attn: Attention, factor: Expr, lse: Expr) -> tuple[Expr, Expr]:
    """What a row's accumulator is multiplied by, and its lse, where weights and values are of few bits.

    A head that holds what is no number makes both NaN, but for rows that saw no key.
    """
    z = _quantizer(attn, "p")
    if z is None or held(attn, "v") is None:
        return factor, lse
    seen, spoilt = TOTAL > 0.0, name("spoilt", "f32")
    unit = name("unit_v", "f32") * (1.0 / FORMATS[z.dtype].most)
    return where(seen, factor * unit + spoilt, factor), where(seen, lse + spoilt, lse)


def _of_heads(attn: Attention) -> list[Held]:
    """q and k, as far as one number is the scale of a head."""
    return [h for h in all_held(attn) if h.operand in "qk" and h.per in WHOLE]


def _is_number(x: Expr) -> Expr:
    return eq(x, x)


def weigh(attn: Attention, p: Expr, dtype: Dtype) -> Expr:
    """Weights as the second product takes them; quantised ones are multiples of the format's greatest number.

    They are relative to the greatest weight so far, which may be less than the row's: rounding is as fine, elsewhere.
    """
    z = _quantizer(attn, "p")
    if z is None:
        return cast_to(p, dtype)
    form = FORMATS[z.dtype]
    return cast_to(rounded(minimum(p * form.most, form.most), form), dtype)


def rounded(x: Expr, form: Format) -> Expr:
    """x, within the format's range, as its next number; of two the even one."""
    if form.dtype == "i8":  # past 2**23 numbers are whole, and sums round as wanted
        x = (x + WHOLE_BEYOND) - WHOLE_BEYOND
    return cast_to(x, form.dtype)


WHOLE_BEYOND: Final = 1.5 * 2.0**23


def rescale(b: Builder, attn: Attention, o: Expr, batch: Expr, head: Expr, piece: Piece) -> Expr:
    """An output [BM, width] in units of the values; rows that see nothing stay 0, whatever the scale."""
    z = _quantizer(attn, "p")
    o = o if z is None else o * (1.0 / FORMATS[z.dtype].most)
    h = held(attn, "v")
    if h is None:
        return o
    x, at = input_param(h.scales), 0 if h.per == "tensor" else head
    if h.per in WHOLE:
        factor = read(x, batch, at, 0)
    else:
        columns = piece.column + iota(piece.width)
        factor = row(read(x, batch, at, columns, mask=columns < h.dim))
    o = b.let("o", o)
    return where(eq(o, 0.0), 0.0, o * factor)
