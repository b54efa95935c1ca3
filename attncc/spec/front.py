"""The Python front: keyword arguments and callables in, the same Spec out that YAML gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from attncc.errors import CompilerBug, SpecError, nearest
from attncc.ir.expr import TRUE, Expr
from attncc.spec.loading import Spec, loads
from attncc.spec.render import document, expression
from attncc.spec.schema import SpecModel
from attncc.spec.trace import Tracer
from attncc.spec.yaml_text import mapping

CALLABLE: Final = ("score", "mask")
Text = str | bool | int | float


def attention(
    *,
    name: str,
    heads: int | Mapping[str, Any],
    dims: int | Mapping[str, Any],
    score: Text | Callable[..., Any] | None = None,
    mask: Text | Callable[..., Any] | None = None,
    **keys: Any,
) -> Spec:
    """A spec from Python: every key of schema 1 is an argument; see `attncc schema` for them.

    `score` and `mask` are texts of the expression language, or callables of FlexAttention's form,
    `score_mod(score, b, h, q_idx, kv_idx)` and `mask_mod(b, h, q_idx, kv_idx)`. Tensors that these read
    become inputs and stand in `Spec.captured`. `Spec.text` is canonical YAML that loads as the same variant.
    """
    given = {"name": name, "heads": heads, "dims": dims, "score": score, "mask": mask, **keys}
    for key in given:
        if key not in SpecModel.model_fields:
            raise SpecError(f"attention() has no argument '{key}'", hint=nearest(key, SpecModel.model_fields))
    inputs = keys.get("inputs") or {}
    tracer = Tracer(inputs if isinstance(inputs, Mapping) else {})
    entries = _traced({"attncc": 1, **given}, tracer)
    if isinstance(entries.get("parts"), list | tuple):
        entries["parts"] = [_traced(p, tracer) if isinstance(p, Mapping) else p for p in entries["parts"]]
    if tracer.inputs:
        made = {n: {"shape": list(x.shape), "dtype": x.dtype} for n, x in tracer.inputs.items()}
        entries["inputs"] = {n: {**made.get(n, {}), **inputs.get(n, {})} for n in {**inputs, **made}}
    spec = loads(mapping(_plain(entries, "attention()")), f"<attention {name}>")
    text = document(spec.attention)
    canonical = loads(text, spec.file)
    if canonical.attention != spec.attention:
        raise CompilerBug(f"the canonical text of '{name}' reads back as another variant:\n{text}")
    return Spec(spec.attention, text, spec.file, dict(tracer.captured), canonical.source)


def _traced(entries: Mapping[str, Any], tracer: Tracer) -> dict[str, Any]:
    """The entries with callables replaced by the texts of what they compute; None means not given."""
    result = {key: value for key, value in entries.items() if value is not None}
    masks: list[Expr] = []
    if callable(mask := result.get("mask")):
        masks.append(tracer.mask(mask))
    if callable(score := result.get("score")):
        traced, seen = tracer.score(score)
        result["score"] = expression(traced)
        masks += [seen] if seen != TRUE else []
    if masks:
        texts = [f"({expression(e)})" if len(masks) > 1 or "mask" in result else expression(e) for e in masks]
        own = result.get("mask")
        texts += [f"({own})"] if own is not None and not callable(own) else []
        result["mask"] = " & ".join(texts)
    return result


def _plain(value: Any, what: str) -> Any:
    """Python's values as those of YAML."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise SpecError(f"{what}: keys must be texts")
        return {key: _plain(v, f"{what} '{key}'") for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple | frozenset | set):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(v, what) for v in items]
    if isinstance(value, str | bool | int | float):
        return value
    raise SpecError(f"{what}: {type(value).__name__} is not a value of a spec", hint="a number, text, list or mapping")
