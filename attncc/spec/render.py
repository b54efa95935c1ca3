"""Expressions and attention variants in, the text of the spec language out.

What is rendered reads back as the same expression, node by node: `loads(document(attn)).attention == attn`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isinf
from typing import Any, Final

from attncc.errors import CompilerBug
from attncc.ir.attention import Attention, Call, Heads, Numerics, Part, Quantizer, Select, Size, State, Storage
from attncc.ir.expr import TRUE, Expr, const, ew, name
from attncc.spec.calls import Signature, Vocabulary
from attncc.spec.checks import has_lse
from attncc.spec.operators import FUNCTIONS, SYMBOLS
from attncc.spec.vocabulary import (
    CACHE_QUANTIZER,
    COMBINE,
    DECAY,
    EPILOGUE,
    OUTPUTS,
    PROLOGUE,
    SELECT_FORCE,
    SELECT_REUSE,
    SELECT_RULE,
    SELECT_SCORE,
    UPDATE,
)
from attncc.spec.yaml_text import mapping

# How tightly each operator binds, as in Python.
COMPARE: Final = 1
PRECEDENCE: Final[dict[str, int]] = {
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), COMPARE),
    "or": 2,
    "and": 3,
    **dict.fromkeys(("add", "sub"), 4),
    **dict.fromkeys(("mul", "div", "floordiv", "mod"), 5),
    **dict.fromkeys(("neg", "not"), 6),
    "pow": 7,
}
ATOM: Final = 8

DEFAULT_SCORE: Final = name("qk", "f32") * name("scale", "f32")


def expression(e: Expr) -> str:
    """The text of an expression, with no parentheses but those it needs."""
    return _render(e)[0]


def _render(e: Expr) -> tuple[str, int]:
    """The text of `e` and how tightly its outermost operator binds."""
    if e.op in ("const", "name", "load", "bucket", "qdot"):
        return _leaf(e)
    if idiom := _idiom(e):
        return idiom, ATOM
    if e.op == "cast" and e.dtype == "f32":
        return f"float({expression(e.args[0])})", ATOM
    if e.op in FUNCTIONS:
        return f"{e.op}({', '.join(map(expression, e.args))})", ATOM
    if e.op not in PRECEDENCE:
        raise CompilerBug(f"the spec language has no operator '{e.op}'")
    own = PRECEDENCE[e.op]
    if len(e.args) == 1:
        return SYMBOLS[e.op] + _inside(e.args[0], own), own
    # Comparisons do not nest: a < b < c is a chain. A power groups to the right, all others to the left.
    left, right = (own + 1, own) if e.op == "pow" else (own, own + 1)
    left = own + 1 if own == COMPARE else left
    right = PRECEDENCE["neg"] if e.op == "pow" else right
    a, b = e.args
    return f"{_inside(a, left)} {SYMBOLS[e.op]} {_inside(b, right)}", own


def _inside(e: Expr, least: int) -> str:
    text, binds = _render(e)
    return text if binds >= least else f"({text})"


def _leaf(e: Expr) -> tuple[str, int]:
    index = [expression(a) for a in e.args]
    match e.op:
        case "const":
            return _number(e)
        case "name":
            return str(e.attr), ATOM
        case "load":
            return (f"{e.attr}[{', '.join(index)}]" if index else str(e.attr)), ATOM
        case "qdot":
            return f"qdot({e.attr}[{', '.join(index)}])" if index else f"qdot({e.attr})", ATOM
        case _:
            row = f"{e.attr}[{', '.join(index[:-1])}]" if index[:-1] else str(e.attr)
            return f"bucket({row}, {index[-1]})", ATOM


def _number(e: Expr) -> tuple[str, int]:
    value = e.value
    if isinstance(value, bool):
        return ("true" if value else "false"), ATOM
    if isinstance(value, float) and isinf(value):
        return ("inf", ATOM) if value > 0 else ("-inf", PRECEDENCE["neg"])
    negative = value is not None and (value < 0 or str(value).startswith("-"))
    return repr(value), PRECEDENCE["neg"] if negative else ATOM


def _idiom(e: Expr) -> str:
    """The name of a formula that has one in the language."""
    match e:
        case Expr("mul", (c, Expr("tanh", (Expr("div", (x, again)),)))) if c == again:
            return f"softcap({expression(x)}, {expression(c)})"
        case Expr("min", (Expr("max", (x, low)), high)):
            return f"clamp({expression(x)}, {expression(low)}, {expression(high)})"
        case Expr("le", (Expr("name", (), "j"), Expr("name", (), "i"))):
            return "causal"
    return ""


def call(c: Call, signature: Signature | None = None) -> str:
    """The text of a primitive: words, then expressions, then what goes by name."""
    by_name = [f"{key}={expression(v) if isinstance(v, Expr) else v}" for key, v in c.kwargs]
    if signature:
        order = [a.name for a in signature]
        by_name.sort(key=lambda text: order.index(text.partition("=")[0]))
    args = [*c.words, *map(expression, c.args), *by_name]
    return f"{c.name}({', '.join(args)})" if args else c.name


def _calls(found: Iterable[Call], table: Vocabulary) -> list[str]:
    return [call(c, table[c.name]) for c in found]


# -- the document ------------------------------------------------------------------------------------


def document(attn: Attention) -> str:
    """The canonical YAML of a variant: keys in the schema's order, defaults left out."""
    entries: dict[str, Any] = {"attncc": 1, "name": attn.name}
    entries |= _unless({"doc": (attn.doc, ""), "family": (attn.family, ""), "source": (attn.source, "")})
    entries["heads"] = _heads(attn.heads)
    entries["dims"] = attn.dims.qk if attn.dims.v == attn.dims.qk else {"qk": attn.dims.qk, "v": attn.dims.v}
    entries |= _unless({"dtype": (attn.dtype, "bf16"), "layout": (attn.layout, "bhsd")})
    if attn.inputs:
        entries["inputs"] = {x.name: _input(x.shape, x.dtype, x.grad, x.sorted) for x in attn.inputs}
    if attn.sizes:
        entries["sizes"] = {s.name: _size(s) for s in attn.sizes}
    if attn.scale != ew("rsqrt", const(attn.dims.qk)):
        entries["scale"] = expression(attn.scale)
    if attn.align.kind != "bottom_right":
        entries["align"] = attn.align.input or attn.align.kind
    entries |= _branches(attn)
    entries |= _rest(attn)
    return mapping(entries)


