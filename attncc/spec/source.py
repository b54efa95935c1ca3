"""YAML text in, a tree of plain values out that remembers where each key and value stands.

A spec is untrusted: size and nesting are bounded before the parser sees them, nothing is constructed but
strings, numbers, lists and mappings, and what YAML offers beyond that (tags, anchors, aliases, several
documents) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from attncc.errors import Location, SpecError

MAX_BYTES: Final = 1 << 20
MAX_LINE: Final = 16_384
MAX_LINES: Final = 50_000
MAX_NODES: Final = 10_000
MAX_DEPTH: Final = 16

Path_ = tuple[str | int, ...]
Scalar = str | int | float | bool | None

_NEWLINE = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*")
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]{1,4})?")
_WORDS: Final[dict[str, Scalar]] = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True, slots=True)
class Snippet:
    """A scalar's text and where it stands; `exact` when its characters stand there one by one."""

    text: str
    location: Location | None = None
    exact: bool = False

    def part(self, start: int, end: int) -> Location | None:
        """The location of the characters [start, end) of the text, or of the whole of it."""
        if self.location is None or not self.exact:
            return self.location
        return self.location.shift(start, end - start)


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the document, its location, and for scalars the text as written."""

    value: Any
    snippet: Snippet
    keys: dict[str, Snippet] | None = None
    """Mappings only: each key as it stands."""

    @property
    def location(self) -> Location | None:
        return self.snippet.location


@dataclass(frozen=True, slots=True)
class Source:
    """A read document: its text, and its values with their places."""

    file: str
    text: str
    root: Node

    def data(self) -> Any:
        """The document as plain lists, mappings and scalars."""
        return _plain(self.root)

    def node(self, path: Path_) -> Node | None:
        """The value at `path`, None where the document has none."""
        node = self.root
        for step in path:
            holds = isinstance(node.value, dict | list)
            known = holds and (step in node.value if isinstance(node.value, dict) else _inside(node, step))
            if not known:
                return None
            node = node.value[step]
        return node

    def locate(self, path: Path_) -> Location | None:
        """Where the value at `path` stands, or the nearest enclosing value that the document has."""
        for length in range(len(path), -1, -1):
            node = self.node(path[:length])
            if node is not None:
                return node.location
        return None

    def locate_key(self, path: Path_) -> Location | None:
        """Where the last key of `path` itself stands; its value's place where it is no mapping key."""
        parent = self.node(path[:-1])
        key = parent.keys.get(str(path[-1])) if parent is not None and parent.keys and path else None
        return key.location if key else self.locate(path)

    def snippet(self, path: Path_) -> Snippet | None:
        node = self.node(path)
        return node.snippet if node is not None else None


def parse_path(key: str) -> Path_:
    """`parts[0].state` as the path ("parts", 0, "state")."""
    steps = re.findall(r"[^.\[\]]+", key)
    return tuple(int(s) if s.isdigit() else s for s in steps)


def read_file(path: str | Path) -> tuple[str, str]:
    """The text of a spec file and the name to report it by; refuses what is no readable UTF-8 text."""
    name = str(path)
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as e:
        raise SpecError(f"cannot read the spec '{name}': {e.strerror or e}") from e
    try:
        return raw.decode("utf-8"), name
    except UnicodeDecodeError as e:
        if len(raw) > MAX_BYTES:
            raise _too_big(name) from None
        line = raw.count(b"\n", 0, e.start) + 1
        raise SpecError("the spec is not UTF-8 text", Location(name, line, 1)) from None


def read(text: str, file: str = "<string>") -> Source:
    """The document `text` holds, every fault of its form refused."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise _too_big(file)
    lines = _NEWLINE.split(text)
    _guard(lines, file)
    composer = _Composer(file, lines)
    try:
        root = composer.compose(YAML(typ="safe", pure=True).parse(text))
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = composer.place(mark.line, mark.column, mark.column + 1) if mark else None
        problem = " ".join(part for part in (e.context, e.problem) if part)
        raise SpecError(f"not valid YAML: {problem}", place, _yaml_hint(problem)) from None
    except YAMLError as e:
        raise SpecError(f"not valid YAML: {str(e).splitlines()[0]}", Location(file, 1, 1, lines[0])) from None
    return Source(file, text, root)


def _too_big(file: str) -> SpecError:
    return SpecError(f"the spec is larger than {MAX_BYTES >> 20} MiB", Location(file, 1, 1))


def _yaml_hint(problem: str) -> str:
    if "mapping values are not allowed" in problem:
        return "a text with ': ' in it must stand in quotes"
    if "cannot start any token" in problem or "block entry" in problem or "sequence entries" in problem:
        return "a text that starts with one of % @ ` - ? must stand in quotes"
    return ""


def _guard(lines: list[str], file: str) -> None:
    """Bounds what the YAML scanner would take long over: lines, their length, open brackets."""
    if len(lines) > MAX_LINES:
        raise SpecError(f"more than {MAX_LINES} lines", Location(file, 1, 1))
    depth = 0
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE:
            place = Location(file, number, 1, line[:200])
            raise SpecError(f"a line of {len(line)} characters; at most {MAX_LINE} are read", place)
        for match in re.finditer(r"[\[\]{}]", _COMMENT.sub("", line)):
            depth = depth + 1 if match[0] in "[{" else max(0, depth - 1)
            if depth > 2 * MAX_DEPTH:
                raise SpecError("nested too deeply", Location(file, number, match.start() + 1, line))


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return [_plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def _inside(node: Node, step: str | int) -> bool:
    return isinstance(step, int) and 0 <= step < len(node.value)


def resolve(text: str) -> Scalar:
    """The value of a plain scalar: YAML 1.2's numbers and booleans, else the text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if len(text) < 40 and _FLOAT.fullmatch(text) else text


