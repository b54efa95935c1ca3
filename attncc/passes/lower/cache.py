"""A cache of few bits as kernels read it: codes become numbers in the load of a tile, or their scales join the scores.

Products are of the operands' own dtype, which holds every code exactly. Where one scale is that of a whole key it
multiplies the score, to which a zero point adds its share of the sum of the query; that of a whole value multiplies its
weight, and its zero point, times the weight, adds to all columns. What is both key and value, and columns that differ
in scale, are multiplied as numbers, rounded to the operands' dtype as a cache without codes would hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce as fold
from typing import Final

from attncc.ir.attention import Attention, Quantizer
from attncc.ir.build import Builder, column, expand, iota, quotient, read, reduce, remainder, reshape, row
from attncc.ir.cache import FORMATS, INTEGERS, Cached, beside, cached, find
from attncc.ir.expr import WORD, Dtype, Expr, cast_to, const, eq, minimum, name, where
from attncc.ir.given import Given
from attncc.ir.tile import Param
from attncc.passes.lower import halves, staircase, storage, words
from attncc.passes.lower.grid import QueryTile, is_varlen
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.pieces import Piece, pieces
from attncc.passes.lower.words import WHOLE, has_words, joins

CODES: Final[Mapping[str, Dtype]] = {"int8": "i8", "uint8": "u8", "fp8_e4m3": "f8e4m3", "fp8_e5m2": "f8e5m2"}
DTYPES: Final[Mapping[str, Dtype]] = {**VALUE_DTYPE, **CODES}
PER: Final = ("tensor", "head", "channel", "token", "group")
"""What may share a scale: blocks of tokens would be stored again with each that joins them."""
NIBBLES: Final = 16
NAMES: Final = ("k_scales", "k_zeros", "k_rope", "v_scales", "v_zeros")
ROPE: Final = "K_ROPE"

Raw = Callable[[Param, Piece, int], Expr]
"""The tile [BN, width] of an operand, of which the dim is given, as it is stored."""


def _some(holds: Callable[[Attention, Cached], bool]) -> Callable[[Attention], bool]:
    return lambda a: any(holds(a, c) for c in cached(a))


def _held(holds: Callable[[Quantizer], bool]) -> Callable[[Attention], bool]:
    return lambda a: any(z.operand == "cache" and holds(z) for z in a.quantize)


def _is_filled(dim: int) -> bool:
    """Whether pieces of a dim have no column beyond it."""
    return sum(p.width for p in pieces(dim)) == dim


LIMITS: Final[tuple[tuple[Callable[[Attention], bool], str], ...]] = (
    *staircase.LIMITS,
    (
        _held(lambda z: not z.staircase and (z.dtype, z.symmetric) not in FORMATS),
        ", ".join(dict.fromkeys(d for d, _ in FORMATS)),
    ),
    (_held(lambda z: bool(z.smooth)), "caches whose keys have no mean taken off"),
    (_some(lambda a, c: c.per not in PER), f"caches per {', '.join(PER)}"),
    (lambda a: bool(cached(a)) and len(a.quantize) > 1, "the cache alone, or q, k, v and p"),
    (
        _some(lambda a, c: c.is_packed and (c.dim % 2 > 0 or not _is_filled(c.width))),
        "int4 where half of a head dim is a sum of up to three powers of two, 16 at least",
    ),
    (_some(lambda a, c: a.is_latent and c.is_packed), "int8 and fp8 where values are a part of the keys"),
    (
        _some(lambda a, c: c.rope > 0 and not _is_filled(c.dim)),
        "latents that are a sum of up to three powers of two, 16 at least, before their rope columns",
    ),
    (_some(lambda a, c: a.is_latent and a.dims.v > c.dim), "latents whose values hold no rope columns"),
    (
        lambda a: bool(cached(a)) and any(x.name in NAMES for x in a.inputs),
        "inputs of other names: k_scales and the like are the cache's",
    ),
)
"""What is not carried yet, and what is instead."""


# -- columns and parameters ----------------------------------------------------------------------


def key_pieces(attn: Attention) -> tuple[Piece, ...]:
    """The pieces in which queries and keys are multiplied."""
    c = find(attn, "k")
    if c is None:
        return pieces(attn.dims.qk)
    return (*_coded(attn, c), *(Piece(c.dim + p.column, p.width) for p in (pieces(c.rope) if c.rope else ())))


def value_pieces(attn: Attention) -> tuple[Piece, ...]:
    """The pieces of values and outputs."""
    c = find(attn, "v")
    return pieces(attn.dims.v) if c is None else _coded(attn, c)


def _coded(attn: Attention, c: Cached) -> tuple[Piece, ...]:
    """Of two codes in a byte one stands for a column of the first half, one for the same column of the second."""
    if has_words(attn):
        return tuple(words.fields(c))
    halves = (0, c.width) if c.is_packed else (0,)
    return tuple(Piece(at + p.column, p.width) for at in halves for p in pieces(c.width))


def operand(attn: Attention, which: str, given: Param) -> Param:
    """The parameter of keys or values: `given` where they come as numbers."""
    c = find(attn, which)
    if c is None or given.extent is None:
        return given
    in_words = has_words(attn)
    width, dtype = (words.count(c), WORD) if in_words else (c.width, CODES[c.codes])
    read_ = (*pieces(width), *(value_pieces(attn) if attn.is_latent else ()))
    tiles = tuple(dict.fromkeys(("BN", p.width) for p in read_))
    doc = f"{given.doc}, {c.dtype} codes{', two bytes a column' * in_words}"
    return replace(given, dtype=dtype, tiles=tiles, extent=(given.extent[0], width), doc=doc)


def parameters(attn: Attention, rows: Expr) -> tuple[Param, ...]:
    """What is read beside the codes; `rows`: of the keys."""
    return tuple(_rope(attn, x, rows) if x.name == ROPE.lower() else buffer(x) for x in beside(attn))


def buffer(x: Given) -> Param:
    """The parameter of scales, zero points or a ring."""
    return Param(f"{x.name}_ptr", "buffer", DTYPES[x.dtype], rank=len(x.axes), doc=x.doc, strides=x.strides)


def _rope(attn: Attention, x: Given, rows: Expr) -> Param:
    width = int(x.axes[-1])
    tiles = tuple(dict.fromkeys(("BN", p.width) for p in pieces(width)))
    given = Param(ROPE, "operand", VALUE_DTYPE[attn.dtype], tiles=tiles, extent=(rows, width), doc=x.doc)
    return storage.as_stored(attn, given)


# -- before the loop -----------------------------------------------------------------------------


def bind(b: Builder, attn: Attention, t: QueryTile, heads: Mapping[str, Expr]) -> None:
    """Binds what no key moves: scales of whole sequences, and sums of queries that zero points are multiplied by."""
    for c in cached(attn):
        sequence = (t.scope.values["b"],)
        if c.per in WHOLE:
            at = sequence if c.per == "tensor" else (*sequence, heads[c.operand])
            for text in _texts(c):
                b.let(text, read(b.params[f"{text}s_ptr"], *at))
    c = find(attn, "k")
    if c is None or not joins(attn, c):
        return
    if lifts(attn):
        halves.lift(b, _queries(attn, c, "bf16"))
    if c.has_zeros or _shift(attn, c):
        sums = [reduce("sum", cast_to(q, "f32"), 1) for q in _queries(attn, c, value_dtype(attn, c)).values()]
        b.let("q_sum", fold(lambda x, y: x + y, sums), "[BM] what zero points are multiplied by")


def lifts(attn: Attention) -> bool:
    """Whether queries of bf16 are multiplied as f16, which few instructions make of codes."""
    c = find(attn, "k")
    return c is not None and attn.dtype == "bf16" and value_dtype(attn, c) == "f16"


def _queries(attn: Attention, c: Cached, dtype: Dtype) -> dict[str, Expr]:
    """The tiles of queries that codes are multiplied by."""
    parts = key_pieces(attn)
    texts = {p: "q" + p.suffix(parts) for p in _coded(attn, c)}
    return {text: name(text, dtype, ("BM", p.width)) for p, text in texts.items()}


def has_finite_values(attn: Attention) -> bool:
    """Whether values are codes whose scales multiply weights, so that no tile of them holds anything but numbers."""
    c = find(attn, "v")
    return c is not None and joins(attn, c)


def _texts(c: Cached) -> tuple[str, ...]:
    return (f"{c.operand}_scale", *([f"{c.operand}_zero"] if c.has_zeros else ()))


def _shift(attn: Attention, c: Cached) -> float:
    """What the numbers that are multiplied are less than those which the scale is for."""
    if has_words(attn):
        return words.MIDDLE[words.kind(c)] - c.offset
    return _middle(c) - c.offset if c.operand == "v" else -c.offset


def _middle(c: Cached) -> float:
    """What is taken from values that are read by bytes."""
    return words.MIDDLE.get(words.kind(c), 0)


# -- inside it -----------------------------------------------------------------------------------


def scaled(b: Builder, attn: Attention, t: QueryTile, p: Piece, s: Expr, unit: Expr | None) -> Expr:
    """Products [BM, BN] up to the columns of a piece: behind the last codes they become those of numbers.

    `unit`: of rows, if it is not in what scores are multiplied by.
    """
    c = find(attn, "k")
    if c is None or not joins(attn, c) or p != _coded(attn, c)[-1]:
        return s
    s = b.let("s", s, "[BM, BN] of codes")
    scale, zero = _of_whole(b, attn, c, t, t.scope.values["hk"])
    s = s * _across(scale)
    s = s if zero is None else s + column(name("q_sum", "f32", ("BM",))) * _across(zero)
    return s if unit is None else s * column(unit)


def above(b: Builder, attn: Attention, t: QueryTile, head: Expr, keep: Expr) -> Expr | None:
    """How far above a tile's greatest score the peak of a row is to be, number or [BM], if that is due; `keep`: which
    keys rows of a cut tile see."""
    c = find(attn, "v")
    if c is None or not joins(attn, c) or _ends_rows(attn, c) or not halves.serve_weights(attn):
        return None
    return halves.above(b, _of_key(b, attn, c, t, head)[0], keep)


def weighted(
    b: Builder, attn: Attention, t: QueryTile, head: Expr, p: Expr, hide: Callable[[Expr], Expr]
) -> tuple[tuple[Expr, ...], Expr | None]:
    """The terms of the weights [BM, BN] of a tile's codes, and what zero points add to every column, [BM], if anything.

    Rounded to bf16, a weight would be as far off as a value of 16 bits is, where the weight of such a value may be
    exact. f16 has three digits more, and `above` gives it the range that scales may have; where weights are relative to
    nothing, two terms of bf16 have.
    `hide`: binds 0 where a row does not see a key, so that scales which no row sees do not matter, whatever they are.
    """
    c = find(attn, "v")
    if c is None or not joins(attn, c) or _ends_rows(attn, c):
        return (), None
    scale, zero = _of_whole(b, attn, c, t, None if halves.serve_weights(attn) else head)
    w = hide(b.let("w", p * _across(scale), "[BM, BN] weights of codes"))
    terms = (w,)
    if halves.serve_weights(attn):
        terms = (b.let("w_half", cast_to(w, "f16")),)
    elif attn.dtype != "fp32":
        high = b.let("w_high", cast_to(w, "bf16"))
        terms = (high, b.let("w_low", cast_to(w - cast_to(high, "f32"), "bf16"), "what the other lacks"))
    if zero is None:
        return terms, None
    z = hide(b.let("z", p * _across(zero), "[BM, BN] what they add to all columns"))
    return terms, b.let("moved", reduce("sum", z, 1), "[BM]")


def ended(b: Builder, attn: Attention, o: Expr, scale: Callable[[Param], Expr] | None = None) -> Expr:
    """Outputs in units of the values: the scale of a whole head multiplies those of rows that see anything.

    `scale`: reads it from its tensor; without that it is the one that `bind` has bound.
    """
    c = find(attn, "v")
    if c is None or not _ends_rows(attn, c):
        return o
    factor = name("v_scale", "f32") if scale is None else scale(b.params[f"{c.scales}_ptr"])
    o = b.let("o", o)
    return where(eq(o, 0.0), 0.0, o * factor)


def reader(attn: Attention, batch: Expr, head: Expr) -> Callable[[Param], Expr]:
    """What reads the scale of a head's values from its tensor."""
    c = find(attn, "v")
    whole = c is not None and c.per == "tensor"
    return lambda x: read(x, batch) if whole else read(x, batch, head)


