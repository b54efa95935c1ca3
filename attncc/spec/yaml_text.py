"""Plain values in, the YAML of a spec out: a line a key, flow style for what is short."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from attncc.spec.source import resolve

_PLAIN = re.compile(r"(?:[A-Za-z_(~0-9.]|-[A-Za-z0-9(.])[^:#\x00-\x1f]*")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")

TALL: Final = frozenset({"inputs", "select", "quantize", "state"})
"""Mappings with a line for each of their keys."""


def mapping(entries: Mapping[str, Any]) -> str:
    """A YAML document that reads back as `entries`."""
    return "".join(f"{line}\n" for key, value in entries.items() for line in _block(key, value, ""))


def _block(key: str, value: Any, indent: str) -> list[str]:
    head = f"{indent}{scalar(key, True)}:"
    if key in TALL and isinstance(value, Mapping) and value:
        return [head, *(f"{indent}  {scalar(str(k), True)}: {_flow(v, False)}" for k, v in value.items())]
    if key == "parts" and isinstance(value, list) and all(isinstance(p, Mapping) for p in value) and value:
        return [head, *(line for part in value for line in _item(part, indent))]
    if key in ("prologue", "epilogue", "tune") and isinstance(value, list) and value:
        return [head, *(f"{indent}  - {_flow(v, False)}" for v in value)]
    return [f"{head} {_flow(value, False)}"]


def _item(part: Mapping[str, Any], indent: str) -> list[str]:
    lines = [line for k, v in part.items() for line in _block(str(k), v, indent + "    ")]
    return [f"{indent}  - {lines[0].strip()}", *lines[1:]] if lines else [f"{indent}  - {{}}"]


def _flow(value: Any, nested: bool) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(str(k), True)}: {_flow(v, True)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v, True) for v in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return scalar(value, nested) if isinstance(value, str) else repr(value)


def scalar(text: str, nested: bool) -> str:
    """A text as YAML: plain where it reads back as itself, else in quotes."""
    special = nested and re.search(r"[,\[\]{}]", text)
    plain = _PLAIN.fullmatch(text) and not special and resolve(text) == text and text == text.strip()
    if plain and not _UNPRINTABLE.search(text):
        return text
    return _UNPRINTABLE.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(text, ensure_ascii=False))