def _branches(attn: Attention) -> dict[str, Any]:
    if len(attn.parts) == 1 and not attn.parts[0].name:
        return _branch(attn.parts[0])
    parts = [{**({"name": p.name} if p.name else {}), **_branch(p)} for p in attn.parts]
    combine = {"combine": call(attn.combine, COMBINE[attn.combine.name])}
    return {"parts": parts, **(combine if attn.combine != Call("lse") else {})}


def _branch(part: Part) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if part.score != DEFAULT_SCORE:
        entries["score"] = expression(part.score)
    if part.mask != TRUE:
        entries["mask"] = expression(part.mask)
    kind = part.normalizer.kind
    if part.normalizer.sink is not None:
        entries["normalizer"] = f"softmax(sink={expression(part.normalizer.sink)})"
    elif kind == "linear":
        entries["normalizer"] = f"linear({part.normalizer.eps!r})"
    elif kind != ("none" if part.state else "softmax"):
        entries["normalizer"] = kind
    entries |= _unless({"dropout": (part.dropout, 0.0), "kv": (_storage(part.kv), "dense")})
    if part.select:
        entries["select"] = _select(part.select)
    if part.state:
        entries["state"] = _state(part.state)
    if part.columns:
        entries["columns"] = list(part.columns)
    return entries