def _ends_rows(attn: Attention, c: Cached) -> bool:
    """Whether a scale of values multiplies outputs: one number, and none that is added to what it is for."""
    return c.operand == "v" and joins(attn, c) and c.per in WHOLE and not c.has_zeros and not _shift(attn, c)


def value_dtype(attn: Attention, c: Cached) -> Dtype:
    """What codes become: of values what their weights are, for either dtype holds them exactly; integers among the
    keys f16."""
    if c.operand == "v" and joins(attn, c) and not _ends_rows(attn, c) and attn.dtype != "fp32":
        return "f16" if halves.serve_weights(attn) else "bf16"
    given = VALUE_DTYPE[attn.dtype]
    return "f16" if given == "bf16" and c.operand == "k" and has_words(attn) and c.dtype in INTEGERS else given


def _across(x: Expr) -> Expr:
    return row(x) if x.shape else x


def _of_whole(b: Builder, attn: Attention, c: Cached, t: QueryTile, head: Expr | None) -> tuple[Expr, Expr | None]:
    """Scale and zero point of whole keys as the numbers that are multiplied want them."""
    scale, zero = _of_key(b, attn, c, t, head)
    shift = _shift(attn, c)
    if shift:
        zero = scale * shift if zero is None else zero + scale * shift
    return scale, zero


