"""Launch configs where nothing was tuned: ordered rules an architecture, the first that holds wins.

The rules for sm_90 were measured on an H200 (`benchmarks/results/`): what wins there is three or four programs on a
multiprocessor rather than a deep pipeline, so few registers and one stage. The others are safe, not tuned; those for
operands of few bits are the largest tiles whose conversions fit a thread's registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attncc.device import Device
from attncc.errors import Unsupported
from attncc.ir.attention import Attention
from attncc.passes.lower import latent, short, storage
from attncc.passes.lower.conditions import (
    Condition,
    always,
    both,
    fills_shared,
    fp32_up_to,
    has_pieces,
    has_scaled_rows,
    has_small_tiles,
    has_wide_words,
    is_cached,
    is_fp32,
    is_latent,
    is_light,
    is_listed,
    is_masked,
    is_paged,
    is_quantised,
    is_staircase,
    is_unmasked,
    reads_tiles,
    up_to,
    values_up_to,
    widest,
)
from attncc.passes.lower.group import groups, members
from attncc.passes.lower.hopper import gap
from attncc.passes.lower.knobs import E_GROUP
from attncc.passes.lower.parts import has_parts
from attncc.passes.lower.pieces import MAX_DIM
from attncc.passes.lower.words import has_words

Config = Mapping[str, int]
Row = tuple[Mapping[str, int], Config]


@dataclass(frozen=True, slots=True)
class Rule:
    """`config` for the variants for which `applies`; `why` goes into the emitted file."""

    why: str
    applies: Condition
    config: Config


def _config(bm: int, bn: int, warps: int, stages: int, registers: int = 0, *, tma: int = 0, group: int = 8) -> Config:
    """`registers` caps a thread's registers, 0 leaves them to the compiler."""
    knobs = {"BM": bm, "BN": bn, "GROUP": group, "ONE_PASS": 0, "TMA": tma}
    return {**knobs, "num_warps": warps, "num_stages": stages, "maxnreg": registers}


def _engine(
    keys: int, consumers: int, q_stages: int = 2, turns: int = 0, registers: int = 240, stages: int = 2
) -> Config:
    return {
        "E_KEYS": keys, "E_CONSUMERS": consumers, "E_STAGES": stages, "E_Q_STAGES": q_stages, "E_GROUP": 8,
        "E_TURNS": turns, "E_REGISTERS": registers, "E_POLY": 0, "E_DRAWN": 1,
    }  # fmt: skip


