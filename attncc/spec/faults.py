"""Pydantic's verdicts as SpecErrors: the place in the document, what is wrong, and the nearest valid word."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from attncc.errors import SpecError, nearest
from attncc.spec.schema import IDENTIFIER, SpecModel
from attncc.spec.source import Path_, Source

Explain = Callable[[ErrorDetails], tuple[str, str]]


def validate(source: Source) -> SpecModel:
    """The document as the schema's model; its first fault, in the order of the text, is raised."""
    data = source.data()
    if not isinstance(data, dict):
        raise SpecError("a spec is a mapping of keys", source.root.location, "attncc: 1")
    try:
        return SpecModel.model_validate(data)
    except ValidationError as e:
        faults = [_fault(details, source) for details in e.errors()]
    raise min(faults, key=_position)


def _position(fault: SpecError) -> tuple[int, int, int]:
    """Unknown keys first: a misspelt key explains a missing one."""
    place = fault.location
    late = 1 if "is missing" in fault.message else 0
    return (late, place.line, place.column) if place else (late, 0, 0)


def _fault(details: ErrorDetails, source: Source) -> SpecError:
    path: Path_ = tuple(details["loc"])
    last = str(path[-1]) if path else ""
    if details["type"] == "extra_forbidden":
        hint = nearest(last, _keys(SpecModel, path[:-1]))
        return SpecError(f"unknown key '{last}'", source.locate_key(path), hint)
    if details["type"] == "missing":
        owner = f" in '{path[-2]}'" if len(path) > 1 else ""
        hint = _missing_hint(path)
        return SpecError(f"'{last}' is missing{owner}", source.locate_key(path[:-1]), hint)
    if details["type"] == "model_attributes_type" or details["input"] is None:
        place = source.locate_key(path)
        if details["input"] is None:
            return SpecError(f"'{last}' has no value", place)
    message, hint = EXPLANATIONS.get(details["type"], _plain)(details)
    return SpecError(f"{_name(path)}: {message}", source.locate(path), hint)


def _name(path: Path_) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text or "the spec"


def _missing_hint(path: Path_) -> str:
    example = {"attncc": "attncc: 1", "name": "name: my_attention", "heads": "heads: {q: 32, kv: 8}"}
    return {**example, "dims": "dims: 128"}.get(str(path[-1]), "")


def _keys(model: Any, path: Path_) -> list[str]:
    """The keys of the model at `path` below `model`; in a mapping of models the names are the user's own."""
    own_name = False
    for step in path:
        if isinstance(step, int) or own_name:
            own_name = False
        elif isinstance(model, type) and issubclass(model, BaseModel) and step in model.model_fields:
            annotation = model.model_fields[step].annotation
            model, own_name = _model_in(annotation), get_origin(annotation) is dict
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The model class inside `list[X]`, `dict[str, X]`, `X | None` or an Annotated of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _shown(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", bool: "true or false"}
    text = repr(value)
    return kinds.get(type(value)) or (text if len(text) <= 40 else f"{text[:37]}…")


def _plain(details: ErrorDetails) -> tuple[str, str]:
    return details["msg"].removeprefix("Value error, "), ""


def _wanted(kind: str) -> Explain:
    return lambda details: (f"expected {kind}, this is {_shown(details['input'])}", "")


def _literal(details: ErrorDetails) -> tuple[str, str]:
    words = re.findall(r"'([^']*)'", str(details["ctx"]["expected"])) if "ctx" in details else []
    value = details["input"]
    if not words:
        return f"expected {details.get('ctx', {}).get('expected')}, this is {_shown(value)}", ""
    return f"{_shown(value)} is not one of its values", nearest(str(value), words)


def _bound(symbol: str, key: str) -> Explain:
    def explain(details: ErrorDetails) -> tuple[str, str]:
        limit = details.get("ctx", {}).get(key)
        return f"{_shown(details['input'])} is out of bounds, it must be {symbol} {limit:g}", ""

    return explain


def _pattern(details: ErrorDetails) -> tuple[str, str]:
    if details.get("ctx", {}).get("pattern") == IDENTIFIER:
        hint = "letters, digits and _, a letter first"
        return f"{_shown(details['input'])} is not an identifier", hint
    return "must be one line", ""


def _length(what: str, key: str) -> Explain:
    def explain(details: ErrorDetails) -> tuple[str, str]:
        return "is empty" if details["input"] == "" else f"{what} {details.get('ctx', {}).get(key)}", ""

    return explain


EXPLANATIONS: Final[Mapping[str, Explain]] = {
    "literal_error": _literal,
    "int_type": _wanted("a whole number"),
    "int_from_float": _wanted("a whole number"),
    "float_type": _wanted("a number"),
    "string_type": _wanted("a text"),
    "bool_type": _wanted("true or false"),
    "list_type": _wanted("a list"),
    "dict_type": _wanted("a mapping"),
    "model_type": _wanted("a mapping"),
    "model_attributes_type": _wanted("a mapping"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than_equal": _bound("at most", "le"),
    "less_than": _bound("below", "lt"),
    "string_pattern_mismatch": _pattern,
    "too_long": _length("too many entries; at most", "max_length"),
    "too_short": _length("too few entries; at least", "min_length"),
    "string_too_long": _length("too long; at most this many characters:", "max_length"),
    "string_too_short": _length("too short; at least", "min_length"),
}