def _of_key(b: Builder, attn: Attention, c: Cached, t: QueryTile, head: Expr | None) -> tuple[Expr, Expr | None]:
    """Scale and zero point of whole keys: [BN], or numbers; without a head they are bound already."""
    if c.per == "token" and head is not None:
        for text in _texts(c):
            b.let(text, _at_tokens(b.params[f"{text}s_ptr"], attn, t, head), "[BN]")
    shape = ("BN",) if c.per == "token" else ()
    scale, *zero = (name(text, "f32", shape) for text in _texts(c))
    return scale, zero[0] if zero else None


def _at_tokens(x: Param, attn: Attention, t: QueryTile, head: Expr, more: Expr | None = None) -> Expr:
    """Entries [BN] of a tensor that lies beside the keys; of some of its groups, [BN, more]. 0 behind the last key."""
    tokens, kept = name("n") + iota("BN"), None
    if attn.page_size and storage.has_whole_tiles(attn):
        index = (name("page"), head, name("slot") + iota("BN"))
    elif attn.page_size:
        page, slot = (name(text, "i32", ("BN",)) for text in ("page", "slot"))
        index, kept = (page, head, slot), storage.HELD
    else:
        index = (head, t.first_key + tokens) if is_varlen(attn) else (t.batch, head, tokens)
        kept = tokens < t.keys
    if more is None:
        return read(x, *index, mask=kept)
    placed = (*(column(e) if e.shape else e for e in index), row(more) if more.shape else more)
    return read(x, *placed, mask=None if kept is None else column(kept))