STAIRS: Final = _config(64, 32, 4, 1, tma=1)
HOPPER: Final = (
    Rule("fp32 products, which take no tensor core", fp32_up_to(128), _config(64, 32, 4, 1, tma=1)),
    Rule("fp32 products, wide heads", is_fp32, _config(32, 16, 4, 1, tma=1)),
    Rule("operands of few bits, heads up to 128", both(is_quantised, up_to(128)), _config(64, 64, 4, 1, tma=1)),
    Rule("operands of few bits, heads up to 256", both(is_quantised, up_to(256)), _config(64, 32, 4, 1, tma=1)),
    Rule("a staircase, by four warps: by eight, keys of NaN made an H200 read astray", is_staircase, STAIRS),
    Rule("a cache of few bits, heads up to 128", both(is_cached, up_to(128)), _config(128, 32, 8, 1, tma=1)),
    Rule("codes in words, heads from 129 to 256", has_wide_words, _config(64, 16, 4, 1, tma=1)),
    Rule("a cache of few bits, heads up to 256", both(is_cached, up_to(256)), _config(64, 32, 8, 1, tma=1)),
    Rule("a cache of few bits, the widest heads", is_cached, _config(64, 32, 8, 1, tma=1)),
    Rule("pages of whole tiles", both(storage.has_whole_tiles, up_to(128)), _config(128, 64, 8, 1, tma=1)),
    Rule("keys that find their own pages", both(is_paged, up_to(128)), _config(128, 32, 8, 1, tma=1)),
    Rule("a bias tile beside the scores", both(reads_tiles, up_to(128)), _config(128, 64, 8, 2, 128, tma=1, group=2)),
    Rule(
        "listed tiles of heads in several pieces",
        both(both(is_listed, has_pieces), up_to(256)),
        _config(64, 32, 4, 1, tma=1, group=1),
    ),
    Rule("heads of several pieces", both(has_pieces, up_to(128)), _config(64, 32, 4, 2, tma=1)),
    Rule("listed tiles: one head at a time", both(is_listed, up_to(128)), _config(64, 128, 4, 1, 168, tma=1, group=1)),
    Rule("narrow heads, no mask", both(is_unmasked, up_to(64)), _config(64, 128, 4, 1, 160, tma=1)),
    Rule("narrow heads", up_to(64), _config(64, 128, 4, 2, 160, tma=1)),
    Rule(
        "more work a pair, or few keys a row: four programs a multiprocessor",
        both(has_small_tiles, values_up_to(128)),
        _config(64, 64, 4, 1, 128, tma=1),
    ),
    Rule("values up to 128: three programs a multiprocessor", values_up_to(128), _config(64, 128, 4, 1, 168, tma=1)),
    Rule(
        "heads of several pieces up to 256, masked",
        both(both(has_pieces, is_masked), up_to(256)),
        _config(64, 32, 4, 2, tma=1),
    ),
    Rule("heads up to 160", up_to(160), _config(64, 64, 4, 2, tma=1)),
    Rule("heads up to 256", up_to(256), _config(64, 128, 4, 1, tma=1)),
    Rule("a wide latent: two stages, without which registers spill", is_latent, _config(64, 32, 8, 2, tma=1)),
    Rule("the widest heads", always, _config(64, 32, 8, 1, tma=1)),
)
ENGINE: Final = (
    Rule("listed tiles of several pieces", both(is_listed, has_pieces), _engine(keys=64, consumers=2, q_stages=1)),
    Rule("operands of few bits, scales of rows or keys", has_scaled_rows, _engine(64, 2, stages=3)),
    Rule("operands of few bits", is_quantised, _engine(128, 2, stages=3, turns=2)),
    Rule("heads up to 64", both(up_to(64), is_light), _engine(keys=128, consumers=3, turns=1, registers=160)),
    Rule(
        "heads up to 80, no mask, in parts",
        both(both(has_parts, up_to(80)), is_unmasked),
        _engine(112, 3, q_stages=1, turns=1, registers=160),
    ),
    Rule(
        "heads up to 96, in parts: a mask cuts no more tiles than it must where two have a query tile's rows",
        both(has_parts, up_to(96)),
        _engine(96, 3, turns=1, registers=160),
    ),
    Rule("heads up to 192, in parts", both(has_parts, up_to(192)), _engine(96, 2, q_stages=1)),
    Rule("heads up to 256, in parts", has_parts, _engine(64, 2, q_stages=1)),
    Rule("heads up to 128", up_to(128), _engine(keys=128, consumers=2)),
    Rule(
        "heads up to 160, or of 192 with values of 128: turns, for products take as long as weights",
        fills_shared,
        _engine(128, 2, q_stages=1, turns=1),
    ),
    Rule("heads up to 256", always, _engine(keys=64, consumers=2, q_stages=1)),
)
"""Of the Hopper engine."""
BLACKWELL: Final = (
    Rule("fp32 products", is_fp32, _config(32, 16, 4, 1, tma=1)),
    Rule("a cache of few bits", both(is_cached, up_to(256)), _config(64, 32, 4, 1, tma=1)),
    Rule("keys in pages", both(is_paged, up_to(128)), _config(64, 32, 4, 1, tma=1)),
    Rule("operands of few bits", both(is_quantised, up_to(256)), _config(64, 64, 4, 1, tma=1)),
    Rule("heads up to 128", up_to(128), _config(128, 64, 4, 2, tma=1)),
    Rule("heads up to 256", up_to(256), _config(64, 64, 4, 1, tma=1)),
    Rule("the widest heads", always, _config(64, 32, 8, 1, tma=1)),
)
AMPERE: Final = (
    Rule("fp32 products, wide heads", lambda a: is_fp32(a) and widest(a) > 128, _config(16, 16, 4, 1)),
    Rule("fp32 products", is_fp32, _config(32, 32, 4, 1)),
    Rule("a cache of few bits", both(is_cached, up_to(128)), _config(64, 32, 4, 1)),
    Rule("keys in pages", both(is_paged, up_to(128)), _config(64, 32, 4, 1)),
    Rule("heads up to 128", up_to(128), _config(64, 64, 4, 2)),
    Rule("heads up to 256", up_to(256), _config(64, 32, 4, 1)),
    Rule("the widest heads", always, _config(32, 16, 8, 1)),
)
CDNA: Final = (
    Rule("fp32 products", is_fp32, _config(32, 16, 4, 1)),
    Rule("a cache of few bits", both(is_cached, up_to(128)), _config(64, 32, 4, 1)),
    Rule("heads up to 128", up_to(128), _config(64, 64, 4, 1)),
    Rule("wide heads", always, _config(32, 32, 4, 1)),
)
INTERPRETED: Final = (Rule("Triton's interpreter: few, large steps", always, _config(64, 64, 4, 1)),)
RULES: Final[Mapping[str, tuple[Rule, ...]]] = {
    "sm_80": AMPERE,
    "sm_86": AMPERE,
    "sm_89": AMPERE,
    "sm_90": HOPPER,
    "sm_100": BLACKWELL,
    "gfx942": CDNA,
    "interpreter": INTERPRETED,
}
SHORT: Final = 16
"""Up to so many queries a tile of 16 rows holds them all."""
SMALL: Final = 2**18
"""Up to so many (query, key) pairs a head, counted over the batch, a call takes as long as its launch: one launch then,
and pointers, for which no descriptors are made."""
WORTH_SPLITTING: Final = 512
"""Up to so many keys a small call is done before the launch of a merge would be."""
SOON_READ: Final = 16384
"""Up to so many keys the first reads of a program are much of its time."""
LISTED: Final = 8
"""Batch entries up to which a table has rows of their own."""
NEAR: Final = 25
"""Of so many programs one may be missing for all multiprocessors to have equally much to do."""
SHARE: Final = 256
"""Keys that a share has at least, for it to cost more than its merge."""
FIXED_SHARE: Final = 512
"""Keys that it has where its size may depend on nothing else."""
FILLING: Final = 4
"""Programs a multiprocessor, as many as its registers hold, for it to have loads in flight always."""
MERGED: Final = 64
"""Shares that a merge takes at once: programs that fill a GPU are a multiple."""
KEYS: Final = (16, 32, 64, 128)
"""Of a key tile."""
PIECED: Final = 32
"""Keys of a tile of heads in several pieces, of 64 rows and by four warps: of wider ones that wait in one place, as all
do that no tensor map reads, ptxas 12.8 multiplies what lies at undefined addresses (`codegen/uniform.py`)."""
GROUPED: Final = (16, 32, 64)
"""Rows of a group's query tile."""
CODED: Final = (
    (128, {16: (1, 2), 32: (4, 2), 64: (4, 1)}),
    (256, {16: (4, 3), 32: (4, 1), 64: (8, 1)}),
    (MAX_DIM, {16: (4, 1)}),
)
"""Warps and stages over a cache of few bits, by the widest head dim and by rows: what registers allow beside numbers
that are made of codes. One warp of 16 rows is fastest on an H200, eight programs a multiprocessor; the others are those
of the fewest instructions a key."""
TURNED: Final = 8
"""Rows of a group's query tile whose products are turned: half as many as tensor cores multiply."""
IN_WORDS: Final[Mapping[int, Config]] = {
    TURNED: {"BN": 64, "num_warps": 1, "num_stages": 3},
    16: {"BN": 32, "num_warps": 1, "num_stages": 2},
    32: {"BN": 32, "num_warps": 2, "num_stages": 2},
    64: {"BN": 32, "num_warps": 4, "num_stages": 2},
}
"""Over codes that are read in words, heads up to 128, by rows: measured on an H200 for 8, the others by the fewest
instructions a key."""
STEPPED: Final = (4, 1)
"""The same over a staircase, of 16 rows: the fewest warps that leave nothing of its many formats in memory."""


