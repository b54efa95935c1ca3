"""Prefill forward: attncc against FlexAttention and cuDNN's SDPA, checked, then timed in interleaved rounds.

`python -m benchmarks.prefill emit -o DIR` writes the packages (any machine); `run DIR --json FILE` measures them on the
GPU here and needs torch and triton alone; `plot FILE -o SVG` draws the ratios.
"""

from __future__ import annotations

import sys
from typing import Final

from benchmarks.cases import CASES, TINY, mask_cases
from benchmarks.command import Table, main
from benchmarks.pool import Job

TABLE: Final = Table(
    "prefill",
    __doc__,
    tuple(case.spec for case in (*CASES, TINY)),
    (Job("host", TINY), *(Job("fwd", case) for case in CASES), *(Job("mask", case) for case in mask_cases())),
)

if __name__ == "__main__":
    sys.exit(main(TABLE))