def read_tile(b: Builder, attn: Attention, which: str, t: QueryTile, head: Expr, p: Piece, raw: Raw) -> Expr:
    """The [BN, width] tile of keys or values of a cache, in the dtype that is multiplied."""
    c = find(attn, which)
    assert c is not None
    dtype = value_dtype(attn, c)
    if p.column >= c.dim:
        return raw(b.params[ROPE], Piece(p.column - c.dim, p.width), c.rope)
    if has_words(attn):
        return _field(b, attn, c, p, raw)
    codes = _codes(b, c, p, raw)
    if joins(attn, c):
        if not (_middle(c) and c.operand == "v"):
            return cast_to(codes, dtype)
        return cast_to(cast_to(codes, "f32") - float(_middle(c)), dtype)
    x = cast_to(codes, "f32")
    x = x - float(c.offset) if c.offset else x
    if c.per == "group":
        return cast_to(_by_groups(b, attn, c, t, head, p, x), dtype)
    if c.per == "channel":
        parts = tuple(_channels(b.params[f"{text}s_ptr"], c, t, head, p) for text in _texts(c))
        scale, *zero = parts
        return cast_to(x * scale + zero[0] if zero else x * scale, dtype)
    scale, shift = _of_key(b, attn, c, t, head)
    if c.per == "token":
        scale, shift = column(scale), None if shift is None else column(shift)
    return cast_to(x * scale if shift is None else x * scale + shift, dtype)


