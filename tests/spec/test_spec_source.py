"""YAML reading: values, places, and everything of YAML that a spec may not use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncc.errors import SpecError
from attncc.spec import load
from attncc.spec.source import parse_path, read
from attncc.spec.yaml_text import mapping

TEXT = """\
name: one   # a comment
heads: {q: 8, kv: 2}
list:
  - plain text, with a comma
  - "quoted"
number: -1.5e-3
flag: true
folded: >
  two
  lines
"""


def test_values() -> None:
    assert read(TEXT).data() == {
        "name": "one",
        "heads": {"q": 8, "kv": 2},
        "list": ["plain text, with a comma", "quoted"],
        "number": -1.5e-3,
        "flag": True,
        "folded": "two lines\n",
    }


@pytest.mark.parametrize(
    ("path", "line", "column", "width"),
    [
        ("name", 1, 7, 3),
        ("heads.kv", 2, 19, 1),
        ("list[0]", 4, 5, 24),
        ("list[1]", 5, 6, 6),
        ("number", 6, 9, 7),
    ],
)
def test_places(path: str, line: int, column: int, width: int) -> None:
    place = read(TEXT, "f.yaml").locate(parse_path(path))
    assert place is not None
    assert (place.file, place.line, place.column, place.width) == ("f.yaml", line, column, width)
    assert place.text == TEXT.splitlines()[line - 1]


def test_place_of_a_key_and_of_what_is_absent() -> None:
    source = read(TEXT)
    key = source.locate_key(("heads", "kv"))
    assert key is not None
    assert (key.line, key.column, key.width) == (2, 15, 2)
    assert source.locate(("heads", "v", "x")) == source.locate(("heads",))
    assert source.node(("list", 7)) is None
    assert source.node(("list", "name")) is None


@pytest.mark.parametrize(
    ("text", "message", "line", "column"),
    [
        ("a: !!python/object/apply:os.system ['true']", "tags", 1, 4),
        ("a: !custom 1", "tags", 1, 4),
        ("!!map {a: 1}", "tags", 1, 1),
        ("a: &x 1\nb: *x", "anchors", 1, 4),
        ("a: *x", "anchors", 1, 4),
        ("a: [&x 1]", "anchors", 1, 5),
        ("a: 1\nb: 2\na: 3", "given twice", 3, 1),
        ("a: {b: 1, b: 2}", "given twice", 1, 11),
        ("a: 1\n---\nb: 2", "one YAML document", 2, 1),
        ("1: 2", "key must be a word", 1, 1),
        ("true: 2", "key must be a word", 1, 1),
        ("[a]: b", "key must be a word", 1, 2),
        ("? {a: 1}\n: b", "key must be a word", 1, 4),
        ("a: [1", "not valid YAML", 1, 6),
        ("a: 'x", "not valid YAML", 1, 6),
        ("a: b: c", "not valid YAML", 1, 5),
        ("a: @x", "not valid YAML", 1, 4),
        ("a: 1\n b: 2", "not valid YAML", 2, 3),
        ("\ta: 1", "not valid YAML", 1, 1),
        ("a: \x00", "not valid YAML", 1, 1),
        ("", "empty", 1, 1),
        ("# nothing\n", "empty", 1, 1),
    ],
)
def test_refused_yaml(text: str, message: str, line: int, column: int) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        read(text)
    place = caught.value.location
    assert place is not None
    assert (place.line, place.column) == (line, column)


def test_error_shows_the_line_underlined() -> None:
    with pytest.raises(SpecError) as caught:
        read("a: 1\na: 2", "f.yaml")
    expected = "f.yaml:2:1: 'a' is given twice\n  2 | a: 2\n      ^\n  it stands in line 1 already"
    assert str(caught.value) == expected


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read the spec"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(SpecError, match="cannot read the spec"):
        load(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"attncc: 1\nname: caf\xe9\n")
    with pytest.raises(SpecError, match="not UTF-8") as caught:
        load(latin)
    assert caught.value.location is not None
    assert caught.value.location.line == 2


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1), VALUES, min_size=1, max_size=4))
def test_emitted_yaml_reads_back(entries: dict[str, object]) -> None:
    assert read(mapping(entries)).data() == entries
