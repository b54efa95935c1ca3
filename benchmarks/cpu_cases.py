"""The CPU table: cases by the kind of work they are, which the summary means over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from benchmarks.cases import Case, Pattern

QUARTER: Final = Pattern(window=256, block=64, density=0.2)
"""A fifth of the blocks and the first of each row: about a quarter of them."""
DENSE: Final = tuple((1, 8, 8, s, d, d) for d in (64, 128) for s in (64, 256, 1024, 4096))
LOW: Final = ((1, 8, 8, 1024, 64, 64), (1, 8, 8, 2048, 128, 128))
MASKED: Final = ((1, 8, 8, 1024, 64, 64), (1, 8, 2, 2048, 128, 128))
TENSORS: Final = tuple((1, 8, 8, s, d, d) for d in (64, 128) for s in (1024, 2048))
"""With a score or a mask a pair, that is read from memory."""
DECODE: Final = (
    (1, 8, 8, 4096, 128, 128),
    (1, 8, 2, 8192, 128, 128),
    (1, 8, 1, 8192, 128, 128),
    (4, 8, 8, 1000, 64, 64),
    (8, 32, 8, 2048, 128, 128),
)
CASES: Final[Mapping[str, tuple[Case, ...]]] = {
    "fp32": tuple(Case("none", *shape, "fp32") for shape in DENSE),
    "fp32 causal": tuple(Case("causal", *shape, "fp32") for shape in DENSE),
    **{t: tuple(Case(v, *shape, t) for shape in LOW for v in ("none", "causal")) for t in ("bf16", "fp16")},
    "masks": tuple(
        Case(v, *shape, "fp32", pattern=QUARTER) for shape in MASKED for v in ("window", "alibi", "documents", "blocks")
    ),
    "tensors": tuple(Case(v, *shape, "fp32") for shape in TENSORS for v in ("bias", "mask_tensor")),
    "decode": tuple(Case("none", *shape, "fp32", queries=1) for shape in DECODE),
}
FIXED: Final = tuple(
    Case(v, 1, 8, 8, s, d, d, "fp32")
    for v, s, d in (("none", 64, 64), ("none", 1024, 64), ("causal", 1024, 64), ("none", 1024, 128))
)
"""Also as packages that are for this very size."""
MM_LENGTH: Final = 1024
"""From here up, fp32 products should run at the rate of torch.mm."""
TINY: Final = Case("none", 1, 1, 1, 64, 64, 64, "fp32")
"""For the time that a call takes at least."""
TYPICAL: Final = Case("causal", 1, 8, 8, 1024, 64, 64, "fp32")
"""For the time that compiling takes."""


def has_ceiling(case: Case) -> bool:
    """Whether torch.mm's rate is a measure of it."""
    return case.dtype == "fp32" and case.variant in ("none", "causal") and case.sq >= MM_LENGTH