def _codes(b: Builder, c: Cached, p: Piece, raw: Raw) -> Expr:
    """Codes of the columns of a piece; bytes that hold two are read with the first of these."""
    stored = b.params[c.operand.upper()]
    if not c.is_packed:
        return raw(stored, p, c.width)
    at = Piece(p.column % c.width, p.width)
    text = f"{c.operand}_bytes{at.suffix(pieces(c.width))}"
    if p.column < c.width:
        b.let(text, raw(stored, at, c.width), f"[BN, {p.width}] two codes each")
    both = cast_to(name(text, "u8", ("BN", p.width)), "i32")
    return remainder(both, NIBBLES) if p.column < c.width else quotient(both, NIBBLES)


def _field(b: Builder, attn: Attention, c: Cached, p: Piece, raw: Raw) -> Expr:
    """The numbers of a piece's columns; words are read with the first of their fields."""
    field = words.fields(c)[p]
    text = f"{c.operand}_words{field.word.suffix(pieces(words.count(c)))}"
    if not field.bit:
        b.let(text, raw(b.params[c.operand.upper()], field.word, words.count(c)), f"[BN, {p.width}]")
    return words.numbers(c, name(text, WORD, ("BN", p.width)), field.bit, value_dtype(attn, c))


def _channels(x: Param, c: Cached, t: QueryTile, head: Expr, p: Piece) -> Expr:
    """[1, width] of a tensor that has an entry a column."""
    columns = p.columns
    mask = columns < c.dim if p.end > c.dim else None
    return row(read(x, t.scope.values["b"], head, columns, mask=mask))


def _by_groups(b: Builder, attn: Attention, c: Cached, t: QueryTile, head: Expr, p: Piece, x: Expr) -> Expr:
    """Codes [BN, width] as numbers, where groups of columns have scales: those of a piece are read once each."""
    tensors = [b.params[f"{text}s_ptr"] for text in _texts(c)]
    first, last = p.column // c.group, (p.column + p.width - 1) // c.group
    several = p.width % c.group == 0 and p.column % c.group == 0
    if several and last > first:
        count = p.width // c.group
        read_ = [_at_tokens(y, attn, t, head, first + iota(count)) for y in tensors]
        texts = [f"{text}{p.suffix(_coded(attn, c))}" for text in _texts(c)]
        parts = [expand(b.let(text, y, f"[BN, {count}] of groups"), 2) for text, y in zip(texts, read_, strict=True)]
        x = reshape(x, ("BN", count, c.group)) * parts[0]
        x = x + parts[1] if len(parts) > 1 else x
        return reshape(x, ("BN", p.width))
    at = const(first) if first == last else minimum(quotient(p.column + iota(p.width), c.group), c.groups - 1)
    parts = [_at_tokens(y, attn, t, head, at) for y in tensors]
    return x * parts[0] + parts[1] if len(parts) > 1 else x * parts[0]