def _rest(attn: Attention) -> dict[str, Any]:
    lse = has_lse(attn.parts, attn.combine)
    outputs = (Call("o"), Call("lse")) if lse else (Call("o"),)
    numerics = Numerics()
    return _unless(
        {
            "quantize": ({q.operand: _quantizer(q) for q in attn.quantize}, {}),
            "prologue": (_calls(attn.prologue, PROLOGUE), []),
            "epilogue": (_calls(attn.epilogue, EPILOGUE), []),
            "outputs": (_calls(attn.outputs, OUTPUTS), _calls(outputs, OUTPUTS)),
            "modes": (list(attn.modes), ["prefill", "decode"]),
            "numerics": (
                _unless(
                    {
                        "reproducible": (attn.numerics.reproducible, numerics.reproducible),
                        "exp": (attn.numerics.exp, numerics.exp),
                    }
                ),
                {},
            ),
            "schedule": (call(attn.schedule), "auto"),
            "tune": ([dict(case) for case in attn.tune], []),
        }
    )


def _unless(entries: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The entries whose value is not the default beside it."""
    return {key: value for key, (value, default) in entries.items() if value != default}


def _heads(heads: Heads) -> Any:
    entries: dict[str, Any] = {"q": heads.q}
    entries |= _unless({"kv": (heads.kv, heads.q), "v": (heads.v, heads.kv), "map": (heads.map, "interleave")})
    return heads.q if len(entries) == 1 else entries


def _input(shape: tuple[int | str, ...], dtype: str, grad: bool, in_order: bool) -> dict[str, Any]:
    flags = _unless({"dtype": (dtype, "fp32"), "grad": (grad, False), "sorted": (in_order, False)})
    return {"shape": list(shape), **flags}


def _size(size: Size) -> Any:
    if size.fixed is not None:
        return size.fixed
    return _unless({"max": (size.max, None), "multiple": (size.multiple, 1)})


def _storage(kv: Storage) -> str:
    match kv.kind:
        case "paged":
            return f"paged({kv.page_size})"
        case "latent":
            pages = "" if kv.page_size is None else f", page_size={kv.page_size}"
            return f"latent(rope={kv.rope}{pages})"
        case "gathered":
            return f"gathered({kv.index})"
        case "given":
            return f"given({kv.index}, {kv.values})"
        case "pooled":
            args = [*([str(kv.block)] if kv.block else []), *(["weighted=true"] if kv.weighted else [])]
            return f"pooled({', '.join(args)})" if args else "pooled"
        case _:
            return kv.kind


def _select(select: Select) -> dict[str, Any]:
    return {
        "block": {"q": select.block[0], "k": select.block[1]},
        "score": call(select.score, SELECT_SCORE[select.score.name]),
        **_unless({"normalize": (select.normalize, "softmax"), "heads": (select.heads, "none")}),
        "rule": call(select.rule, SELECT_RULE[select.rule.name]),
        **_unless(
            {
                "force": (_calls(select.force, SELECT_FORCE), []),
                "charge": (select.charge, True),
                "take": (select.take, "selected"),
                "reuse": (call(select.reuse, SELECT_REUSE[select.reuse.name]), "every_call"),
            }
        ),
    }


def _state(state: State) -> dict[str, Any]:
    entries = _unless(
        {
            "feature": (state.feature, "identity"),
            "decay": (call(state.decay, DECAY[state.decay.name]), "none"),
            "update": (call(state.update, UPDATE[state.update.name]), "add"),
            "causal": (state.causal, True),
            "chunk": (state.chunk, 64),
            "initial": (state.initial, ""),
            "initial_mass": (state.initial_mass, ""),
            "scale": (_optional(state.scale), None),
            "prescale": (_optional(state.prescale), None),
        }
    )
    return entries or {"feature": state.feature}


def _optional(e: Expr | None) -> str | None:
    return None if e is None else expression(e)


def _quantizer(q: Quantizer) -> str:
    args = [f"({'inf' if age is None else age}, {dtype})" for age, dtype in q.staircase]
    parts = [f"[{', '.join(args)}]"] if args else []
    parts += [f"per={call(q.per)}"] if q.per else []
    parts += [] if q.symmetric else ["symmetric=false"]
    parts += [f"smooth={q.smooth}"] if q.smooth else []
    if q.dtype not in CACHE_QUANTIZER:
        raise CompilerBug(f"the spec language has no quantizer '{q.dtype}'")
    return f"{q.dtype}({', '.join(parts)})" if parts else q.dtype
