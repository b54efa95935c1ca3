"""Where records are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_data_path

from attncc.autotune.record import Record


def default_root() -> Path:
    """The folder of this user's records: $ATTNCC_STORE where that is set."""
    return Path(os.environ.get("ATTNCC_STORE") or user_data_path("attncc") / "records")


class Store:
    """Records in files of one JSON text a line."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def records(self, program: str | None = None, card: str | None = None) -> Iterator[Record]:
        """Those of a variant, of a card."""
        for path in sorted(self.root.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                record = Record.model_validate_json(line)
                if program in (None, record.program) and card in (None, record.card.name):
                    yield record
