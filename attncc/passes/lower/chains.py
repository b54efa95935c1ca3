"""The steps that q, k and v go through before attention, operand by operand, and what keeps some from kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from attncc.ir.appending import appends
from attncc.ir.attention import Attention, Call
from attncc.ir.expr import Dtype, Expr
from attncc.ir.primitives import on, pairs_tokens
from attncc.ir.tile import Param
from attncc.ir.widths import axis_size, entry_width, matrix
from attncc.passes.lower.columns import cut
from attncc.passes.lower.normalizers import VALUE_DTYPE
from attncc.passes.lower.pieces import MAX_DIM, MIN_WIDTH
from attncc.passes.lower.scores import KERNEL_SIZES, own_name

HELD: Final = 2**16
"""Bytes of a head's matrices that stay in shared memory."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What becomes of one operand."""

    operand: str
    steps: tuple[Call, ...]
    runs: tuple[int, ...]
    """The number of the run that each step is of: steps of one name that follow each other in the spec."""
    tensor: str
    """Where it is then, in scratch memory."""
    heads: int
    widths: tuple[int, ...]
    """Columns before each step, and behind the last."""

    @property
    def stored(self) -> int:
        """Columns of the scratch tensor, those past the head dim being 0: tensor maps want rows of whole 16 bytes."""
        return -(-self.widths[-1] // MIN_WIDTH) * MIN_WIDTH


def chains(attn: Attention) -> tuple[Chain, ...]:
    return tuple(c for c in (chain(attn, operand) for operand in "qkv") if c is not None)


def chain(attn: Attention, operand: str) -> Chain | None:
    """The steps of an operand; None where it is read as it came."""
    if operand == "v" and attn.is_latent:
        return None
    found = [
        (step, number)
        for number, (_, run) in enumerate(groupby(attn.prologue, key=lambda step: step.name))
        for step in run
        if operand in on(step)
    ]
    if not found:
        return None
    steps, runs = zip(*found, strict=True)
    widths = [entry_width(attn, operand)]
    for step in steps:
        n, r = matrix(attn, step) if step.name == "absorb" else (0, 0)
        widths.append(widths[-1] - n + r)
    heads = {"q": attn.heads.q, "k": attn.heads.kv, "v": attn.heads.v}[operand]
    return Chain(operand, steps, runs, own_name(f"{operand}_prepared", attn), heads, tuple(widths))


def prepared(attn: Attention, given: Param) -> Param:
    """The parameter by which q, k or v comes: `given`, the call's own, or the one that the steps have made."""
    c = chain(attn, given.name.lower())
    if c is None:
        return given
    extent = None if given.extent is None else (given.extent[0], c.stored)
    return replace(given, name=c.tensor, extent=extent, doc=f"{given.doc} behind the prologue")


def dtype_behind(attn: Attention, operand: str) -> Dtype:
    """In which an operand stands behind its steps: fp32 where it is quantised then, for numbers that are rounded twice
    fall to the other side where they were half way."""
    steps = chain(attn, operand) is not None
    quantised = any(z.operand == operand for z in attn.quantize)
    return "f32" if steps and quantised else VALUE_DTYPE[attn.dtype]


def source(attn: Attention, operand: str) -> str:
    """The name of the kernel's parameter."""
    c = chain(attn, operand)
    return operand.upper() if c is None else c.tensor


def output(attn: Attention) -> str:
    """The name of the parameter by which attention's output leaves: the call's own, or one that steps then read."""
    return own_name("o_plain", attn) if attn.epilogue else "O"


# -- what is not carried ---------------------------------------------------------------------------


def option(step: Call, word: str) -> Expr | str | None:
    return dict(step.kwargs).get(word)


def number(step: Call, word: str, default: float) -> float:
    """A step's option that is a number."""
    given = option(step, word)
    return float(given.value) if isinstance(given, Expr) and given.value is not None else default


def _uses(*names: str) -> Callable[[Attention], bool]:
    return lambda a: any(step.name in names for step in a.prologue)


def _each(holds: Callable[[Attention, Call], bool], *names: str) -> Callable[[Attention], bool]:
    return lambda a: any(step.name in names and holds(a, step) for step in a.prologue)


def _of_each(holds: Callable[[Chain], bool]) -> Callable[[Attention], bool]:
    return lambda a: not _has_unknown_matrix(a) and any(map(holds, chains(a)))


def turned(attn: Attention, step: Call, width: int) -> int | None:
    """How many columns a rope turns; None where only a table tells, whose length is not known."""
    dims, table = option(step, "dims"), option(step, "cos")
    if isinstance(dims, Expr) and dims.value is not None:
        return int(dims.value)
    if table is None:
        return width
    last = axis_size(attn, attn.input(str(table)).shape[-1])
    return None if last is None else 2 * last


def rope_of(attn: Attention, step: Call, width: int) -> tuple[int | None, bool]:
    """How many columns a rope turns, and whether pairs are neighbours."""
    return turned(attn, step, width), option(step, "pairs") == "interleaved"


def _has_unknown_matrix(a: Attention) -> bool:
    steps = [step for step in (*a.prologue, *a.epilogue) if step.name == "absorb"]
    return any(None in [axis_size(a, n) for n in a.input(step.words[0]).shape[-2:]] for step in steps)


def _has_odd_table(a: Attention, step: Call) -> bool:
    """Also one whose length is not what `dims` says, which the oracle refuses."""
    table, dims = option(step, "cos"), turned(a, step, 2)
    if table is None:
        return False
    lengths = {axis_size(a, a.input(str(option(step, word))).shape[-1]) for word in ("cos", "sin")}
    widths = [a.dims.v if letter == "v" else a.dims.qk for letter in on(step)]
    return dims is None or lengths != {dims // 2} or dims > min(widths)


def _ropes_differ(a: Attention) -> bool:
    """Whether an operand is turned by ropes of several kinds: its tiles hold the columns of one."""
    for letter in "qkv":
        width = a.dims.v if letter == "v" else a.dims.qk
        ropes = [step for step in a.prologue if step.name == "rope" and letter in on(step)]
        if len({rope_of(a, step, width) for step in ropes}) > 1:
            return True
    return False


def _absorbs_early(c: Chain) -> bool:
    return any(step.name == "absorb" for step in c.steps[:-1])


def _joins_absorbed(a: Attention) -> bool:
    return pairs_tokens(a) and any(step.name == "absorb" for step in a.prologue)


def _reads_what_is_kept(a: Attention) -> bool:
    """Steps on keys or values of a cache, which are none that this has behind it."""
    apart = appends(a) or a.is_latent
    return apart and any(set(on(step)) & set("kv") for step in a.prologue)


def channels(attn: Attention, step: Call, width: int) -> tuple[int, int] | None:
    """Heads and taps of a convolution's weights; None where their shape is not as this many columns have it."""
    shape = [axis_size(attn, entry) for entry in attn.input(step.words[0]).shape]
    *lead, taps = shape
    if taps is None or None in lead or number(step, "kernel", taps) != taps:
        return None
    if option(step, "groups") == "heads":
        if lead[-1] != width:
            return None
        lead = lead[:-1]
    elif len(lead) > 1 and lead[-1] == 1:  # torch has an axis of 1 there
        lead = lead[:-1]
    match lead:
        case [int(heads), int(columns)] if columns == width:
            return heads, taps
        case [int(flat)] if flat % width == 0:
            return flat // width, taps
        case _:
            return None


def heads_and_taps(attn: Attention, step: Call, width: int) -> tuple[int, int]:
    """The same of weights that have a lowering: an odd shape has none."""
    found = channels(attn, step, width)
    assert found is not None, "an odd shape has no lowering"
    return found


def matrix_bytes(attn: Attention, step: Call, width: int) -> int:
    """What the matrices of a head's convolution take, in 16 bits."""
    found = channels(attn, step, width)
    lanes = sum(c.width for c in cut(0, width))
    return 0 if found is None else 2 * found[1] * lanes**2


def _mixes_too_much(a: Attention, step: Call) -> bool:
    heads = option(step, "groups") == "heads"
    return heads and any(matrix_bytes(a, step, width) > HELD for _, _, width in _places(a, step))


def _has_odd_weights(a: Attention, step: Call) -> bool:
    """Weights, or biases, that are not of as many channels as the step's operands have."""
    heads = {"q": a.heads.q, "k": a.heads.kv, "v": a.heads.v}
    widths = {a.dims.v if letter == "v" else a.dims.qk for letter in on(step)}
    if len(widths) > 1:
        return True
    (width,) = widths
    found, wanted = channels(a, step, width), sum(heads[letter] for letter in on(step))
    if found is None or found[0] != wanted:
        return True
    bias = option(step, "bias")
    if bias is None:
        return False
    shape = [axis_size(a, entry) for entry in a.input(str(bias)).shape]
    return shape not in ([wanted, width], [wanted * width])


def _fits(a: Attention, word: str, *wanted: tuple[int | str, ...]) -> bool:
    """Whether each axis of an input is one of those wanted of it."""
    shape = a.input(word).shape
    sizes = [entry if entry in KERNEL_SIZES else axis_size(a, entry) for entry in shape]
    return len(shape) == len(wanted) and all(size in some for size, some in zip(sizes, wanted, strict=True))


def _places(a: Attention, step: Call) -> list[tuple[int, str, int]]:
    """Heads, the size of tokens and columns of each operand of a step."""
    heads = {"q": a.heads.q, "k": a.heads.kv, "v": a.heads.v}
    return [(heads[x], "Sq" if x == "q" else "Sk", a.dims.v if x == "v" else a.dims.qk) for x in on(step)]


def _has_odd_scales(a: Attention, step: Call) -> bool:
    word = option(step, "weight")
    if word is None:
        return False
    return not all(
        _fits(a, str(word), (width, 1)) or _fits(a, str(word), (heads, 1), (width, 1))
        for heads, _, width in _places(a, step)
    )


def _lerps_to_odd_shapes(a: Attention, step: Call) -> bool:
    return not all(
        _fits(a, step.words[0], ("B", 1), (heads, 1), (tokens, 1), (width, 1))
        for heads, tokens, width in _places(a, step)
    )


def _absorbs_for_other_heads(a: Attention, step: Call) -> bool:
    """Whether a matrix for each head is one for other heads."""
    shape = a.input(step.words[0]).shape
    heads = {axis_size(a, shape[0]) if len(shape) == 3 else 1} - {1}
    return bool(heads - {own for own, _, _ in _places(a, step)})


def _runs_of_several(a: Attention) -> bool:
    """Whether convolutions that follow each other are of different operands."""
    runs = [list(run) for name, run in groupby(a.prologue, key=lambda step: step.name) if name == "causal_conv"]
    return any(len({on(step) for step in run}) > 1 for run in runs)


def _transforms_oddly(c: Chain) -> bool:
    """Whether the columns of a rope are no blocks of a Hadamard transform's."""
    if "hadamard" not in {step.name for step in c.steps}:
        return False
    width = c.widths[0]
    dims = [option(step, "dims") for step in c.steps if step.name == "rope" and option(step, "cos") is None]
    by_table = any(step.name == "rope" and option(step, "cos") is not None for step in c.steps)
    turned_ = {width if not isinstance(d, Expr) else int(d.value or 0) for d in dims}
    return width < MIN_WIDTH or by_table or any(n not in (width, width // 2) or n < 2 * MIN_WIDTH for n in turned_)


def _turns_and_absorbs(c: Chain) -> bool:
    return {"rope", "absorb"} <= {step.name for step in c.steps}


LIMITS: Final[tuple[tuple[Callable[[Attention], bool], str], ...]] = (
    (_reads_what_is_kept, "steps on queries alone, where keys hold the values, age, or lie where a selection says"),
    (lambda a: pairs_tokens(a) and a.layout == "varlen", "mean_residual in the layouts bhsd and bshd"),
)
"""What attention does not carry yet of steps before it, and what is instead."""
STEP_LIMITS: Final[tuple[tuple[Callable[[Attention], bool], str], ...]] = (
    (_has_unknown_matrix, "absorb by matrices whose sizes are known when compiled"),
    (_uses("smooth"), "all steps but smooth"),
    (_of_each(_transforms_oddly), "hadamard of heads of 16 columns or more, beside ropes of all of them or of half"),
    (_of_each(lambda c: {"hadamard", "absorb"} <= {step.name for step in c.steps}), "hadamard or absorb of an operand"),
    (_each(lambda a, step: option(step, "positions") == "packed", "rope"), "rope(positions=logical)"),
    (_each(_has_odd_table, "rope"), "rope by tables of as many columns as it turns pairs"),
    (_ropes_differ, "ropes of one kind on an operand, of as many columns and the same pairs"),
    (_each(_has_odd_scales, "rms_norm"), "rms_norm by weights [D] or [H, D]"),
    (_each(_lerps_to_odd_shapes, "lerp"), "lerp to an input [B, H, S, D], its axes those of the operand or 1"),
    (_each(_absorbs_for_other_heads, "absorb"), "absorb by matrices [n, r], or [H, n, r] of the operand's heads"),
    (_each(_has_odd_weights, "causal_conv"), "causal_conv by weights of as many channels as its operands have"),
    (_each(_mixes_too_much, "causal_conv"), f"causal_conv by matrices of a head of up to {HELD} bytes in 16 bits"),
    (_runs_of_several, "causal_conv steps that follow each other on the same operands"),
    (_joins_absorbed, "mean_residual or absorb"),
    (_of_each(_absorbs_early), "absorb behind the other steps of its operand"),
    (_of_each(_turns_and_absorbs), "rope or absorb of an operand"),
    (_of_each(lambda c: max(c.widths) > MAX_DIM), f"operands of up to {MAX_DIM} columns"),
    (
        lambda a: _uses("absorb")(a) and any(z.operand != "cache" for z in a.quantize),
        "all steps but absorb, where operands are quantised then",
    ),
)
"""What is not carried yet of steps before attention or on the way into a cache, and what is instead."""