def default_configs(attn: Attention, device: Device, with_engine: bool = True) -> tuple[tuple[Row, ...], str]:
    """Rows of (upper bounds of sizes, config) for a device, and the rule they come from.

    Without a mask the programs of a head read the same keys at about the same time: two heads at once fill the cache.
    """
    if device.arch not in RULES:
        raise Unsupported(f"nothing is known of launches on {device.arch}", hint=f"supported: {', '.join(RULES)}")
    rule = next(r for r in RULES[device.arch] if r.applies(attn))
    config = {**rule.config, "GROUP": min(2, rule.config["GROUP"])} if is_unmasked(attn) else rule.config
    config = {**config, "BN": max(n for n in KEYS if n <= config["BN"] and storage.fits_tiles(attn, n))}
    large = {**config, **_engine_config(attn, device)} if with_engine else config
    small = {**config, **_small(attn, config, device), "ONE_PASS": 1, "TMA": 0, "maxnreg": 0}
    if short.gap(attn):
        few = {**config, "BM": 16, "maxnreg": 0, "num_stages": config["num_stages"] if attn.is_latent else 1}
        rows: tuple[Row, ...] = (({"Sq": SHORT}, few), ({}, large))
        return rows if attn.is_apart else (({"pairs": SMALL}, small), *rows), rule.why
    whole = {"SPLIT": 0, "FILL": filling(device, FILLING)}
    brief = _splitting(attn, {**config, **whole}, device)
    brief = [*_spread(attn, brief[0], device), *brief]
    small, large = {**small, **whole}, {**large, **whole}
    if with_engine:
        brief = [*_latent_rows(attn, brief[-1], device), *brief]
    if attn.is_apart:  # pairs are counted over the batch
        return (*brief, ({}, large)), rule.why
    return (({"pairs": SMALL, "Sk": WORTH_SPLITTING}, small), *brief, ({"pairs": SMALL}, small), ({}, large)), rule.why


