"""Random damage to valid specs: refused with a place, or read; nothing else ever happens."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_samples import HEAD, INPUTS, refusal, underlined
from test_spec_schema import EVERY_KEY

from attncc.errors import SpecError
from attncc.spec import loads
from attncc.spec.source import read
from attncc.spec.yaml_text import mapping

EXAMPLES = [p.read_text() for p in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))]
TEXTS = st.sampled_from([EVERY_KEY, *EXAMPLES])
DOCUMENT = read(EVERY_KEY).data()
TOKENS = (
    st.sampled_from(
        [
            *"()[]{}:,#&*!|>'\"%@`~-+<=/?.\t\n \\",
            "causal",
            "qk",
            "i",
            "0",
            "9" * 30,
            "1e9",
            "  ",
            "- ",
            ": ",
            "not ",
            "**",
            "//",
        ]
    )
    | st.characters()
)


def outcome(text: str) -> SpecError | None:
    """How a text is refused, None where it is read; any other exception fails the test."""
    try:
        loads(text)
    except SpecError as error:
        return error
    return None


@given(TEXTS, st.data())
@settings(max_examples=400, deadline=20_000)
def test_damaged_text(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 4)))
        text = text[:start] + data.draw(TOKENS) + text[end:]
    error = outcome(text)
    if error:
        assert error.location is not None
        assert 1 <= error.location.line <= text.count("\n") + text.count("\r") + 2
        assert str(error)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every mapping of the document by its path, but those whose keys are the user's own names."""
    found = [at] if isinstance(value, dict) and at not in (("inputs",), ("sizes",)) else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [p for key, inner in items for p in paths(inner, (*at, key))]


def inside(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


@given(st.from_regex(r"[a-z]{3,12}zz", fullmatch=True))
@settings(max_examples=3, deadline=None)
def test_unknown_keys_anywhere(word: str) -> None:
    for path in paths(DOCUMENT):
        document = deepcopy(DOCUMENT)
        inside(document, path)[word] = 1
        error = refusal(mapping(document))
        assert f"unknown key '{word}'" in error.message
        assert underlined(error) in (word, "1")
        assert error.hint


WRONG = st.sampled_from([{"zz": 1}, [[]], "zz zz", -1, 1e30, "", True, {"q": {"q": 1}}, ["(", ")"]])


@given(WRONG, st.data())
@settings(max_examples=300, deadline=None)
def test_wrong_values_anywhere(value: Any, data: st.DataObject) -> None:
    """Whatever stands in the place of a value, the reader answers with an attention or a placed refusal."""
    document = deepcopy(DOCUMENT)
    path = data.draw(st.sampled_from([p for p in paths(document) if p != ("parts", 0)]))
    owner = inside(document, path)
    owner[data.draw(st.sampled_from(sorted(owner)))] = value
    error = outcome(mapping(document))
    assert error is None or error.location is not None


@pytest.mark.parametrize(
    "key", ["heads", "dims", "layout", "dtype", "inputs", "align", "normalizer", "kv", "outputs", "modes"]
)
@given(st.dictionaries(st.text("abc", min_size=1), st.integers(), min_size=1, max_size=2))
@settings(max_examples=10, deadline=None)
def test_mappings_where_none_belongs(key: str, value: dict[str, int]) -> None:
    head = "".join(f"{line}\n" for line in HEAD.splitlines() if not line.startswith(key))
    error = refusal(head + (INPUTS if key != "inputs" else "") + mapping({key: value}))
    assert error.location is not None
    assert error.location.text
