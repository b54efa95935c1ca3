"""A spec, loaded: the attention it describes, its text, and where each key of it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attncc.errors import Location
from attncc.ir.attention import Attention
from attncc.spec.build import build
from attncc.spec.faults import validate
from attncc.spec.source import Source, parse_path, read, read_file


@dataclass(frozen=True, slots=True)
class Spec:
    """One attention variant with the text it came from."""

    attention: Attention
    text: str
    """The YAML, byte for byte."""
    file: str
    captured: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Tensors a traced callable closed over, by the name of the input they became."""
    source: Source | None = field(default=None, compare=False, repr=False)

    def locate(self, key: str) -> Location | None:
        """Where the value of a dotted key such as `parts[0].state` stands; None where the text lacks it.

        A branch's key such as `state` is looked for in each of the parts too.
        """
        if self.source is None:
            return None
        path = parse_path(key)
        places = (path, *(("parts", n, *path) for n in range(len(self.attention.parts))))
        return next((node.location for node in map(self.source.node, places) if node is not None), None)


def loads(text: str, file: str = "<string>") -> Spec:
    """The spec a YAML text holds; `file` is what errors call it."""
    source = read(text, file)
    return Spec(build(validate(source), source), text, file, source=source)


def load(source: str | Path) -> Spec:
    """The spec in a YAML file."""
    text, name = read_file(source)
    return loads(text, name)
