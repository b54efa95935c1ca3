"""Combinations that no kernel could give a meaning to: rules over the built attention, each naming its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attncc.errors import SpecError, nearest
from attncc.ir.attention import SIZE_NAMES, Attention, Call, Part
from attncc.ir.expr import INTS, Expr
from attncc.ir.primitives import TENSORS
from attncc.spec import selections
from attncc.spec.findings import Finding, PartRule, Rule, dtype_of, float_input, input_axes, number
from attncc.spec.source import Path_, Source

POSITIVE_FEATURES: Final = frozenset({"relu", "elu1", "softmax", "exp"})
TUNE_WORDS: Final = ("sparsity", "documents", "weight")


def has_lse(parts: tuple[Part, ...], combine: Call) -> bool:
    """Whether the output has a log-sum-exp: one row of positive weights, or several merged by it."""
    return all(part_has_lse(p) for p in parts) and (len(parts) == 1 or combine.name == "lse")


def part_has_lse(part: Part) -> bool:
    """Softmax has one; so does a linear part whose weights cannot be negative."""
    if part.state is None:
        return part.normalizer.kind == "softmax"
    return part.normalizer.kind == "linear" and part.state.feature in POSITIVE_FEATURES


def check(attn: Attention, source: Source) -> None:
    """Raises the first impossible combination at its key."""
    for rule in RULES:
        for path, message, hint in rule(attn):
            written = source.node(path[:1]) is not None
            raise SpecError(message, source.locate(path) if written else source.locate_key(("parts",)), hint)
    for k, part in enumerate(attn.parts):
        at: Path_ = ("parts", k) if source.node(("parts",)) else ()
        for rule in PART_RULES:
            for path, message, hint in rule(attn, part):
                inherited = path[0] == "kv" and source.node((*at, "kv")) is None
                raise SpecError(message, source.locate(path if inherited else (*at, *path)), hint)


# -- of the whole ------------------------------------------------------------------------------------


def _combine(attn: Attention) -> Iterator[Finding]:
    n, name = len(attn.parts), attn.combine.name
    if n > 1 and name == "lse" and not has_lse(attn.parts, attn.combine):
        yield ("combine",), "'lse' merges parts by their log-sum-exp, which not all of these have", "combine: add"
    if name == "lerp" and n != 2:
        yield ("combine",), f"'lerp' goes between 2 parts, there are {n}", ""
    if name == "gate" and len(attn.combine.args) not in (n, n - 1):
        hint = "one gate a part, or one fewer where the first has none"
        yield ("combine",), f"{len(attn.combine.args)} gates for {n} parts", hint
    for word in attn.combine.words:
        if len(attn.input(word).shape) not in (2, 3):
            yield ("combine",), f"'{word}' has axes [Dv, Dv] or [Hq, Dv, Dv], its shape here has others", ""
    names = [p.name for p in attn.parts if p.name]
    for k, part in enumerate(attn.parts):
        if part.name and names.count(part.name) > 1:
            yield ("parts", k, "name"), f"two parts are called '{part.name}'", ""


def _outputs(attn: Attention) -> Iterator[Finding]:
    names = [o.name for o in attn.outputs]
    for k, name in enumerate(names):
        if name in names[:k] and name in ("o", "lse", "max_score", "final_state", "final_mass", "indices"):
            yield ("outputs", k), f"'{name}' is given twice", ""
    if "o" not in names:
        yield ("outputs",), "the output 'o' cannot be left out", "outputs: [o, …]"
    soft = any(p.state is None and p.normalizer.kind == "softmax" for p in attn.parts) and not attn.combine.words
    demands = {
        "lse": (has_lse(attn.parts, attn.combine), "only softmax has a log-sum-exp"),
        "max_score": (any(p.state is None for p in attn.parts), "a state has no scores"),
        "final_state": (any(p.state for p in attn.parts), "no part has a state"),
        "final_mass": (any(p.state and p.normalizer.kind == "linear" for p in attn.parts), "no state is normalised"),
        "indices": (any(p.select for p in attn.parts), "no part selects"),
        "column_mass": (soft, "the mass of a column is one of softmax"),
        "row_mass": (soft, "the mass of a row is one of softmax"),
        "block_mass": (soft, "the mass of a block is one of softmax"),
        "pair_value": (soft, "the weights of pairs are those of softmax"),
    }
    for k, name in enumerate(names):
        held, reason = demands.get(name, (True, ""))
        if not held:
            yield ("outputs", k), f"there is no output '{name}' here: {reason}", ""
        for word in attn.outputs[k].words:
            yield from input_axes(attn, ("outputs", k), word, name, "B", "Sq", "Sk", "C")


def _modes(attn: Attention) -> Iterator[Finding]:
    for k, mode in enumerate(attn.modes):
        if mode in attn.modes[:k]:
            yield ("modes", k), f"'{mode}' is given twice", ""
    cached = attn.page_size > 0 or any(p.kv.kind in ("gathered", "cache") for p in attn.parts)
    for mode in ("backward", "jvp"):
        if mode in attn.modes and cached:
            yield ("modes", attn.modes.index(mode)), f"'{mode}' through a written, paged or gathered cache", ""
        if mode in attn.modes and any(q.operand == "cache" for q in attn.quantize):
            yield ("modes", attn.modes.index(mode)), f"'{mode}' through a quantised cache", ""
        elif mode in attn.modes and attn.quantize:
            yield ("modes", attn.modes.index(mode)), f"'{mode}' through rounding, which has no gradient", ""


def _quantize(attn: Attention) -> Iterator[Finding]:
    for q in attn.quantize:
        path: Path_ = ("quantize", q.operand)
        per = q.per.name if q.per else ""
        if q.operand == "p" and (q.smooth or per == "channel"):
            yield path, "probabilities are not smoothed, and have no channels", ""
        elif q.operand == "p" and per not in ("", "token", "group"):
            yield path, "probabilities are relative to the greatest of their row", f"{q.dtype}(per=token)"
        if per == "thread" and q.operand not in ("q", "k"):
            yield path, "threads share scales in q and k", f"{q.dtype}(per=block)"
        if q.operand == "v" and any(p.kv.kind == "latent" for p in attn.parts):
            yield path, "latent: V is a view of K, so k or the cache is quantised", ""
        ages = [age for age, _ in q.staircase if age is not None]
        if any(age % ages[0] for age in ages):
            yield path, f"segments of {ages[0]} tokens go down the staircase whole: ages are its multiples", ""
        if q.operand == "v" and q.smooth:
            yield path, "smoothing subtracts a mean from q or k", ""
        if q.dtype == "nvfp4" and per not in ("", "group"):
            yield path, "nvfp4 has one scale a group", "nvfp4(per=group(16))"
        if q.dtype.startswith(("fp8", "nvfp4")) and not q.symmetric:
            yield path, f"{q.dtype} has no zero point: it is symmetric", ""
        if per == "group" and q.per and number(q.per.args[0]) > max(attn.dims.qk, attn.dims.v):
            yield path, "a group is wider than a head", ""
    by_operand = {q.operand for q in attn.quantize}
    if "cache" in by_operand and by_operand & {"k", "v"}:
        yield ("quantize", "cache"), "the cache holds k and v: quantise it, or them", ""


def _tune(attn: Attention) -> Iterator[Finding]:
    own = {s for x in attn.inputs for s in x.shape if isinstance(s, str)}
    sizes = {"B", "Sq", "Sk"} | (own - set(SIZE_NAMES))
    for k, case in enumerate(attn.tune):
        for key, value in case:
            path: Path_ = ("tune", k, key)
            if key not in sizes and key not in TUNE_WORDS:
                yield path, f"unknown key '{key}'", nearest(key, [*sizes, *TUNE_WORDS])
            if key in sizes and not (isinstance(value, int) and value >= 1):
                yield path, f"'{key}' must be a whole number that is at least 1", ""
            if key == "sparsity" and (isinstance(value, str) or not 0 <= value <= 1):
                yield path, "'sparsity' must be in [0, 1]", ""
            fixed = attn.size(key).fixed
            if key in sizes and fixed is not None and value != fixed:
                yield path, f"'{key}' is fixed to {fixed}", ""


def _steps(attn: Attention) -> Iterator[Finding]:
    """Numbers of the prologue must fit the head."""
    for k, step in enumerate(attn.prologue):
        options = dict(step.kwargs)
        dims = options.get("dims")
        widths = {attn.dims.v if letter == "v" else attn.dims.qk for letter in str(options.get("on", "qk"))}
        if isinstance(dims, Expr) and not (number(dims) <= min(widths) and number(dims) % 2 == 0):
            yield ("prologue", k), f"rope turns an even number of the {min(widths)} columns", ""
        if step.name == "rope" and not {"dims", "cos"} & set(options) and any(n % 2 for n in widths):
            yield ("prologue", k), f"rope turns pairs of columns, the head has {max(widths)}", "rope(dims=2)"
        if step.name == "mean_residual" and options.get("on") == "v":
            yield ("prologue", k), "mean_residual joins queries and keys", ""
        if step.name == "rope" and ("cos" in options) != ("sin" in options):
            yield ("prologue", k), "rope takes cos and sin together", ""
        if step.name == "rope" and "cos" in options and "base" in options:
            yield ("prologue", k), "rope takes a base, or cos and sin", ""
        odd = [n for n in widths if n & (n - 1)]
        if step.name == "hadamard" and odd:
            yield ("prologue", k), f"a Hadamard transform needs a power of two, the head has {odd[0]}", ""


STEP_AXES: Final = {
    "rope": (2, 3),
    "rms_norm": (1, 2),
    "causal_conv": (2, 4),
    "bias": (1, 2),
    "lerp": (4, 4),
    "absorb": (2, 3),
    "add": (2, 3),
}
"""The least and most axes of the inputs of a step, by its name or the option."""


def _step_inputs(attn: Attention) -> Iterator[Finding]:
    """What steps read must be floats, with axes that they know."""
    for key, steps in (("prologue", attn.prologue), ("epilogue", attn.epilogue), ("combine", (attn.combine,))):
        for k, step in enumerate(steps):
            path: Path_ = (key,) if key == "combine" else (key, k)
            read = [("", word) for word in step.words] + [(o, w) for o, w in step.kwargs if o in TENSORS]
            for option, word in read:
                yield from float_input(attn, path, str(word), step.name)
                low, high = STEP_AXES[option if option in STEP_AXES else step.name]
                axes = len(attn.input(str(word)).shape)
                if not low <= axes <= high:
                    count = f"{low} axes" if low == high else f"{low} to {high} axes"
                    yield path, f"'{step.name}' reads an input of {count}, '{word}' has {axes}", ""


def _smoothing(attn: Attention) -> Iterator[Finding]:
    mixed = any(p.state or p.columns or p.kv.kind in ("given", "pooled") for p in attn.parts)
    for q in attn.quantize:
        if q.smooth and mixed:
            message = "what smoothing takes off is given back to products of whole queries with the call's keys"
            yield ("quantize", q.operand), message, ""


def _storages(attn: Attention) -> Iterator[Finding]:
    """All parts read the same keys, but for those that have their own, or lists or means of them."""
    kinds = {k: p.kv for k, p in enumerate(attn.parts) if p.kv.kind not in ("gathered", "given", "pooled")}
    first = next(iter(kinds.values()), None)
    for k, kv in kinds.items():
        if kv != first:
            yield ("parts", k, "kv"), "the keys of a call lie in one way, a part before this has another", ""


def _varlen(attn: Attention) -> Iterator[Finding]:
    """Shapes over a packed layout are per sequence; the packed tensors are q, k, v and o alone."""
    if attn.layout == "varlen" and attn.schedule.name == "stream_k" and "backward" in attn.modes:
        yield ("schedule",), "a packed backward has no stream-K", ""
    if attn.schedule.name == "split_kv" and all(p.state for p in attn.parts):
        yield ("schedule",), "a state has no keys to split", ""


# -- of one part -------------------------------------------------------------------------------------


def _kv(attn: Attention, part: Part) -> Iterator[Finding]:
    kv, dims = part.kv, attn.dims
    if kv.kind == "latent":
        if dims.v > dims.qk:
            yield ("kv",), f"latent: V is a view of K's first columns, but Dv {dims.v} > Dqk {dims.qk}", ""
        if kv.rope is not None and kv.rope >= dims.qk:
            yield ("kv",), f"latent: rope={kv.rope} leaves nothing of the {dims.qk} columns", ""
        if attn.heads.v != attn.heads.kv:
            yield ("kv",), "latent: V is a view of K, so heads.v must be heads.kv", ""
    if kv.kind == "given":
        for word in (kv.index, kv.values):
            yield from input_axes(attn, ("kv",), word, "given", "B", "H", "N", "D")
    if kv.kind == "pooled" and kv.block is None and part.select is None:
        yield ("kv",), "pooled needs a size, or a selection whose blocks it pools", "kv: pooled(64)"
    if kv.kind == "gathered" and (dtype_of(attn, kv.index) not in INTS or len(attn.input(kv.index).shape) != 4):
        yield ("kv",), f"gathered needs an int input [B, Hk, Sq, N], '{kv.index}' is none", ""
    if part.state and (kv.page_size or kv.kind in ("cache", "gathered", "pooled")):
        yield ("kv",), f"a state is not kept in {'paged' if kv.page_size else kv.kind} storage", ""
    if part.columns and not 0 <= part.columns[0] < part.columns[1] <= dims.qk:
        yield ("columns",), f"columns are some of the {dims.qk} of a head: [lo, hi), lo < hi", ""


def _state(attn: Attention, part: Part) -> Iterator[Finding]:
    state = part.state
    if state is None:
        return
    if part.normalizer.kind not in ("none", "linear"):
        yield ("normalizer",), f"a state is normalised by none or linear(eps), not {part.normalizer.kind}", ""
    for key, call in (("decay", state.decay), ("update", state.update)):
        for word in call.words:
            yield from float_input(attn, ("state", key), word, call.name)
    if not state.causal and state.decay.name != "none":
        yield ("state", "decay"), "totals have no order to decay in", "causal: true"
    if not state.causal and state.update.name == "delta":
        yield ("state", "update"), "the delta rule goes token by token", "causal: true"
    if part.select and (state.causal or state.update.name != "add"):
        yield ("select",), "a state over selected blocks has no order", "causal: false"
    if part.normalizer.kind == "linear" and state.update.name == "delta":
        yield ("normalizer",), "the delta rule has no sum of weights to divide by", "normalizer: none"


def _initial_state(attn: Attention, part: Part) -> Iterator[Finding]:
    state = part.state
    if state is None:
        return
    for key, word in (("initial", state.initial), ("initial_mass", state.initial_mass)):
        if word:
            yield from float_input(attn, ("state", key), word, key)
    if state.initial_mass and not (part.normalizer.kind == "linear" and state.initial):
        yield ("state", "initial_mass"), "a mass stands beside an initial state and linear(eps)", ""
    if state.update.name == "none" and not state.initial:
        yield ("state", "update"), "a state that nothing enters is its initial one", "initial: NAME"
    if state.update.name == "none" and state.decay.name != "none":
        yield ("state", "decay"), "a state that nothing enters stays what it is", "decay: none"
    if state.decay.name == "vector" and state.feature == "taylor2":
        yield ("state", "decay"), "a decay of each column has none for their products", "decay: scalar(NAME)"


STATE_AXES: Final = {
    "scalar": ("B", "H", "Sk"),
    "vector": ("B", "H", "Sk", "Dqk"),
    "delta": ("B", "H", "Sk"),
    "initial": ("B", "H", "F", "Dv"),
    "initial_mass": ("B", "H", "F"),
}
"""Axes of a state's inputs: H is the query or the key heads, F the features."""