class _Composer:
    """Builds nodes from parser events without recursing into hostile depths."""

    def __init__(self, file: str, lines: list[str]) -> None:
        self.file = file
        self.lines = lines
        self.nodes = 0

    def place(self, line: int, start: int, end: int) -> Location:
        text = self.lines[line] if line < len(self.lines) else ""
        return Location(self.file, line + 1, start + 1, text, max(1, end - start))

    def where(self, event: Event) -> Location:
        start, end = event.start_mark, event.end_mark
        width_to = end.column if end.line == start.line else len(self.lines[start.line].rstrip())
        return self.place(start.line, start.column, width_to)

    def compose(self, events: Iterator[Event]) -> Node:
        documents: list[Node] = []
        for event in events:
            if isinstance(event, DocumentStartEvent) and documents:
                raise SpecError("a spec is one YAML document", self.where(event), "remove what follows '---'")
            if isinstance(event, NodeEvent):
                documents.append(self.node(event, events, 0))
        if not documents:
            raise SpecError("the spec is empty", self.place(0, 0, 1), "a spec starts with 'attncc: 1'")
        return documents[0]

    def node(self, event: Event, events: Iterator[Event], depth: int) -> Node:
        self.check(event, depth)
        if isinstance(event, ScalarEvent):
            return self.scalar(event)
        if isinstance(event, SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(event := next(events), SequenceEndEvent):
                items.append(self.node(event, events, depth + 1))
            return Node(items, Snippet("", self.where_start(event, items)))
        return self.mapping(event, events, depth)

    def where_start(self, end: Event, items: list[Node]) -> Location:
        """A collection is underlined at its first item's line; an empty one where it ends."""
        return next((n.location for n in items if n.location), None) or self.where(end)

    def check(self, event: Event, depth: int) -> None:
        self.nodes += 1
        place = self.where(event)
        if self.nodes > MAX_NODES:
            raise SpecError(f"more than {MAX_NODES} values", place)
        if depth > MAX_DEPTH:
            raise SpecError("nested too deeply", place)
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            hint = "write the value out; a text that starts with & or * must stand in quotes"
            raise SpecError("anchors and aliases are not read", place, hint)
        if getattr(event, "tag", None):
            raise SpecError("tags are not read", place, "write the value without '!'")

    def scalar(self, event: ScalarEvent) -> Node:
        text = event.value
        start, end = event.start_mark, event.end_mark
        plain = event.style in (None, "")
        line = self.lines[start.line] if start.line < len(self.lines) else ""
        left = start.column + (0 if plain else 1)
        exact = start.line == end.line and line[left : left + len(text)] == text
        place = self.place(start.line, left, left + len(text)) if exact and text else self.where(event)
        return Node(resolve(text) if plain else text, Snippet(text, place, exact))

    def mapping(self, start: Event, events: Iterator[Event], depth: int) -> Node:
        if not isinstance(start, MappingStartEvent):
            raise SpecError("not valid YAML", self.where(start))
        values: dict[str, Node] = {}
        keys: dict[str, Snippet] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            key = self.node(event, events, depth + 1)
            if not isinstance(key.value, str):
                raise SpecError("a key must be a word", key.location or self.where(event))
            if key.value in values:
                first = keys[key.value].location
                hint = f"it stands in line {first.line} already" if first else ""
                raise SpecError(f"'{key.value}' is given twice", key.location, hint)
            keys[key.value] = key.snippet
            values[key.value] = self.node(next(events), events, depth + 1)
        first_key = next((k.location for k in keys.values()), None)
        return Node(values, Snippet("", first_key or self.where(start)), keys)
