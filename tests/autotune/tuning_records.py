"""Records of tuning for tests, with all that a test does not care about filled in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from attncc.autotune.record import Card, Certificate, Record, Resources, Toolchain
from attncc.device import find

CERTIFICATE: Final = Certificate(cases=12, inputs=("random", "one_hot"), worst=0.4)
TOOLS: Final = Toolchain(attncc="0.1", torch="2.13", triton="3.6.0", driver="580.1")
WHEN: Final = datetime(2026, 11, 28, 12, tzinfo=UTC)


def record(**changes: Any) -> Record:
    """A certified measurement on an H200."""
    fields: dict[str, Any] = {
        "variant": "tiny",
        "program": "0" * 16,
        "card": Card.of(find("nvidia_h200")),
        "toolchain": TOOLS,
        "shape": {"B": 1, "Sq": 4096, "Sk": 4096},
        "config": {"BM": 64, "BN": 64},
        "status": "measured",
        "ms": 1.0,
        "resources": Resources(registers=128, shared_bytes=65536),
        "certificate": CERTIFICATE,
        "when": WHEN,
    }
    return Record(**{**fields, **changes})