def _state_axes(attn: Attention, part: Part) -> Iterator[Finding]:
    if part.state is None:
        return
    calls = {"decay": part.state.decay, "update": part.state.update}
    read = [(key, call.name, word) for key, call in calls.items() for word in call.words]
    read += [("initial", "initial", part.state.initial), ("initial_mass", "initial_mass", part.state.initial_mass)]
    for key, kind, word in read:
        axes = STATE_AXES[kind]
        if word and len(attn.input(word).shape) != len(axes):
            yield ("state", key), f"'{word}' has axes [{', '.join(axes)}], its shape here has others", ""


def _softmax(attn: Attention, part: Part) -> Iterator[Finding]:
    kind = part.normalizer.kind
    if kind == "column_softmax" and "decode" in attn.modes and len(attn.modes) == 1:
        yield ("normalizer",), "a column needs all its queries, decode has one at a time", ""
    if kind == "column_softmax" and part.select:
        yield ("select",), "a selection of keys has no whole columns", ""


PART_RULES: Final[tuple[PartRule, ...]] = (
    _kv,
    _state,
    _initial_state,
    _state_axes,
    _softmax,
    selections.block,
    selections.inputs,
    selections.rule,
    selections.forced,
)
RULES: Final[tuple[Rule, ...]] = (
    _combine,
    _outputs,
    _modes,
    _quantize,
    _smoothing,
    _tune,
    _steps,
    _step_inputs,
    _storages,
    _varlen,
)