def filling(device: Device, each: int) -> int:
    """So many programs a multiprocessor, in all: where they are many, a multiple of what a merge takes at once."""
    programs = each * device.sms
    return programs // MERGED * MERGED or programs


def _small(attn: Attention, config: Config, device: Device) -> Config:
    """What small calls have otherwise."""
    if device.has_wgmma and has_pieces(attn):
        return {"BN": min(PIECED, config["BN"]), "num_stages": 1}
    return {"BN": min(64, config["BN"])}


def _splitting(attn: Attention, config: Config, device: Device) -> list[Row]:
    """Rows for calls of few queries, by how many of them with all heads of their group one query tile holds."""
    keys = 64 if attn.page_size and widest(attn) <= 128 else min(64, config["BN"])
    keys = PIECED if device.has_wgmma and has_pieces(attn) else keys
    keys = (PIECED if widest(attn) <= 256 else PIECED // 2) if is_cached(attn) else keys
    keys = min(keys, config["BN"]) if is_staircase(attn) else keys  # a tile is in a segment
    tiles = (FIXED_SHARE if attn.is_apart else SHARE) // keys
    heights = [rows for rows in GROUPED if rows <= config["BM"]]
    heights = [TURNED, *heights] if _is_turned(attn, device) else heights
    heights = heights[:1] if is_staircase(attn) or (is_cached(attn) and widest(attn) > 256) else heights
    bounds = {min(rows // members(attn), SHORT): rows for rows in reversed(heights)}
    bounds.setdefault(SHORT, heights[-1])
    few = {**config, "BN": keys, "maxnreg": 0, "SPLIT": tiles}
    return [
        ({"Sq": most}, {**few, "BM": bounds[most], **_pace(attn, bounds[most], device)})
        for most in sorted(bounds)
        if most
    ]


def _spread(attn: Attention, few: Row, device: Device) -> list[Row]:
    """Rows for calls of so many groups that programs can be as many on each multiprocessor: a query tile to a group.

    One is there then; where keys are few, two wait for their first reads side by side. A program more on some would be
    time in which others have nothing to do: elsewhere calls have `few`, whose programs are many.
    """
    is_plain = not attn.page_size and not is_cached(attn) and not attn.is_latent and not is_fp32(attn)
    if not device.has_wgmma or not is_plain or has_pieces(attn) or not 64 < widest(attn) <= 128:
        return []
    bounds, config = few
    even = [_shares_evenly(entries * groups(attn), device.sms) for entries in range(1, LISTED + 1)]
    if attn.is_apart or attn.schedule.name != "auto" or not any(even):
        return []
    one = {**config, "BN": 128, "SPLIT": SHARE // 128, "num_warps": 4, "num_stages": 3, "FILL": device.sms}
    two = {**config, "num_stages": 3, "FILL": 2 * device.sms}
    most = [n + 1 for n in range(LISTED) if n + 1 == LISTED or even[n] != even[n + 1]]
    most = most if even[-1] else most[:-1]
    short = {**bounds, "Sk": SOON_READ}
    rows = [({"B": most[0], **short}, two)] * even[0] + [({"B": most[-1], **short}, config)] * (len(most) > 1)
    return [*rows, *(({"B": n, **bounds}, one if even[n - 1] else config) for n in most)]


def _shares_evenly(items: int, programs: int) -> bool:
    """Whether programs that are as many to each item come near to so many."""
    return programs // items * items * NEAR >= programs * (NEAR - 1)


def _latent_rows(attn: Attention, row: Row, device: Device) -> list[Row]:
    """Rows for the calls that the latent engine serves: a block a multiprocessor; else as `row` has it."""
    if not device.has_wgmma or latent.gap(attn):
        return []
    bounds, config = row
    most = {"Sq": 1} if latent.serves_one(attn) else bounds
    tiles = (FIXED_SHARE if attn.is_apart else SHARE) // latent.HEIGHT
    width = latent.knobs(attn)[0].choices[0]
    return [(most, {**config, **beside_latent({"L_WIDTH": width, "SPLIT": tiles, "FILL": device.sms})})]


def beside_latent(choice: Config) -> Config:
    """What the latent engine is told, with the knobs of the portable kernels beside it, whose tiles are its own."""
    return {"BM": latent.HEIGHT, "BN": latent.HEIGHT, "num_warps": 8, "TMA": 1, "ENGINE": 1, **choice}


def _pace(attn: Attention, rows: int, device: Device) -> Config:
    """Warps and stages of query tiles of few rows, which leave registers to addresses, and to keys in flight.

    Measured on an H200: two warps and two stages are fastest over rows of keys as over pages, but for wide latents, and
    three stages where each key finds its own page.
    """
    if is_staircase(attn):
        warps, stages = STEPPED
        return {"num_warps": warps, "num_stages": stages}
    if _is_turned(attn, device):
        found = IN_WORDS[rows]
        share = (FIXED_SHARE if attn.is_apart else SHARE) // found["BN"]
        many = {"FILL": filling(device, 8)} if rows <= GROUPED[0] and device.has_wgmma else {}
        return {**found, "SPLIT": share, **many}
    if is_cached(attn):
        warps, stages = next(pace for dim, pace in CODED if widest(attn) <= dim)[rows]
        many = {"FILL": filling(device, 8)} if warps == 1 else {}
        return {"num_warps": warps, "num_stages": stages, **many}
    if not device.has_wgmma or is_fp32(attn) or widest(attn) > 128:
        if attn.is_latent:
            return {"num_warps": 4, "FILL": filling(device, 2)} if device.has_wgmma and rows == GROUPED[0] else {}
        return {"num_stages": 1, "num_warps": 4} if attn.page_size and widest(attn) <= 128 else {"num_stages": 1}
    if rows > GROUPED[0]:
        return {"num_stages": 2, "num_warps": 4}
    return {"num_stages": 3 if attn.page_size and not storage.has_whole_tiles(attn) else 2, "num_warps": 2}


def _is_turned(attn: Attention, device: Device) -> bool:
    """Whether tiles of few rows are worth it: where making numbers of codes is what takes the time."""
    return has_words(attn) and widest(attn) <= 128 and device.caps_registers


def _engine_config(attn: Attention, device: Device) -> Config:
    """What is added for calls that the architecture's engine serves; nothing where it does not carry the variant."""
    if not device.has_wgmma or gap(attn):
        return {}
    rule = next(r for r in ENGINE if r.applies(attn))
    shared = rule.config["E_GROUP"]
    if is_listed(attn):
        shared = 1
    elif is_unmasked(attn):  # tiles take equally long in whatever order: that in which fewest keys are due at a time
        shared = _sharing(attn)
    return beside_engine(attn, {**rule.config, "E_GROUP": shared})


def _sharing(attn: Attention) -> int:
    """Heads that share their keys, or as many of them as the knob can say."""
    return max(n for n in E_GROUP.choices if n <= max(1, attn.heads.q // attn.heads.kv))


def beside_engine(attn: Attention, engine: Config) -> Config:
    """An engine's knobs with those of the portable kernels beside it.

    These only do tiles again, 64 rows at a time; where tiles are listed, those of the lists are the engine's.
    """
    portable = {"BM": 64, "num_stages": 1, "maxnreg": 0}
    if has_pieces(attn):
        portable["num_warps"] = 8  # by four, ptxas 12.8 multiplies what lies at undefined addresses (heads of 80, 96)
    if is_listed(attn):
        portable |= {"BM": 64 * engine["E_CONSUMERS"], "BN": engine["E_KEYS"], "num_warps": 8}
        if has_pieces(attn):
            portable["num_warps"] = 16  # as above, of tiles as high as the engine's
    return {**portable, "ENGINE": 1, **engine}
