"""One query a sequence: attncc against cuDNN's SDPA, FlexAttention and a kernel that only reads the same bytes.

`python -m benchmarks.decode emit -o DIR` writes the packages (any machine); `run DIR --json FILE` measures them on the
GPU here, from CUDA graphs. A ratio to `bytes` is the share of what memory allows.
"""

from __future__ import annotations

import sys
from typing import Final

from benchmarks.command import Table, main
from benchmarks.decode_cases import CASES
from benchmarks.pool import Job

TABLE: Final = Table(
    "decode", __doc__, tuple(spec for case in CASES for spec in case.specs), tuple(Job("decode", c) for c in CASES)
)

if __name__ == "__main__":
    sys.exit(main(TABLE))
