"""What default configs ask of a variant: conditions, which rules combine."""

from __future__ import annotations

from collections.abc import Callable

from attncc.ir.attention import Attention
from attncc.ir.cache import quantizer
from attncc.ir.expr import TRUE
from attncc.ir.rewrite import buffers, names
from attncc.ir.staircase import staircase
from attncc.passes.lower import cache, quantize
from attncc.passes.lower.skew import split_diagonals
from attncc.passes.lower.words import has_words

Condition = Callable[[Attention], bool]


def is_light(attn: Attention) -> bool:
    """Whether scores are the products and no lists are read: nothing else wants registers."""
    return attn.part.score.op == "mul" and names(attn.part.score) <= {"qk", "scale"} and not is_listed(attn)


def widest(attn: Attention) -> int:
    return max(attn.dims.qk, attn.dims.v)


def is_fp32(attn: Attention) -> bool:
    return attn.dtype == "fp32"


def is_quantised(attn: Attention) -> bool:
    return bool(attn.quantize) and quantizer(attn) is None


def is_cached(attn: Attention) -> bool:
    """Whether keys and values are codes, which become numbers in registers."""
    return quantizer(attn) is not None


def is_staircase(attn: Attention) -> bool:
    return staircase(attn) is not None


def has_wide_words(attn: Attention) -> bool:
    return has_words(attn) and 128 < widest(attn) <= 256


def has_scaled_rows(attn: Attention) -> bool:
    """Whether scores read scales, which differ inside a tile."""
    return any(h.operand in "qk" and h.per not in quantize.WHOLE for h in quantize.all_held(attn))


def up_to(dim: int) -> Condition:
    return lambda attn: widest(attn) <= dim


def always(_: Attention) -> bool:
    return True


def values_up_to(dim: int) -> Condition:
    return lambda attn: attn.dims.v <= dim and attn.dims.qk <= 2 * dim


def fp32_up_to(dim: int) -> Condition:
    return both(is_fp32, up_to(dim))


def both(a: Condition, b: Condition) -> Condition:
    return lambda attn: a(attn) and b(attn)


def reads_tiles(attn: Attention) -> bool:
    return bool(split_diagonals(attn)[1])


def fills_shared(attn: Attention) -> bool:
    """Whether two key tiles of 128 and one query tile of 128 are what shared memory holds."""
    return attn.dims.qk + attn.dims.v <= 320


def is_listed(attn: Attention) -> bool:
    tiles = attn.parts[0].key_tiles
    return tiles is not None and tiles.listed


def is_unmasked(attn: Attention) -> bool:
    return attn.parts[0].mask == TRUE


def is_masked(attn: Attention) -> bool:
    return not is_unmasked(attn)


def has_small_tiles(attn: Attention) -> bool:
    """Scores that read inputs, and masks that start behind the first key."""
    part = attn.parts[0]
    ranges = part.key_tiles.ranges if part.key_tiles else ()
    return attn.dims.qk <= 128 and (bool(buffers(part.score)) or any(r.lo.value != 0 for r in ranges))


def is_paged(attn: Attention) -> bool:
    return attn.page_size > 0


def is_latent(attn: Attention) -> bool:
    return attn.is_latent


def has_pieces(attn: Attention) -> bool:
    return max(len(cache.key_pieces(attn)), len(cache.value_pieces(attn))) > 1
