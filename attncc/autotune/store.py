"""Records on disk: files of one record a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from attncc.autotune.record import Record


def default_root() -> Path:
    """Where a user's records are kept."""
    return platformdirs.user_data_path("attncc") / "records"


@dataclass(frozen=True, slots=True)
class Store:
    """The records below a directory."""

    root: Path

    def records(self, program: str | None = None, card: str | None = None) -> Iterator[Record]:
        """Those of a program, or of a card's name; all where neither is named."""
        for file in sorted(self.root.rglob("*.jsonl")):
            for line in file.read_text().splitlines():
                record = Record.model_validate_json(line)
                if program in (None, record.program) and card in (None, record.card.name):
                    yield record
